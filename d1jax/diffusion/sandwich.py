"""Lower and upper estimates of log p(completion | prompt), under block-wise masks."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from d1jax.diffusion.corruption import noise
from d1jax.diffusion.denoiser import Denoiser, Params
from d1jax.diffusion.elbo import Hidden, Sums, check_samples, hidden_logps, ranks
from d1jax.diffusion.likelihood import Scores
from d1jax.diffusion.rollout import Rollout, SamplerSpec
from d1jax.microbatch import sum_over_parts

_BLOCK_STREAM = 1
_LEAST_POWER = -80.0
"""The logarithm of the least p^b that float32 can distinguish from 0, about."""


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
  """SPG's bounds (arXiv 2510.09541), from block-wise masks as its authors' code draws and weighs them: `samples`
  forward passes.

  A sample draws one of the row's blocks of `spec.block_length` tokens, up to the one of the stop id; earlier blocks are
  shown, later ones masked, and of the m tokens of the block l ~ U{1..m} are masked. All masked tokens are scored, those
  of later blocks too (the paper's text scores the drawn block alone); see `bounds` for the weights.

  With one block, lower is the bound of log p under random order. With more it is not: later blocks are scored as
  `one_step` does, but the network sees the earlier ones. Upper is certain to be above log p only with one block and an
  exponent of at least the number of tokens (Hoelder's inequality). The paper's theorem also has a constant that depends
  on the masks; the paper drops it because its gradient is 0. The mean of p^b is under a logarithm: with few samples
  upper is closer to lower.

  Args:
    denoiser: the mask predictor.
    params: its parameters.
    rollout: prompts and completions.
    spec: only its block length is read.
    key: the key of the masks.
    samples: masks.
    exponent: b.
    p_mask_prompt: probability that a prompt token is masked.
    tile: see `token_logps`.

  Raises:
    ValueError: samples below 1, an exponent that is not positive, a block-causal network.
  """
  check_samples("samples", samples)
  if denoiser.block is not None:
    raise ValueError(
      "sandwich masks all blocks behind the one it draws, but a network with block-causal attention"
      f" (block={denoiser.block}) scores each block under the clean tokens before it: use the estimator elbo, or"
      " step_merged"
    )
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
    inside = scored & (block_of == block)
    size = jnp.sum(inside, axis=1)
    count = jnp.minimum(1 + jnp.floor(time * size).astype(jnp.int32), size)
    masked = (inside & (ranks(uniform, inside) < count[:, None])) | (scored & (block_of > block))
    drawn = Hidden(masked, mask_weight(masked, scored, samples), pass_key)
    logp = hidden_logps(denoiser, params, rollout, drawn, p_mask_prompt=p_mask_prompt, tile=tile)
    return mask_sums(drawn, logp, exponent)

  sums, powers = sum_over_parts(jax.checkpoint(one, prevent_cse=False), jnp.arange(samples))
  return bounds(sums, powers, scored, exponent)


def mask_weight(masked: Bool[Array, "B C"], scored: Bool[Array, "B C"], samples: int) -> Float[Array, "B"]:
  """The weight n / (m samples) of each of the m masked tokens of a row of n: a sample is a mean over its masks, times
  n.
  """
  return jnp.sum(scored, axis=1) / jnp.maximum(jnp.sum(masked, axis=1), 1) / samples


def mask_sums(drawn: Hidden, logp: Float[Array, "B C"], exponent: float) -> tuple[Sums, Float[Array, "B C"]]:
  """The terms of one mask, for each token: its weight w, w log p, and w p^b."""
  weight = drawn.hidden * drawn.weight[:, None]
  part = jnp.where(drawn.hidden, weight * logp, 0.0)
  return Sums(weight, part), weight * jnp.exp(jnp.maximum(exponent * logp, _LEAST_POWER))


def bounds(sums: Sums, powers: Float[Array, "B C"], scored: Bool[Array, "B C"], exponent: float) -> Scores:
  """Both bounds from the sums over samples s.

  Lower of a row is sum_s sum_k w log p_k: n times the mean over samples of the mean over the tokens that each masked.
  Upper of a token that some sample masked is (1 / b) log(sum_s w p^b / sum_s w); each such token weighs n over their
  number. So upper is never below lower for a token, but their weights differ.

  Args:
    sums: of `mask_sums`.
    powers: likewise.
    scored: the n tokens of each row.
    exponent: b.
  """
  seen = sums.weight > 0
  mean = jnp.where(seen, powers / jnp.where(seen, sums.weight, 1.0), 1.0)
  weight = seen * (jnp.sum(scored, axis=1) / jnp.maximum(jnp.sum(seen, axis=1), 1))[:, None]
  return sums.scores()._replace(upper=jnp.log(mean) / exponent, upper_weight=weight)
