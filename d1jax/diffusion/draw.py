"""Exact draws from a tempered softmax, one uniform a draw, in float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def log_prob(logits: Float[Array, "*B V"], tokens: Int[Array, "*B"]) -> Float[Array, "*B"]:
  """Log softmax(logits) at the given tokens, in float32."""
  logits = logits.astype(jnp.float32)
  chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
  return chosen - jax.nn.logsumexp(logits, axis=-1)


def inverse_cdf(logits: Float[Array, "*B V"], uniform: Float[Array, "*B"]) -> Int[Array, "*B"]:
  """Draws from softmax(logits) by inverting its distribution function: the first token whose cumulative mass exceeds
  `uniform`.

  A token of probability zero is never drawn, whatever the rounding of the cumulative sum.

  Args:
    logits: minus infinity forbids a token.
    uniform: in [0, 1).
  """
  mass = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
  cumulative = jnp.cumsum(mass, axis=-1)
  beyond = (cumulative > uniform[..., None] * cumulative[..., -1:]) & (mass > 0)
  drawn = jnp.argmax(beyond, axis=-1)
  return jnp.where(jnp.any(beyond, axis=-1), drawn, jnp.argmax(mass, axis=-1)).astype(jnp.int32)


def propose(
  logits: Float[Array, "*B V"], uniform: Float[Array, "*B"], temperature: float
) -> tuple[Int[Array, "*B"], Float[Array, "*B"]]:
  """Proposes a token a position: a draw from softmax(logits / temperature), or the argmax at temperature 0.

  Returns:
    The tokens, and the log-probability that the tempered distribution gives them (0 at temperature 0).
  """
  if temperature == 0:
    tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return tokens, jnp.zeros(tokens.shape, jnp.float32)
  tempered = logits / temperature
  tokens = inverse_cdf(tempered, uniform)
  return tokens, log_prob(tempered, tokens)
