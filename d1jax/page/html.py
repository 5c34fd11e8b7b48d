"""The page as HTML text: a pure function of the files of one run, or of two.

Completions, questions and names may be hostile text. The page contains them escaped, or as JSON without a `<` which its
script shows as text nodes only, and its content security policy allows no script but its own.
"""

import json
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup

from d1jax.evaluation import html as evaluations
from d1jax.page import curves, drawing, facts, shown
from d1jax.page.curves import Curve, Figure
from d1jax.page.drawing import Chart, Level, Line, Span
from d1jax.page.run_files import RunFiles
from d1jax.report import TITLES as SHORT
from d1jax.run.metrics import STAGES

TITLES = {"sft": "Supervised fine-tuning", "dpo": "Preference tuning", "grpo": "diffu-GRPO"}

_HERE = Path(__file__).parent


class Drawn(NamedTuple):
  """A chart on the page.

  Attributes:
    title: its title.
    unit: the unit of its values; empty: they are plain numbers.
    stage: the stage whose iterations it has.
    svg: the chart.
    note: a remark below.
  """

  title: str
  unit: str
  stage: str
  svg: Markup
  note: str = ""


def render(run: RunFiles, other: RunFiles | None = None) -> str:
  """The text of the page; equal inputs give equal bytes.

  `other` is a run to draw on the same axes.

  Returns:
    HTML that can be encoded in UTF-8, whatever the files contain.
  """
  runs = [run] if other is None else [run, other]
  return evaluations.written(
    _HERE / "page",
    style=(_HERE / "page.css").read_text(encoding="utf-8"),
    names=[each.name for each in runs],
    letters=drawing.LETTERS[: len(runs)] if other else [""],
    status=[facts.status(each) for each in runs],
    about=facts.about(run),
    tiles=facts.tiles(runs),
    alarms=facts.alarm_lines(run),
    hero=_validations(runs),
    smoothing=curves.SMOOTHING,
    has_training=other is None and any(curves.TRAINING.name in own[-1] for own in run.records.values()),
    held_out=facts.held_out(runs),
    stages=[
      (stage, TITLES[stage], *_stage(runs, stage))
      for stage in reversed(STAGES)
      if any(stage in r.records for r in runs)
    ],
    differences=facts.differences(run, other) if other else None,
    cost=facts.cost_parts(runs),
    samples=Markup(evaluations.embedded(shown.data(runs))),
    has_samples=bool(run.validated),
    config=json.dumps(run.config, indent=2),
  )


def _last(runs: list[RunFiles], stage: str) -> int:
  """The last iteration of a stage's axis: what the configuration asks for, or what was reached if that is more.

  A stage that has ended, early or not, ends where it ended.
  """
  reached = [run.records[stage][-1]["iteration"] for run in runs if stage in run.records]
  wanted = [int(facts.wanted(run, stage)) for run in runs if stage in run.records and facts.is_at(run, stage)]
  return max([*reached, *wanted, 1])


def _start(run: RunFiles, stage: str, letter: str) -> list[Level]:
  """The validation with which a stage starts: the best of the one before."""
  found = curves.best(run, "sft") if stage != "sft" else None
  if found is None or found[1] < 0:
    return []
  return [Level(100 * found[1], f"{letter} SFT start {drawing.short(100 * found[1])}".strip(), "start")]


def _letter(runs: list[RunFiles], place: int) -> str:
  return drawing.LETTERS[place] if len(runs) > 1 else ""


def _validations(runs: list[RunFiles]) -> list[tuple[str, Markup]]:
  """The validations of all stages in one chart, for a wide and for a narrow window; nothing without any."""
  stages = [stage for stage in STAGES if any(stage in run.records for run in runs)]
  found = {(place, stage): curves.validation(run, stage) for place, run in enumerate(runs) for stage in stages}
  kept = [s for s in stages if any((f := found[place, s]) and f[0] is curves.VALIDATION for place in range(len(runs)))]
  if not kept:
    return []
  spans = [Span(stage, SHORT[stage], _last(runs, stage), share) for stage, share in _shares(runs[0], kept).items()]
  lines: list[Line] = []
  levels: list[Level] = []
  for at, stage in enumerate(kept):
    for place, run in enumerate(runs):
      name = f"{_letter(runs, place)} validation".strip()
      levels += [level._replace(span=at) for level in _start(run, stage, _letter(runs, place)) if len(kept) > 1]
      training = curves.curve(run.records.get(stage, []), curves.TRAINING) if len(runs) == 1 else None
      if training:
        lines.append(Line(at, place, training, "thin", "training"))
      if (validated := found[place, stage]) and validated[0] is curves.VALIDATION:
        lines.append(Line(at, place, validated[1], "points", name))
  chart = Chart(curves.VALIDATION.title, "%", spans, lines, levels)
  return [("wide", drawing.drawn(chart, 980, 334)), ("narrow", drawing.drawn(chart, 360, 254))]


def _shares(run: RunFiles, stages: list[str]) -> dict[str, float]:
  """The shares of the width: those of the time that the stages took, but none is hard to see."""
  seconds = {stage: facts.elapsed(run, stage) for stage in stages}
  whole = sum(seconds.values()) or 1.0
  return {stage: max(spent / whole, 0.3) for stage, spent in seconds.items()}


def _stage(runs: list[RunFiles], stage: str) -> tuple[list[tuple[str, list[Drawn]]], list[tuple[str, str]]]:
  """The charts of a stage by group, and the figures that never change, with their values."""
  records = [run.records.get(stage, []) for run in runs]
  groups: list[tuple[str, list[Drawn]]] = []
  constant: list[tuple[str, str]] = []
  loss = [_held_out_loss(runs, stage)]
  for group, figures in curves.figures(records).items():
    charts = [chart for chart in loss if chart]
    loss = []
    for figure in figures:
      drawn = [curves.curve(own, figure) for own in records]
      chart = _chart(runs, stage, figure, drawn)
      if chart is None:
        continue
      if chart.is_constant:
        value = next(each for each in drawn if each).last
        constant.append((figure.title, f"{drawing.short(value)} {figure.unit}".strip()))
      else:
        charts.append(Drawn(figure.title, figure.unit, stage, drawing.drawn(chart)))
    if charts:
      groups.append((group, charts))
  return groups, constant


def _held_out_loss(runs: list[RunFiles], stage: str) -> Drawn | None:
  """The chart of held-out losses, if these are what the stage validates by."""
  found = [curves.validation(run, stage) for run in runs]
  lines = [
    Line(0, place, one[1], "points", _letter(runs, place) or "held out")
    for place, one in enumerate(found)
    if one and one[0] is curves.HELD_OUT_LOSS
  ]
  if not lines:
    return None
  figure = curves.HELD_OUT_LOSS
  chart = Chart(figure.title, figure.unit, [Span(stage, "", _last(runs, stage))], lines)
  return Drawn(figure.title, figure.unit, stage, drawing.drawn(chart))


def _chart(runs: list[RunFiles], stage: str, figure: Figure, drawn: list[Curve | None]) -> Chart | None:
  """The chart of one figure; None if no run has it."""
  lines = [Line(0, place, curve, "mean", _letter(runs, place) or "mean") for place, curve in enumerate(drawn) if curve]
  if not lines:
    return None
  levels: list[Level] = []
  if figure.limit is not None:
    limit = figure.limit * figure.factor
    levels = [Level(limit, f"{figure.limit_name} {drawing.short(limit)}", "limit")]
  alarms = curves.alarmed(runs[0].records.get(stage, []), figure.name)
  span = Span(stage, "", _last(runs, stage))
  return Chart(figure.title, figure.unit, [span], lines, levels, alarms, figure.name in curves.LOGARITHMIC)
