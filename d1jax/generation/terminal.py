"""Shows the canvas on a terminal, step by step; each token has the colour of the step that unmasked it."""

import itertools
from collections.abc import Callable, Iterator, Sequence

from d1jax.generation import board as boards
from d1jax.generation import canvas as canvases
from d1jax.generation.canvas import GIVEN, SCALE, Canvas, Glyph, evenly, layout

MOST = 20
"""The largest number of steps to show."""

LEGEND = (
  f"{canvases.HIDDEN} hidden   {canvases.NEW_LINE} line break   {canvases.END} end   {canvases.BEHIND} behind the end"
)

BOARD_LEGEND = (f"{canvases.HIDDEN} hidden   * not as in the solution", "clues grey, errors red")
"""That of a Sudoku, without colours and with them."""

_GREY, _RED = "90", "31;1"


def show(canvas: Canvas, *, columns: int, colored: bool) -> str:
  """The canvas after each step (after evenly spaced steps if there are many), and a legend.

  Args:
    canvas: the completion.
    columns: the width of the terminal.
    colored: whether the terminal supports colours; unmasked and masked tokens also differ without them.
  """
  before = GIVEN
  parts = []
  for step in evenly(range(canvas.total), MOST):
    head = ", ".join(canvas.progress(step))
    parts.append("\n".join([head, *_picture(canvas, step, before, columns, colored), ""]))
    before = step
  scale = "".join(_paint("■", f"38;5;{number}", colored) for number in SCALE)
  legend = LEGEND if canvas.board is None else BOARD_LEGEND[colored]
  parts.append(f"revealed early {scale} late   {legend}" if colored else legend)
  return "\n".join(parts)


def frame(canvas: Canvas, *, columns: int, colored: bool) -> list[str]:
  """The lines of a canvas that is not finished, after its last step."""
  last = canvas.total - 1
  return _picture(canvas, last, last - 1, columns, colored)


def _picture(canvas: Canvas, step: int, before: int, columns: int, colored: bool) -> list[str]:
  """The lines of a canvas after a step: its texts, or the grid of its Sudoku."""
  if canvas.board is None:
    return ["".join(_line(canvas, line, step, before, colored)) for line in layout(canvas.texts, columns)]
  board, cells = canvas.board, []
  for cell, token in enumerate(board.tokens):
    shown = bool(canvas.steps[token] <= step)
    kind = board.kind(cell, shown=shown)
    fresh = ";1" if shown and canvas.steps[token] > before else ""
    code = {boards.CLUE: _GREY, boards.WRONG: _RED, boards.HIDDEN: "2"}.get(kind)
    code = code or f"38;5;{SCALE[canvas.shade(token)]}{fresh}"
    text = board.text(cell, shown=shown) or canvases.HIDDEN
    cells.append(_paint(text, code, colored) + ("" if colored else "*" if kind == boards.WRONG else " "))
  return boards.rows(cells, 1 if colored else 2)


class Screen:
  """A part of a terminal, at the cursor, that is written again and again."""

  def __init__(self, write: Callable[[str], None], rows: int):
    """Writes with `write`, and never more than so many lines: the last ones."""
    self._write, self._rows, self._up = write, rows, 0

  def show(self, lines: Sequence[str]) -> None:
    """Replaces what is shown, in one piece, so that it does not flicker; no lines: nothing is left of it."""
    kept = lines[-self._rows :]
    back = f"\x1b[{self._up}A" if self._up else ""
    self._write(back + "\r\x1b[J" * bool(back or kept) + "".join(f"{line}\n" for line in kept))
    self._up = len(kept)


def _line(canvas: Canvas, line: list[Glyph], step: int, before: int, colored: bool) -> Iterator[str]:
  """Yields the parts of a line, each in one colour; tokens that this step unmasked are bold."""

  def style(glyph: Glyph) -> tuple[str, bool]:
    own = canvas.steps[glyph.token]
    if own > step:
      return "2", True
    if own == GIVEN:
      return "", False
    return f"38;5;{SCALE[canvas.shade(glyph.token)]}" + (";1" if own > before else ""), False

  for (code, hidden), run in itertools.groupby(line, style):
    text = "".join(canvases.HIDDEN * glyph.columns if hidden else glyph.text for glyph in run)
    yield _paint(text, code, colored)


def _paint(text: str, code: str, colored: bool) -> str:
  return f"\x1b[{code}m{text}\x1b[0m" if colored and code else text
