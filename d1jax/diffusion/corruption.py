"""The forward process q(x_t | x_0): each token becomes a mask with probability t, independently."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from d1jax import keys

_TIME_STREAM, _MASK_STREAM = 0, 1
EPSILON = 1e-3
"""The least masking probability (LLaDA and d1): it bounds the weight 1/t by 1000."""


class Corrupted(NamedTuple):
  """Noisy completions: the tokens, where they were masked, and each row's masking probability t."""

  tokens: Int[Array, "B C"]
  masked: Bool[Array, "B C"]
  time: Float[Array, "B"]


def noise(
  key: Key[Array, ""], sample_id: Int[Array, "B"], length: int
) -> tuple[Float[Array, "B"], Float[Array, "B length"]]:
  """Uniforms in [0, 1) for a mask: one for each row, which gives its time, and one for each completion position."""
  per_sample = keys.sample_keys(key, sample_id)
  time = keys.uniforms(keys.fold(per_sample, _TIME_STREAM), 1)[:, 0]
  return time, keys.uniforms(keys.fold(per_sample, _MASK_STREAM), length)


def corrupt(key: Key[Array, ""], sample_id: Int[Array, "B"], completion: Int[Array, "B C"], mask_id: int) -> Corrupted:
  """Draws t ~ U(EPSILON, 1) a row and masks each token with probability t (LLaDA, section 2.2; d1's SFT)."""
  time, uniform = noise(key, sample_id, completion.shape[1])
  time = EPSILON + (1 - EPSILON) * time
  masked = uniform < time[:, None]
  return Corrupted(jnp.where(masked, mask_id, completion), masked, time)


def mask_prompt(
  key: Key[Array, ""],
  sample_id: Int[Array, "B"],
  prompt: Int[Array, "B P"],
  prompt_valid: Bool[Array, "B P"],
  p_mask_prompt: float,
  mask_id: int,
) -> Int[Array, "B P"]:
  """Masks each prompt token with probability `p_mask_prompt`, but never padding (d1, section 3.2: q -> q').

  Prompts are padded on the left. Uniform number i belongs to the token at distance i from the prompt's end, so that a
  prompt has the same masks in a bucket of 128 tokens and in one of 256.
  """
  uniform = keys.uniforms(keys.sample_keys(key, sample_id), prompt.shape[1])[:, ::-1]
  return jnp.where(prompt_valid & (uniform < p_mask_prompt), mask_id, prompt)
