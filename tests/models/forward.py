"""The logits of a network, without a Denoiser."""

from typing import Any

import jax
import jax.numpy as jnp

from d1jax.models.transformer import Network
from d1jax.models.visibility import Rule


def logits(
  network: Network, params: Any, tokens: jax.Array, valid: jax.Array, keys: Any = None, rule: Rule | None = None
) -> jax.Array:
  """Of every position, in float32; `keys` are those of dropout, `rule` says who sees whom."""
  hidden = network.encode(params, tokens, valid, keys, rule)
  return jnp.matmul(hidden, network.head(params).astype(hidden.dtype), preferred_element_type=jnp.float32)
