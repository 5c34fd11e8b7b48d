"""TensorBoard event files in `WORKDIR/tensorboard/STAGE`: `tensorboard --logdir WORKDIR/tensorboard`."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from d1jax.run.trackers import Run

FLUSH_SECONDS = 60
"""How often events go to a bucket, where a file can only be written whole."""


class TensorBoard:
  """One event file an attempt."""

  def __init__(self, run: Run):
    """Opens the file."""
    # Not a SummaryWriter, whose thread would die on a full disk and leave the run waiting for it.
    folder = run.workdir / "tensorboard" / run.stage
    folder.mkdir(parents=True, exist_ok=True)
    self._events = EventsWriter(str(folder / "events"))
    self._every = 0 if isinstance(folder, Path) else FLUSH_SECONDS
    self._flushed = 0.0
    self._write(run.start + 1, session_log=SessionLog(status=SessionLog.START))  # hides what is made again

  def _write(self, step: int, **content: Any) -> None:
    self._events.write_event(Event(wall_time=time.time(), step=step, **content))
    if time.monotonic() - self._flushed >= self._every:
      self._events.flush()
      self._flushed = time.monotonic()

  def log(self, step: int, values: Mapping[str, float]) -> None:
    """Writes an event."""
    found = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
    self._write(step, summary=Summary(value=found))

  def close(self) -> None:
    """Closes the file."""
    self._events.close()


def build(run: Run) -> TensorBoard:
  """The tracker of a stage."""
  return TensorBoard(run)
