"""The film of a canvas: an animated GIF."""

import io
import itertools
import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from d1jax import look
from d1jax.generation import board as boards
from d1jax.generation.canvas import GIVEN, NEVER, SCALE, Canvas, Glyph, evenly, layout, rgb
from d1jax.run.workdir import write_atomically

MOST_FRAMES = 240
PILL = look.rgb(look.DARK["rule"])
"""The colour of a masked token."""

MOST_CANVASES = 8
"""The largest number of completions in a film; they are shown one after the other."""

_SIZE, _CELL, _LINE, _MARGIN = 18, 11, 29, 28  # pixels: letters, their grid, the border
_PROMPT_LINES = 5
_FIRST, _SHORTEST, _LONGEST, _LAST = 700, 40, 500, 3000  # milliseconds
_WHOLE = 8000  # milliseconds of all steps together, if that is neither too fast nor too slow
_BACKGROUND, _DIM, _BRIGHT = (look.rgb(look.DARK[name]) for name in ("paper", "muted", "ink"))
_RED, _GREEN, _WHITE = look.rgb(look.DARK["wrong"]), look.rgb(look.DARK["right"]), (255, 255, 255)
_SQUARE, _GAP = 78, 12  # pixels: a cell of a Sudoku, the space between its boxes
_GRID = ImageFont.Layout.BASIC  # every letter has a whole number of pixels

_Color = tuple[int, int, int]


def check(path: Path) -> None:
  """Raises a ValueError unless a film can be written to the path; no file is left there."""
  if path.suffix.lower() != ".gif":
    raise ValueError(f"film={str(path)!r} does not end in .gif, the one format that is written")
  if path.is_dir():
    raise ValueError(f"film={str(path)!r} is a folder; name a file")
  try:
    with tempfile.TemporaryFile(dir=path.parent):
      pass
  except OSError as error:
    raise ValueError(f"film={str(path)!r} cannot be written ({error.strerror}); name another place") from None


def save(path: Path, canvases: Sequence[Canvas]) -> None:
  """Writes a film of completions, one after the other, in an endless loop.

  Raises:
    ValueError: see `check`.
    OSError: the disk is full.
  """
  check(path)
  longest = max((sum(map(len, canvas.texts)) for canvas in canvases if canvas.board is None), default=0)
  columns = min(100, max(44, math.isqrt(5 * longest // 2)))
  scenes = [_Scene(canvas, columns) if canvas.board is None else _BoardScene(canvas) for canvas in canvases]
  width = max(scene.width for scene in scenes)
  height = max(scene.height for scene in scenes)
  frames: list[Image.Image] = []
  durations: list[int] = []
  for scene in scenes:
    for image, milliseconds in scene.frames((width, height), MOST_FRAMES // len(scenes)):
      frames.append(image)
      durations.append(milliseconds)
  # All frames share one palette, so that colours do not flicker.
  some = evenly(range(len(frames)), 12)
  sheet = Image.new("RGB", (width, height * len(some)))
  for place, frame in enumerate(some):
    sheet.paste(frames[frame], (0, place * height))
  palette = sheet.quantize(256)
  first, *others = (frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames)
  content = io.BytesIO()
  first.save(content, "GIF", save_all=True, append_images=others, duration=durations, loop=0)
  write_atomically(path, content.getvalue())


class _Run(NamedTuple):
  """The part of a token on one line: its glyphs, and the corner where they start."""

  left: int
  top: int
  glyphs: list[Glyph]


class _Scene:
  """One completion: its layout and its frames."""

  def __init__(self, canvas: Canvas, columns: int):
    self._canvas = canvas
    self._font = ImageFont.truetype(
      Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSansMono.ttf", _SIZE, layout_engine=_GRID
    )
    prompt = layout([canvas.prompt], columns)
    self._prompt = ["".join(glyph.text for glyph in line) for line in prompt[:_PROMPT_LINES]]
    if len(prompt) > _PROMPT_LINES:
      self._prompt[-1] = self._prompt[-1][: columns - 1] + "…"
    top = _MARGIN + len(self._prompt) * _LINE + _LINE // 2
    self._runs: dict[int, list[_Run]] = {}
    for line in layout(canvas.texts, columns):
      left = _MARGIN
      for token, glyphs in itertools.groupby(line, lambda glyph: glyph.token):
        run = _Run(left, top, list(glyphs))
        self._runs.setdefault(token, []).append(run)
        left += sum(glyph.columns for glyph in run.glyphs) * _CELL
      top += _LINE
    self.width, self.height = 2 * _MARGIN + (columns + 1) * _CELL, top + 2 * _LINE + _MARGIN

  def frames(self, size: tuple[int, int], most: int) -> Iterator[tuple[Image.Image, int]]:
    """Yields the frames, each with its duration in milliseconds."""
    canvas = self._canvas
    base = Image.new("RGB", size, _BACKGROUND)
    drawn = ImageDraw.Draw(base)
    for place, text in enumerate(self._prompt):
      drawn.text((_MARGIN, _MARGIN + place * _LINE), text, _DIM, self._font)
    for token in range(len(canvas.texts)):
      if canvas.steps[token] == GIVEN:
        self._draw(drawn, token, _BACKGROUND, _BRIGHT)
      else:
        self._draw(drawn, token, PILL, None)
    yield self._with_progress(base, GIVEN), _FIRST
    steps = [GIVEN, *evenly(range(canvas.total), most - 2)]
    each = min(_LONGEST, max(_SHORTEST, _WHOLE // len(steps) // 10 * 10))
    for before, step in itertools.pairwise(steps):
      image = base.copy()
      for token in np.flatnonzero((canvas.steps > before) & (canvas.steps <= step)).tolist():
        color = rgb(canvas.shade(token))
        self._draw(ImageDraw.Draw(image), token, _mixed(color, _BACKGROUND, 0.35), _mixed(_WHITE, color, 0.7))
        self._draw(drawn, token, _BACKGROUND, _mixed(_WHITE, color, 0.25))
      yield self._with_progress(image, step), each
    self._finish(drawn)
    yield self._with_progress(base, steps[-1]), _LAST

  def _finish(self, draw: ImageDraw.ImageDraw) -> None:
    """Draws what the last picture has more than the step before."""

  def _draw(self, draw: ImageDraw.ImageDraw, token: int, pill: _Color, letters: _Color | None) -> None:
    """Draws a token over the picture; without a colour for letters, the token is masked."""
    for left, top, glyphs in self._runs.get(token, []):
      right = left + sum(glyph.columns for glyph in glyphs) * _CELL
      draw.rectangle((left, top - 2, right - 1, top + _SIZE + 4), _BACKGROUND)
      draw.rounded_rectangle((left + 1, top - 2, right - 2, top + _SIZE + 4), 4, pill)
      for glyph in glyphs if letters else []:
        draw.text((left, top), glyph.text, letters, self._font)
        left += glyph.columns * _CELL

  def _with_progress(self, picture: Image.Image, step: int) -> Image.Image:
    """A copy of the picture with a progress bar in the colours of the scale, and its numbers."""
    canvas, image = self._canvas, picture.copy()
    draw, (width, height) = ImageDraw.Draw(image), image.size
    top, left, right = height - _MARGIN - _LINE, _MARGIN, width - _MARGIN
    done = left + (right - left) * (step + 1) // canvas.total
    draw.rounded_rectangle((left, top, right, top + 4), 2, PILL)
    for shade in range(len(SCALE)):
      first, end = (left + (right - left) * part // len(SCALE) for part in (shade, shade + 1))
      if first < done:
        draw.rectangle((first, top, min(end, done), top + 4), rgb(shade))
    step_of, tokens_of = canvas.progress(step)
    draw.text((left, top + 12), step_of, _DIM, self._font)
    draw.text((right, top + 12), tokens_of, _DIM, self._font, anchor="ra")
    return image


class _BoardScene(_Scene):
  """A Sudoku that an answer fills in: clues are grey, digits coloured by step, errors are marked at last."""

  def __init__(self, canvas: Canvas):
    assert canvas.board is not None
    self._canvas, self._board = canvas, canvas.board
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSansMono.ttf"
    self._font = ImageFont.truetype(path, _SIZE, layout_engine=_GRID)
    self._digits = ImageFont.truetype(path, 2 * _SIZE, layout_engine=_GRID)
    self._prompt = ["4x4 Sudoku"]
    top = _MARGIN + 3 * _LINE // 2
    step = lambda place: place * _SQUARE + (place >= boards.BOX) * _GAP
    self._corners = [
      (_MARGIN + step(cell % boards.SIDE), top + step(cell // boards.SIDE)) for cell in range(boards.CELLS)
    ]
    side = step(boards.SIDE)
    self.width, self.height = 2 * _MARGIN + side, top + side + 2 * _LINE + _MARGIN

  def _draw(self, draw: ImageDraw.ImageDraw, token: int, pill: _Color, letters: _Color | None) -> None:
    """Draws the cell of a token, if it has one; without a colour for letters, it is masked."""
    if token not in self._board.tokens:
      return
    cell = self._board.tokens.index(token)
    kind = self._board.kind(cell, shown=letters is not None)
    color = _DIM if kind == boards.CLUE else letters
    self._square(draw, cell, pill if kind != boards.CLUE else _BACKGROUND, color, shown=letters is not None)

  def _square(self, draw: ImageDraw.ImageDraw, cell: int, ground: _Color, color: _Color | None, *, shown: bool) -> None:
    left, top = self._corners[cell]
    draw.rounded_rectangle((left, top, left + _SQUARE - 4, top + _SQUARE - 4), 6, ground, PILL, 2)
    if color:
      middle = (left + _SQUARE // 2 - 2, top + _SQUARE // 2 - 2)
      draw.text(middle, self._board.text(cell, shown=shown), color, self._digits, anchor="mm")

  def _finish(self, draw: ImageDraw.ImageDraw) -> None:
    """Marks the errors, and says how many there are."""
    for cell, token in enumerate(self._board.tokens):
      if self._canvas.steps[token] < NEVER and self._board.kind(cell, shown=True) == boards.WRONG:
        self._square(draw, cell, _mixed(_RED, _BACKGROUND, 0.35), _RED, shown=True)
    wrong = self._board.wrong
    text, color = (f"{wrong} wrong", _RED) if wrong else ("solved", _GREEN)
    draw.text((self.width - _MARGIN, _MARGIN), text, color, self._font, anchor="ra")


def _mixed(color: _Color, ground: _Color, share: float) -> _Color:
  """Mixes a share of one colour into another."""
  red, green, blue = (round(share * c + (1 - share) * g) for c, g in zip(color, ground, strict=True))
  return red, green, blue
