"""Compares what a block-causal network and one with full attention learn in equal time and with equal passes.

`python -m benchmarks.blocks` trains, for each seed, the recipe on tiny Sudoku with full attention
(`tiny,sudoku,stepmerge`) and with blocks (`tiny,sudoku,block`), one after the other on an otherwise idle machine. Both
score their rollouts with `step_merged`, by two forward passes: two segments of the path, or the path itself. It prints
a JSON line a run and a table, and draws the validations over seconds and over forward passes. Held-out grids are looked
at once a run, at its end; what both arms reach in equal time, and with equal passes, is said of the validation grids.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from d1jax import look
from d1jax.columns import markdown
from d1jax.run.metrics import read_records

ROOT = Path(__file__).parent.parent
ARMS = {"full": ("tiny,sudoku,stepmerge", "full attention"), "block": ("tiny,sudoku,block", "blocks of 6")}
PASSES = tuple(f"cost/passes/{part}" for part in ("rollout", "score", "update"))


def run(arm: str, seed: int, workdir: Path, fields: Sequence[str]) -> dict[str, Any]:
  """Trains one arm and returns its line; a finished work directory is read, not run again."""
  command = [sys.executable, "-m", "d1jax.main", f"--config=configs/grpo.py:{ARMS[arm][0]}"]
  command += [f"--config.seed={seed}", f"--config.workdir={workdir}", *fields]
  subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
  results = json.loads((workdir / "results.json").read_text(encoding="utf-8"))
  seconds = passes = before = 0.0
  curve, stage, spent = [], "", {"rollout": 0.0, "update": 0.0}
  for record in read_records(workdir / "metrics.jsonl"):
    if record["stage"] != stage:
      stage, before = record["stage"], seconds
    seconds = before + record["elapsed"]
    passes += sum(record.get(name, 0.0) for name in PASSES)
    spent = {part: spent[part] + record.get(f"cost/seconds/{part}", 0.0) for part in spent}
    if "validation" in record:
      curve.append((seconds, passes, record["validation"]))
  return {
    "arm": arm,
    "seed": seed,
    "before": results["before"]["solved"],
    "solved": results["after"]["solved"],
    "solved_interval": results["after"]["solved_interval"],
    "n": results["after"]["n"],
    "seconds": seconds,
    "passes": passes,
    "seconds_of": spent,
    "curve": curve,
  }


def best_within(line: dict[str, Any], column: int, limit: float) -> float:
  """The best validation of a run until it has spent `limit` seconds (column 0) or passes (column 1)."""
  return max((point[2] for point in line["curve"] if point[column] <= limit), default=0.0)


def table(lines: Sequence[dict[str, Any]]) -> str:
  """A row an arm: means of the seeds, and the extremes."""
  ends = [[max(line["curve"][-1][column] for line in lines if line["arm"] == arm) for arm in ARMS] for column in (0, 1)]
  limits = [min(each) for each in ends]
  head = (
    "attention",
    "held-out solved after SFT",
    "after diffu-GRPO",
    "seconds",
    "of rollouts",
    "passes, thousands",
    f"validation within {limits[0]:.0f} s",
    f"within {limits[1] / 1e3:.0f} thousand passes",
  )
  rows = []
  for arm, (_, name) in ARMS.items():
    own = [line for line in lines if line["arm"] == arm]
    percent = lambda values: (
      f"{100 * statistics.mean(values):.1f}% ({100 * min(values):.1f} to {100 * max(values):.1f})"
    )
    rows.append(
      (
        name,
        percent([line["before"] for line in own]),
        percent([line["solved"] for line in own]),
        f"{statistics.mean([line['seconds'] for line in own]):.0f}",
        f"{statistics.mean([line['seconds_of']['rollout'] for line in own]):.0f}",
        f"{statistics.mean([line['passes'] for line in own]) / 1e3:.0f}",
        *(percent([best_within(line, column, limit) for line in own]) for column, limit in enumerate(limits)),
      )
    )
  return markdown(head, rows)


@look.styled()
def plot(lines: Sequence[dict[str, Any]]) -> Figure:
  """Validations over seconds and over passes, a line a run."""
  figure = look.panels(2, width=5.5, height=4.2, sharey=True)
  for index, (arm, (_, name)) in enumerate(ARMS.items()):
    for line in (line for line in lines if line["arm"] == arm):
      for axes, column, unit in zip(figure.axes, (0, 1), (1, 1e3), strict=True):
        x, y = zip(*((point[column] / unit, 100 * point[2]) for point in line["curve"]), strict=True)
        look.line(axes, x, y, look.LINES[index], name)
  first, second = figure.axes
  first.set(title="Equal time", xlabel="time of training, s", ylabel="validation grids solved, %", ylim=(0, 100))
  second.set(title="Equal work", xlabel="forward passes of a row, thousands")
  return figure


def main() -> None:
  """Runs all seeds and arms."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
  parser.add_argument("--folder", type=Path, default=Path("runs/blocks"), help="finished work directories are read")
  parser.add_argument("--picture", type=Path, help="of the curves; left out: learning.png in the folder")
  options, fields = parser.parse_known_args()
  lines = []
  for seed in options.seeds:
    for arm in ARMS:
      lines.append(run(arm, seed, options.folder.absolute() / f"{arm}-{seed}", fields))
      print(json.dumps(lines[-1]), flush=True)
  (options.picture or options.folder / "learning.png").write_bytes(look.png(plot(lines)))
  print(table(lines), file=sys.stderr)


if __name__ == "__main__":
  main()
