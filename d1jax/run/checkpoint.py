"""Checkpoints of a stage with Orbax: asynchronous, sharded, verified on the way back in.

A checkpoint holds the TrainState, rollouts that wait for their update (if there are any) and, as metadata, everything
needed to resume or to evaluate: data position, config, seconds spent, and a fingerprint of every array. A checkpoint is
damaged if its metadata, metrics or arrays cannot be read, or if its fingerprint differs. It is then skipped with a
warning, and another one is used; the run that writes the folder also moves it to `corrupt`. A reader changes nothing:
an unfinished checkpoint may be one that a run is writing.
All processes save and read together, from a shared folder. Process 0 lists the checkpoints, and one is good only if all
processes can read it.
"""

import contextlib
import dataclasses
import functools
import hashlib
import logging
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
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
"""The names that the metadata of every checkpoint has, and their types."""


@dataclasses.dataclass(frozen=True)
class Restored:
  """A checkpoint that was read and verified; `waiting` is None unless it was asked for."""

  step: int
  state: TrainState
  metadata: dict[str, Any]
  waiting: Any = None


class Checkpoints:
  """The checkpoints of one stage in one folder: the last two and the best by validation are kept."""

  def __init__(self, folder: Folder, *, writes: bool = False):
    """Opens the folder.

    Args:
      folder: the folder of one stage.
      writes: True for the run that writes the folder: the folder is made, checkpoints that a kill left half written are
        deleted, and damaged ones are moved to `corrupt`. If False, nothing is changed, and `save` is not allowed.

    Raises:
      RunError: `writes` is True, and the path is not a folder.
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
    for step, reason in multihost.from_main(self._damaged):  # moved first, because Orbax fails when it reads them
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
    """The steps on disk, ascending, without those with damaged metadata, which a warning names."""
    for step, reason in self._damaged():
      log.warning("%s; it is passed over", reason)
      self._passed.add(step)
    return self._on_disk()

  def _on_disk(self) -> list[int]:
    """The steps of completely written checkpoints, ascending, without the skipped ones.

    On a disk, Orbax renames a checkpoint when it is complete; a bucket cannot rename, so there it adds a file.
    """
    if not self.folder.is_dir():
      return []
    found = [path for path in self.folder.iterdir() if is_step(path.name) and path.is_dir()]
    if not isinstance(self.folder, Path):
      found = [path for path in found if (path / "commit_success.txt").exists()]
    return sorted({int(path.name) for path in found} - self._passed)

  def _damaged(self) -> list[list[Any]]:
    """[step, reason] of each checkpoint whose metadata or metrics cannot be read."""
    found: list[list[Any]] = []
    for step in self._on_disk():
      try:
        self.metadata(step)
        self._score(step)
      except RunError as error:
        found.append([step, str(error)])
    return found

  def _score(self, step: int) -> float | None:
    """The validation score of one checkpoint; None if it was saved without one.

    Raises:
      RunError: it has a score that cannot be read.
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
    """Turns errors in a file into a RunError that names the checkpoint."""
    try:
      yield
    except (ValueError, AttributeError, TypeError) as error:
      raise RunError(f"checkpoint {self.folder}/{step} cannot be read ({error})") from error

  @property
  def passed(self) -> bool:
    """Whether a damaged checkpoint was found."""
    return bool(self._passed)

  def _scored(self, steps: list[int]) -> list[tuple[float, int]]:
    """(validation score, step) of the checkpoints that have a score."""
    scored = []
    for step in steps:
      with contextlib.suppress(RunError):  # its writer may just have deleted it
        score = self._score(step)
        scored += [] if score is None or math.isnan(score) else [(score, step)]
    return scored

  def best_step(self) -> int | None:
    """The step with the best validation score, the later one of equals; the last step if none has a score."""
    # Tuples compare by score first, then by step: of (60.0, 50), (62.5, 100) and (62.5, 150), `max` takes step 150. If
    # scores are equal, the later checkpoint has trained longer. A NaN score counts as no score.
    steps = self.steps()
    scored = self._scored(steps)
    return max(scored)[1] if scored else max(steps, default=None)

  def best_score(self) -> float | None:
    """The best validation score, the same on all processes; None if no checkpoint has one."""
    return multihost.from_main(lambda: max((score for score, _ in self._scored(self.steps())), default=None))

  def metadata(self, step: int) -> dict[str, Any]:
    """The metadata of one checkpoint.

    Raises:
      RunError: it cannot be read, or lacks something that every run writes.
    """
    with self._reading(step):
      path = self.folder / str(step) / "_CHECKPOINT_METADATA"
      found: dict[str, Any] = dict(read_json(path, dict).get("custom_metadata") or {})
      for name, kind in KNOWN.items():
        if not isinstance(found.get(name), kind):
          raise FileError(f"{path} does not say what a run says: {name!r} is missing or of another type")
      return found

  def newest(self) -> int | None:
    """The newest step with readable metadata; None if there is none. No warning is given."""
    damaged = {step for step, _ in self._damaged()}
    return max((step for step in self._on_disk() if step not in damaged), default=None)

  def newest_metadata(self) -> dict[str, Any] | None:
    """The metadata of the `newest` checkpoint."""
    step = self.newest()
    return None if step is None else self.metadata(step)

  def save(
    self, step: int, state: TrainState, metadata: Mapping[str, Any], score: float | None, waiting: Any = None
  ) -> None:
    """Starts to write a checkpoint. Arrays are copied before this returns, so `state` may be donated.

    Args:
      step: the number of the checkpoint.
      state: the state.
      metadata: what else to know; fingerprints are added.
      score: of the validation; None: there was none.
      waiting: small replicated arrays that the next iterations need beside the state; None: there are none.
    """
    said = {**metadata, "fingerprint": fingerprint(state), "trainable": fingerprint(state.trainable)}
    if evaluated(state) is not state.trainable:
      said["evaluated"] = fingerprint(evaluated(state))
    arrays = {"state": state}
    if waiting is not None:
      said["waiting"], arrays["waiting"] = small_fingerprint(waiting), waiting
    self._passed.discard(step)  # a damaged checkpoint of this step was moved away; this is a new one
    self._writer.save_checkpointables_async(
      step,
      arrays,
      force=True,  # the loop decides when to save
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
    """Blocks until everything is on disk; an error of the writer is raised here."""
    self._writer.wait()
    self._writer.reload()  # so that the metrics of the newest checkpoint are read from disk

  def close(self) -> None:
    """Waits for the writer and closes the folder."""
    if self._orbax is not None:
      self._orbax.close()

  def restore(self, step: int, abstract: TrainState, waiting: Any = None) -> Restored:
    """Reads one checkpoint onto the placements of `abstract`; the mesh may differ from that of the writer.

    Args:
      step: the number of the checkpoint.
      abstract: shapes, types and placements of the state.
      waiting: the same of the arrays that were saved beside it; None: they are not read.

    Raises:
      RunError: some process cannot read it, or its arrays are not those that were written.
    """
    read, metadata = self._read(step, {"state": abstract} | ({} if waiting is None else {"waiting": waiting}))
    self._compare(step, fingerprint(read["state"]), metadata["fingerprint"])
    if waiting is not None:
      self._compare(step, small_fingerprint(read["waiting"]), metadata.get("waiting"))
    return Restored(step, read["state"], metadata, read.get("waiting"))

  def restore_evaluated(self, step: int, abstract: TrainState) -> Params:
    """Like `restore`, but reads only the evaluated weights (`optimizer.evaluated`), not the optimiser's moments."""
    name = "trainable" if evaluated(abstract) is abstract.trainable else "evaluated"
    if not isinstance(multihost.from_main(lambda: self.metadata(step).get(name)), str):
      return evaluated(self.restore(step, abstract).state)  # an older release wrote no separate fingerprint
    wanted = set(map(id, jax.tree.leaves(evaluated(abstract))))
    partial = jax.tree.map(lambda x: x if id(x) in wanted else ocp.PLACEHOLDER, abstract)
    read, metadata = self._read(step, {"state": partial})
    self._compare(step, fingerprint(evaluated(read["state"])), metadata[name])
    return evaluated(read["state"])

  def _read(self, step: int, abstract: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    failure: Exception | None = None
    _silence_abandoned_reads()
    try:
      found = ocp.load_checkpointables(self._absolute / str(step), abstract)
      metadata = self.metadata(step)
    except Exception as error:
      if is_lost(error):
        raise
      failure = error
    reasons = multihost.gather(failure and (str(failure).splitlines() or [type(failure).__name__])[0][:160])
    for reason in filter(None, reasons):
      raise RunError(f"checkpoint {self.folder}/{step} cannot be read ({reason})") from failure
    return found, metadata

  def _compare(self, step: int, found: str, expected: Any) -> None:
    if found != expected:
      raise RunError(f"checkpoint {self.folder}/{step} is corrupt: its arrays are not those that were written")

  def _set_aside(self, step: int) -> None:
    """Moves a damaged checkpoint to `corrupt`, where it can be inspected; it is skipped from now on."""
    self._passed.add(step)
    if multihost.is_main():
      target = self.folder.parent / "corrupt" / f"{self.folder.name}-{step}"
      target.parent.mkdir(exist_ok=True)
      if target.exists():
        epath.Path(target).rmtree()
      (self.folder / str(step)).rename(target)
    multihost.barrier("set aside")

  def _first_good(self, choose: Callable[[], int | None], read: Callable[[int], T]) -> T | None:
    """Reads the checkpoint that `choose` names; if it is damaged, warns and chooses again among the others."""
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

  def restore_latest(self, abstract: TrainState, waiting: Callable[[int], Any] = lambda step: None) -> Restored | None:
    """The last good checkpoint; None if there are no checkpoints.

    For `abstract` see `restore`; `waiting` gives what it takes of that name for a step.

    Raises:
      RunError: there are checkpoints, but none of them is good.
    """
    read = lambda step: self.restore(step, abstract, waiting(step))
    return self._first_good(lambda: max(self.steps(), default=None), read)

  def best_evaluated(self, abstract: TrainState) -> tuple[int, Params] | None:
    """The step and the evaluated weights, without the optimiser's moments, of the good checkpoint with the best
    validation score; None if there are no checkpoints.
    """
    return self._first_good(self.best_step, lambda step: (step, self.restore_evaluated(step, abstract)))


@functools.cache
def _silence_abandoned_reads() -> None:
  """Silences the tracebacks of arrays that Orbax was still reading when one of them failed.

  Orbax leaves their coroutines in a closed event loop. Python would print a traceback for each one when it collects
  them or their data arrives, although the failed read is reported already.
  """
  logging.getLogger("asyncio").setLevel(logging.CRITICAL)
  warnings.filterwarnings("ignore", "coroutine '.*' was never awaited", RuntimeWarning)
  print_error = sys.unraisablehook

  def hook(unraisable: Any) -> None:
    code = getattr(unraisable.object, "cr_code", None)
    is_read = code is not None and "orbax" in Path(code.co_filename).parts
    if not is_read and str(unraisable.exc_value) != "Event loop is closed":
      print_error(unraisable)

  sys.unraisablehook = hook


def small_fingerprint(tree: Any) -> str:
  """SHA-256 over small arrays that every process has whole. Unlike `fingerprint` it compiles nothing."""
  found = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    value = np.asarray(leaf)
    found.update(f"{jax.tree_util.keystr(path)} {value.shape} {value.dtype}\n".encode() + value.tobytes())
  return found.hexdigest()


def _rank(score: float) -> float:
  """A validation score for comparing checkpoints; NaN is below all other scores."""
  return -math.inf if math.isnan(score) else score


def is_step(name: str) -> bool:
  """Whether this is the name of a checkpoint's folder: a whole number as Python prints it."""
  return name.isascii() and name.isdigit() and name == str(int(name))
