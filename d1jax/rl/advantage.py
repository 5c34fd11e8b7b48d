"""Advantages from the rewards of a group of completions of one prompt."""

import jax.numpy as jnp
from jaxtyping import Array, Float

STD_EPSILON = 1e-4


def group_relative(
  rewards: Float[Array, "B"], num_generations: int, *, divide_by_std: bool = False
) -> Float[Array, "B"]:
  """Each reward minus its group's mean (d1, eq. 3, without GRPO's division), optionally over the group's standard
  deviation.

  Args:
    rewards: groups are runs of `num_generations` neighbours.
    num_generations: G; B is a multiple of it.
    divide_by_std: GRPO's normalisation (arXiv 2402.03300), population standard deviation plus 1e-4.
  """
  groups = rewards.astype(jnp.float32).reshape(-1, num_generations)
  centred = groups - jnp.mean(groups, axis=1, keepdims=True)
  if divide_by_std:
    centred = centred / (jnp.std(groups, axis=1, keepdims=True) + STD_EPSILON)
  return centred.reshape(-1)
