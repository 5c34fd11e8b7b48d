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
"""The seconds between uploads of events to a bucket, which stores only whole files."""


class TensorBoard:
  """One event file per attempt."""

  def __init__(self, run: Run):
    """Opens the file."""
    # A SummaryWriter is not used: on a full disk its thread would die, and the run would wait for it for ever.
    folder = run.workdir / "tensorboard" / run.stage
    folder.mkdir(parents=True, exist_ok=True)
    self._events = EventsWriter(str(folder / "events"))
    self._every = 0 if isinstance(folder, Path) else FLUSH_SECONDS
    self._flushed = 0.0
    self._write(run.start + 1, session_log=SessionLog(status=SessionLog.START))  # hides events that are logged again

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
