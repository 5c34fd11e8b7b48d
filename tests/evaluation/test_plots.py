"""Pictures, read back from their SVG."""

import re
import xml.etree.ElementTree as ElementTree

import pytest

from d1jax import look
from d1jax.evaluation.plots import plots
from d1jax.evaluation.summary import summarise
from tests.evaluation.arms import arm, item


def row(items, baseline=0.02) -> dict:
  first = items[0]
  constant = None if baseline is None else {"value": baseline, "interval": [0.0, 0.1]}
  own = {"task": first.task, "length": first.length, "temperature": first.temperature}
  return own | {"summary": summarise(items, "solved"), "baseline": constant}


def drawn(plot) -> ElementTree.Element:
  """The picture as a tree; that it can be read is the first thing to test."""
  return ElementTree.fromstring(plot.svg.replace("xlink:href", "href"))


def texts(plot) -> list[str]:
  return [element.text for element in drawn(plot).iter("text")]


@pytest.fixture(scope="module")
def evaluation():
  sets = [arm(60, 0.6, length=length) for length in (128, 256, 512)]
  sets += [arm(60, 0.5, length=length, temperature=0.9, samples=4) for length in (128, 256, 512)]
  return [row(own) for own in sets], [one for own in sets for one in own]


def test_a_task_has_a_picture_of_each_kind(evaluation):
  arms, items = evaluation
  length, k, tokens = plots(arms, items, "solved")
  assert length.title == "gsm8k: accuracy by generation length"
  assert {"128", "256", "512", "temperature 0", "temperature 0.9", "constant answer"} <= set(texts(length))
  assert k.title == "gsm8k: pass@k"
  assert {"1", "2", "4", "length 256, temp. 0.9"} <= set(texts(k))
  assert "length 256, temp. 0" not in texts(k)
  assert {"solved", "wrong", "length 512, temp. 0.9", "effective tokens"} <= set(texts(tokens))


def test_a_picture_is_self_contained_and_coloured_by_the_page(evaluation):
  for plot in plots(*evaluation, "solved"):
    root = drawn(plot)
    assert root.tag == "svg"
    assert root.get("role") == "img"
    assert root.get("aria-label") == plot.title
    assert "http" not in plot.svg
    assert "font-family" not in plot.svg
    assert "<style" not in plot.svg
    assert set(re.findall(r"var\(--(\w+)\)", plot.svg)) <= look.LIGHT.keys()
    assert not re.findall(r"#[0-9a-f]{6}", plot.svg)
    ids = {element.get("id") for element in root.iter() if element.get("id")}
    links = [e.get("href")[1:] for e in root.iter() if e.get("href")]
    assert set(links) | set(re.findall(r"url\(#(\w+)\)", plot.svg)) == ids


def test_ids_differ_between_pictures_and_bytes_do_not_between_runs(evaluation):
  first, second = plots(*evaluation, "solved"), plots(*evaluation, "solved")
  assert first == second
  ids = [name for plot in first for name in re.findall(r' id="([^"]*)"', plot.svg)]
  assert len(ids) == len(set(ids)) > 0


def heights(plot, name: str, points: int) -> list[list[float]]:
  """The heights of the paths of one colour that have so many points, each from left to right."""
  found = []
  for path in drawn(plot).iter("path"):
    corners = re.findall(r"[ML] ([\d.]+) ([\d.]+)", path.get("d", ""))
    if f"stroke: var(--{name})" in path.get("style", "") and len(corners) == points:
      found.append([float(y) for _, y in corners])
  return found


def test_points_and_whiskers_are_where_the_numbers_are(evaluation):
  arms, items = evaluation
  plot = plots(arms, items, "solved")[0]
  marks = [element for element in drawn(plot).iter("text") if element.text.isdigit()]
  ticks = {int(mark.text): float(mark.get("y")) for mark in marks if mark.text not in ("128", "256", "512")}
  slope = (ticks[max(ticks)] - ticks[0]) / max(ticks)
  for line, start in enumerate((0, 3)):
    own = [arm["summary"] for arm in arms[start : start + 3]]
    (curve,) = heights(plot, f"line{line}", 3)
    rises = [100 * slope * (summary["accuracy"] - own[0]["accuracy"]) for summary in own]
    assert [y - curve[0] for y in curve] == pytest.approx(rises, abs=1e-3)
    whiskers = [abs(y - z) for y, z in heights(plot, f"line{line}", 2)[:3]]
    widths = [100 * abs(slope) * (high - low) for low, high in (summary["accuracy_interval"] for summary in own)]
    assert whiskers == pytest.approx(widths, abs=1e-3)
  constant = heights(plot, "muted", 3)[0]
  rise = 100 * slope * (0.02 - arms[0]["summary"]["accuracy"])
  assert [y - heights(plot, "line0", 3)[0][0] for y in constant] == pytest.approx([rise] * 3, abs=1e-3)


def test_what_is_not_known_is_not_drawn():
  short = [row(arm(5, 0.5), baseline=None)]
  assert [plot.title for plot in plots(short, arm(5, 0.5), "solved")] == ["gsm8k: effective tokens, solved and wrong"]
  nothing = [item(0), item(1, False)]
  assert plots([row(nothing)], nothing, "solved") == []
  unknown = [[item(0, None, length=length, tokens=3)] for length in (64, 128)]
  assert plots([row(own) for own in unknown], [one for own in unknown for one in own], "solved") == []
  no_constant = [arm(5, 0.5, length=length) for length in (64, 128)]
  found = plots([row(own, baseline=None) for own in no_constant], [], "solved")
  assert [plot.title for plot in found] == ["gsm8k: accuracy by generation length"]
  assert "constant answer" not in texts(found[0])


def test_names_of_tasks_are_text():
  task = "$x^{2$ <b>&amp;"
  sets = [arm(5, 0.5, length=length, task=task) for length in (64, 128)]
  plot = plots([row(own) for own in sets], [], "solved")[0]
  assert drawn(plot).get("aria-label") == f"{task}: accuracy by generation length"


def test_more_arms_than_colours_are_drawn():
  count = len(look.MARKERS) + 2
  sets = [arm(4, 0.5, temperature=float(number), samples=2) for number in range(count)]
  found = plots([row(own) for own in sets], [], "solved")
  assert [plot.title for plot in found] == ["gsm8k: pass@k"]
  assert {f"temp. {number}" for number in range(count)} <= set(texts(found[0]))
