"""The mathematics of masked diffusion: corruption, schedules, draws, the denoising loop, likelihood estimators.

It takes a `Denoiser`, never a network, and knows nothing of rewards or meshes.
"""
