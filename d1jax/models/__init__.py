"""Networks. They know nothing of diffusion, reinforcement learning or meshes."""
