"""Which method learns most at equal cost? `python -m benchmarks.methods`.

For each seed, every preset of `configs/methods.py` goes on from one SFT checkpoint of a tiny model, for as many
iterations as its passes allow: forward passes of a completion in rollouts, scores and updates, a backward pass counted
as two, come to `--passes` for all. The warm-up has the same share of each. The reference is scored by all, to log the
distance to it. Checkpoints are chosen on the validation split, and the held-out split is looked at once. It prints a
JSON line a run, whose figures are those of the last tenth of its iterations, then a table, and draws the curves: means
of the seeds, and of the best methods from the worst seed to the best.
"""

import argparse
import json
import runpy
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from benchmarks import passes, timing
from d1jax import look
from d1jax.columns import markdown
from d1jax.diffusion.rollout import SamplerSpec
from d1jax.rl.advantage import ADVANTAGES
from d1jax.run.metrics import read_records
from d1jax.training import configured

ROOT = Path(__file__).parent.parent
METHODS = runpy.run_path(str(ROOT / "configs" / "methods.py"))["METHODS"]
FIRST = next(iter(METHODS))
"""Trains the SFT checkpoint that all others start from."""

POINTS = 10
"""Validations of a run."""

HIGHLIGHTED = 3
"""Methods with a colour and a band."""

FIGURES = ("reference_gap", "sampling_gap", "entropy", "no_signal")
"""Of a line, as medians over iterations. Clips and ratios are left out: tiny's one step a rollout has none."""


def preset(words: str) -> ConfigDict:
  """What a run starts from."""
  config: ConfigDict = runpy.run_path(str(ROOT / "configs" / "grpo.py"))["get_config"](words)
  return config


def passes_an_iteration(config: ConfigDict) -> int:
  """Of one completion: its rollout, the reference's score, and the update."""
  sampler = SamplerSpec(**config.rollout)
  each, again = passes.of(configured.method(config.grpo, sampler).estimator, sampler)
  return sampler.blocks * sampler.steps_per_block + config.grpo.num_iterations * (each * (1 + 3) + again)


def command(words: str, seed: int, workdir: Path, fields: dict[str, Any]) -> list[str]:
  """What trains one run."""
  fields = fields | {"seed": seed, "workdir": workdir, "grpo.score_reference": True}
  flags = [f"--config.{name}={value}" for name, value in fields.items()]
  return [sys.executable, "-m", "d1jax.main", f"--config=configs/grpo.py:{words}", *flags]


def run(name: str, advantage: str | None, seed: int, options: argparse.Namespace) -> dict[str, Any]:
  """Trains one method and returns its line; a finished work directory is read, not run again."""
  words = f"{options.size},{options.task},{name}"
  label = name if advantage is None else f"{name} ({advantage})"
  workdir, start = (options.folder.absolute() / f"{each}-{seed}" for each in (label, FIRST))
  if label != FIRST and not workdir.exists():
    shutil.copytree(start / "checkpoints" / "sft", workdir / "checkpoints" / "sft")
  config = preset(words)
  each = passes_an_iteration(config)
  steps = max(POINTS, options.passes // each)
  warm_up = steps * config.grpo.warmup_steps // config.grpo.steps
  fields: dict[str, Any] = {
    "grpo.steps": steps,
    "grpo.warmup_steps": warm_up,
    "grpo.validate_every": max(1, steps // POINTS),
  }
  if advantage is not None:
    fields["grpo.advantage"] = advantage
  subprocess.run(command(words, seed, workdir, fields), cwd=ROOT, check=True, stdout=sys.stderr)
  results = json.loads((workdir / "results.json").read_text(encoding="utf-8"))
  records = [r for r in read_records(workdir / "metrics.jsonl") if r["stage"] == "grpo"]
  last = records[-max(1, steps // 10) :]
  figures = {name: statistics.median(r[name] for r in last if name in r) for name in FIGURES if name in last[-1]}
  return {
    "method": label,
    "seed": seed,
    "iterations": steps,
    "before": results["before"]["solved"],
    "solved": results["after"]["solved"],
    "solved_interval": results["after"]["solved_interval"],
    "n": results["after"]["n"],
    "seconds": results["seconds"]["grpo"],
    **figures,
    "curve": [(each * r["iteration"], r["elapsed"], r["validation"]) for r in records if "validation" in r],
  }


def table(lines: Sequence[dict[str, Any]]) -> str:
  """A row a method: held-out problems solved, the mean and the extremes of the seeds, and the figures' medians."""
  head = ("method", "iterations", "solved", "seeds", "seconds", *FIGURES)
  rows = []
  for name in dict.fromkeys(line["method"] for line in lines):
    own = [line for line in lines if line["method"] == name]
    solved = [100 * line["solved"] for line in own]
    medians = [statistics.median(x[field] for x in own) if field in own[0] else None for field in FIGURES]
    shown = ["" if value is None else f"{value:.3g}" for value in medians]
    seconds = statistics.mean(line["seconds"] for line in own)
    span = f"{min(solved):.1f} to {max(solved):.1f}"
    rows.append((f"`{name}`", own[0]["iterations"], f"{statistics.mean(solved):.1f}%", span, f"{seconds:.0f}", *shown))
  return markdown(head, rows)


@look.styled()
def plot(lines: Sequence[dict[str, Any]]) -> Figure:
  """Validation against passes and against seconds: the means of the seeds.

  The best methods have colours, and bands from the worst to the best seed; the others are grey.
  """
  curves = {}
  for name in dict.fromkeys(line["method"] for line in lines):
    own = [np.asarray(line["curve"], float) for line in lines if line["method"] == name]
    least = min(map(len, own))
    curves[name] = np.stack([each[:least] for each in own])
  best = sorted(curves, key=lambda name: -float(curves[name][:, -1, 2].mean()))[:HIGHLIGHTED]
  figure = look.panels(2, width=5.8, height=4.5, sharey=True)
  for axes, column in zip(figure.axes, (0, 1), strict=True):
    for name in [*(name for name in curves if name not in best), *reversed(best)]:
      x, y = curves[name][:, :, column].mean(axis=0), 100 * curves[name][:, :, 2]
      if name in best:
        band = (y.min(axis=0), y.max(axis=0))
        look.line(axes, x, y.mean(axis=0), look.LINES[best.index(name)], name, band=band, width=2.2)
      else:
        look.line(axes, x, y.mean(axis=0), "muted", name, width=1)
  first, second = figure.axes
  first.set(title="Equal work", xlabel="passes of a completion, backward: two", ylabel="validation problems solved, %")
  second.set(title="Their time", xlabel="time of diffu-GRPO, s", ylim=(0, None))
  return figure


def main() -> None:
  """Runs all methods and seeds."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
  parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
  parser.add_argument("--advantage", choices=list(ADVANTAGES), help="of --methods, in place of each one's own")
  parser.add_argument("--size", default="tiny", choices=("tiny", "smoke"))
  parser.add_argument("--task", default="sudoku", choices=("sudoku", "countdown"))
  parser.add_argument("--passes", type=int, default=5600, help="of a run; 5600 are the 700 iterations of d1's recipe")
  parser.add_argument("--folder", type=Path, default=Path("runs/methods"), help="finished work directories are read")
  parser.add_argument("--picture", type=Path, help="of the curves; left out: learning.png in the folder")
  options = parser.parse_args()
  jax.config.update("jax_platforms", "cpu")  # of this process: an accelerator belongs to those that train
  named = {name: getattr(options, name) for name in ("passes", "size", "task")}
  print(json.dumps({**named, **timing.host()}), flush=True)
  lines = []
  for seed in options.seeds:
    for name, advantage in dict.fromkeys(((FIRST, None), *((name, options.advantage) for name in options.methods))):
      lines.append(run(name, advantage, seed, options))
      print(json.dumps(lines[-1]), flush=True)
  (options.picture or options.folder / "learning.png").write_bytes(look.png(plot(lines)))
  print(table(lines))


if __name__ == "__main__":
  main()
