"""Profiles a few iterations for XProf or TensorBoard (`tensorboard --logdir WORKDIR/profile`)."""

import contextlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax

from d1jax.parallel import multihost
from d1jax.run.workdir import Folder


def iterations(steps: str | None, last: int) -> range:
  """The iterations to profile, counted from 1 as in `metrics.jsonl`; empty if `steps` is None.

  Args:
    steps: `FIRST:LAST`, both inclusive.
    last: the number of iterations of the stage.

  Raises:
    ValueError: `steps` contains no iteration of the stage.
  """
  if steps is None:
    return range(0)
  found = re.fullmatch(r"(\d+):(\d+)", steps)
  if not found or not 1 <= int(found[1]) <= int(found[2]) <= last:
    raise ValueError(
      f"profile_steps={steps!r} must be FIRST:LAST, iterations of the stage, counted from 1: for example 1:{last}"
    )
  return range(int(found[1]), int(found[2]) + 1)


class Profile:
  """Traces some iterations of a stage. Only the main process does so, and the trace contains only its devices."""

  def __init__(self, chosen: range, stage: str, folder: Folder):
    """Stores the arguments.

    `chosen` are the iterations, `stage` is the name of their steps in the trace, and `folder` that of the trace.
    """
    self._chosen = chosen if multihost.is_main() else range(0)
    self._stage, self._folder = stage, folder
    self._writing: tempfile.TemporaryDirectory[str] | None = None

  @contextlib.contextmanager
  def iteration(self, number: int) -> Iterator[None]:
    """A context for an iteration; a chosen iteration becomes a step in the trace."""
    if number not in self._chosen:
      yield
      return
    if self._writing is None:
      options = jax.profiler.ProfileOptions()
      options.python_tracer_level = 0  # a trace of all Python calls would hide the rest
      self._writing = tempfile.TemporaryDirectory()
      jax.profiler.start_trace(self._writing.name, profiler_options=options)
    with jax.profiler.StepTraceAnnotation(self._stage, step_num=number):
      yield
    if number == self._chosen[-1]:
      self.close()

  def close(self) -> None:
    """Writes the trace if it is not written yet."""
    if self._writing is None:
      return
    jax.profiler.stop_trace()
    with self._writing as found:  # JAX writes only to disks, not to buckets
      for path in filter(Path.is_file, Path(found).rglob("*")):
        target = self._folder / path.relative_to(found).as_posix()
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    self._writing = None
