"""Dynamic sampling: which of the groups that were drawn are trained on (DAPO, arXiv 2503.14476, section 3.2)."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

NO_SIGNAL = 1e-6
"""A group whose rewards differ by less teaches nothing."""


def with_signal(rewards: Float[Array, "B"], num_generations: int, rows: int) -> Int[Array, "rows"]:
  """The rows of the first groups whose rewards differ; if these are too few, the first of the other groups fill the
  rest.

  A function of the rewards and of the order in which prompts came: the same on any mesh, and after a restart.
  Groups are runs of `num_generations` neighbours; whole groups are taken.
  """
  groups = rewards.reshape(-1, num_generations)
  silent = jnp.ptp(groups, axis=1) < NO_SIGNAL
  chosen = jnp.sort(jnp.argsort(silent, stable=True)[: rows // num_generations])
  return (chosen[:, None] * num_generations + jnp.arange(num_generations)[None, :]).reshape(-1)
