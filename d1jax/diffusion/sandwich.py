"""Lower and upper estimates of log p(completion | prompt), under block-wise masks."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from d1jax.diffusion.corruption import EPSILON, noise
from d1jax.diffusion.denoiser import Denoiser, Params
from d1jax.diffusion.elbo import Hidden, Sums, check_samples, hidden_logps
from d1jax.diffusion.likelihood import Scores
from d1jax.diffusion.rollout import Rollout, SamplerSpec
from d1jax.microbatch import sum_over_parts

_BLOCK_STREAM = 1
_LEAST_POWER = -80.0
"""The logarithm of the least p^b that is told from 0: about where float32 ends."""


def sandwich(
  denoiser: Denoiser,
  params: Params,
  rollout: Rollout,
  spec: SamplerSpec,
  key: Key[Array, ""],
  *,
  samples: int,
  exponent: float,
  p_mask_prompt: float = 0.0,
  tile: int | None = None,
) -> Scores:
  """SPG's bounds (arXiv 2510.09541), from block-wise masks: `samples` forward passes.

  A sample draws one of the row's blocks of `spec.block_length` tokens, up to the one of the stop id; earlier blocks are
  shown, later ones masked, and each of the block's tokens is masked with probability t ~ U(0.001, 1) and weighs
  w = blocks / t. Lower is the bound of log p under block-wise random order, sum_k E w log p_k; upper is
  sum_k (1 / b) log E w p_k^b, with the weights of a token's samples normalised to their sum, as in the lower one: upper
  is never below lower, token by token. `weight` holds for both.

  It is above log p for certain only where b is at least the number of tokens (Hoelder's inequality); the paper's
  theorem has a constant of the masks besides, which it drops as its gradient is 0. The mean of p^b is under a
  logarithm: few samples bring upper closer to lower.

  Args:
    denoiser: the mask predictor.
    params: its parameters.
    rollout: prompts and completions.
    spec: of which the block length is read.
    key: of the masks.
    samples: masks.
    exponent: b.
    p_mask_prompt: probability that a prompt token is masked.
    tile: see `token_logps`.

  Raises:
    ValueError: samples below 1, an exponent that is not positive.
  """
  check_samples("samples", samples)
  if not exponent > 0:
    raise ValueError(f"exponent={exponent} must be positive: the upper bound averages p ** exponent")
  scored = rollout.completion_mask
  blocks = -(-jnp.sum(scored, axis=1) // spec.block_length)
  block_of = jnp.arange(scored.shape[1])[None, :] // spec.block_length

  def one(index: Int[Array, ""]) -> tuple[Sums, Float[Array, "B C"]]:
    pass_key = jax.random.fold_in(key, index)
    time, uniform = noise(pass_key, rollout.sample_id, scored.shape[1])
    which, _ = noise(jax.random.fold_in(pass_key, _BLOCK_STREAM), rollout.sample_id, 1)
    block = jnp.minimum(jnp.floor(which * blocks).astype(jnp.int32), blocks - 1)[:, None]
    time = EPSILON + (1 - EPSILON) * time
    masked = scored & (block_of == block) & (uniform < time[:, None])
    drawn = Hidden(masked | (scored & (block_of > block)), blocks / time / samples, pass_key)
    logp = hidden_logps(denoiser, params, rollout, drawn, p_mask_prompt=p_mask_prompt, tile=tile)
    weight = masked * drawn.weight[:, None]
    part = jnp.where(masked, weight * logp, 0.0)
    return Sums(weight, part), weight * jnp.exp(jnp.maximum(exponent * logp, _LEAST_POWER))

  sums, powers = sum_over_parts(jax.checkpoint(one, prevent_cse=False), jnp.arange(samples))
  scores = sums.scores()
  seen = sums.weight > 0
  mean = jnp.where(seen, powers / jnp.where(seen, sums.weight, 1.0), 1.0)
  return scores._replace(upper=jnp.log(mean) / exponent)
