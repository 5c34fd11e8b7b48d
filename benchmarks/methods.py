"""Which method learns most at equal cost, each with settings of its own? `python -m benchmarks.methods`.

A seed has one start, SFT of a tiny model, from which every preset of `configs/methods.py` goes on, with mu = 1 and with
mu = 4. First each method is tuned: it has the same number of settings (`settings`: the temperature of rollouts, the
learning rate, the size of a group, and one number of its own, the clip's epsilon or the weight of its KL), which are
compared on the validation split with a seed that is used for nothing else. Then the best setting runs with fresh seeds,
as long as equal forward passes allow (of a completion, in rollouts, scores and updates; a backward pass counts as two),
and as long as the seconds allow that d1 takes for them. A control, a seed, is more SFT on the same demonstrations for
these seconds. Checkpoints are chosen on the validation split; the held-out split is looked at once a budget.

Every cell is a work directory under `--folder`, and a line of its `lines.jsonl`: the same command goes on where it was
stopped. It prints what it will take before it begins, refuses more than `--hours`, and ends with a table and curves.
`--subset` is four methods with mu = 1, two settings, two seeds and short runs.
"""

import argparse
import itertools
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from benchmarks import timing
from benchmarks.method_plan import (
  FIRST,
  METHODS,
  SUBSET,
  Plan,
  Setting,
  configuration,
  passes_an_iteration,
  seconds_of,
  settings,
  words,
)
from d1jax import look
from d1jax.columns import markdown
from d1jax.intervals import over_seeds
from d1jax.run.metrics import read_records

ROOT = Path(__file__).parent.parent
TUNING_SEED = 1000

POINTS = 10
"""Validations of a run within its passes."""

HIGHLIGHTED = 3
"""Methods with a colour."""


def run(preset: str, fields: Mapping[str, Any]) -> None:
  """Runs a command of `d1jax.main`."""
  flags = [f"--config.{name}={value}" for name, value in fields.items()]
  command = [sys.executable, "-m", "d1jax.main", f"--config=configs/{preset}", *flags]
  subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)


def read(workdir: Path, stage: str, each: int = 0) -> dict[str, Any]:
  """The figures of a finished work directory; an iteration of its stage has `each` passes.

  Seconds are those of iterations: without compilation, validations and saving.
  """
  results = json.loads((workdir / "results.json").read_text(encoding="utf-8"))
  records = [r for r in read_records(workdir / "metrics.jsonl") if r["stage"] == stage]
  seconds = list(itertools.accumulate(r["seconds"] for r in records))
  curve = [
    (each * r["iteration"], s, r["validation"]) for r, s in zip(records, seconds, strict=True) if "validation" in r
  ]
  return {
    "iterations": len(records),
    "passes": each * len(records),
    "seconds": seconds[-1],
    "seconds_each": statistics.median(r["seconds"] for r in records),
    "validation": max(point[2] for point in curve),
    "solved": results["after"]["solved"],
    "solved_interval": results["after"]["solved_interval"],
    "n": results["after"]["n"],
    "curve": curve,
  }


class Lines:
  """The lines of the cells that are done, in a file; a cell has a name."""

  def __init__(self, path: Path):
    """Reads the file; a last line that a kill cut off is no line."""
    self._path, self.found = path, dict[str, dict[str, Any]]()
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
      path.write_text(whole, encoding="utf-8")
    for line in whole.splitlines():
      row = json.loads(line)
      self.found[row["cell"]] = row

  def add(self, cell: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the line of a cell."""
    self.found[cell] = {"cell": cell, **row}
    with self._path.open("a", encoding="utf-8") as file:
      file.write(json.dumps(self.found[cell]) + "\n")
    print(json.dumps({name: value for name, value in self.found[cell].items() if name != "curve"}), flush=True)
    return self.found[cell]


def start(plan: Plan, seed: int, folder: Path, lines: Lines) -> dict[str, Any]:
  """SFT of a seed, and its folder `start-SEED`, which the methods go on from."""
  cell, output = f"sft-{seed}", folder / f"start-{seed}"
  if cell not in lines.found:
    run(f"sft.py:{plan.size},{plan.task}", {"seed": seed, "workdir": folder / cell})
    if not output.exists():
      part = output.with_suffix(".part")
      shutil.rmtree(part, ignore_errors=True)
      run("export.py", {"checkpoint": folder / cell, "output": part})
      part.rename(output)
    lines.add(cell, {"kind": "start", "seed": seed, **read(folder / cell, "sft")})
  return lines.found[cell]


def control(plan: Plan, seed: int, seconds: float, folder: Path, lines: Lines) -> None:
  """SFT of a seed that has `seconds` more than its start, with a schedule of its own for all of its steps."""
  cell, before = f"control-{seed}", lines.found[f"sft-{seed}"]
  if cell not in lines.found:
    steps = before["iterations"] + round(seconds / before["seconds_each"])
    fields = {"seed": seed, "workdir": folder / cell, "sft.steps": steps, "sft.validate_every": max(1, steps // POINTS)}
    run(f"sft.py:{plan.size},{plan.task}", fields)
    lines.add(cell, {"kind": "control", "seed": seed, **read(folder / cell, "sft")})


def grpo(
  plan: Plan, cell: str, name: str, mu: int, setting: Setting, seed: int, iterations: int, within: int, folder: Path
) -> dict[str, Any]:
  """Runs a method, or goes on with it, and returns its figures.

  Args:
    plan: of the comparison.
    cell: the name of the work directory.
    name: of the method.
    mu: optimiser steps a rollout.
    setting: that it has.
    seed: of the run and of its start.
    iterations: where it ends.
    within: the iterations that warm-up and validations are shares of.
    folder: of the work directories.
  """
  config, chosen = configuration(plan, name, mu, setting)
  chosen |= {
    "seed": seed,
    "workdir": folder / cell,
    "model.pretrained": folder / f"start-{seed}",
    "sft.steps": 0,
    "grpo.steps": iterations,
    "grpo.warmup_steps": max(1, within * mu // 20),
    "grpo.validate_every": max(1, within // POINTS),
  }
  run(f"grpo.py:{words(plan, name)}", chosen)
  told = {"method": name, "mu": mu, "setting": setting._asdict(), "seed": seed}
  return {**told, **read(folder / cell, "grpo", passes_an_iteration(config))}


def tune(plan: Plan, name: str, mu: int, folder: Path, lines: Lines) -> None:
  """Runs every setting of a method."""
  for number, setting in enumerate(settings(name, mu, plan.settings)):
    cell = f"tuning-{name}-{mu}-{number}"
    if cell not in lines.found:
      each = passes_an_iteration(configuration(plan, name, mu, setting)[0])
      iterations = max(1, plan.tuning_passes // each)
      row = grpo(plan, cell, name, mu, setting, TUNING_SEED, iterations, iterations, folder)
      lines.add(cell, {"kind": "tuning", **row})


def best(plan: Plan, name: str, mu: int, lines: Lines) -> dict[str, Any]:
  """The line of the setting that solved most validation problems; of equal ones the first."""
  found = [lines.found[f"tuning-{name}-{mu}-{number}"] for number in range(plan.settings)]
  return max(found, key=lambda line: float(line["validation"]))


def budget(plan: Plan, lines: Lines) -> float:
  """The seconds that d1 takes for the passes of a run, by the median iteration of its best setting."""
  line = best(plan, FIRST, plan.mus[0], lines)
  return float(plan.passes * line["seconds_each"] * line["iterations"] / line["passes"])


def lengths(plan: Plan, line: Mapping[str, Any], seconds: float) -> list[tuple[str, int]]:
  """Budgets and the iterations that they allow a setting, the shorter run first."""
  each = line["passes"] / line["iterations"]
  allowed = {"passes": max(1, int(plan.passes / each)), "seconds": max(1, round(seconds / line["seconds_each"]))}
  return sorted(allowed.items(), key=lambda pair: pair[1])


def compare(plan: Plan, name: str, mu: int, seed: int, seconds: float, folder: Path, lines: Lines) -> None:
  """Runs the best setting of a method with a fresh seed to the one budget, then on to the other."""
  tuned, cell = best(plan, name, mu, lines), f"final-{name}-{mu}-{seed}"
  own = tuned["setting"]["own"]
  setting = Setting(**tuned["setting"] | {"own": own and (own[0], own[1])})
  allowed = lengths(plan, tuned, seconds)
  for kind, iterations in allowed:
    if f"{cell}-{kind}" not in lines.found:
      row = grpo(plan, cell, name, mu, setting, seed, iterations, dict(allowed)["passes"], folder)
      lines.add(f"{cell}-{kind}", {"kind": "final", "budget": kind, **row})


def percent(values: Sequence[float], signed: bool = False) -> tuple[str, str]:
  """The mean over seeds, and its verdict against 0: `yes` if the interval is above it, `no` below, else `open`."""
  found = over_seeds([(1 + value) / 2 for value in values])  # from [-1, 1] to [0, 1], and back
  mean, ends = 2 * found.value - 1, found.interval and [2 * end - 1 for end in found.interval]
  form = "{:+.1f}" if signed else "{:.1f}"
  if ends is None:
    return form.format(100 * mean), ""
  verdict = "yes" if ends[0] > 0 else "no" if ends[1] < 0 else "open"
  low, high = (form.format(100 * (end if signed else min(max(end, 0), 1))) for end in ends)
  return f"{form.format(100 * mean)} ({low} to {high})", verdict


def table(plan: Plan, lines: Lines) -> str:
  """A row a method and mu: its setting, what it solves within both budgets, and how far it is ahead of its control."""
  rows: list[Sequence[Any]] = []
  seeds = range(plan.seeds)
  for label in ("sft", "control"):
    own = [lines.found[f"{label}-{seed}"] for seed in seeds]
    solved = percent([line["solved"] for line in own])[0]
    seconds = statistics.mean(line["seconds"] for line in own)
    shown = "start" if label == "sft" else "SFT control"
    rows.append((shown, "", "", "", "", "", f"{seconds:.0f}", solved, "", ""))
  for name, mu in plan.pairs:
    chosen = best(plan, name, mu, lines)["setting"]
    tuned = [f"T {chosen['temperature']:g}", f"rate {chosen['learning_rate']:g}", f"group {chosen['group']}"]
    tuned += [f"{chosen['own'][0]} {chosen['own'][1]:g}"] if chosen["own"] else []
    row: list[Any] = [f"`{name}`", mu, ", ".join(tuned)]
    for kind in ("passes", "seconds"):
      own = [lines.found[f"final-{name}-{mu}-{seed}-{kind}"] for seed in seeds]
      row += [own[0]["iterations"]]
      row += [f"{statistics.mean(line['seconds'] for line in own):.0f}"] if kind == "seconds" else []
      row += [percent([line["solved"] for line in own])[0]]
    gains = [line["solved"] - lines.found[f"control-{line['seed']}"]["solved"] for line in own]
    rows.append((*row, *percent(gains, signed=True)))
  head = ("method", "mu", "best setting", "iterations", "solved at equal passes, %", "iterations", "seconds")
  return markdown((*head, "solved at equal seconds, %", "ahead of the SFT control, points", "beats it"), rows)


@look.styled()
def plot(plan: Plan, lines: Lines) -> Figure:
  """Validations against passes and against seconds, means over seeds; start and control are level lines.

  The best methods have colours, the others are grey.
  """
  figure = look.panels(2, len(plan.mus), width=5.8, height=4.5, sharey=True)
  level = lambda label: 100 * statistics.mean(lines.found[f"{label}-{i}"]["validation"] for i in range(plan.seeds))
  for index, (mu, kind) in enumerate(itertools.product(plan.mus, ("passes", "seconds"))):
    axes, column, curves = figure.axes[index], ("passes", "seconds").index(kind), {}
    for name in dict.fromkeys(name for name, _ in plan.pairs):
      own = [lines.found[f"final-{name}-{mu}-{seed}-{kind}"]["curve"] for seed in range(plan.seeds)]
      least = min(map(len, own))
      curves[name] = np.mean([np.asarray(curve, float)[:least] for curve in own], axis=0)
    best = sorted(curves, key=lambda name: -float(curves[name][-1, 2]))[:HIGHLIGHTED]
    for name in [*(name for name in curves if name not in best), *reversed(best)]:
      color = look.LINES[best.index(name)] if name in best else "muted"
      x, y = curves[name][:, column], 100 * curves[name][:, 2]
      look.line(axes, x, y, color, name, width=2.2 if name in best else 1)
    look.level(axes, level("sft"), "start", below=True)
    look.level(axes, level("control"), "SFT control")
    axes.set(title=f"mu = {mu}", ylim=(0, None))
    axes.set(xlabel=("passes of a completion, backward: two", "time of iterations, s")[column])
    if not column:
      axes.set(ylabel="validation problems solved, %")
  return figure


def chosen_plan(arguments: Sequence[str]) -> tuple[Plan, argparse.Namespace]:
  """The plan of a command line, and the other options.

  Raises:
    SystemExit: the plan takes longer than it may.
  """
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--subset", action="store_true")
  parser.add_argument("--methods", nargs="+", choices=list(METHODS))
  parser.add_argument("--mus", type=int, nargs="+")
  parser.add_argument("--settings", type=int, help="of each method and mu")
  parser.add_argument("--seeds", type=int, help="how many fresh ones")
  parser.add_argument("--tuning_passes", type=int, help="of a run that tunes")
  parser.add_argument("--passes", type=int, help="of a run with a fresh seed")
  parser.add_argument("--size", choices=("tiny", "smoke"))
  parser.add_argument("--task", choices=("sudoku", "countdown"))
  parser.add_argument("--hours", type=float, default=4.0, help="the plan may take no longer on two idle cores")
  parser.add_argument("--folder", type=Path, default=Path("runs/methods"), help="what is done there is not done again")
  parser.add_argument("--picture", type=Path, help="of the curves; left out: learning.png in the folder")
  options = parser.parse_args(arguments)
  given: dict[str, Any] = {}
  for name in Plan._fields:
    if (value := getattr(options, name)) is not None:
      given[name] = tuple(value) if isinstance(value, list) else value
  plan = (SUBSET if options.subset else Plan())._replace(**given)
  hours = sum(seconds_of(plan).values()) / 3600
  if hours > options.hours:
    raise SystemExit(
      f"the plan takes {hours:.1f} hours of two idle cores, more than --hours={options.hours:g}: lower --passes,"
      f" --settings or --seeds, name fewer --methods, or use --hours={hours + 0.1:.1f}"
    )
  return plan, options


def execute(plan: Plan, folder: Path, lines: Lines) -> None:
  """Runs what is not done yet; a seed after the other, so that a stop leaves whole seeds."""
  start(plan, TUNING_SEED, folder, lines)
  for name, mu in plan.pairs:
    tune(plan, name, mu, folder, lines)
  seconds = budget(plan, lines)
  for seed in range(plan.seeds):
    start(plan, seed, folder, lines)
    control(plan, seed, seconds, folder, lines)
    for name, mu in plan.pairs:
      compare(plan, name, mu, seed, seconds, folder, lines)


def main() -> None:
  """Runs the comparison."""
  plan, options = chosen_plan(sys.argv[1:])
  jax.config.update("jax_platforms", "cpu")  # of this process: an accelerator belongs to those that train
  estimate = {kind: round(seconds) for kind, seconds in seconds_of(plan).items()}
  print(json.dumps({**plan._asdict(), "seconds": estimate, **timing.host()}), flush=True)
  folder = options.folder.absolute()
  folder.mkdir(parents=True, exist_ok=True)
  lines = Lines(folder / "lines.jsonl")
  execute(plan, folder, lines)
  (options.picture or folder / "learning.png").write_bytes(look.png(plot(plan, lines)))
  print(table(plan, lines))


if __name__ == "__main__":
  main()
