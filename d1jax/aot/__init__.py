"""Estimates a job's memory and time on absent chips: compiles its programs ahead of time and analyses them."""
