"""Texts for people: completions of prompts, and what the canvas looked like on the way to them."""
