"""Checkpoints of a stage with Orbax: asynchronous, sharded, verified on the way back in.

A checkpoint holds the TrainState and, as metadata, all that is needed to go on or to evaluate: data position, config,
tokenizer, seconds spent, and a fingerprint of every array. A checkpoint that cannot be read or whose fingerprint
differs is passed over, loudly, for the one before. All processes save and read together, from a folder that all see;
what is there, and what was good, is what process 0 finds and what all find good.
"""

import dataclasses
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from d1jax.errors import RunError, is_lost
from d1jax.fingerprint import fingerprint
from d1jax.parallel import multihost
from d1jax.state import Params, TrainState
from d1jax.training.workdir import Folder

log = logging.getLogger(__name__)
T = TypeVar("T")
METRIC = "validation"


@dataclasses.dataclass(frozen=True)
class Restored:
  """A checkpoint that was read and verified."""

  step: int
  state: TrainState
  metadata: dict[str, Any]


def _score(metrics: Any) -> float:
  return float(metrics[METRIC])


class Checkpoints:
  """The checkpoints of one stage in one folder: the last two and the best by validation are kept."""

  def __init__(self, folder: Folder):
    policies = ocp.training.preservation_policies
    self.folder = folder
    self._orbax = ocp.training.Checkpointer(
      folder.absolute() if isinstance(folder, Path) else folder,
      preservation_policy=policies.AnyPreservationPolicy(
        [
          policies.LatestN(2),
          policies.BestN(get_metric_fn=_score, n=1, keep_checkpoints_without_metrics=False),
        ]
      ),
      cleanup_tmp_directories=True,
    )

  def steps(self) -> list[int]:
    """The steps that are on disk, ascending."""
    return sorted(c.step for c in self._orbax.checkpoints)

  def best_step(self) -> int | None:
    """The step with the best validation, the later of equals; the last one where nothing was validated."""
    scored = [(_score(c.metrics), c.step) for c in self._orbax.checkpoints if c.metrics]
    return max(scored)[1] if scored else max(self.steps(), default=None)

  def metadata(self, step: int) -> dict[str, Any]:
    """What was said beside the state of one checkpoint."""
    return dict(self._orbax.checkpointables_metadata(step).custom_metadata)

  def save(self, step: int, state: TrainState, metadata: Mapping[str, Any], score: float | None) -> None:
    """Starts to write a checkpoint; the arrays are copied before this returns, so `state` may be donated."""
    self._orbax.save_checkpointables_async(
      step,
      {"state": state},
      force=True,  # when to save is decided by the loop
      overwrite=True,
      metrics=None if score is None else {METRIC: score},
      custom_metadata={**metadata, "fingerprint": fingerprint(state), "trainable": fingerprint(state.trainable)},
    )

  def wait(self) -> None:
    """Blocks until all is on disk; an error while writing surfaces here."""
    self._orbax.wait()
    self._orbax.reload()  # metrics of the newest checkpoint are read from disk

  def close(self) -> None:
    """Waits and lets go of the folder."""
    self._orbax.close()

  def restore(self, step: int, abstract: TrainState) -> Restored:
    """Reads one checkpoint onto the placements of `abstract`, any mesh.

    Raises:
      RunError: it cannot be read, by any process, or is not what was written.
    """
    state, metadata = self._read(step, abstract)
    self._compare(step, state, metadata["fingerprint"])
    return Restored(step, state, metadata)

  def restore_trainable(self, step: int, abstract: TrainState) -> Params:
    """Reads what is trained alone, without the memory of the optimiser's moments; otherwise as `restore`."""
    if not isinstance(self.metadata(step).get("trainable"), str):
      return self.restore(step, abstract).state.trainable  # it was written before this was said apart
    left_out = jax.tree.map(lambda _: ocp.PLACEHOLDER, abstract)
    state, metadata = self._read(step, left_out._replace(trainable=abstract.trainable))
    self._compare(step, state.trainable, metadata["trainable"])
    return state.trainable

  def _read(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
    failure: Exception | None = None
    try:
      state = self._orbax.load_checkpointables(step, {"state": abstract})["state"]
      metadata = self.metadata(step)
    except Exception as error:
      if is_lost(error):
        raise
      failure = error
    reasons = multihost.gather(failure and str(failure).splitlines()[0][:160])
    for reason in filter(None, reasons):
      raise RunError(f"checkpoint {self.folder}/{step} cannot be read ({reason})") from failure
    return state, metadata

  def _compare(self, step: int, tree: Any, expected: str) -> None:
    if fingerprint(tree) != expected:
      raise RunError(f"checkpoint {self.folder}/{step} is corrupt: its arrays are not those that were written")

  def _set_aside(self, step: int) -> None:
    """Moves a bad checkpoint out of the way, in case someone wants to look at it."""
    if multihost.is_main():
      target = self.folder.parent / "corrupt" / f"{self.folder.name}-{step}"
      target.parent.mkdir(exist_ok=True)
      if target.exists():
        epath.Path(target).rmtree()
      (self.folder / str(step)).rename(target)
    multihost.barrier("set aside")
    self._orbax.reload()

  def _first_good(self, choose: Callable[[], int | None], read: Callable[[int], T]) -> T | None:
    """What `read` makes of the checkpoint that `choose` names; a bad one is set aside, and the choice is made again."""
    failure: RunError | None = None
    while (step := multihost.from_main(choose)) is not None:
      try:
        found = read(step)
      except RunError as error:
        log.warning("%s; falling back to another", error)
        failure = error
        self._set_aside(step)
        continue
      if failure is not None:
        log.warning("going on from checkpoint %s/%d", self.folder, step)
      return found
    if failure is not None:
      raise RunError(
        f"no checkpoint in {self.folder} can be read; delete the folder to start this stage again"
      ) from failure
    return None

  def restore_latest(self, abstract: TrainState) -> Restored | None:
    """The last good checkpoint, None where there is none.

    Raises:
      RunError: there are checkpoints and none of them is good.
    """
    return self._first_good(lambda: max(self.steps(), default=None), lambda step: self.restore(step, abstract))

  def restore_best(self, abstract: TrainState) -> Restored | None:
    """The good checkpoint with the best validation, None where there is none."""
    return self._first_good(self.best_step, lambda step: self.restore(step, abstract))

  def best_trainable(self, abstract: TrainState) -> tuple[int, Params] | None:
    """Its step and what is trained of it, without the memory of the optimiser's moments; None where there is none."""
    return self._first_good(self.best_step, lambda step: (step, self.restore_trainable(step, abstract)))


def with_placements(abstract: Any, placements: Any) -> Any:
  """Shapes and dtypes with the placement that a restore is to use."""
  return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, placements)


def with_placement(abstract: Any, placement: Any) -> Any:
  """The same with one placement for every leaf."""
  return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=placement), abstract)
