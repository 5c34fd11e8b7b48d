"""Plots of an evaluation as SVG for the report, coloured by the page's style sheet."""

import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from d1jax import look
from d1jax.evaluation.items import Item
from d1jax.evaluation.summary import verdict

WIDTH, HEIGHT = 4.6, 3.1
"""Inches of a plot."""


class Plot(NamedTuple):
  """One plot.

  Attributes:
    title: the title.
    svg: an `<svg>` element without outside references; its colours are `var(--NAME)` of the names in `look.LIGHT`.
  """

  title: str
  svg: str


def plots(arms: Sequence[Mapping[str, Any]], items: Sequence[Item], accuracy: str) -> list[Plot]:
  """The plots of every task; a plot without numbers is left out.

  Args:
    arms: as in `summary.columns`.
    items: the graded completions.
    accuracy: the name of the metric that is the accuracy.
  """
  found: list[Plot] = []
  with look.styled():
    for task in dict.fromkeys(arm["task"] for arm in arms):
      own = [arm for arm in arms if arm["task"] == task and arm["summary"]["accuracy"] is not None]
      found += [
        *_by_length(task, [arm for arm in own if arm["length"]]),
        *_by_k(task, [arm for arm in own if "pass_at" in arm["summary"]]),
        *_by_tokens(task, own, [item for item in items if item.task == task], accuracy),
      ]
  return found


def _by_length(task: str, arms: Sequence[Mapping[str, Any]]) -> Iterator[Plot]:
  """Accuracy against generation length, with one line per temperature; the constant answer is dashed."""
  lengths = sorted({arm["length"] for arm in arms})
  if len(lengths) < 2:
    return
  figure = look.panels(width=WIDTH, height=HEIGHT)
  axes = figure.axes[0]
  temperatures = sorted({arm["temperature"] for arm in arms})
  for number, temperature in enumerate(temperatures):
    line = sorted((arm for arm in arms if arm["temperature"] == temperature), key=lambda arm: arm["length"])
    shift = 0.1 * (number - (len(temperatures) - 1) / 2)  # shifted, so that intervals do not cover one another
    places = [lengths.index(arm["length"]) + shift for arm in line]
    shares = [(arm["summary"]["accuracy"], *arm["summary"]["accuracy_interval"]) for arm in line]
    _line(axes, number, places, shares, f"temperature {temperature:g}")
  constant = {lengths.index(arm["length"]): 100 * arm["baseline"]["value"] for arm in arms if arm["baseline"]}
  if constant:
    x, y = zip(*sorted(constant.items()), strict=True)
    look.line(axes, x, y, "muted", "constant answer", width=1.2)
  axes.set_xticks(range(len(lengths)), [str(length) for length in lengths])
  axes.set(xlabel="generation length, tokens", ylabel="accuracy, %", xlim=(-0.4, len(lengths) - 0.6))
  _stay_in_percent(axes)
  yield _finish(figure, f"{task}: accuracy by generation length")


def _by_k(task: str, arms: Sequence[Mapping[str, Any]]) -> Iterator[Plot]:
  """Pass@k against k, with one line per arm."""
  if not arms:
    return
  figure = look.panels(width=WIDTH, height=HEIGHT)
  axes = figure.axes[0]
  ticks = sorted({int(k) for arm in arms for k in arm["summary"]["pass_at"]})
  for number, arm in enumerate(arms):
    points = arm["summary"]["pass_at"]
    shares = [(point["value"], *point["interval"]) for point in points.values()]
    _line(axes, number, [int(k) for k in points], shares, _name(arm, arms))
  axes.set_xscale("log", base=2)
  axes.set_xticks(ticks, [str(k) for k in ticks])
  axes.xaxis.set_minor_locator(NullLocator())
  axes.set(xlabel="samples k", ylabel="pass@k, %")
  _stay_in_percent(axes)
  yield _finish(figure, f"{task}: pass@k")


def _by_tokens(task: str, arms: Sequence[Mapping[str, Any]], items: Sequence[Item], accuracy: str) -> Iterator[Plot]:
  """Effective tokens of solved and of wrong completions: median, middle half, 5th to 95th percentile."""
  bars = []
  for row, arm in enumerate(arms):
    own = [item for item in items if (item.length, item.temperature) == (arm["length"], arm["temperature"])]
    for name, is_right, shift in (("right", True, -0.16), ("wrong", False, 0.16)):
      tokens = [item.tokens for item in own if item.tokens is not None and verdict(item, accuracy) is is_right]
      if tokens:
        bars.append((row + shift, look.LIGHT[name], np.percentile(tokens, (5, 25, 50, 75, 95))))
  if len({tuple(spread) for _, _, spread in bars}) < 2:  # nothing was graded, or all answers have one length
    return
  figure = look.panels(width=WIDTH, height=1.2 + 0.42 * len(arms))
  axes = figure.axes[0]
  for y, color, (low, first, median, third, high) in bars:
    axes.plot([low, high], [y, y], color=color, linewidth=1.2)
    axes.plot([first, third], [y, y], color=color, linewidth=6, solid_capstyle="butt", alpha=0.5)
    axes.plot([median], [y], color=color, marker="o", markersize=5, linestyle="none")
  for name, y in (("solved", -0.16), ("wrong", 0.16)):
    color = look.LIGHT["right" if name == "solved" else "wrong"]
    axes.annotate(name, (0, y), xytext=(4, 0), textcoords="offset points", va="center", color=color, fontsize=9)
  axes.set_yticks(range(len(arms)), [_name(arm, arms) for arm in arms])
  axes.set(xlabel="effective tokens", xlim=(0, None), ylim=(len(arms) - 0.5, -0.5))
  axes.grid(visible=False, axis="y")
  axes.grid(visible=True, axis="x")
  yield _finish(figure, f"{task}: effective tokens, solved and wrong")


def _name(arm: Mapping[str, Any], arms: Sequence[Mapping[str, Any]]) -> str:
  """The name of an arm among the arms of its task; a length that all have is left out."""
  is_alone = len({other["length"] for other in arms}) == 1
  lengths = [f"length {arm['length']}"] if arm["length"] and not is_alone else []
  return ", ".join([*lengths, f"temp. {arm['temperature']:g}"])


def _line(axes: Axes, number: int, x: Sequence[float], shares: Sequence[tuple[float, float, float]], name: str) -> None:
  """One line of (value, low, high) in percent."""
  value, low, high = 100 * np.asarray(shares).T
  look.points(axes, x, value, look.LINES[number % len(look.LINES)], name, ends=(low, high))


def _stay_in_percent(axes: Axes) -> None:
  low, high = axes.get_ylim()
  axes.set_ylim(max(low, -1), min(high, 101))


def _finish(figure: Figure, title: str) -> Plot:
  """The plot as an element of a page: equal numbers give equal bytes, ids are unique, and text stays text."""
  text = look.svg(figure, title)
  box = re.findall(r'viewBox="[^"]*"', text)[0]
  body = text[text.index(">", text.index("<svg")) + 1 :].strip()
  body = re.sub(r' id="[a-zA-Z0-9.]+_\d+"', "", body)  # names of groups, which are the same in every plot
  body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", body, flags=re.DOTALL)
  body = re.sub(r"font-family: [^;\"]*;? ?", "", body)
  body = re.sub(r"font: ([^;\"]*?) 'DejaVu Sans'[^;\"]*", r"font: \1 sans-serif", body)
  for name, color in look.LIGHT.items():
    body = body.replace(color, f"var(--{name})")
  return Plot(title, f'<svg class="plot" role="img" aria-label="{escape(title)}" {box}>{body}')
