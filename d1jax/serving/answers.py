"""From the engine's updates to texts that are final, and to OpenAI's JSON."""

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from d1jax.data.tokenizer import Tokenizer
from d1jax.serving.protocol import Ask
from d1jax.serving.request import Update

LOWEST = -9999.0
"""OpenAI's log-probability of what is next to impossible; JSON has no minus infinity."""


class Inbox:
  """The updates of some completions, on their way from the engine's thread to one coroutine.

  An update holds everything that those before it hold, so that of each completion only the last one is kept, beside the
  lengths at which it had become final. So a slow reader takes no memory, misses canvases, and never misses text.
  """

  def __init__(self, count: int):
    """Takes updates of so many completions; the running event loop is that of the coroutine."""
    self._loop = asyncio.get_running_loop()
    self._arrived = asyncio.Event()
    self._latest: dict[int, Update] = {}
    self._marks: list[list[int]] = [[] for _ in range(count)]
    self._known = [0] * count

  def put(self, index: int, update: Update) -> None:
    """Takes an update from any thread."""
    self._loop.call_soon_threadsafe(self._put, index, update)

  def _put(self, index: int, update: Update) -> None:
    if update.known > self._known[index]:
      self._known[index] = update.known
      self._marks[index].append(update.known)
    self._latest[index] = update
    self._arrived.set()

  async def get(self, timeout: float) -> list[tuple[int, Update, list[int]]]:
    """Waits for updates: (index, the last update, the lengths that became final since, in order); none come within
    `timeout` seconds if the list is empty.
    """
    with contextlib.suppress(TimeoutError):
      async with asyncio.timeout(timeout):
        await self._arrived.wait()
    self._arrived.clear()
    found = [(index, update, self._marks[index]) for index, update in self._latest.items()]
    self._latest = {}
    for index, _, _ in found:
      self._marks[index] = []
    return found


class Words:
  """The text of each token by itself, with its space; it is asked for once."""

  def __init__(self, tokenizer: Tokenizer):
    self._tokenizer = tokenizer
    self._known: dict[int, str] = {}

  def texts(self, ids: Sequence[int]) -> list[str]:
    """The texts of tokens."""
    new = sorted({i for i in ids if i not in self._known})
    if new:
      # SentencePiece leaves out the space before the first word of a text, but not before the second.
      once, twice = self._tokenizer.decode_all([[i] for i in new]), self._tokenizer.decode_all([[i, i] for i in new])
      self._known |= {i: two[len(one) :] for i, one, two in zip(new, once, twice, strict=True)}
    return [self._known[i] for i in ids]


class Token(NamedTuple):
  """A token of an answer: its part of the text, where that begins, and its log-probability."""

  text: str
  start: int
  logp: float


class Piece(NamedTuple):
  """What an answer has more than before: final text, and the tokens that end in it."""

  text: str
  tokens: list[Token]


class Answer:
  """The text of one completion, as it becomes final.

  The text is the decoded tokens, up to the first stop id, the first stop text or the most tokens. What may still change
  is held back: the bytes of an unfinished character, with which no answer ends, and what may be the beginning of a stop
  text. An answer is read in the same steps whether it is streamed or not, so that both are the same text whatever the
  tokenizer does.

  Attributes:
    text: the final text, without the prefill.
    count: the tokens that are final.
    finish: OpenAI's reason of the end: `stop` or `length`; None: it goes on.
  """

  def __init__(self, ask: Ask, tokenizer: Tokenizer):
    """Begins an empty answer."""
    self._ask, self._tokenizer = ask, tokenizer
    self._ends: list[int] = []  # of the text, after each token; for log-probabilities alone
    self._given = 0  # tokens that were given with their log-probabilities
    self.text, self.count = "", 0
    self.finish: str | None = None

  def feed(self, update: Update, marks: Sequence[int]) -> Piece:
    """Takes an update, and the lengths at which it became final."""
    before = len(self.text)
    for known in marks:
      if self.finish is None:
        self._extend(update.tokens.tolist(), min(known, self._ask.tokens))
    if self.finish is None and update.reason in ("stop", "length"):
      self._extend(update.tokens.tolist(), min(update.known, self._ask.tokens), ended=update.reason)
    return Piece(self.text[before:], self._tokens(update) if self._ask.logprobs else [])

  def _extend(self, ids: list[int], count: int, ended: str | None = None) -> None:
    """Reads the tokens up to `count`."""
    stopped = next((i + 1 for i in range(self.count, count) if ids[i] in self._tokenizer.stop_ids), None)
    count = stopped or count
    finish = "stop" if stopped else "length" if count >= self._ask.tokens else ended
    (text,) = self._tokenizer.decode_all([ids[:count]])
    emitted = len(self.text)
    if self._ask.logprobs:
      self._measure(ids, count)
    # A stop text may begin in what was held back, and no earlier.
    places = [(place, stop) for stop in self._ask.stop if (place := text.find(stop, emitted)) >= 0]
    if places:
      place, stop = min(places)
      finish, safe = "stop", place
      rows = self._tokenizer.decode_all([ids[:end] for end in range(self.count + 1, count + 1)])
      count = next((end for end, row in enumerate(rows, self.count + 1) if stop in row[emitted:]), count)
    else:
      safe = len(_whole(text))
      if finish is None:
        safe -= max((_overlap(text[emitted:safe], stop) for stop in self._ask.stop), default=0)
    self.text += text[emitted : max(safe, emitted)]
    self.count, self.finish = count, finish

  def _measure(self, ids: list[int], count: int) -> None:
    """Notes where the text of each new token ends; a character of several tokens belongs to the last of them."""
    rows = self._tokenizer.decode_all([ids[:end] for end in range(len(self._ends) + 1, count + 1)])
    for row in rows:
      self._ends.append(max(len(_whole(row)), self._ends[-1] if self._ends else 0))

  def _tokens(self, update: Update) -> list[Token]:
    """The tokens whose text is final, and that were not given yet; a stop id has no text and is left out."""
    found = []
    while self._given < self.count:
      start = self._ends[self._given - 1] if self._given else 0
      end = self._ends[self._given]
      is_stop = int(update.tokens[self._given]) in self._tokenizer.stop_ids
      if is_stop or (start >= len(self.text) and end > start) or (self.finish is None and end > len(self.text)):
        break
      logp = float(update.reveal_logp[self._given])
      found.append(Token(self.text[start:end], start, max(logp, LOWEST)))
      self._given += 1
    return found


def _whole(text: str) -> str:
  """A text without the bytes of an unfinished character at its end, which are three at most: decoders write U+FFFD for
  each of them, or for all.
  """
  return text[:-3] + text[-3:].rstrip("\ufffd")


def _overlap(text: str, stop: str) -> int:
  """The length of the longest end of a text that is a beginning of a stop text, but not all of it."""
  return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def canvas(update: Update, words: Words, mask_id: int, count: int) -> dict[str, Any]:
  """What a canvas shows after a step: the texts of its first `count` tokens, and the steps that unmasked them, counted
  from 0 without gaps; None where a mask is left.
  """
  shown = update.tokens != mask_id
  steps = np.unique(update.reveal_step[shown])
  order = np.searchsorted(steps, update.reveal_step)[:count].tolist()
  ids, given = update.tokens[:count], shown[:count].tolist()
  texts = iter(words.texts(ids[shown[:count]].tolist()))
  return {
    "step": len(steps),
    "tokens": [next(texts) if one else None for one in given],
    "steps": [step if one else None for step, one in zip(order, given, strict=True)],
  }


def steps_of(update: Update, mask_id: int) -> int:
  """The number of steps that unmasked a token so far."""
  return len(np.unique(update.reveal_step[update.tokens != mask_id]))


class Writer:
  """The JSON of one answer to a client.

  Attributes:
    id: the answer's id.
  """

  def __init__(self, ask: Ask, name: str):
    """Writes answers of the model `name`."""
    self._ask, self._name = ask, name
    self._created = int(time.time())
    self.id = ("chatcmpl-" if ask.chat else "cmpl-") + secrets.token_hex(12)

  def _head(self, choices: list[dict[str, Any]], part: bool) -> dict[str, Any]:
    kind = ("chat.completion.chunk" if part else "chat.completion") if self._ask.chat else "text_completion"
    return {"id": self.id, "object": kind, "created": self._created, "model": self._name, "choices": choices}

  def _choice(self, index: int, finish: str | None, tokens: list[Token]) -> dict[str, Any]:
    found: dict[str, Any] | None = None
    if self._ask.logprobs and self._ask.chat:
      listed = [
        {"token": one.text, "logprob": one.logp, "bytes": list(one.text.encode()), "top_logprobs": []} for one in tokens
      ]
      found = {"content": listed, "refusal": None}
    elif self._ask.logprobs:
      found = {
        "tokens": [one.text for one in tokens],
        "token_logprobs": [one.logp for one in tokens],
        "top_logprobs": [{one.text: one.logp} for one in tokens] if self._ask.top else None,
        "text_offset": [one.start for one in tokens],
      }
    return {"index": index, "finish_reason": finish, "logprobs": found}

  def part(
    self, index: int, piece: Piece, finish: str | None = None, own: dict[str, Any] | None = None, role: bool = False
  ) -> bytes:
    """An event with more text of a choice; `own` is what d1jax says beside it, `role` begins a message."""
    choice = self._choice(index, finish, piece.tokens)
    if self._ask.chat:
      choice["delta"] = {"role": "assistant"} if role else {}
      if piece.text or role:
        choice["delta"]["content"] = piece.text
    else:
      choice["text"] = piece.text
    return event(self._head([choice], True) | ({} if own is None else {"d1jax": own}))

  def last(self, usage: dict[str, int]) -> bytes:
    """The event that counts the tokens."""
    return event(self._head([], True) | {"usage": usage})

  def whole(self, texts: list[tuple[Piece, str]], usage: dict[str, int], own: dict[str, Any]) -> dict[str, Any]:
    """The answer that is not streamed: (text and tokens, reason of the end) of each choice."""
    choices = []
    for index, (piece, finish) in enumerate(texts):
      choice = self._choice(index, finish, piece.tokens)
      if self._ask.chat:
        choice["message"] = {"role": "assistant", "content": piece.text, "refusal": None}
      else:
        choice["text"] = piece.text
      choices.append(choice)
    return self._head(choices, False) | {"usage": usage, "d1jax": own}


def event(value: dict[str, Any]) -> bytes:
  """A server-sent event with JSON."""
  return b"data: " + dumped(value) + b"\n\n"


def dumped(value: Any) -> bytes:
  """JSON in ASCII alone, since a text may hold halves of surrogate pairs."""
  return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()
