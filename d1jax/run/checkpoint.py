"""Checkpoints of a stage with Orbax: asynchronous, sharded, verified on the way back in.

A checkpoint holds the TrainState and, as metadata, all that is needed to go on or to evaluate: data position, config,
seconds spent, and a fingerprint of every array. A checkpoint whose metadata, metrics or arrays cannot be read, or whose
fingerprint differs, is passed over, loudly, for another; the run that writes the folder also moves it out of the way.
Whoever only reads changes nothing: an unfinished checkpoint that is there belongs to a run that is writing it.
All processes save and read together, from a folder that all see; what is there, and what was good, is what process 0
finds and what all find good.
"""

import contextlib
import dataclasses
import functools
import logging
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from d1jax.errors import RunError, input_checked, is_lost
from d1jax.files import FileError, read_json, write_check
from d1jax.fingerprint import fingerprint
from d1jax.optimizer import evaluated
from d1jax.parallel import multihost
from d1jax.run.workdir import Folder
from d1jax.state import Params, TrainState

log = logging.getLogger(__name__)
T = TypeVar("T")
METRIC = "validation"
KNOWN: Mapping[str, Any] = {"fingerprint": str, "config": dict, "seconds": int | float}
"""What the metadata of every checkpoint holds, and of which type."""


@dataclasses.dataclass(frozen=True)
class Restored:
  """A checkpoint that was read and verified."""

  step: int
  state: TrainState
  metadata: dict[str, Any]


class Checkpoints:
  """The checkpoints of one stage in one folder: the last two and the best by validation are kept."""

  def __init__(self, folder: Folder, *, writes: bool = False):
    """Opens the folder.

    Args:
      folder: of one stage.
      writes: whether this is the run that writes it: the folder is made, what a kill left half written is deleted, and
        damaged checkpoints are moved to `corrupt`. Otherwise nothing is changed, and `save` is not allowed.

    Raises:
      RunError: the folder is to be written, and something else is in its place.
    """
    self.folder = folder
    self._absolute = folder.absolute() if isinstance(folder, Path) else folder
    self._passed: set[int] = set()
    self._orbax: ocp.training.Checkpointer | None = None
    if not writes:
      return
    with input_checked():
      if isinstance(folder, Path):
        write_check(folder)
    for step, reason in multihost.from_main(self._damaged):  # before Orbax, which cannot bear them, reads them
      log.warning("%s; falling back to another", reason)
      self._set_aside(step)
    policies = ocp.training.preservation_policies
    self._orbax = ocp.training.Checkpointer(
      self._absolute,
      preservation_policy=policies.AnyPreservationPolicy(
        [
          policies.LatestN(2),
          policies.BestN(
            get_metric_fn=lambda metrics: _rank(float(metrics[METRIC])), n=1, keep_checkpoints_without_metrics=False
          ),
        ]
      ),
      cleanup_tmp_directories=True,
    )

  def steps(self) -> list[int]:
    """The steps that are on disk, ascending, but those with damaged metadata, which are named in a warning."""
    for step, reason in self._damaged():
      log.warning("%s; it is passed over", reason)
      self._passed.add(step)
    return self._on_disk()

  def _on_disk(self) -> list[int]:
    """The steps that were written to their end, ascending, but those that are passed over.

    On a disk Orbax gives a checkpoint its name at the end; in a bucket, which cannot rename, it adds a file then.
    """
    if not self.folder.is_dir():
      return []
    found = [path for path in self.folder.iterdir() if is_step(path.name) and path.is_dir()]
    if not isinstance(self.folder, Path):
      found = [path for path in found if (path / "commit_success.txt").exists()]
    return sorted({int(path.name) for path in found} - self._passed)

  def _damaged(self) -> list[list[Any]]:
    """[step, what is wrong] of those whose metadata or metrics cannot be read."""
    found: list[list[Any]] = []
    for step in self._on_disk():
      try:
        self.metadata(step)
        self._score(step)
      except RunError as error:
        found.append([step, str(error)])
    return found

  def _score(self, step: int) -> float | None:
    """The validation of one checkpoint, None where it was saved without.

    Raises:
      RunError: it was saved with one, which cannot be read.
    """
    with self._reading(step):
      if "metrics" not in read_json(self.folder / str(step) / "_CHECKPOINT_METADATA", dict).get("item_handlers", {}):
        return None
      path = self.folder / str(step) / "metrics" / "metrics"
      score = read_json(path, dict).get(METRIC)
      if not isinstance(score, int | float):
        raise FileError(f"{path} holds no number {METRIC!r}")
      return float(score)

  @contextlib.contextmanager
  def _reading(self, step: int) -> Iterator[None]:
    """Turns what is wrong with a file into a RunError that names the checkpoint."""
    try:
      yield
    except (ValueError, AttributeError, TypeError) as error:
      raise RunError(f"checkpoint {self.folder}/{step} cannot be read ({error})") from error

  @property
  def passed(self) -> bool:
    """Whether a damaged checkpoint was met."""
    return bool(self._passed)

  def _scored(self, steps: list[int]) -> list[tuple[float, int]]:
    """(validation, step) of those that have one."""
    scored = []
    for step in steps:
      with contextlib.suppress(RunError):  # the run that writes the folder has just deleted it
        score = self._score(step)
        scored += [] if score is None or math.isnan(score) else [(score, step)]
    return scored

  def best_step(self) -> int | None:
    """The step with the best validation, the later of equals; the last one where nothing was validated."""
    steps = self.steps()
    scored = self._scored(steps)
    return max(scored)[1] if scored else max(steps, default=None)

  def best_score(self) -> float | None:
    """The best validation, None where nothing was validated; the same on all processes."""
    return multihost.from_main(lambda: max((score for score, _ in self._scored(self.steps())), default=None))

  def metadata(self, step: int) -> dict[str, Any]:
    """What was said beside the state of one checkpoint.

    Raises:
      RunError: it cannot be read, or is not what a run says.
    """
    with self._reading(step):
      path = self.folder / str(step) / "_CHECKPOINT_METADATA"
      found: dict[str, Any] = dict(read_json(path, dict).get("custom_metadata") or {})
      for name, kind in KNOWN.items():
        if not isinstance(found.get(name), kind):
          raise FileError(f"{path} does not say what a run says: {name!r} is missing or of another type")
      return found

  def newest(self) -> int | None:
    """The newest step whose metadata is sound; None where there is none. Nothing is warned."""
    damaged = {step for step, _ in self._damaged()}
    return max((step for step in self._on_disk() if step not in damaged), default=None)

  def newest_metadata(self) -> dict[str, Any] | None:
    """What was said beside that one."""
    step = self.newest()
    return None if step is None else self.metadata(step)

  def save(self, step: int, state: TrainState, metadata: Mapping[str, Any], score: float | None) -> None:
    """Starts to write a checkpoint; the arrays are copied before this returns, so `state` may be donated."""
    said = {**metadata, "fingerprint": fingerprint(state), "trainable": fingerprint(state.trainable)}
    if evaluated(state) is not state.trainable:
      said["evaluated"] = fingerprint(evaluated(state))
    self._passed.discard(step)  # a damaged one of this step was moved away, and this is another
    self._writer.save_checkpointables_async(
      step,
      {"state": state},
      force=True,  # when to save is decided by the loop
      overwrite=True,
      metrics=None if score is None else {METRIC: score},
      custom_metadata=said,
    )

  @property
  def _writer(self) -> ocp.training.Checkpointer:
    if self._orbax is None:
      raise ValueError(f"{self.folder} was opened to be read: open it with writes=True")
    return self._orbax

  def wait(self) -> None:
    """Blocks until all is on disk; an error while writing surfaces here."""
    self._writer.wait()
    self._writer.reload()  # metrics of the newest checkpoint are read from disk

  def close(self) -> None:
    """Waits and lets go of the folder."""
    if self._orbax is not None:
      self._orbax.close()

  def restore(self, step: int, abstract: TrainState) -> Restored:
    """Reads one checkpoint onto the placements of `abstract`, any mesh.

    Raises:
      RunError: it cannot be read, by any process, or is not what was written.
    """
    state, metadata = self._read(step, abstract)
    self._compare(step, state, metadata["fingerprint"])
    return Restored(step, state, metadata)

  def restore_evaluated(self, step: int, abstract: TrainState) -> Params:
    """Reads what is evaluated of a state (`optimizer.evaluated`) alone, without the memory of the optimiser's moments;
    otherwise as `restore`.
    """
    name = "trainable" if evaluated(abstract) is abstract.trainable else "evaluated"
    if not isinstance(multihost.from_main(lambda: self.metadata(step).get(name)), str):
      return evaluated(self.restore(step, abstract).state)  # it was written before this was said apart
    wanted = set(map(id, jax.tree.leaves(evaluated(abstract))))
    state, metadata = self._read(step, jax.tree.map(lambda x: x if id(x) in wanted else ocp.PLACEHOLDER, abstract))
    self._compare(step, evaluated(state), metadata[name])
    return evaluated(state)

  def _read(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
    failure: Exception | None = None
    try:
      state = ocp.load_checkpointables(self._absolute / str(step), {"state": abstract})["state"]
      metadata = self.metadata(step)
    except Exception as error:
      if is_lost(error):
        raise
      failure = error
      _silence_abandoned_reads()
    reasons = multihost.gather(failure and (str(failure).splitlines() or [type(failure).__name__])[0][:160])
    for reason in filter(None, reasons):
      raise RunError(f"checkpoint {self.folder}/{step} cannot be read ({reason})") from failure
    return state, metadata

  def _compare(self, step: int, tree: Any, expected: str) -> None:
    if fingerprint(tree) != expected:
      raise RunError(f"checkpoint {self.folder}/{step} is corrupt: its arrays are not those that were written")

  def _set_aside(self, step: int) -> None:
    """Moves a bad checkpoint out of the way, in case someone wants to look at it; it is passed over from now on."""
    self._passed.add(step)
    if multihost.is_main():
      target = self.folder.parent / "corrupt" / f"{self.folder.name}-{step}"
      target.parent.mkdir(exist_ok=True)
      if target.exists():
        epath.Path(target).rmtree()
      (self.folder / str(step)).rename(target)
    multihost.barrier("set aside")

  def _first_good(self, choose: Callable[[], int | None], read: Callable[[int], T]) -> T | None:
    """What `read` makes of the checkpoint that `choose` names; a bad one is reported, and the choice is made again."""
    failure: RunError | None = None
    while (step := multihost.from_main(choose)) is not None:
      try:
        found = read(step)
      except RunError as error:
        log.warning("%s; falling back to another", error)
        failure = error
        if self._orbax is None:
          self._passed.add(step)
        else:
          self._set_aside(step)
          self._orbax.reload()
        continue
      if failure is not None:
        log.warning("going on from checkpoint %s/%d", self.folder, step)
      return found
    if multihost.from_main(lambda: self.passed):
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

  def best_evaluated(self, abstract: TrainState) -> tuple[int, Params] | None:
    """Its step and what is evaluated of it, without the memory of the optimiser's moments; None where there is none."""
    return self._first_good(self.best_step, lambda step: (step, self.restore_evaluated(step, abstract)))


@functools.cache
def _silence_abandoned_reads() -> None:
  """Says nothing of the arrays that Orbax was still reading when one of them failed.

  It leaves their coroutines behind in a closed event loop, and Python would print a traceback for each of them,
  whenever it came to collect them or their data arrived. The read that failed says it all.
  """
  warnings.filterwarnings("ignore", "coroutine '.*' was never awaited", RuntimeWarning)
  print_error = sys.unraisablehook

  def hook(unraisable: Any) -> None:
    code = getattr(unraisable.object, "cr_code", None)
    is_read = code is not None and "orbax" in Path(code.co_filename).parts
    if not is_read and str(unraisable.exc_value) != "Event loop is closed":
      print_error(unraisable)

  sys.unraisablehook = hook


def _rank(score: float) -> float:
  """A validation by which checkpoints are compared: one that is no number is below all others."""
  return -math.inf if math.isnan(score) else score


def is_step(name: str) -> bool:
  """Whether this is the name of a checkpoint's folder: an iteration as Python writes it."""
  return name.isascii() and name.isdigit() and name == str(int(name))
