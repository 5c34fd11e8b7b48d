"""Qwen3 after dllm's training as a diffusion model (`A2DQwen3Config` of dllm); position i predicts token i.

MDLM folders have full attention. BD3LM folders are block-causal; dllm trains them with blocks of 32 and does not write
that into config.json.
"""

import dataclasses

from d1jax.models.families import qwen3
from d1jax.models.layers import TransformerSize

QWEN3_0_6B = TransformerSize(
  vocab=151936,
  embed=1024,
  heads=16,
  mlp=3072,
  layers=28,
  rope_theta=1e6,
  norm_eps=1e-6,
  kv_heads=8,
  head_dim=128,
  tied=True,
  attention_layer=qwen3.NormedAttention,
)

FAMILY = dataclasses.replace(  # `A2DQwen3Config` changes nothing of `Qwen3Config` but the name
  qwen3.FAMILY,
  model_type="a2d-qwen3",
  shift=0,
  presets={"qwen3_0.6b": QWEN3_0_6B, "qwen3_1.7b": dataclasses.replace(QWEN3_0_6B, embed=2048, mlp=6144)},
)
