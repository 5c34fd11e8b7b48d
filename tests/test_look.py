"""The look of plots: the palette by the numbers of colour vision, names beside lines, and every plot of the code."""

import itertools

import numpy as np
import pytest
from matplotlib.figure import Figure

from benchmarks import blocks, learning, scaling
from d1jax import look
from d1jax.evaluation import plots
from d1jax.page import picture, run_files
from tests import looks
from tests.evaluation.arms import arm
from tests.evaluation.test_plots import row
from tests.page import pages

# Machado, Oliveira, Fernandes 2009, severity 1: what readers without one kind of cones see, in linear RGB.
VISION = {
  "all": np.eye(3),
  "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
  "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
  "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
XYZ = np.asarray([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def linear(color: str) -> np.ndarray:
  share = np.asarray(look.rgb(color)) / 255
  return np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
  """CIE L*a*b*, in which a distance of 2.3 can just be seen."""
  x, y, z = np.cbrt(XYZ @ np.clip(rgb, 0, 1) / [0.9505, 1, 1.089])
  return np.asarray([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def contrast(color: str, ground: str) -> float:
  low, high = sorted(float(XYZ[1] @ linear(each)) for each in (color, ground))
  return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("colors", [look.LIGHT, look.DARK], ids=["light", "dark"])
def test_colours_are_told_apart_by_everybody_and_read_in_small_type(colors):
  assert len(set(colors.values())) == len(colors), "a plot's colour is its name on the page"
  for pair in (*itertools.combinations(look.LINES, 2), ("right", "wrong")):
    for kind, seen in VISION.items():
      first, second = (lab(np.asarray(seen) @ linear(colors[name])) for name in pair)
      assert np.linalg.norm(first - second) > 15, (pair, kind)
  for name in (*look.LINES, "right", "wrong", "ink", "muted"):
    assert min(contrast(colors[name], colors[ground]) for ground in ("paper", "card")) >= 4.5, name
  assert look.LIGHT.keys() == look.DARK.keys()


@pytest.mark.parametrize(
  ("places", "expected"),
  [
    ([1, 50], [1, 50]),
    ([40, 41, 42], [31, 41, 51]),
    ([0, 0, 90], [0, 10, 90]),
    ([98, 99], [90, 100]),
    ([10, 11, 20, 80], [11 / 3, 41 / 3, 71 / 3, 80]),  # the three that crowd keep their mean
  ],
)
def test_names_move_as_little_as_they_can(places, expected):
  assert look.apart(places, 10, 0, 100) == pytest.approx(expected)


def curve(end: float, points: int = 11) -> list[tuple[float, float, float]]:
  return [(300.0 * i, 12.0 * i, end * i / points) for i in range(1, points)]


def of_scaling() -> Figure:
  lines = [
    {"axis": axis, "program": program, "exponent": 0.5, "values": values, "seconds": [scale * v**0.5 for v in values]}
    for axis, values in scaling.AXES.items()
    for program, scale in zip(scaling.PROGRAMS, (0.004, 0.002, 0.2), strict=True)
  ]
  return scaling.plot(lines)


ENDS = {"recipe": (61, 60, 72), "control": (20, 24, 30)}
FIGURES = {
  "scaling": of_scaling,
  "blocks": lambda: blocks.plot([{"arm": name, "curve": curve(e)} for name in blocks.ARMS for e in (0.5, 0.8, 0.82)]),
  "learning": lambda: learning.plot(
    {arm: [([10, 90, 180], [5, 20, end], 32.0) for end in ends] for arm, ends in ENDS.items()}
  ),
}


@pytest.mark.parametrize("name", FIGURES)
def test_every_plot_of_a_benchmark_can_be_read(name):
  looks.check(FIGURES[name]())


def test_the_learning_curves_of_a_run_can_be_read(tmp_path):
  figure = picture.figure(run_files.read(pages.write(tmp_path / "run")))
  looks.check(figure)
  assert [figure.axes[0].get_title(loc="left"), figure.axes[3].get_ylabel()] == [
    "SFT",
    "reward of training, mean of 20",
  ]
  assert {"validation 60%", "SFT 20%"} < {text.get_text() for text in figure.axes[1].texts}
  assert [len(each.get_paths()) for each in figure.axes[1].collections] == [5], "a whisker a validation"


@pytest.mark.parametrize(("stage", "sign", "label"), [("dpo", 1, "preferred"), ("sft", -1, "held-out loss")])
def test_the_learning_curves_of_other_runs_can_be_read(stage, sign, label):
  shares = dict.fromkeys(("accuracy", "held_out/accuracy"), 0.7) if stage == "dpo" else {}
  records = [
    {"stage": stage, "iteration": i, "loss": 1 / i, "validation": sign * i / 99, **shares} for i in range(1, 50)
  ]
  figure = picture.figure(run_files.RunFiles("", {}, {stage: records}, [], 0, None))
  looks.check(figure)
  assert label in figure.axes[0].get_ylabel()


@pytest.mark.parametrize("temperatures", [(0.0, 0.9), (0.0, 0.3, 0.6, 0.9)])
def test_the_plots_of_an_evaluation_can_be_read(monkeypatch, temperatures):
  checked = []

  def check(figure: Figure, salt: str) -> str:
    looks.check(figure, has_caption=True)
    checked.append(salt)
    return '<svg viewBox="0 0 1 1"></svg>'

  monkeypatch.setattr(look, "svg", check)
  sets = [arm(12, 0.5, length=length, temperature=t, samples=2) for length in (64, 128) for t in temperatures]
  plots.plots([row(own) for own in sets], [one for own in sets for one in own], "solved")
  assert len(checked) == 3
