"""The canvas as a grid of characters, each with its token and the step that unmasked it.

A masked token takes as much space as its final text, so that nothing moves while the canvas fills.
"""

import dataclasses
import functools
import itertools
import unicodedata
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from d1jax.data.tokenizer import Tokenizer
from d1jax.errors import steers
from d1jax.generation import board as boards
from d1jax.generation.board import Board
from d1jax.generation.generate import Generation
from d1jax.tasks.base import Record

HIDDEN, NEW_LINE, END, BEHIND, SILENT, UNPRINTABLE = "░", "↵", "∎", "·", "◦", "\ufffd"
"""Signs of a masked token, a line break, the stop, a token after it, a token without text, a control character."""

_HANGING = (" ", NEW_LINE)

SCALE = (33, 69, 99, 135, 134, 169, 168, 167, 166, 172)
"""From early to late: blue, violet, red, orange. Numbers of xterm's 256 colours, readable on black and on white."""

GIVEN = -1
"""The step of a token that was given in the prefill."""

NEVER = int(np.iinfo(np.int32).max)
"""The step of a token that no step unmasked."""

NEAR = 16
"""The number of tokens from whose text a token's part of it is read off, before and behind it."""


@dataclasses.dataclass(frozen=True)
class Glyph:
  """A character on the grid, including combining marks.

  Attributes:
    text: the characters to draw.
    columns: the width: 1 or 2.
    token: the index of its token.
  """

  text: str
  columns: int
  token: int


@dataclasses.dataclass(frozen=True, eq=False)
class Canvas:
  """A completion and the steps that unmasked it.

  Attributes:
    prompt: the prompt.
    texts: the visible text of each token.
    steps: the step that unmasked each token, counted from 0 without gaps; or `GIVEN` or `NEVER`.
    board: the Sudoku that the answer fills in, which is drawn in place of the texts; None: there is none.
  """

  prompt: str
  texts: tuple[str, ...]
  steps: Int[np.ndarray, "N"]
  board: Board | None = None

  @functools.cached_property
  def total(self) -> int:
    """The number of steps that unmasked a token."""
    return int(self.steps[self.steps < NEVER].max()) + 1

  def progress(self, step: int) -> tuple[str, str]:
    """Two texts: the number of a step, and the number of tokens that are unmasked after it."""
    own = self.steps > GIVEN
    return f"step {step + 1} of {self.total}", f"{int((own & (self.steps <= step)).sum())} of {int(own.sum())} tokens"

  def shade(self, token: int) -> int:
    """The colour of a token, as an index in `SCALE`."""
    return round(int(self.steps[token]) / max(self.total - 1, 1) * (len(SCALE) - 1))


def of(generation: Generation, tokenizer: Tokenizer, record: Record | None = None) -> Canvas:
  """The canvas of a completion.

  A Sudoku is drawn as a grid if its question, `record`, is known.
  """
  ids = generation.tokens.tolist()
  ended = ids[generation.length - 1] in tokenizer.stop_ids
  read = generation.length - ended
  texts = [text or SILENT for text in pieces(tokenizer, ids[:read])]
  texts += [END] * ended + [BEHIND] * (len(ids) - generation.length)
  recorded = generation.reveal_step
  steps = np.where(recorded < 0, NEVER, np.searchsorted(np.unique(recorded[recorded >= 0]), recorded))
  if generation.prefill:
    texts, steps = [generation.prefill, *texts], np.append(GIVEN, steps)
  board = boards.of(texts, record) if record and "puzzle" in record else None
  return Canvas(generation.prompt, tuple(texts), steps, board)


def pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
  """The part of the text that each token adds; joined, the parts are the text.

  A character of several tokens belongs to the last of them.
  """
  if not ids:
    return []
  # A token adds what the text has more with it than without. To decode all n prefixes would take n^2 / 2 tokens, so a
  # prefix is decoded from a few tokens before its end on.
  (whole,) = tokenizer.decode_all([ids])
  found = _pieces(tokenizer, ids, NEAR)
  return found if "".join(found) == whole else _pieces(tokenizer, ids, len(ids))


def _pieces(tokenizer: Tokenizer, ids: Sequence[int], near: int) -> list[str]:
  """The parts of the text; each one is read off a text of `near` tokens before and behind, or a little more."""
  spans, asked = [], []
  for first in range(0, len(ids), near):
    begin, ends = max(first - near, 0), range(first, min(first + near, len(ids)) + 1)
    spans.append(len(ends))
    asked += [ids[begin : ends[-1] + near], *(ids[begin:end] for end in ends)]
  texts = iter(tokenizer.decode_all(asked))
  found = []
  for count in spans:
    around, *prefixes = itertools.islice(texts, count + 1)
    shared = itertools.accumulate((_shared(text, around) for text in prefixes), max)
    found += [around[first:end] for first, end in itertools.pairwise(shared)]
  return found


def _shared(text: str, other: str) -> int:
  """The length of the common beginning of two texts."""
  if other.startswith(text):
    return len(text)
  return next(place for place, pair in enumerate(zip(text, other + "\0", strict=False)) if pair[0] != pair[1])


def layout(texts: Sequence[str], columns: int) -> list[list[Glyph]]:
  """Breaks texts into lines: at line breaks, between words, and inside words that are longer than a line.

  A space or the sign of a line break stays on the line of its word, and may exceed the line by one column.
  """
  lines: list[list[Glyph]] = [[]]
  used = 0
  for word in _words(texts):
    letters = sum(glyph.columns for glyph in word if glyph.text not in _HANGING)
    fresh = used > 0 and used + letters > columns
    for glyph in word:
      if fresh or (used + glyph.columns > columns and glyph.text not in _HANGING):
        lines.append([])
        used, fresh = 0, False
      lines[-1].append(glyph)
      used += glyph.columns
    if word and word[-1].text == NEW_LINE:
      lines.append([])
      used = 0
  return lines if lines[-1] else lines[:-1]


def _words(texts: Sequence[str]) -> list[list[Glyph]]:
  """Groups glyphs into words; each word includes the space or line break that ends it."""
  words: list[list[Glyph]] = [[]]
  for token, text in enumerate(texts):
    for char in text:
      if unicodedata.combining(char) and words[-1]:
        last = words[-1][-1]
        words[-1][-1] = dataclasses.replace(last, text=last.text + char)
        continue
      wide = unicodedata.east_asian_width(char) in ("W", "F")
      words[-1].append(Glyph(visible(char), 2 if wide else 1, token))
      if char in " \n":
        words.append([])
  return words


def visible(char: str) -> str:
  """The character; or a substitute, if it would move the cursor, be invisible or change the direction of the text."""
  if char == "\n":
    return NEW_LINE
  return UNPRINTABLE if steers(char) else char


def evenly(steps: Sequence[int], most: int) -> list[int]:
  """At most `most` of the steps, evenly spaced, including the last one."""
  if len(steps) <= most:
    return list(steps)
  return [steps[round(place)] for place in np.linspace(len(steps) / most, len(steps), most) - 1]


def rgb(shade: int) -> tuple[int, int, int]:
  """Red, green and blue (0 to 255) of an index in `SCALE`."""
  levels, number = (0, 95, 135, 175, 215, 255), SCALE[shade] - 16
  return levels[number // 36], levels[number // 6 % 6], levels[number % 6]
