"""Dumps of rollouts: an iteration's completions with rewards and advantages, for reading and for replay."""

import io
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from d1jax.diffusion.rollout import Rollout
from d1jax.parallel import multihost
from d1jax.run.workdir import Folder, write_atomically
from d1jax.training.host import Visit


class Dumped(NamedTuple):
  """One iteration; `rollout`, `rewards` and `behaviour` are enough to repeat its update. `behaviour` is log p under the
  weights that drew the rollout, if the method scores it.
  """

  rollout: Rollout
  rewards: Float[np.ndarray, "B"]
  advantages: Float[np.ndarray, "B"]
  texts: list[str]
  behaviour: Float[np.ndarray, "B C"] | None = None


def path_of(folder: Folder, iteration: int) -> Folder:
  """The file of one iteration, counted from 0."""
  return folder / f"{iteration:06d}.npz"


def write(
  folder: Folder,
  iteration: int,
  chunks: Sequence[Rollout],
  visit: Visit,
  advantages: Float[Array, "B"],
  behaviour: Sequence[Float[Array, "b C"]] = (),
) -> None:
  """Writes one iteration; every process has a part of it, and all but `visit` is on devices."""
  parts, advantages, behaviour = multihost.fetch((list(chunks), advantages, list(behaviour)))
  texts = multihost.gather_rows(visit.rows, visit.graded.texts)
  if not multihost.is_main():
    return
  rollout = jax.tree.map(lambda *x: np.concatenate(x), *parts)
  content = io.BytesIO()
  arrays = rollout._asdict() | ({"behaviour": np.concatenate(behaviour)} if behaviour else {})
  np.savez_compressed(content, **arrays, rewards=visit.rewards, advantages=advantages, texts=np.asarray(texts))
  folder.mkdir(parents=True, exist_ok=True)
  write_atomically(path_of(folder, iteration), content.getvalue())


def read(folder: Folder, iteration: int) -> Dumped:
  """Reads one iteration back."""
  with np.load(io.BytesIO(path_of(folder, iteration).read_bytes())) as stored:
    rollout = Rollout(*(stored[name] for name in Rollout._fields))
    given = stored["rewards"], stored["advantages"], stored["texts"].tolist(), stored.get("behaviour")
    return Dumped(rollout, *given)
