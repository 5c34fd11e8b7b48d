"""Dream 7B is Qwen2.5 after further training as a diffusion model; position i still predicts token i + 1."""

import dataclasses

from d1jax.models.families import qwen2
from d1jax.models.layers import TransformerSize

FAMILY = dataclasses.replace(  # `DreamConfig` of Dream-7B's configuration_dream.py has the defaults of Qwen2's
  qwen2.FAMILY,
  model_type="dream",
  presets={
    "dream_7b": TransformerSize(
      vocab=152064,
      embed=3584,
      heads=28,
      mlp=18944,
      layers=28,
      rope_theta=1e6,
      norm_eps=1e-6,
      kv_heads=4,
      qkv_bias=True,
    )
  },
)
