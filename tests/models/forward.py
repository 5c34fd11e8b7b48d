"""The logits of a network, without a Denoiser."""

from typing import Any

import jax
import jax.numpy as jnp

from d1jax.models.transformer import Network


def logits(network: Network, params: Any, tokens: jax.Array, valid: jax.Array, keys: Any = None) -> jax.Array:
  """Of every position, in float32; `keys` are those of dropout."""
  hidden = network.encode(params, tokens, valid, keys)
  return jnp.matmul(hidden, network.head(params).astype(hidden.dtype), preferred_element_type=jnp.float32)
