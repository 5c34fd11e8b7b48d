"""What every plot must keep to (`d1jax/look.py`)."""

import itertools

from matplotlib.axes import Axes
from matplotlib.collections import Collection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.spines import Spine
from matplotlib.text import Text

from d1jax import look

UNITS = {"%", "s", "ms", "nats a token", "thousands", "rows", "tokens", "ids", "layers", "backward: two"}
PLAIN = {"iteration", "samples k"}
"""Counts, which have no unit; neither has a loss or a reward."""

COLOURS = set(look.LIGHT.values())


def check(figure: Figure, *, has_caption: bool = False) -> None:
  """Asserts that a plot has a title or a caption, axis labels with units, the palette's colours, and readable names."""
  look.png(figure)  # writes the names
  figure.draw_without_rendering()
  titles = [axes.get_title(loc="left") for axes in figure.axes]
  assert has_caption or figure.get_suptitle() or any(titles), "no title"
  for axes in figure.axes:
    assert all(_label(axes, which) for which in "xy"), "an axis without a label"
    colours = {line.get_color() for line in axes.get_lines() if not str(line.get_label()).startswith("_")}
    assert axes.get_legend() or len(axes.texts) >= len(colours), "lines of several colours, and nobody says which"
  said = [text.get_text() for text in figure.findobj(Text)]
  assert not [text for text in said if "$" in text], "nothing reads formulas"
  for artist in figure.findobj(lambda artist: isinstance(artist, Line2D | Collection | Text | Spine)):
    if artist.get_visible():
      assert _colours(artist) <= COLOURS, artist
  texts = _texts(figure)
  for text, other in itertools.combinations(texts, 2):
    assert not text.get_window_extent().padded(-1).overlaps(other.get_window_extent().padded(-1)), (text, other)
  for text in texts:
    box = text.get_window_extent()
    assert figure.bbox.x0 <= box.x0 <= box.x1 <= figure.bbox.x1, text
    assert figure.bbox.y0 <= box.y0 <= box.y1 <= figure.bbox.y1, text


def _label(axes: Axes, which: str) -> bool:
  """Whether an axis says what it counts and in which unit, itself or by one that it shares."""
  shared = (axes.get_shared_x_axes() if which == "x" else axes.get_shared_y_axes()).get_siblings(axes)
  words = {getattr(each, f"get_{which}label")() for each in shared} - {""}
  if not words and which == "y":  # names stand at the ticks
    return all(any(map(str.isalpha, tick.get_text())) for tick in axes.get_yticklabels())
  for said in words:
    unit = said.rpartition(", ")[2]
    assert unit in UNITS or said in PLAIN or said.startswith(("loss", "reward", "effective tokens")), said
  return bool(words)


def _colours(artist: Line2D | Collection | Text | Spine) -> set[str]:
  """The colours that an artist draws with; a text without letters has none."""
  if isinstance(artist, Text):
    return {to_hex(artist.get_color())} if artist.get_text() else set()
  if isinstance(artist, Line2D):
    return {to_hex(artist.get_color())}
  if isinstance(artist, Spine):
    return {to_hex(artist.get_edgecolor())}
  return {to_hex(color) for color in (*artist.get_facecolor(), *artist.get_edgecolor())}


def _texts(figure: Figure) -> list[Text]:
  """The texts besides the ticks'."""
  found = [text for text in figure.texts if text.get_text()]
  for axes in figure.axes:
    legend = axes.get_legend()
    own = [*axes.texts, axes.xaxis.label, axes.yaxis.label, axes._left_title, *(legend.get_texts() if legend else [])]
    found += [text for text in own if text.get_text() and text.get_visible()]
  return found
