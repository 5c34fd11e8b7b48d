"""Evaluation: completions of held-out questions, graded and counted, with intervals and a page to read."""
