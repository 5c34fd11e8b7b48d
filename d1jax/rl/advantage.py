"""Advantages from the rewards of a group of completions of one prompt; groups are runs of neighbours in a batch.

Each is a function of the rewards [B] and G, the completions of a prompt, of which B is a multiple.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

STD_EPSILON = 1e-4

Advantage = Callable[[Float[Array, "B"], int], Float[Array, "B"]]


def mean(rewards: Float[Array, "B"], num_generations: int) -> Float[Array, "B"]:
  """Centre the rewards: A_i = r_i - their mean (d1, eq. 3, without GRPO's division; Dr. GRPO, arXiv 2503.20783)."""
  groups = _groups(rewards, num_generations)
  return (groups - jnp.mean(groups, axis=1, keepdims=True)).reshape(-1)


def mean_std(rewards: Float[Array, "B"], num_generations: int) -> Float[Array, "B"]:
  """GRPO's: A_i = (r_i - mean(r)) / (std(r) + 1e-4), with the population's standard deviation (arXiv 2402.03300)."""
  groups = _groups(rewards, num_generations)
  centred = groups - jnp.mean(groups, axis=1, keepdims=True)
  return (centred / (jnp.std(groups, axis=1, keepdims=True) + STD_EPSILON)).reshape(-1)


def leave_one_out(rewards: Float[Array, "B"], num_generations: int) -> Float[Array, "B"]:
  """RLOO's: A_i = r_i - mean of the others' = G / (G - 1) (r_i - mean(r)) (arXiv 2402.14740); G is at least 2."""
  return mean(rewards, num_generations) * (num_generations / (num_generations - 1))


def softmax(rewards: Float[Array, "B"], num_generations: int) -> Float[Array, "B"]:
  """wd1's (arXiv 2507.08838): A_i = w+_i - w-_i, exp(r_i) and exp(-r_i) over their sums within the group."""
  groups = _groups(rewards, num_generations)
  return (jax.nn.softmax(groups, axis=1) - jax.nn.softmax(-groups, axis=1)).reshape(-1)


def _groups(rewards: Float[Array, "B"], num_generations: int) -> Float[Array, "prompts G"]:
  return rewards.astype(jnp.float32).reshape(-1, num_generations)


ADVANTAGES: Mapping[str, Advantage] = {
  "mean": mean,
  "mean_std": mean_std,
  "leave_one_out": leave_one_out,
  "softmax": softmax,
}
"""The advantages that a configuration names."""
