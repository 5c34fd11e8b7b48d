"""Qwen2 and Qwen2.5 as the start of a diffusion model: Llama with biases in q, k and v."""

import dataclasses
import functools

from d1jax.models.families import llama
from d1jax.models.names import Scheme

NAMES: Scheme = {
  **llama.NAMES,
  ("blocks", "attention", "query_bias"): "model.layers.{}.self_attn.q_proj.bias",
  ("blocks", "attention", "key_bias"): "model.layers.{}.self_attn.k_proj.bias",
  ("blocks", "attention", "value_bias"): "model.layers.{}.self_attn.v_proj.bias",
}

FAMILY = dataclasses.replace(  # `Qwen2Config` of transformers 4.57.1 has the defaults of Llama's
  llama.FAMILY, model_type="qwen2", read=functools.partial(llama.read, qkv_bias=True), schemes=(NAMES,)
)
