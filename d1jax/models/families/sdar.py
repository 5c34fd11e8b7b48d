"""SDAR and TraDo (arXiv 2510.06303, 2509.06949): Qwen3 with block-causal attention; position i predicts token i.

Their folders do not say the block length; the names of the models do (`-b4` is left out, then `-b8` to `-b64`).
"""

import dataclasses

from d1jax.models.families import qwen3
from d1jax.models.layers import TransformerSize

SDAR_8B = TransformerSize(
  vocab=151936,
  embed=4096,
  heads=32,
  mlp=12288,
  layers=36,
  rope_theta=1e6,
  norm_eps=1e-6,
  kv_heads=8,
  head_dim=128,
  attention_layer=qwen3.NormedAttention,
)

FAMILY = dataclasses.replace(  # `SDARConfig` of configuration_sdar.py has the defaults of `Qwen3Config`
  qwen3.FAMILY,
  model_type="sdar",
  shift=0,
  block_causal=True,
  masked=True,
  presets={
    "sdar_1.7b": dataclasses.replace(SDAR_8B, embed=2048, heads=16, mlp=6144, layers=28),
    "sdar_4b": dataclasses.replace(SDAR_8B, embed=2560, mlp=9728),
    "sdar_8b": SDAR_8B,
  },
)
