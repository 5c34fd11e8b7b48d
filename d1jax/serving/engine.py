"""The engine: a thread that owns the device, and completes the prompts of many requests at once."""

import collections
import functools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from d1jax.diffusion.slots import check_row, columns_needed, completion_start
from d1jax.generation.generate import MOST_PROMPTS, MOST_SEEDS
from d1jax.model import Model
from d1jax.serving.lane import Lane, how_many, key_program, sizes_of
from d1jax.serving.request import Job, Request, Update
from d1jax.state import Params
from d1jax.tasks.common import check_integer

log = logging.getLogger(__name__)

MOST_SAMPLES = 2**31 // MOST_PROMPTS
"""The number of samples of a prompt."""


class BusyError(Exception):
  """The queue is full, or the engine is closed.

  Attributes:
    retry_after: seconds, after which there may be room.
  """

  def __init__(self, message: str, retry_after: float):
    super().__init__(message)
    self.retry_after = retry_after


class Ticket:
  """A submitted request."""

  def __init__(self, job: Job, cancel: Callable[[], None]):
    self._job, self._cancel = job, cancel

  @property
  def queued_seconds(self) -> float:
    """How long the request has waited for a free slot."""
    began = self._job.began
    return (time.monotonic() if began is None else began) - self._job.submitted

  def cancel(self) -> None:
    """Ends the request after the forward passes that run; its listener gets a last update, unless it had one. Any
    thread may call it.
    """
    self._cancel()


class Engine:
  """Completes requests on the device of a model.

  Attributes:
    ready: whether requests are served: `prepare` is done, and the engine is not closed.
  """

  def __init__(
    self,
    model: Model,
    params: Params | None = None,
    *,
    slots: int = 16,
    lengths: Sequence[int] = (256, 512, 1024),
    block_length: int = 32,
    queue: int = 64,
  ):
    """Stores the arguments; nothing is compiled yet.

    Args:
      model: network and mesh.
      params: the weights, from `Model.publish`; None: `Model.params`.
      slots: the most rows that run at once on canvases of one length; rounded up to what the mesh divides.
      lengths: the canvases: a request takes the smallest that holds its prompt and its completion. They are rounded up
        to whole blocks of a block-causal network.
      block_length: the longest block of a request.
      queue: the most requests that wait.
    """
    for name, value in (("slots", slots), ("block_length", block_length), ("queue", queue)):
      check_integer(name, value, 1)
    if not lengths:
      raise ValueError("lengths is empty; give a length at least")
    for length in lengths:
      check_integer("a length of lengths", length, 1)
    self.ready = False
    self._model, self._denoiser, self._given = model, model.rollout_denoiser, params
    block = self._denoiser.block or 1
    self._width = block_length if self._denoiser.block is None else min(block_length, block)
    sizes = sizes_of(slots, model.rollout_ways)
    canvases = sorted({-(-length // block) * block for length in lengths})
    self._lanes = [Lane(model, self._params, length, sizes, self._width) for length in canvases]
    self._most_waiting = queue
    self._changed = threading.Condition()
    self._waiting: list[Job] = []
    self._closed = False
    self._thread: threading.Thread | None = None
    self._key: Callable[[int, int], np.ndarray] | None = None
    self._turn = 0
    self._requests = self._tokens = 0
    self._ended = collections.deque[float](maxlen=16)

  def _params(self) -> Params:
    return self._model.params if self._given is None else self._given

  def prepare(self, report: Callable[[str], Any] = lambda line: None) -> None:
    """Compiles every program, calls `report` with a line before each, and starts the thread; nothing is compiled
    afterwards.
    """
    if self._thread is not None:
      return
    self._key = key_program(self._model)
    jax.block_until_ready(self._params())  # read or drawn here, not while the first pass is timed
    for lane in self._lanes:
      lane.prepare(report)
    self._thread = threading.Thread(target=self._run, name="d1jax-engine", daemon=True)
    self._thread.start()
    self.ready = True

  def check(self, request: Request) -> None:
    """Raises a ValueError that names the parameter and the bound if the request cannot be served."""
    prompt, spec, denoiser = request.prompt, request.spec, self._denoiser
    check_row(denoiser, spec, self._width)
    if not len(prompt):
      raise ValueError("prompt has no token: give one at least")
    if prompt.min() < 0 or prompt.max() >= denoiser.vocab:
      raise ValueError(f"prompt has ids outside of 0 to {denoiser.vocab - 1}: encode it with the model's tokenizer")
    needed, longest = columns_needed(denoiser, spec, len(prompt)), self._lanes[-1].length
    if needed > longest:
      raise ValueError(
        f"prompt has {len(prompt)} tokens, which with completion_length={spec.completion_length} need {needed}; the"
        f" longest canvas has {longest}: shorten the prompt, or use a smaller completion_length"
      )
    check_integer("seed", request.seed, 0)
    check_integer("sample", request.sample, 0)
    for name, value, most in (("seed", request.seed, MOST_SEEDS), ("sample", request.sample, MOST_SAMPLES)):
      if value >= most:
        raise ValueError(f"{name} is {value}; give one below {most}")
    if request.deadline is not None and not request.deadline > 0:
      raise ValueError(f"deadline is {request.deadline}; give seconds above 0, or None")

  def submit(self, request: Request, listen: Callable[[Update], None]) -> Ticket:
    """Queues a request. Any thread may call it.

    Args:
      request: what to complete.
      listen: is called with each update from the engine's thread; it must not block. If it raises, the request ends.

    Raises:
      BusyError: the queue is full, or the engine is closed.
      ValueError: the request cannot be served, see `check`.
    """
    self.check(request)
    tokens = len(request.prompt)
    needed = columns_needed(self._denoiser, request.spec, tokens)
    lane = next(lane for lane in self._lanes if lane.length >= needed)
    first = completion_start(self._denoiser, request.spec, tokens, lane.length)
    job = Job(request, listen, lane, time.monotonic(), first)
    with self._changed:
      if self._closed:
        raise BusyError("the engine is closing and takes no more requests", self._retry_after())
      if len(self._waiting) >= self._most_waiting:
        raise BusyError(f"{len(self._waiting)} requests wait, the most that may", self._retry_after())
      self._waiting.append(job)
      self._changed.notify()

    def cancel() -> None:
      with self._changed:
        job.cancelled = job.cancelled or "cancelled"
        self._changed.notify()

    return Ticket(job, cancel)

  def _retry_after(self) -> float:
    """Seconds until a quarter of the queue is done, at the pace of the last requests."""
    ended = list(self._ended)
    each = (ended[-1] - ended[0]) / (len(ended) - 1) if len(ended) > 1 else 1.0
    return min(max(1.0, each * self._most_waiting / 4), 60.0)

  def close(self, drain: float | None = None) -> None:
    """Refuses new requests, and ends when those that were submitted have ended.

    Args:
      drain: seconds after which requests that still run or wait are cancelled; None: they are completed.
    """
    with self._changed:
      self._closed, self.ready = True, False
      self._changed.notify()
    if self._thread is None:
      self._end_all("cancelled", "the engine was closed before it was ready")
      return
    self._thread.join(drain)
    with self._changed:
      for job in self._jobs():
        job.cancelled = job.cancelled or "cancelled"
      self._changed.notify()
    self._thread.join()

  def gauges(self) -> dict[str, float]:
    """Numbers to watch: `slots`, `running` and `waiting` requests; since the start, `requests` that ended, completion
    `tokens`, `passes` of the network and `token_forwards`, the positions that they computed.
    """
    return {
      "slots": sum(lane.slots for lane in self._lanes),
      "running": sum(lane.slots - lane.free for lane in self._lanes),
      "waiting": len(self._waiting),
      "requests": self._requests,
      "tokens": self._tokens,
      "passes": sum(lane.passes for lane in self._lanes),
      "token_forwards": sum(lane.token_forwards for lane in self._lanes),
    }

  def _jobs(self) -> list[Job]:
    """All requests that have not ended."""
    return [job for lane in self._lanes for job in lane.jobs if job is not None] + self._waiting

  def _run(self) -> None:
    """The thread."""
    try:
      self._serve()
    except Exception:
      log.exception("the engine stops: it could not go on after an error")
      self._closed, self.ready = True, False
      self._end_all("error", "the engine has stopped after an error")

  def _serve(self) -> None:
    while True:
      with self._changed:
        self._changed.wait_for(lambda: self._closed or self._jobs())
        if self._closed and not self._jobs():
          return
      self._sweep()
      self._admit()
      busy = [lane for lane in self._lanes if lane.free < lane.slots]
      if busy:
        self._turn += 1
        lane = busy[self._turn % len(busy)]
        self._guarded(lane, self._advance)

  def _guarded(self, lane: Lane, work: Callable[[Lane], None]) -> None:
    """Does a piece of work in a lane, whose requests get the answer `error` if it fails; the engine goes on."""
    try:
      work(lane)
    except Exception as error:
      log.exception("the requests on canvases of %d tokens end, because a step of the engine failed", lane.length)
      message = f"a denoising step failed: {type(error).__name__}"
      for job in [job for job in lane.jobs if job is not None]:
        self._end(job, "error", message)
      lane.reset()

  def _sweep(self) -> None:
    """Ends what is cancelled or late."""
    now = time.monotonic()
    for job in self._jobs():
      deadline = job.request.deadline
      if job.cancelled:
        self._end(job, job.cancelled)
      elif deadline is not None and now >= job.submitted + deadline:
        self._end(job, "deadline")

  def _admit(self) -> None:
    """Lets waiting requests into free slots, the first to come first."""
    for job in list(self._waiting):
      if job.lane.free:
        self._guarded(job.lane, functools.partial(self._let_in, job))

  def _let_in(self, job: Job, lane: Lane) -> None:
    request, slot = job.request, None
    assert self._key is not None
    try:
      key = self._key(request.seed, request.sample)
      slot = lane.admit(job, request.spec, np.asarray(request.prompt, np.int32), key)
    finally:
      with self._changed:
        self._waiting.remove(job)
        job.slot, job.began = slot, time.monotonic()
      if slot is None:
        self._tell(job, job.update(self._denoiser.mask_id, "error", "the prompt could not be computed"))

  def _advance(self, lane: Lane) -> None:
    """Advances some rows of a lane, and tells their listeners."""
    running = sorted((job for job in lane.jobs if job is not None), key=lambda job: (job.known > 0, job.submitted))
    chosen = running[: how_many(lane.seconds, len(running))]
    each = any(job.request.every_step for job in chosen)
    finished = lane.advance([job.slot for job in chosen if job.slot is not None], 1 if each else None)
    for job in chosen:
      if job.slot is not None and finished[job.slot]:
        self._finish_block(job)
      elif job.request.every_step and not self._tell(job, job.update(self._denoiser.mask_id, None)):
        self._free(job)

  def _finish_block(self, job: Job) -> None:
    """Tells what a finished block holds; the request ends with its first stop id, or with its last block."""
    length, row = job.request.spec.completion_length, job.lane.rows
    known = min(int(row.start[job.slot]) - job.first, length)
    stops = np.flatnonzero(np.isin(row.tokens[job.slot, job.first : job.first + known], self._denoiser.stop_ids))
    job.known = int(stops[0]) + 1 if stops.size else known
    reason = "stop" if stops.size else "length" if known == length else None
    if reason:
      self._end(job, reason)
    elif not self._tell(job, job.update(self._denoiser.mask_id, None)):
      self._free(job)

  def _tell(self, job: Job, update: Update) -> bool:
    """Whether the listener could be told."""
    try:
      job.listen(update)
    except Exception:
      log.exception("a listener failed; its request ends")
      return False
    return True

  def _end(self, job: Job, reason: str, message: str = "") -> None:
    update = job.update(self._denoiser.mask_id, reason, message)
    self._free(job)
    self._tell(job, update)

  def _free(self, job: Job) -> None:
    with self._changed:
      if job.slot is not None:
        job.lane.release(job.slot)
        job.slot = None
      else:
        self._waiting.remove(job)
    self._requests += 1
    self._tokens += job.known
    self._ended.append(time.monotonic())

  def _end_all(self, reason: str, message: str) -> None:
    for job in self._jobs():
      self._end(job, reason, message)
