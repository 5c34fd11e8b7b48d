"""Qwen3 as the start of a diffusion model: Llama with a norm on the heads of q and k before the rotary embedding."""

import dataclasses
import functools
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from d1jax.models.families import llama
from d1jax.models.layers import RMSNorm, SelfAttention, TransformerSize
from d1jax.models.names import Scheme


class NormedAttention(SelfAttention):
  """Attention with a norm on queries and one on keys; all heads share its scale [H]."""

  def __init__(self, size: TransformerSize, *, rngs: nnx.Rngs, **options: Any):
    super().__init__(size, rngs=rngs, **options)
    self.query_norm = RMSNorm(size.head_size, eps=size.norm_eps, rngs=rngs)
    self.key_norm = RMSNorm(size.head_size, eps=size.norm_eps, rngs=rngs)

  def before_rotary(self, name: str, heads: Float[Array, "B L N H"]) -> Float[Array, "B L N H"]:
    """The heads of `query` or `key`, normalised."""
    return getattr(self, f"{name}_norm")(heads)


NAMES: Scheme = {
  **llama.NAMES,
  ("blocks", "attention", "query_norm", "scale"): "model.layers.{}.self_attn.q_norm.weight",
  ("blocks", "attention", "key_norm", "scale"): "model.layers.{}.self_attn.k_norm.weight",
}

FAMILY = dataclasses.replace(
  llama.FAMILY,
  model_type="qwen3",
  read=functools.partial(llama.read, attention_layer=NormedAttention),
  schemes=(NAMES,),
  defaults={**llama.FAMILY.defaults, "head_dim": 128},  # `Qwen3Config` of transformers 5.24.0
)
