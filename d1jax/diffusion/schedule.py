"""How many tokens each denoising step reveals, and which."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from d1jax.diffusion.rollout import SamplerSpec


def reveal_counts(masked: int, steps: int) -> np.ndarray:
  """Tokens to reveal at each of `steps` steps, `masked` in all; a remainder goes to the earliest steps (LLaDA's
  generate.py).

  18 tokens in 4 steps are [5, 5, 4, 4]. With more steps than tokens the schedule has one step a token: steps that would
  reveal nothing are left out.

  Returns:
    int32 array of min(steps, masked) counts.
  """
  if masked < 1 or steps < 1:
    raise ValueError(f"cannot spread {masked} tokens over {steps} steps: both must be at least 1")
  steps = min(steps, masked)
  base, remainder = divmod(masked, steps)
  return np.asarray([base + (i < remainder) for i in range(steps)], np.int32)


def rank_descending(scores: Float[Array, "B W"]) -> Int[Array, "B W"]:
  """Each entry's rank in its row, 0 for the largest; ties go to the left."""
  # An entry's rank is the number of entries that come before it: [0.2, 0.9, 0.2] has the ranks [1, 0, 2]. Comparing all
  # pairs costs W^2, which is little for a block of 32 tokens, and needs no sort and no scatter on the device.
  place = jnp.arange(scores.shape[1])
  higher = scores[:, None, :] > scores[:, :, None]
  tied = (scores[:, None, :] == scores[:, :, None]) & (place[None, None, :] < place[None, :, None])
  return jnp.sum(higher | tied, axis=-1, dtype=jnp.int32)


def confident_count(
  spec: SamplerSpec, log_confidence: Float[Array, "B W"], rank: Int[Array, "B W"], masked: Bool[Array, "B W"]
) -> Int[Array, "B"]:
  """How many tokens a row reveals under a confidence schedule (Fast-dLLM, arXiv 2505.22618, section 3.3): from 1 to
  `spec.max_reveal`.

  Args:
    spec: `schedule` is `threshold` (the tokens that are at least that confident) or `factor` (the largest n such that
      the k-th most confident token has, for each k <= n, at least the confidence 1 - factor / (k + 1)). With factor 1
      the bounds are 0.5, 0.67, 0.75, ...: confidences of 0.95, 0.8 and 0.5 reveal two tokens.
    log_confidence: log-probability of each proposal.
    rank: of each masked entry among its row's, 0 for the most confident.
    masked: the tokens that may be revealed.
  """
  confidence = jnp.exp(log_confidence)
  if spec.schedule == "threshold":
    count = at_least(spec.threshold, confidence, masked)
  else:
    count = in_a_row(spec.factor, confidence, rank, masked)
  return jnp.clip(count, 1, spec.max_reveal)


def at_least(
  threshold: float | Float[Array, "B 1"], confidence: Float[Array, "B W"], masked: Bool[Array, "B W"]
) -> Int[Array, "B"]:
  """How many masked entries of each row have at least this confidence."""
  return jnp.sum(masked & (confidence >= threshold), axis=1, dtype=jnp.int32)


def in_a_row(
  factor: float | Float[Array, "B 1"],
  confidence: Float[Array, "B W"],
  rank: Int[Array, "B W"],
  masked: Bool[Array, "B W"],
) -> Int[Array, "B"]:
  """The largest n such that of each row the k-th most confident masked entry has, for each k <= n, at least the
  confidence 1 - factor / (k + 1); W where no entry has less.
  """
  fails = masked & (confidence < 1 - factor / (rank + 2))  # the entry of rank r is the k-th, k = r + 1
  return jnp.min(jnp.where(fails, rank, rank.shape[1]), axis=1)
