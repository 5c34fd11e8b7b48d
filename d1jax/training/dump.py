"""Rollouts on disk: any iteration's completions with rewards and advantages, to be read and replayed."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from d1jax.diffusion.rollout import Rollout
from d1jax.rl.grading import Graded


class Dumped(NamedTuple):
  """One iteration as it was: `rollout` and `rewards` are what an update needs to be replayed."""

  rollout: Rollout
  rewards: Float[np.ndarray, "B"]
  advantages: Float[np.ndarray, "B"]
  texts: list[str]


def path_of(folder: Path, iteration: int) -> Path:
  """The file of one iteration, counted from 0."""
  return folder / f"{iteration:06d}.npz"


def write(folder: Path, iteration: int, rollout: Rollout, graded: Graded, advantages: np.ndarray) -> None:
  """Writes one iteration; `rollout` holds host arrays."""
  folder.mkdir(parents=True, exist_ok=True)
  np.savez_compressed(
    path_of(folder, iteration),
    **rollout._asdict(),
    rewards=graded.rewards,
    advantages=advantages,
    texts=np.asarray(graded.texts),
  )


def read(folder: Path, iteration: int) -> Dumped:
  """Reads one iteration back."""
  with np.load(path_of(folder, iteration)) as stored:
    rollout = Rollout(*(stored[name] for name in Rollout._fields))
    return Dumped(rollout, stored["rewards"], stored["advantages"], stored["texts"].tolist())
