"""From requests to the engine's rows, and from its updates to the parts of an answer; nothing here knows HTTP."""

import asyncio
import contextlib
import dataclasses
import functools
import time
from collections.abc import AsyncGenerator
from typing import Any

import numpy as np

from d1jax.data.tokenizer import Tokenizer
from d1jax.serving.answers import Answer, Inbox, Piece, Words, Writer, canvas, event, steps_of
from d1jax.serving.engine import BusyError, Engine, Ticket
from d1jax.serving.fields import ApiError
from d1jax.serving.metrics import Metrics
from d1jax.serving.protocol import CHARACTERS_A_TOKEN, Ask, Served
from d1jax.serving.request import Request, Update

QUIET_SECONDS = 15.0
"""After so long without text a stream sends a comment, so that no proxy takes it for dead."""

DRAINING_SECONDS = 30.0
"""After which a client may ask another server, or this one when it was started again."""


@dataclasses.dataclass(eq=False)
class Service:
  """What the endpoints share.

  Attributes:
    engine: completes prompts.
    tokenizer: of the model.
    mask_id: of the model.
    served: the model's name, and bounds.
    key: what clients must send; None: nothing.
    local: whether the server listens on the loopback alone.
    request_seconds: the time of a completion.
    draining: whether it ends, and takes no more requests.
  """

  engine: Engine
  tokenizer: Tokenizer
  mask_id: int
  served: Served
  key: bytes | None
  local: bool
  request_seconds: float
  draining: bool = False
  created: int = dataclasses.field(default_factory=lambda: int(time.time()))
  metrics: Metrics = dataclasses.field(default_factory=Metrics)
  words: Words = dataclasses.field(init=False)

  def __post_init__(self) -> None:
    self.words = Words(self.tokenizer)

  def check_open(self) -> None:
    """An `ApiError` if no request can be answered now."""
    if self.draining:
      raise ApiError("the server is about to end; ask again later", status=503, retry_after=DRAINING_SECONDS)
    if not self.engine.ready:
      raise ApiError("the server is compiling; /health says when it is ready", status=503, retry_after=5.0)

  def rows(self, ask: Ask) -> list[Request]:
    """The rows of the engine that answer a request: all completions of the first prompt, then those of the second.

    Raises:
      ApiError: a prompt cannot be read, or the engine cannot serve a row.
    """
    name = "messages" if ask.chat else "prompt"
    prompts = [self._ids(prompt, ask.prefill, name) for prompt in ask.prompts]
    rows = [
      Request(np.asarray(ids, np.int32), ask.spec, ask.seed, sample, ask.canvas, self.request_seconds)
      for ids in prompts
      for sample in range(ask.samples)
    ]
    try:
      for row in rows:
        self.engine.check(row)
    except ValueError as error:
      raise ApiError(str(error).replace("completion_length", "max_tokens"), param=name) from None
    return rows

  def _ids(self, prompt: Any, prefill: str, name: str) -> list[int]:
    """The ids of a prompt: of a conversation, of a text, or ids themselves."""
    if isinstance(prompt, list) and isinstance(prompt[0], int):
      wrong = next((i for i in prompt if not 0 <= i < self.tokenizer.vocab or i == self.mask_id), None)
      if wrong is not None:
        must = f"below {self.tokenizer.vocab}, and not the mask's ({self.mask_id})"
        raise ApiError(f"the id {wrong} of the prompt must be {must}", param=name)
      return list(prompt)
    written = prompt if isinstance(prompt, str) else "".join(turn["content"] for turn in prompt)
    if len(written) + len(prefill) > CHARACTERS_A_TOKEN * self.served.longest:
      raise ApiError(
        f"the prompt has {len(written) + len(prefill)} characters, far more than the {self.served.longest} tokens of"
        " the longest canvas: shorten it",
        param=name,
      )
    try:
      unknown = self.tokenizer.unknown(written + prefill)
      if unknown:
        raise ApiError(
          f"the prompt has characters that the tokenizer does not know: {', '.join(map(repr, unknown[:20]))}",
          param=name,
        )
      return self.tokenizer.encode(prompt) if isinstance(prompt, str) else self.tokenizer.prompt(prompt, prefill)
    except ValueError as error:
      raise ApiError(str(error), param=name) from None


class Reply:
  """The completions of one request, while the engine writes them."""

  def __init__(self, service: Service, ask: Ask, rows: list[Request]):
    """Submits the rows, all of them or none.

    Raises:
      ApiError: the queue has no room for them.
    """
    self.service, self.ask = service, ask
    self.prompt_tokens = sum(row.prompt.size for row in rows[:: ask.samples])
    self.answers = [Answer(ask, service.tokenizer) for _ in rows]
    self.steps = [0] * len(rows)
    self.tickets: list[Ticket] = []
    self.began, self.first = time.monotonic(), False
    inbox = self._inbox = Inbox(len(rows))
    try:
      for index, row in enumerate(rows):
        self.tickets.append(service.engine.submit(row, functools.partial(inbox.put, index)))
    except (BusyError, ValueError) as error:
      self.cancel()
      if isinstance(error, BusyError):
        service.check_open()
        raise ApiError(
          f"{error}; ask again later", status=429, code="queue_full", retry_after=error.retry_after
        ) from None
      raise ApiError(str(error)) from None

  def cancel(self) -> None:
    """Frees the rows that still run."""
    for ticket in self.tickets:
      ticket.cancel()

  async def advance(self) -> AsyncGenerator[tuple[int, Update, Piece] | None, None]:
    """Yields (index, update, what is new) until all completions have ended; None after a quiet while.

    Raises:
      ApiError: a completion was ended by something else than its own end.
    """
    metrics, left = self.service.metrics, len(self.answers)
    try:
      while left:
        found = await self._inbox.get(QUIET_SECONDS)
        if not found:
          yield None
        for index, update, marks in found:
          answer = self.answers[index]
          if answer.finish is not None:
            continue
          piece = await asyncio.to_thread(answer.feed, update, marks)
          if answer.count and not self.first:
            self.first = True
            metrics.took("first_block", self.seconds)
          if answer.finish is not None:
            left -= 1
            self.tickets[index].cancel()
            self.steps[index] = steps_of(update, self.service.mask_id)
            metrics.took("completion", self.seconds)
            metrics.took("queued", self.queued([index]))
          elif update.reason is not None:
            raise self._failure(update)
          yield index, update, piece
    finally:
      self.cancel()

  @property
  def seconds(self) -> float:
    """Since the request."""
    return time.monotonic() - self.began

  def queued(self, indices: list[int]) -> float:
    """The seconds that the last of these completions waited for a slot."""
    return max(self.tickets[i].queued_seconds for i in indices)

  def figures(self, indices: list[int]) -> dict[str, Any]:
    """What d1jax says of completions that have ended."""
    seconds, queued = self.seconds, self.queued(indices)
    tokens = sum(self.answers[i].count for i in indices)
    return {
      "steps": sum(self.steps[i] for i in indices),
      "seconds": round(seconds, 4),
      "tokens_per_second": round(tokens / max(seconds - queued, 1e-6), 2),
      "queued_seconds": round(queued, 4),
      "seed": self.ask.seed,
    }

  @property
  def usage(self) -> dict[str, int]:
    """OpenAI's counts of tokens."""
    completion = sum(answer.count for answer in self.answers)
    return {
      "prompt_tokens": self.prompt_tokens,
      "completion_tokens": completion,
      "total_tokens": self.prompt_tokens + completion,
    }

  def _failure(self, update: Update) -> ApiError:
    if update.reason == "deadline":
      return ApiError(
        f"the answer took longer than the {self.service.request_seconds:g} seconds of a request: ask for fewer tokens"
        " or steps, or ask later",
        status=504,
        code="deadline",
      )
    if update.reason == "cancelled":
      return ApiError("the server ended before the answer did; ask again later", status=503)
    return ApiError(f"the answer failed: {update.message}", status=500)


async def events(reply: Reply) -> AsyncGenerator[bytes, None]:
  """The server-sent events of a stream."""
  ask, service = reply.ask, reply.service
  writer = Writer(ask, service.served.name)
  indices = range(len(reply.answers))
  try:
    async with contextlib.aclosing(reply.advance()) as found:
      if ask.chat:
        for index in indices:
          yield writer.part(index, Piece(ask.prefill, []), role=True)
      async for one in found:
        if one is None:
          yield b": the answer is on its way\n\n"
          continue
        index, update, piece = one
        answer = reply.answers[index]
        if ask.canvas:
          shown = canvas(update, service.words, service.mask_id, ask.tokens if answer.finish is None else answer.count)
          yield writer.part(index, Piece("", []), own=shown)
        if piece.text or piece.tokens:
          yield writer.part(index, piece)
        if answer.finish is not None:
          yield writer.part(index, Piece("", []), answer.finish, reply.figures([index]))
    if ask.usage:
      yield writer.last(reply.usage)
    yield b"data: [DONE]\n\n"
  except ApiError as error:
    yield event(error.body())


async def whole(reply: Reply) -> dict[str, Any]:
  """The answer that is not streamed."""
  tokens: list[list[Any]] = [[] for _ in reply.answers]
  async with contextlib.aclosing(reply.advance()) as found:
    async for one in found:
      if one is not None:
        tokens[one[0]] += one[2].tokens
  pieces = [
    (Piece(reply.ask.prefill + answer.text, own), answer.finish or "length")
    for answer, own in zip(reply.answers, tokens, strict=True)
  ]
  figures = reply.figures([*range(len(reply.answers))])
  return Writer(reply.ask, reply.service.served.name).whole(pieces, reply.usage, figures)
