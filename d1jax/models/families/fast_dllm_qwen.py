"""Fast-dLLM v2 (arXiv 2509.26328): Qwen2.5 with block-causal attention; position i still predicts token i + 1."""

import dataclasses

from d1jax.models.families import qwen2
from d1jax.models.layers import TransformerSize

FAST_DLLM_7B = TransformerSize(
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

FAMILY = dataclasses.replace(  # `Fast_dLLM_QwenConfig` of configuration.py has the defaults of `Qwen2Config`
  qwen2.FAMILY,
  model_type="fast_dllm_qwen",
  block_key="bd_size",
  block_causal=True,
  masked=True,
  presets={
    "fast_dllm_1.5b": dataclasses.replace(
      FAST_DLLM_7B, vocab=151936, embed=1536, heads=12, mlp=8960, kv_heads=2, tied=True
    ),
    "fast_dllm_7b": FAST_DLLM_7B,
  },
)
