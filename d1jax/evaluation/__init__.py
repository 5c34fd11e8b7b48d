"""Evaluation: completes held-out questions, grades them, computes intervals and writes a report."""
