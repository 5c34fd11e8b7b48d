"""Reinforcement learning from graded completions. It takes a `Denoiser`, never a network."""
