"""Generates texts: completes prompts, and shows the canvas after each denoising step."""
