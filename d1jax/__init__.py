"""Reinforcement learning for diffusion language models, on JAX."""
