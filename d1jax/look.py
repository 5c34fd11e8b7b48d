"""The look of every plot: colours, type, lines with bands, points with whiskers, and the names at their ends.

Pictures have a white ground of their own, so that they can be read on a light and on a dark page. The plots of a page
are drawn in the same colours, by their names in its style sheet (`css`), which has them for light and for dark pages.
Each plot is drawn inside `styled()`, and becomes a file by `png` or text by `svg`.
"""

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullLocator

LIGHT: Mapping[str, str] = {
  "paper": "#ffffff",
  "card": "#f7f7f5",
  "ink": "#1d1f23",
  "muted": "#5d636e",
  "rule": "#dedfe2",
  "link": "#1f5fa8",
  "right": "#00784a",
  "wrong": "#bb4800",
  "mark": "#e4edf8",
  "mark-ink": "#1b4c86",
  "line0": "#0064be",
  "line1": "#c04d00",
  "line2": "#00804a",
  "line3": "#9c3f8f",
  "line4": "#574300",
  "line5": "#3c4048",
}
"""Colours by name, on a light ground. The lines have hues of Okabe and Ito (https://jfly.uni-koeln.de/color), shifted
until names in small type have a contrast of 4.5, and readers with any kind of colour blindness tell them apart."""

DARK: Mapping[str, str] = {
  "paper": "#15171a",
  "card": "#1d2024",
  "ink": "#e6e7e9",
  "muted": "#a0a6b0",
  "rule": "#363b42",
  "link": "#82b4ee",
  "right": "#26b381",
  "wrong": "#ea8040",
  "mark": "#24364c",
  "mark-ink": "#a9cdf7",
  "line0": "#4a9eff",
  "line1": "#e8762c",
  "line2": "#1fae7a",
  "line3": "#e79ad2",
  "line4": "#f5dc6a",
  "line5": "#c4ecff",
}
"""The same colours on a dark ground."""

MARKERS = "os^Dvp"
"""One for each of the lines: they differ in shape too."""

LINES = tuple(f"line{number}" for number in range(len(MARKERS)))

MOST_NAMES, LONGEST_NAME = 12, 18
"""Names stand at the ends of lines, if they are no more and no longer; otherwise in a legend above."""

_SPACE = 1.3  # between the middles of two names, in heights of the type
_SMALL = 9  # points

_STYLE: dict[Any, Any] = {
  "axes.axisbelow": True,
  "axes.edgecolor": LIGHT["muted"],
  "axes.facecolor": "none",
  "axes.grid": True,
  "axes.grid.axis": "y",
  "axes.labelcolor": LIGHT["muted"],
  "axes.linewidth": 0.8,
  "axes.spines.left": False,
  "axes.spines.right": False,
  "axes.spines.top": False,
  "axes.titlelocation": "left",
  "axes.titlesize": 11,
  "axes.titleweight": "bold",
  "figure.constrained_layout.h_pad": 0.08,
  "figure.constrained_layout.w_pad": 0.08,
  "figure.facecolor": LIGHT["paper"],
  "font.family": "DejaVu Sans",
  "font.size": 10,
  "grid.color": LIGHT["rule"],
  "grid.linewidth": 0.7,
  "legend.fontsize": _SMALL,
  "legend.frameon": False,
  "svg.fonttype": "none",
  "text.color": LIGHT["ink"],
  "text.parse_math": False,
  "xtick.color": LIGHT["muted"],
  "xtick.major.size": 0,
  "xtick.minor.size": 0,
  "ytick.color": LIGHT["muted"],
  "ytick.major.size": 0,
  "ytick.minor.size": 0,
}


def css() -> str:
  """The colours as variables of a style sheet: `var(--NAME)`, for light and for dark pages."""
  light, dark = (
    ":root { " + " ".join(f"--{name}: {color};" for name, color in own.items()) + " }" for own in (LIGHT, DARK)
  )
  return f"{light}\n@media (prefers-color-scheme: dark) {{ {dark} }}\n"


def rgb(color: str) -> tuple[int, int, int]:
  """Red, green and blue (0 to 255) of `#rrggbb`."""
  red, green, blue = bytes.fromhex(color[1:])
  return red, green, blue


@contextlib.contextmanager
def styled() -> Iterator[None]:
  """The context in which a plot is drawn; also a decorator."""
  with matplotlib.rc_context(_STYLE):
    yield


def panels(columns: int = 1, rows: int = 1, *, width: float = 5.5, height: float = 3.8, **shared: Any) -> Figure:
  """An empty figure with panels of so many inches; `shared` goes to `Figure.subplots` (`sharex`, `sharey`)."""
  figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
  figure.subplots(rows, columns, **shared)
  return figure


def line(
  axes: Axes,
  x: npt.ArrayLike,
  y: npt.ArrayLike,
  color: str,
  name: str = "",
  *,
  band: tuple[npt.ArrayLike, npt.ArrayLike] | None = None,
  width: float = 1.8,
) -> None:
  """Draws a curve, and a band from low to high around it.

  Args:
    axes: where.
    x: places, from left to right.
    y: values.
    color: a name in `LIGHT`.
    name: stands at its end; curves of one name have one, at the middle of their ends.
    band: the lower and the upper ends.
    width: of the line, in points.
  """
  if band is not None:
    axes.fill_between(x, *band, color=LIGHT[color], alpha=0.15, linewidth=0)
  axes.plot(x, y, color=LIGHT[color], linewidth=width, solid_joinstyle="round", label=name or None)


def points(
  axes: Axes,
  x: npt.ArrayLike,
  y: npt.ArrayLike,
  color: str,
  name: str = "",
  *,
  ends: tuple[npt.ArrayLike, npt.ArrayLike] | None = None,
) -> None:
  """Draws measured points that a line joins, each with a whisker from `ends[0]` to `ends[1]`; otherwise as `line`."""
  marker = MARKERS[LINES.index(color)] if color in LINES else "o"
  if ends is not None:
    axes.vlines(x, *ends, color=LIGHT[color], linewidth=1.1, alpha=0.6)
  axes.plot(x, y, color=LIGHT[color], linewidth=1.8, marker=marker, markersize=4.5, label=name or None)


def level(axes: Axes, value: float, name: str, *, below: bool = False) -> None:
  """Draws a dashed line across the panel, with its name above its right end, or below it."""
  axes.axhline(value, color=LIGHT["muted"], linewidth=1, linestyle=(0, (4, 3)), label="_level")
  axes.annotate(
    name,
    (1, value),
    xycoords=axes.get_yaxis_transform(),
    xytext=(-3, -3 if below else 3),
    textcoords="offset points",
    ha="right",
    va="top" if below else "bottom",
    color=LIGHT["muted"],
    fontsize=_SMALL,
  )


def logarithmic(axes: Axes, *which: Literal["x", "y"]) -> None:
  """Makes axes of a panel logarithmic, with plain numbers at the powers of ten."""
  for each in which:
    axes.set(**{f"{each}scale": "log"})
    axis = axes.xaxis if each == "x" else axes.yaxis
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def apart(places: Sequence[float], least: float, low: float, high: float) -> list[float]:
  """Moves places as little as possible until neighbours are `least` apart, and all lie between `low` and `high`.

  The sum of the squared moves is the smallest one; the order stays. What does not fit ends above `high`.

  Args:
    places: in ascending order.
    least: the smallest distance.
    low: the lower end.
    high: the upper end.
  """
  # With z_i = place_i - i * least, "at least apart" is "not descending": neighbours that descend share their mean.
  blocks: list[list[float]] = []
  for number, place in enumerate(places):
    blocks.append([place - number * least])
    while len(blocks) > 1 and np.mean(blocks[-2]) > np.mean(blocks[-1]):
      last = blocks.pop()
      blocks[-1] += last
  top = max(low, high - (len(places) - 1) * least)
  means = [min(max(float(np.mean(block)), low), top) for block in blocks for _ in block]
  return [mean + number * least for number, mean in enumerate(means)]


def _points(drawn: Line2D) -> np.ndarray:
  """The points [N 2] of a line."""
  return np.asarray(drawn.get_xydata(), float)


def _named(axes: Axes) -> dict[str, list[Line2D]]:
  """The lines of each name."""
  found: dict[str, list[Line2D]] = {}
  for each in axes.get_lines():
    name = str(each.get_label())
    if not name.startswith("_") and len(_points(each)):
      found.setdefault(name, []).append(each)
  return found


def name_lines(figure: Figure) -> None:
  """Writes the names of all lines: right of their ends, in their colours, or in a legend above the panel."""
  direct: list[tuple[Axes, dict[str, list[Line2D]]]] = []
  for axes in figure.axes:
    named = _named(axes)
    if len(named) <= MOST_NAMES and all(len(name) <= LONGEST_NAME for name in named):
      direct.append((axes, named))
    else:
      handles = [lines[0] for lines in named.values()]
      axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, columnspacing=1.2)
  figure.draw_without_rendering()  # now each panel has its height, which names beside it do not change
  for axes, named in direct:
    box = axes.get_window_extent()
    ends = []
    for name, lines in named.items():
      last = [_points(each)[-1] for each in lines]
      height = float(np.mean(axes.transData.transform(last)[:, 1]))
      ends.append((height, name, lines[0].get_color()))
    ends.sort(key=lambda end: end[0])
    least = _SPACE * _SMALL * figure.dpi / 72
    places = apart([height for height, _, _ in ends], least, box.y0, box.y1)
    for place, (_, name, color) in zip(places, ends, strict=True):
      axes.annotate(
        name,
        (1, (place - box.y0) / box.height),
        xycoords="axes fraction",
        xytext=(5, 0),
        textcoords="offset points",
        va="center",
        color=color,
        fontsize=_SMALL,
        fontweight="bold",
        annotation_clip=False,
      )


def png(figure: Figure) -> bytes:
  """The picture, on its white ground; equal plots give equal bytes."""
  picture = io.BytesIO()
  with styled():
    name_lines(figure)
    figure.savefig(picture, format="png", dpi=120, metadata={"Software": None})
  return picture.getvalue()


def svg(figure: Figure, salt: str) -> str:
  """The plot as SVG without a ground: text stays text, and its ids are hashes with this salt.

  The file has no date, no version and no references to outside.
  """
  buffer = io.StringIO()
  figure.patch.set_visible(False)
  with styled(), matplotlib.rc_context({"svg.hashsalt": salt}):
    name_lines(figure)
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
  return buffer.getvalue()
