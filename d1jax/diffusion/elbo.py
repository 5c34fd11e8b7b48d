"""Estimators that mask a random part of the completion, several times, and score the tokens that were masked.

All but `coupled` estimate the evidence lower bound of log p under uniformly random order,
L = int_0^1 dt (1 / t) E sum_{k masked} log p(o_k | o_t, q) <= log p(o | q), each token masked with probability t.

`logp` of a token is its mean log-probability over the masks that hide it, and `weight` is the sum of their weights.
Weights depend on the draws alone: a ratio of old to current is a ratio of probabilities, whatever 1 / t is. If two of
three masks hide a token, with weights 2 and 4 and log p -1 and -2, then `weight` is 6 and `logp` is -10 / 6.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from d1jax.diffusion.corruption import EPSILON, noise
from d1jax.diffusion.denoiser import Denoiser, Params
from d1jax.diffusion.likelihood import Scores, masked_logps
from d1jax.diffusion.rollout import Rollout, SamplerSpec
from d1jax.microbatch import sum_over_parts

MASKINGS = ("bernoulli", "count")
_LEAST_RATIO, _MOST_RATIO = 0.2, 0.8


class Hidden(NamedTuple):
  """The tokens of each row that one pass hides and scores, the weight of each, and the key of the prompt's mask."""

  hidden: Bool[Array, "B C"]
  weight: Float[Array, "B"]
  key: Key[Array, ""]


class Sums(NamedTuple):
  """Sums over the passes, for each token: of its weights, and of its weights times log-probabilities."""

  weight: Float[Array, "B C"]
  logp: Float[Array, "B C"]

  def scores(self) -> Scores:
    """The mean log-probability of each token and its weight; 0 and 0 where no pass hid it."""
    mean = jnp.where(self.weight > 0, self.logp / jnp.where(self.weight > 0, self.weight, 1.0), 0.0)
    return Scores(mean, self.weight)


def hidden_logps(
  denoiser: Denoiser, params: Params, rollout: Rollout, drawn: Hidden, *, p_mask_prompt: float, tile: int | None
) -> Float[Array, "B C"]:
  """Log p of every token in the pass that hides these; tokens behind the stop id are always hidden."""
  masked = drawn.hidden | ~rollout.completion_mask
  return masked_logps(denoiser, params, rollout, drawn.key, masked, p_mask_prompt=p_mask_prompt, tile=tile)


def check_samples(name: str, count: int) -> None:
  """Raises a ValueError if the number of passes is below 1."""
  if count < 1:
    raise ValueError(f"{name}={count} must be at least 1: each is a forward pass that hides part of the completion")


def _sums(
  denoiser: Denoiser,
  params: Params,
  rollout: Rollout,
  draw: Callable[[Int[Array, ""]], Hidden],
  passes: int,
  *,
  p_mask_prompt: float,
  tile: int | None,
) -> Sums:
  """One pass in memory at a time, forwards and backwards."""

  def one(index: Int[Array, ""]) -> Sums:
    drawn = draw(index)
    logp = hidden_logps(denoiser, params, rollout, drawn, p_mask_prompt=p_mask_prompt, tile=tile)
    weight = drawn.hidden * drawn.weight[:, None]
    return Sums(weight, jnp.where(drawn.hidden, weight * logp, 0.0))

  return sum_over_parts(jax.checkpoint(one, prevent_cse=False), jnp.arange(passes))


def elbo(
  denoiser: Denoiser,
  params: Params,
  rollout: Rollout,
  spec: SamplerSpec,
  key: Key[Array, ""],
  *,
  samples: int,
  masking: str = "bernoulli",
  antithetic: bool = False,
  p_mask_prompt: float = 0.0,
  tile: int | None = None,
) -> Scores:
  """The lower bound L by Monte Carlo, a time a mask (VRPO, arXiv 2505.19223; ESPO, arXiv 2512.03759).

  With masks that old, current and reference share, as they do for one key, differences of L are antithetic in VRPO's
  sense. Costs `samples` forward passes.

  Args:
    denoiser: the mask predictor.
    params: its parameters.
    rollout: prompts and completions.
    spec: not read.
    key: the key of the masks.
    samples: masks.
    masking: `bernoulli`, t ~ U(0.001, 1) and each token with probability t, weight 1 / t (d1); `count`, l ~ U{1..n} of
      the n tokens up to the stop id, weight n / l (LLaDA), which varies less.
    antithetic: every second mask is the complement of the one before (ESPO's coupled masks). Times are then symmetric:
      t ~ U(0.001, 0.999), and l ~ U{0..n} with weights (n + 1) / l, under which both of a pair are unbiased.
    p_mask_prompt: probability that a prompt token is masked, the same for a pair.
    tile: see `token_logps`.

  Raises:
    ValueError: samples below 1, odd samples of pairs, an unknown masking.
  """
  del spec
  check_samples("samples", samples)
  if masking not in MASKINGS:
    raise ValueError(f"masking={masking!r} is unknown; known: {', '.join(MASKINGS)}")
  if antithetic and samples % 2:
    raise ValueError(
      f"samples={samples} is odd, but antithetic masks come in pairs: use {samples + 1}, or antithetic=False"
    )
  scored = rollout.completion_mask
  count = jnp.sum(scored, axis=1)

  # Why n / l: with l uniform from 1 to n, the sum over l masked tokens times n / l has the same mean as the integral
  # over t of 1 / t. A pair also masks the other n - l tokens; l must then be symmetric, so that 0 and n are possible
  # (n + 1 values). With n = 3 and l = 1 a pair scores one token with weight 4 and two with weight 2 each; l = 0 scores
  # no token and its complement all three, with weight 4 / 3.
  def draw(index: Int[Array, ""]) -> Hidden:
    pass_key = jax.random.fold_in(key, index // 2 if antithetic else index)
    time, uniform = noise(pass_key, rollout.sample_id, scored.shape[1])
    complement = (index % 2 == 1) & antithetic
    if masking == "bernoulli":
      time = EPSILON + (1 - (2 if antithetic else 1) * EPSILON) * time
      hidden = uniform < time[:, None]
      weight = 1 / jnp.where(complement, 1 - time, time)
    else:
      first = 0 if antithetic else 1
      hide = jnp.minimum(first + jnp.floor(time * (count + 1 - first)).astype(jnp.int32), count)
      hidden = ranks(uniform, scored) < hide[:, None]
      weight = (count + 1 - first) / jnp.maximum(jnp.where(complement, count - hide, hide), 1)
    return Hidden(scored & (hidden ^ complement), weight / samples, pass_key)

  return _sums(denoiser, params, rollout, draw, samples, p_mask_prompt=p_mask_prompt, tile=tile).scores()


def ranks(uniform: Float[Array, "B C"], among: Bool[Array, "B C"]) -> Int[Array, "B C"]:
  """The rank of each token's uniform among the tokens of its row that are in `among`, from 0; the others come last."""
  order = jnp.argsort(jnp.where(among, uniform, 2.0), axis=1, stable=True)
  return jnp.argsort(order, axis=1, stable=True).astype(jnp.int32)


def quadrature(
  denoiser: Denoiser,
  params: Params,
  rollout: Rollout,
  spec: SamplerSpec,
  key: Key[Array, ""],
  *,
  nodes: int,
  p_mask_prompt: float = 0.0,
  tile: int | None = None,
) -> Scores:
  """The lower bound L by Gauss-Legendre quadrature over t in (0, 1), one mask a node (GDPO, arXiv 2510.08554).

  The integrand is a polynomial in t of degree n - 1 for n tokens: with at least n / 2 nodes the mean over masks is L.
  Costs `nodes` forward passes.

  Raises:
    ValueError: nodes below 1.
  """
  del spec
  check_samples("nodes", nodes)
  at, share = np.polynomial.legendre.leggauss(nodes)
  times, shares = jnp.asarray((at + 1) / 2, jnp.float32), jnp.asarray(share / 2, jnp.float32)

  def draw(index: Int[Array, ""]) -> Hidden:
    pass_key = jax.random.fold_in(key, index)
    _, uniform = noise(pass_key, rollout.sample_id, rollout.completion.shape[1])
    weight = jnp.broadcast_to(shares[index] / times[index], uniform.shape[:1])
    return Hidden(rollout.completion_mask & (uniform < times[index]), weight, pass_key)

  return _sums(denoiser, params, rollout, draw, nodes, p_mask_prompt=p_mask_prompt, tile=tile).scores()


def coupled(
  denoiser: Denoiser,
  params: Params,
  rollout: Rollout,
  spec: SamplerSpec,
  key: Key[Array, ""],
  *,
  samples: int,
  p_mask_prompt: float = 0.0,
  tile: int | None = None,
) -> Scores:
  """Coupled complementary masks (DiffuCoder, arXiv 2506.20639): pairs of masks, and one that hides everything.

  A pair masks each token with probability m, m ~ U(0.2, 0.8), and the rest: every token is scored once, with weight
  1 / m or 1 / (1 - m). Token k scores (sum over pairs of weight x log p + fully masked log p) / (samples + 1).

  As in the paper that value itself stands in `logp`, which a token's ratio is of, and `weight` is 1 up to the stop id.
  A pair counts once but is worth two samples: with m over all of (0, 1) the mean is
  (2 samples L + what one step scores) / (samples + 1), below the bound L. Costs 2 `samples` + 1 forward passes.

  Raises:
    ValueError: samples (pairs) below 1.
  """
  del spec
  check_samples("samples", samples)
  scored = rollout.completion_mask

  def draw(index: Int[Array, ""]) -> Hidden:
    pass_key = jax.random.fold_in(key, (index + 1) // 2)  # pass 0 hides everything
    time, uniform = noise(pass_key, rollout.sample_id, scored.shape[1])
    ratio = _LEAST_RATIO + (_MOST_RATIO - _LEAST_RATIO) * time
    complement = index % 2 == 0
    hidden = (uniform < ratio[:, None]) ^ complement
    weight = 1 / jnp.where(complement, 1 - ratio, ratio)
    whole = index == 0
    return Hidden(scored & (hidden | whole), jnp.where(whole, 1.0, weight) / (samples + 1), pass_key)

  sums = _sums(denoiser, params, rollout, draw, 2 * samples + 1, p_mask_prompt=p_mask_prompt, tile=tile)
  return Scores(sums.logp, scored.astype(jnp.float32))
