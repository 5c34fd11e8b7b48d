"""Charts as SVG, drawn from numbers alone: lines of one or two runs over the iterations of one or several stages.

The style sheet of the page gives them their colours. `data-x` and `data-y` are read by the page's script, which shows
values under the pointer.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from markupsafe import Markup, escape

from d1jax import look
from d1jax.page.curves import DECADES, Curve

LETTERS = ("A", "B")
"""The names of the runs of a page at the ends of their lines; a run alone has none."""

_TOP, _BOTTOM, _LEFT = 12, 38, 44  # pixels of a chart around its axes, at its own size
_LINE = 12  # the height of a label
_GAP = 14  # between the axes of two stages


class Scale(NamedTuple):
  """Maps values to pixels.

  Attributes:
    low: the value at `first`.
    high: the value at `last`.
    first: pixels.
    last: pixels.
    logarithmic: whether equal ratios have equal distances.
  """

  low: float
  high: float
  first: float
  last: float
  logarithmic: bool = False

  def __call__(self, value: np.ndarray | float) -> np.ndarray:
    """Pixels; a value beyond an end is drawn there."""
    ends = np.asarray([self.low, self.high])
    given = np.clip(np.asarray(value, float), *ends)
    if self.logarithmic:
      ends, given = np.log10(ends), np.log10(given)
    share = (given - ends[0]) / (ends[1] - ends[0])
    return np.asarray(self.first + share * (self.last - self.first))

  @property
  def data(self) -> str:
    """The attribute for the script."""
    return f"{self.low!r} {self.high!r} {self.first:g} {self.last:g} {int(self.logarithmic)}"


class Span(NamedTuple):
  """The part of a chart that one stage has.

  Attributes:
    stage: its name in the records.
    title: shown above the part; empty where the chart has one stage.
    last: the last iteration on its axis.
    share: its share of the width.
  """

  stage: str
  title: str
  last: int
  share: float = 1.0


class Line(NamedTuple):
  """A curve in a chart.

  Attributes:
    span: the index of its span.
    run: 0 for the run of the page, 1 for the one that it is compared with.
    curve: the numbers.
    style: `mean`, a line over its single values; `points`, a line with marks and intervals; `thin`, a plain line.
    name: what the script calls it.
  """

  span: int
  run: int
  curve: Curve
  style: str
  name: str


class Level(NamedTuple):
  """A horizontal line: `kind` is `start` or `limit`, `span` the index of its span, `label` its text."""

  value: float
  label: str
  kind: str
  span: int = 0


class Chart(NamedTuple):
  """A chart without its size.

  Attributes:
    title: for readers who do not see it.
    unit: of its values; `%` ends at 100.
    spans: its stages.
    lines: its curves; at least one.
    levels: horizontal lines.
    alarms: iterations from and to which an alarm was on, in the last span.
    logarithmic: whether the axis may be logarithmic.
  """

  title: str
  unit: str
  spans: Sequence[Span]
  lines: Sequence[Line]
  levels: Sequence[Level] = ()
  alarms: Sequence[tuple[int, int]] = ()
  logarithmic: bool = False

  @property
  def is_constant(self) -> bool:
    """Whether all its values are the same but for rounding."""
    values = np.concatenate([part for line in self.lines for part in (line.curve.y, line.curve.raw_y)])
    return bool(np.ptp(values) <= 1e-9 * np.max(np.abs(values)))


def short(value: float) -> str:
  """A number with three digits: 0.0123, 4.56, 789, 12.3k, 4.5M, 1.2e-05."""
  if not math.isfinite(value):
    return "–"
  size = abs(value)
  for suffix, unit in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
    if 9999.5 <= size < 1e15 and size >= unit:
      return f"{value / unit:.3g}{suffix}"
  return f"{value:.0f}" if 100 <= size < 1e4 else f"{value:.3g}".replace("-", "\u2212").replace("e\u2212", "e-")


def ticks(low: float, high: float, most: int) -> list[float]:
  """Round numbers between two ends, at most so many."""
  if not high > low:
    return [low]
  step = 10.0 ** math.floor(math.log10((high - low) / most))
  for factor in (1, 2, 5, 10, 20):
    if (high - low) / (step * factor) <= most - 1e-9:
      step *= factor
      break
  first = math.ceil(low / step - 1e-9)
  return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def drawn(chart: Chart, width: int = 360, height: int = 202) -> Markup:
  """The chart as an `<svg>` element, without outside references."""
  right = 62 if any(line.run for line in chart.lines) else 48  # for the last values
  top = _TOP + (_LINE + 4 if any(span.title for span in chart.spans) else 0)
  y = _y_scale(chart, height - _BOTTOM, top)
  x = _x_scales(chart.spans, _LEFT, width - right)
  parts = [*_grid(y, x), *_axes(chart, x, y, top)]
  for level in chart.levels:
    parts += _level(level, x[level.span], y)
  for first, last in chart.alarms:
    a, b = x[-1](np.asarray([first, last], float))
    parts.append(f'<rect class="alarm" x="{a:.1f}" y="{y.first - 3:g}" width="{max(b - a, 2):.1f}" height="3"/>')
  for line in chart.lines:
    parts += _line(line, x[line.span], y)
  parts += _ends(chart, x, y)
  label = f"{chart.title}: " + "; ".join(_said(line, chart) for line in chart.lines)
  return Markup(
    f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">'
    f'{"".join(parts)}<g class="cursor"></g></svg>'
  )


def _y_scale(chart: Chart, bottom: float, top: float) -> Scale:
  """The axis of the values: from zero where that is near, to 100 at most for shares, logarithmic for long falls."""
  firm = [part for line in chart.lines for part in (line.curve.y, line.curve.low, line.curve.high) if len(part)]
  single = [np.percentile(line.curve.raw_y, (2, 98)) for line in chart.lines if len(line.curve.raw_y)]
  values = np.concatenate([*firm, *single])
  low, high = float(values.min()), float(values.max())
  if chart.logarithmic and low > 0 and high / low > DECADES:
    return Scale(low / 1.3, high * 1.3, bottom, top, True)
  if chart.unit == "%":
    low = 0.0
    high = min(high * 1.08, 100.0) if high > 0 else 1.0
  elif low >= 0 and low < 0.6 * high:
    low, high = 0.0, high * 1.06
  else:
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    low, high = low - room, high + room
  return Scale(low, high, bottom, top)


def _x_scales(spans: Sequence[Span], left: float, right: float) -> list[Scale]:
  """The axis of each stage, side by side."""
  usable = right - left - _GAP * (len(spans) - 1)
  total, found = sum(span.share for span in spans), []
  for span in spans:
    width = usable * span.share / total
    found.append(Scale(0.0, float(max(span.last, 1)), left, left + width))
    left += width + _GAP
  return found


def _grid(y: Scale, x: Sequence[Scale]) -> Iterator[str]:
  """Horizontal lines with their values."""
  if y.logarithmic:
    low, high = math.ceil(math.log10(y.low)), math.floor(math.log10(y.high))
    every = max(1, math.ceil((high - low + 1) / 4))
    marks = [10.0**power for power in range(low, high + 1, every)]
  else:
    marks = ticks(y.low, y.high, 4)
  for mark in marks:
    place = float(y(mark))
    for scale in x:
      yield f'<path class="rule" d="M{scale.first:.1f} {place:.1f}H{scale.last:.1f}"/>'
    yield f'<text class="tick" x="{x[0].first - 6:.1f}" y="{place + 3.5:.1f}" text-anchor="end">{short(mark)}</text>'


def _axes(chart: Chart, x: Sequence[Scale], y: Scale, top: float) -> Iterator[str]:
  """The iterations below, and the titles of the stages above."""
  for span, scale in zip(chart.spans, x, strict=True):
    yield f'<path class="axis" d="M{scale.first:.1f} {y.first:g}H{scale.last:.1f}"/>'
    for mark in ticks(scale.low, scale.high, max(2, int((scale.last - scale.first) // 50))):
      if mark == int(mark) and (mark or scale is x[0]):  # the first number of a stage would touch the last one before
        place = float(scale(mark))
        yield f'<text class="tick" x="{place:.1f}" y="{y.first + 14:g}" text-anchor="middle">{short(mark)}</text>'
    middle = (scale.first + scale.last) / 2
    yield f'<text class="tick" x="{middle:.1f}" y="{y.first + 30:g}" text-anchor="middle">iteration</text>'
    if span.title:
      yield f'<text class="stage" x="{scale.first:.1f}" y="{top - 8:g}">{escape(span.title)}</text>'


def _level(level: Level, x: Scale, y: Scale) -> Iterator[str]:
  """A dashed line with its label above or, close to the upper end, below; none outside of the axis."""
  if not min(y.low, y.high) <= level.value <= max(y.low, y.high):
    return
  place = float(y(level.value))
  text = place - 4 if place - _LINE > y.last else place + _LINE
  yield f'<path class="level {level.kind}" d="M{x.first:.1f} {place:.1f}H{x.last:.1f}"/>'
  yield f'<text class="level {level.kind}" x="{x.first + 4:.1f}" y="{text:.1f}">{escape(level.label)}</text>'


def _points(x: np.ndarray, y: np.ndarray) -> str:
  return " ".join(f"{a:.1f},{b:.2f}" for a, b in zip(x.tolist(), y.tolist(), strict=True))


def _line(line: Line, x: Scale, y: Scale) -> Iterator[str]:
  curve, run = line.curve, "ab"[line.run]
  if line.style == "mean" and len(curve.raw_x) > 1:
    yield f'<polyline class="raw {run}" points="{_points(x(curve.raw_x), y(curve.raw_y))}"/>'
  places, heights = x(curve.x), y(curve.y)
  if len(curve.low):
    ends = zip(places.tolist(), y(curve.low).tolist(), y(curve.high).tolist(), strict=True)
    yield f'<path class="whisker {run}" d="{"".join(f"M{at:.1f} {low:.1f}V{high:.1f}" for at, low, high in ends)}"/>'
  kind = "thin" if line.style == "thin" else "line"
  yield (
    f'<polyline class="{kind} {run}" data-x="{x.data}" data-y="{y.data}" data-name="{escape(line.name)}"'
    f' points="{_points(places, heights)}"/>'
  )
  if line.style == "points" or len(places) == 1:
    yield "".join(
      f'<circle class="mark {run}" cx="{a:.1f}" cy="{b:.2f}" r="{2.6 if len(places) < 50 else 1.6:g}"/>'
      for a, b in zip(places.tolist(), heights.tolist(), strict=True)
    )


def _ends(chart: Chart, x: Sequence[Scale], y: Scale) -> Iterator[str]:
  """The last values, beside the ends of the lines of the last span; labels make room for each other."""
  labelled = [line for line in chart.lines if line.span == len(chart.spans) - 1]
  several = any(line.run for line in chart.lines)
  labelled.sort(key=lambda line: float(y(line.curve.last)))
  heights = look.apart([float(y(line.curve.last)) + 3.5 for line in labelled], _LINE, y.last, y.first + 2)
  for line, place in zip(labelled, heights, strict=True):
    kind = "t" if line.style == "thin" else "ab"[line.run]
    text = f"{LETTERS[line.run]} {short(line.curve.last)}" if several else short(line.curve.last)
    at = float(x[line.span](line.curve.x[-1])) + 5
    yield f'<text class="end {kind}" x="{at:.1f}" y="{place:.1f}">{text}</text>'


def _said(line: Line, chart: Chart) -> str:
  """A line in words."""
  first, last = line.curve.y[0], line.curve.last
  stage = chart.spans[line.span].stage
  return f"{line.name}, {stage}: from {short(float(first))} to {short(last)} {chart.unit}".rstrip()
