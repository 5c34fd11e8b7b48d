"""An engine that answers with what it is told, and what a server needs beside it."""

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from d1jax.data.hugging_face import HuggingFaceTokenizer
from d1jax.diffusion.rollout import SamplerSpec
from d1jax.serving.engine import BusyError, Engine, Ticket
from d1jax.serving.protocol import Served
from d1jax.serving.request import Request, Update
from d1jax.serving.service import Service
from tests.data.folders import small_files

SPEC = SamplerSpec(completion_length=32, diffusion_steps=16, block_length=8, temperature=0.0, early_exit=True)
SERVED = Served("tiny", SPEC, None, 256, 8)


@functools.cache
def tokenizer() -> HuggingFaceTokenizer:
  """Reads bytes; the mask is 261, stops are 258 and the end of a turn."""
  return HuggingFaceTokenizer(small_files(mask_token_id=261, eos_token_id=258, pad_token_id=258))


def written(text: str) -> list[int]:
  """The ids of an answer that says this and ends."""
  return [*tokenizer().encode(text), 258]


def echo(request: Request) -> list[int]:
  """Says the end of the prompt's last message again, with the seed and the sample."""
  (prompt,) = tokenizer().decode_all([request.prompt.tolist()])
  said = prompt.strip().removesuffix("assistant").strip().splitlines()[-1]
  return written(f"{said} {request.seed} {request.sample}")


def updates(request: Request, ids: Sequence[int], mask_id: int, stop_ids: Sequence[int]) -> list[Update]:
  """What an engine says of a completion: a token a step, from right to left in each block."""
  spec = request.spec
  length, size = spec.completion_length, spec.block_length
  full = np.asarray([*ids, *[0] * length][:length], np.int32)
  found = []
  tokens, steps, logps = np.full(length, mask_id, np.int32), np.full(length, -1, np.int32), np.zeros(length, np.float32)
  for start in range(0, length, size):
    for within in reversed(range(size)):
      at = start + within
      tokens[at], steps[at], logps[at] = full[at], start + size - 1 - within, -0.5 * (at + 1)
      if request.every_step and within:
        found.append(Update(tokens.copy(), steps.copy(), logps.copy(), start, None))
    stops = np.flatnonzero(np.isin(tokens, stop_ids))
    known, reason = start + size, "length" if start + size == length else None
    if stops.size:
      known, reason = int(stops[0]) + 1, "stop"
    found.append(Update(tokens.copy(), steps.copy(), logps.copy(), known, reason))
    if reason:
      break
  return found


class StandInTicket(Ticket):
  """Of a thread, which looks whether it is cancelled."""

  def __init__(self) -> None:
    self.cancelled = threading.Event()

  @property
  def queued_seconds(self) -> float:
    return 0.0

  def cancel(self) -> None:
    self.cancelled.set()


class StandIn(Engine):
  """Answers each request in a thread of its own, without a device.

  Attributes:
    tickets: all that were given.
    go: requests wait for it.
  """

  def __init__(self, answer: Callable[[Request], list[int]] = echo, *, queue: int = 64, seconds: float = 0.0):
    self.answer, self.queue, self.seconds = answer, queue, seconds
    self.ready, self.tickets, self.running = True, [], 0
    self.go = threading.Event()
    self.go.set()

  def prepare(self, report=print) -> None:
    report("nothing to compile")
    self.ready = True

  def check(self, request: Request) -> None:
    size = request.prompt.size + request.spec.completion_length
    if size > SERVED.longest:
      raise ValueError(f"the prompt has {request.prompt.size} tokens, too many beside {request.spec.completion_length}")

  def submit(self, request: Request, listen: Callable[[Update], None]) -> Ticket:
    if self.running >= self.queue:
      raise BusyError("the queue is full", 1.5)
    self.running += 1
    ticket = StandInTicket()
    self.tickets.append(ticket)
    threading.Thread(target=self._run, args=(request, listen, ticket), daemon=True).start()
    return ticket

  def _run(self, request: Request, listen: Callable[[Update], None], ticket: StandInTicket) -> None:
    began, update = time.monotonic(), None
    for update in updates(request, self.answer(request), 261, tokenizer().stop_ids):
      while not self.go.wait(0.01) and not ticket.cancelled.is_set():
        if request.deadline is not None and time.monotonic() - began > request.deadline:
          break
      time.sleep(self.seconds)
      late = request.deadline is not None and time.monotonic() - began > request.deadline
      if late or ticket.cancelled.is_set():
        update = update._replace(known=0, reason="deadline" if late else "cancelled")
      if update.reason is not None:
        self.running -= 1
      with contextlib.suppress(RuntimeError):  # the loop of a test that has ended
        listen(update)
      if update.reason is not None:
        return

  def close(self, drain: float | None = None) -> None:
    end = time.monotonic() + (drain or 60)
    while self.running and time.monotonic() < end:
      time.sleep(0.01)
    for ticket in self.tickets:
      ticket.cancel()

  def gauges(self) -> dict[str, float]:
    return {"slots": 4, "running": self.running, "waiting": 0, "requests": len(self.tickets), "tokens": 1e6}


def service(engine: StandIn | None = None, **changes) -> Service:
  """A service of a stand-in."""
  fields = {"key": None, "local": True, "request_seconds": 60.0, "served": SERVED} | changes
  return Service(engine=engine or StandIn(), tokenizer=tokenizer(), mask_id=261, **fields)
