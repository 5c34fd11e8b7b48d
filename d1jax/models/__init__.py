"""Networks. They do not depend on diffusion, reinforcement learning or meshes."""
