"""What the page says in words and tables: the state of a run, its results, its cost, and how two runs differ."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from d1jax.page import curves
from d1jax.page.drawing import short
from d1jax.page.run_files import RunFiles
from d1jax.report import TITLES
from d1jax.run.identity import flatten
from d1jax.run.metrics import STAGES
from d1jax.telemetry import ledger
from d1jax.telemetry.alarms import Limits, alarms

SAME = ("workdir", "report.compare", "trackers")
"""Fields that say nothing about how two runs differ."""

_NARROW = "\u202f"
"""The space between a number and its unit, where no line breaks."""

Value = tuple[str, str]
"""A value of a run, and a remark about it."""


class Tile(NamedTuple):
  """A fact with its value for each run."""

  title: str
  values: list[Value]


class Interval(NamedTuple):
  """A share in percent with its 95% interval: `name` says of what, `run` is the index of the run."""

  name: str
  run: int
  value: float
  low: float
  high: float
  n: str


class Part(NamedTuple):
  """A part of a stage's time: its name, its device-seconds, its share of the run in percent, tokens, FLOPs, MFU."""

  name: str
  seconds: str
  share: float
  tokens: str
  flops: str
  mfu: str


def _field(tree: Any, *names: str) -> Any:
  """A value in nested dictionaries; None if it is not there."""
  for name in names:
    tree = tree.get(name) if isinstance(tree, Mapping) else None
  return tree


def _number(value: Any) -> float | None:
  """A finite number; None for everything else."""
  is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < curves.LARGEST
  return float(value) if is_number else None


def wanted(run: RunFiles, stage: str) -> int:
  """The iterations of a stage that the configuration asks for; 0 if it does not say."""
  steps = _number(_field(run.config, stage, "steps"))
  return int(steps) if steps and steps > 0 else 0


def is_at(run: RunFiles, stage: str) -> bool:
  """Whether a stage is the last one that has records, in a run that is not finished."""
  return run.results is None and stage == [*run.records][-1]


def elapsed(run: RunFiles, stage: str) -> float:
  """The seconds of a stage, including earlier attempts."""
  records = run.records.get(stage, [])
  return max((x for r in records[-1:] if (x := _number(r.get("elapsed"))) is not None), default=0.0)


def duration(seconds: float) -> str:
  """Seconds as text, such as 12 s, 3 min 20 s or 2 h 5 min."""
  whole = round(max(seconds, 0.0))
  if whole < 60:
    return f"{whole}{_NARROW}s"
  if whole < 3600:
    return f"{whole // 60}{_NARROW}min {whole % 60}{_NARROW}s"
  return f"{whole // 3600}{_NARROW}h {whole % 3600 // 60}{_NARROW}min"


def status(run: RunFiles) -> str:
  """How far a run is."""
  if not run.records:
    return "no iteration yet"
  stage = [*run.records][-1]
  last, of = run.records[stage][-1]["iteration"], wanted(run, stage)
  if run.results is not None:
    return f"finished after {last} iterations of {TITLES[stage]}"
  return f"not finished: {TITLES[stage]}, iteration {last}" + (f" of {of}" if of else "")


def about(run: RunFiles) -> list[tuple[str, str]]:
  """A few facts about what was trained."""
  config, task = run.config, _field(run.config, "task", "name")
  size = _field(config, "model", "pretrained") or _field(config, "model", "size")
  rank, block = _field(config, "lora", "rank"), _field(config, "model", "block")
  method = [_field(config, "grpo", part, "name") for part in ("estimator", "loss", "advantage")]
  rows = [
    ("task", _field(config, "task", "module") or task),
    ("model", size),
    ("trained", f"adapters of rank {rank}" if rank else "every weight"),
    ("attention", f"block-causal, blocks of {block}" if block else None),
    ("method", ", ".join(map(str, method)) if all(method) and run.mode == "grpo" else None),
    ("seed", _field(config, "seed")),
    ("device", _field(run.results, "device")),
  ]
  return [(name, str(value)) for name, value in rows if value is not None]


def tiles(runs: Sequence[RunFiles]) -> list[Tile]:
  """The facts at the top of the page."""
  found = [
    Tile("Best validation", [_best(run) for run in runs]),
    Tile("Last validation", [_newest(run) for run in runs]),
  ]
  if any("grpo" in run.records for run in runs):
    found.append(Tile("Groups without signal", [_recent(run, "no_signal") for run in runs]))
  found.append(Tile("Time of training", [_time(run) for run in runs]))
  return found


def _score(score: float) -> str:
  return f"{short(-score)}" if score < 0 else f"{100 * score:.1f}{_NARROW}%"


def _best(run: RunFiles) -> Value:
  for stage in reversed(STAGES):
    if best := curves.best(run, stage):
      said = f"{TITLES[stage]}, iteration {best[0]}"
      start = curves.best(run, "sft") if stage != "sft" else None
      if start and start[1] >= 0:
        said += f"; SFT start {_score(start[1])}"
      return _score(best[1]), said
  return "–", "no validation yet"


def _newest(run: RunFiles) -> Value:
  for stage in reversed(STAGES):
    x, y = curves.values(run.records.get(stage, []), "validation")
    if len(x):
      ends = [o.solved for o in run.validated if (o.stage, o.iteration) == (stage, int(x[-1]))]
      interval = f" [{100 * ends[0][1]:.1f}, {100 * ends[0][2]:.1f}]" if ends else ""
      return _score(
        float(y[-1])
      ), f"{TITLES[stage]}, iteration {int(x[-1])}{'; 95% interval' + interval if ends else ''}"
  return "–", "no validation yet"


def _recent(run: RunFiles, name: str) -> Value:
  curve = curves.curve(run.records.get("grpo", []), curves.Figure(name, "", "%"))
  if curve is None:
    return "–", ""
  return (
    f"{curve.last:.0f}{_NARROW}%",
    f"{curve.y[0]:.0f}{_NARROW}% at the start; means of {curves.SMOOTHING} iterations",
  )


def _time(run: RunFiles) -> Value:
  spent = {stage: elapsed(run, stage) for stage in run.records}
  return duration(sum(spent.values())), ", ".join(
    f"{TITLES[stage]} {duration(seconds)}" for stage, seconds in spent.items()
  )


def alarm_lines(run: RunFiles) -> list[str]:
  """The alarms at the end of the last stage, in words, with the iteration since which each is on."""
  if not run.records:
    return []
  records = run.records[[*run.records][-1]]
  judged = records[: len(records) - len(records) % Limits.window]
  numbers = [
    {name: x for name in ("kl", "entropy", "no_signal", "reward") if (x := _number(record.get(name))) is not None}
    for record in judged
  ]
  found = []
  for name, sentence in alarms(numbers, Limits()).items():
    times = curves.alarmed(records, name)
    found.append(f"Since iteration {times[-1][0]}: {sentence}." if times else f"{sentence}.")
  return found


def held_out(runs: Sequence[RunFiles]) -> list[Interval]:
  """The final evaluations on the held-out split; none as long as no run is finished."""
  rows = []
  for place, run in enumerate(runs):
    for name, arm in (("constant answer", "baseline"), ("before diffu-GRPO", "before"), ("after training", "after")):
      ends = _field(run.results, arm, "solved_interval")
      numbers = [_number(_field(run.results, arm, "solved"))]
      numbers += [_number(end) for end in ends] if isinstance(ends, list) else []
      if len(numbers) == 3 and all(x is not None and 0 <= x <= 1 for x in numbers):
        value, low, high = (100 * x for x in numbers if x is not None)
        rows.append(Interval(name, place, value, low, high, str(_field(run.results, arm, "n"))))
  return rows


def cost_parts(runs: Sequence[RunFiles]) -> list[list[Part]]:
  """The cost of each run, part by part."""
  found = []
  for run in runs:
    merged = [one for stage, records in run.records.items() for one in _merged(stage, records)]
    spent = ledger.total(merged, {stage: elapsed(run, stage) for stage in run.records}) if merged else {}
    rows = [_part(f"{TITLES[stage]} {part}", each) for stage in run.records for part, each in spent[stage].items()]
    found.append([*rows, *([_part("total", spent["total"])] if spent else [])])
  return found


def _merged(stage: str, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """One record for all of the same devices, with the sums of their costs: of thousands, `ledger.total` takes long."""
  found: dict[tuple[Any, Any], dict[str, Any]] = {}
  kept = ("cost/devices", "cost/peak_flops")
  for record in records:
    devices = {name: x for name in kept if (x := _number(record.get(name))) is not None}
    sums = found.setdefault((devices.get(kept[0]), devices.get(kept[1])), {"stage": stage, **devices})
    for name, value in record.items():
      if name.startswith("cost/") and name not in kept and abs(value) < curves.LARGEST:  # a figure is always a number
        sums[name] = sums.get(name, 0.0) + value
  return list(found.values())


def _part(name: str, each: Mapping[str, float | None]) -> Part:
  tokens, flops, mfu = each["tokens"], each["flops"], each["mfu"]
  return Part(
    name,
    f"{each['device_seconds'] or 0.0:,.1f}",
    100 * (each["share"] or 0.0),
    f"{tokens:,.0f}" if tokens and flops else "",
    f"{flops:.2e}" if flops else "",
    f"{mfu:.1%}" if mfu is not None and math.isfinite(mfu) else "",
  )


def differences(run: RunFiles, other: RunFiles) -> list[tuple[str, str, str]]:
  """The fields of the configuration that differ, with both values; a field that a run does not have is `–`."""
  first, second = flatten(run.config), flatten(other.config)
  names = [name for name in sorted(first.keys() | second.keys()) if name not in SAME]
  return [
    (name, _plain(first, name), _plain(second, name))
    for name in names
    if first.get(name) != second.get(name) or (name in first) != (name in second)
  ]


def _plain(flat: Mapping[str, Any], name: str) -> str:
  value = flat.get(name, "–")
  return value if isinstance(value, str) else json.dumps(value)
