"""Drift: the difference between a cached sampler and the exact one, measured during a run.

At regular intervals, the prompts of one chunk are completed both ways with the same weights and keys. The figures are
logged. If they exceed a limit, the run continues without its cache.
"""

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from d1jax.diffusion.rollout import Rollout
from d1jax.rl.importance import effective_sample_size, weight_sums

log = logging.getLogger(__name__)


def drift(cached: Rollout, exact: Rollout, exact_logp: Float[Array, "B C"]) -> dict[str, Float[Array, ""]]:
  """Compares completions of the same prompts under the same keys.

  Args:
    cached: completions of the sampler with a cache.
    exact: completions of the sampler without one.
    exact_logp: the log-probability of each token of `cached` in the state in which it was unmasked, by exact forward
      passes (`d1jax.diffusion.replay`).

  Returns:
    `token_agreement`: the share of positions with equal tokens, among positions where either completion has a token;
    `logp_difference` and `logp_bias`: the means of |d| and of d over the tokens of `cached`, with
    d = reveal_logp - exact_logp in nats; `effective_sample_size`: that of the completions, as a share, when each is
    weighted by exp(-sum d).
  """
  mask = cached.completion_mask
  agree = (cached.completion == exact.completion) & mask & exact.completion_mask
  difference = jnp.where(mask, cached.reveal_logp - exact_logp, 0.0)
  log_ratio = -jnp.sum(difference, axis=1)
  ratio = jnp.exp(log_ratio - jnp.max(log_ratio))
  return {
    "token_agreement": jnp.sum(agree) / jnp.sum(mask | exact.completion_mask),
    "logp_difference": jnp.sum(jnp.abs(difference)) / jnp.sum(mask),
    "logp_bias": jnp.sum(difference) / jnp.sum(mask),
    "effective_sample_size": effective_sample_size(weight_sums(ratio, jnp.ones_like(ratio, bool))),
  }


@dataclasses.dataclass(frozen=True)
class Watch:
  """When a run measures its drift, and when it gives up the cache.

  Attributes:
    every: iterations between measurements, beginning with the first iteration; 0: never.
    limit: the limit of `drift/logp_difference` in nats per token; beyond it the cache is off for the rest of the stage.
      None: the figures are only logged.
  """

  every: int
  limit: float | None

  def __post_init__(self) -> None:
    if self.every < 0:
      raise ValueError(f"grpo.drift_every is {self.every}; give iterations between looks at the drift, or 0 for none")
    if self.limit is not None and (self.limit < 0 or not self.every):
      raise ValueError(
        f"grpo.drift_limit is {self.limit} with grpo.drift_every={self.every}: a limit is of at least 0 nats a token,"
        " and drift_every says how often it is looked at"
      )

  def due(self, iteration: int) -> bool:
    """Whether to measure at this iteration, counted from 0."""
    return self.every > 0 and iteration % self.every == 0

  def beyond(self, values: Mapping[str, Any]) -> bool:
    """Whether the drift figures of an iteration, if any, exceed the limit; NaN does."""
    if self.limit is None or "drift/logp_difference" not in values:
      return False
    return not values["drift/logp_difference"] <= self.limit

  def trusts(self, records: Iterable[Mapping[str, Any]], position: int) -> bool:
    """Whether a GRPO stage that resumes after iteration `position`, counted from 1, still uses its cache.

    Args:
      records: the records of the run; those of later iterations do not count, since they will be made again.
      position: the last iteration of the restored state; 0 at the start.
    """
    own = (r for r in records if r["stage"] == "grpo" and r["iteration"] <= position)
    return not any(self.beyond(r) for r in own)

  def warn(self, iteration: int, values: Mapping[str, float], cache: str) -> None:
    """Warns that the cache is turned off, and why; `iteration` is counted from 1."""
    log.warning(
      "grpo iteration %d: a token's log-probability differs by %.4f nats from the exact one, beyond grpo.drift_limit=%g"
      " (token agreement %.1f%%, reward gap %+.4f): rollouts go on without the cache %s",
      iteration,
      values["drift/logp_difference"],
      self.limit,
      100 * values["drift/token_agreement"],
      values["drift/reward_gap"],
      cache,
    )


def named(figures: Mapping[str, jax.Array], reward_gap: float) -> dict[str, float]:
  """The figures on the host with their logged names, and the reward gap: the mean reward, cached minus exact."""
  values = {f"drift/{name}": float(value) for name, value in jax.device_get(dict(figures)).items()}
  return values | {"drift/reward_gap": reward_gap}
