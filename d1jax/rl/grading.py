"""The host's visit between two compiled programs: decode, grade, nothing else."""

import contextlib
import logging
import multiprocessing
import pickle
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from d1jax.data.tokenizer import Tokenizer
from d1jax.tasks import checked, worker
from d1jax.tasks.base import Grade, Record, Task, TaskError

SLICES = 4
"""Parts of a batch for each worker, so that one with slow texts does not hold up the rest."""

log = logging.getLogger(__name__)

Pending = Callable[[], list[Grade]]
"""Waits for the grades of a batch, in its order."""

_Slice = tuple[Sequence[str], Sequence[Record], str]


class WorkersDiedError(RuntimeError):
  """Worker processes died over a batch, and new ones too."""


class Graded(NamedTuple):
  """The texts of a batch of completions, their grades and their rewards."""

  texts: list[str]
  grades: list[Grade]
  rewards: Float[np.ndarray, "B"]


def decode(tokenizer: Tokenizer, completion: Int[np.ndarray, "B C"], mask: Bool[np.ndarray, "B C"]) -> list[str]:
  """The texts of completions where `mask` is true: up to their stop id."""
  return tokenizer.decode_all([row[keep].tolist() for row, keep in zip(completion, mask, strict=True)])


def graded_texts(
  tokenizer: Tokenizer,
  prefills: Sequence[str],
  completion: Int[np.ndarray, "B C"],
  mask: Bool[np.ndarray, "B C"],
  protocol: str,
) -> list[str]:
  """The texts that a protocol's rewards read: each prefill and the completion that follows it.

  Args:
    tokenizer: the tokenizer of the ids.
    prefills: the given start of each answer, which is graded too.
    completion: token ids.
    mask: true up to and including the stop id.
    protocol: `d1` also reads the text after the stop id, as d1's rewards do.
  """
  seen = np.ones_like(mask) if protocol == "d1" else mask
  return [prefill + text for prefill, text in zip(prefills, decode(tokenizer, completion, seen), strict=True)]


class Grader:
  """Grades batches of texts, here or in worker processes that import no array library but numpy.

  The processes start with the first batch and end with the `with` block, with this object, or with this process,
  however it ends. The grades are those of `task.grade`, whatever the number of workers.
  """

  def __init__(self, task: Task, workers: int):
    """Keeps the task.

    With 0 workers, texts are graded here, before `submit` returns.

    Raises:
      ValueError: a negative number, or a task that cannot be sent to another process.
    """
    if workers < 0:
      raise ValueError(f"{workers} grading workers: give 0 to grade in the run's own process, or more")
    self._task, self._workers = task, workers
    self._pool: ProcessPoolExecutor | None = None
    if workers:
      try:
        self._pickled = pickle.dumps(task)
        with _without_main():
          pickle.loads(self._pickled)
      except Exception as error:
        raise ValueError(
          f"the task {task.name} cannot be sent to workers ({error}); use 0, or define it in a module"
        ) from error

  def __enter__(self) -> "Grader":
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()

  def close(self) -> None:
    """Ends the workers; what they have not begun is dropped."""
    if self._pool is not None:
      self._pool.shutdown(cancel_futures=True)
      self._pool = None

  def submit(self, texts: Sequence[str], records: Sequence[Record], protocol: str) -> Pending:
    """Begins to grade a batch.

    Returns:
      A function that waits for the grades. If a worker dies, all workers are started again and the batch is graded once
      more. If one dies then too, the function raises a WorkersDiedError. It raises a TaskError if a grade is not
      allowed, for example because a reward is not finite.
    """
    if not self._workers:
      done: Future[list[Grade]] = Future()
      try:
        done.set_result([checked.grade(self._task, *row, protocol) for row in zip(texts, records, strict=True)])
      except TaskError as error:
        done.set_exception(error)
      return done.result
    size = max(len(texts) // (SLICES * self._workers), 1)
    slices = [(texts[i : i + size], records[i : i + size], protocol) for i in range(0, len(texts), size)]
    pool, futures = self._begin(slices)
    return lambda: self._wait(slices, pool, futures)

  def _begin(self, slices: Sequence[_Slice]) -> tuple[ProcessPoolExecutor, list[Future[list[Grade]]]]:
    """Hands the slices to the pool; in a broken one they fail at once."""
    if self._pool is None:
      # Not a fork server: where a signal goes to every process, a dying one would fail what it is asked for.
      context = multiprocessing.get_context("spawn")
      self._pool = ProcessPoolExecutor(self._workers, context, worker.start, (self._pickled,))
    futures: list[Future[list[Grade]]] = []
    with _without_main():
      for part in slices:
        try:
          futures.append(self._pool.submit(worker.grade, *part))
        except BrokenProcessPool as error:
          futures.append(Future())
          futures[-1].set_exception(error)
    return self._pool, futures

  def _wait(
    self, slices: Sequence[_Slice], pool: ProcessPoolExecutor, futures: list[Future[list[Grade]]]
  ) -> list[Grade]:
    try:
      return [grade for future in futures for grade in future.result()]
    except BrokenProcessPool:
      log.warning("a process that grades %s died; its batch is graded again", self._task.name)
    if self._pool is pool:
      self.close()
    try:
      return [grade for future in self._begin(slices)[1] for grade in future.result()]
    except BrokenProcessPool as error:
      raise WorkersDiedError(
        f"processes that grade {self._task.name} died twice on the same batch (out of memory, or killed by the grader):"
        " use fewer workers, or 0 to see where it happens"
      ) from error


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
  """Hides the program that runs, which a process that starts would import again, JAX and all."""
  main = sys.modules["__main__"]
  sys.modules["__main__"] = types.ModuleType("__main__")
  try:
    yield
  finally:
    sys.modules["__main__"] = main
