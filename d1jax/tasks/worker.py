"""The inside of a process that grades: it holds one task and knows nothing of networks or arrays."""

import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Sequence

from d1jax.tasks import checked
from d1jax.tasks.base import Grade, Record, Task

_held: list[Task] = []


def start(pickled: bytes) -> None:
  """Take the task in; called once, when the process starts.

  Ctrl-C is left to the process that asked for the grades. When that dies, whatever way, this one ends too.
  """
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  threading.Thread(target=_end_with_parent, daemon=True).start()
  _held.append(pickle.loads(pickled))


def grade(texts: Sequence[str], records: Sequence[Record], protocol: str) -> list[Grade]:
  """Grade completions, one record each, with the task that the process holds."""
  return [checked.grade(_held[0], text, record, protocol) for text, record in zip(texts, records, strict=True)]


def _end_with_parent() -> None:
  parent = multiprocessing.parent_process()
  if parent is not None:
    parent.join()
    os._exit(1)
