"""Does a run learn as much from rollouts of older weights? `python -m benchmarks.staleness`.

For each seed and staleness (`grpo.off_policy_steps` 0, 1 and 2) it trains `configs/grpo.py:tiny,sudoku`, whose SFT is
the same for all of a seed, one run after the other. Checkpoints are chosen on the validation split, and the held-out
split is looked at once. It prints a JSON line a run and a table, and says whether the mean of the seeds at 1 and 2 lies
within their spread at 0, from the worst seed to the best. All devices are shared by both sides: only the staleness
differs, and only the learning is measured.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import timing
from d1jax.columns import markdown
from d1jax.run.metrics import read_records

ROOT = Path(__file__).parent.parent
FIGURES = ("behaviour_gap", "importance/effective_sample_size", "clip_fraction")
"""Medians over the iterations of a run; the synchronous run has only the last."""


def run(steps: int, seed: int, options: argparse.Namespace) -> dict[str, Any]:
  """Trains one run and returns its line; a finished work directory is read, not run again."""
  workdir = options.folder.absolute() / f"{steps}-{seed}"
  fields = {"seed": seed, "workdir": workdir, "grpo.off_policy_steps": steps}
  flags = [f"--config.{name}={value}" for name, value in fields.items()]
  command = [sys.executable, "-m", "d1jax.main", f"--config=configs/grpo.py:{options.size},sudoku", *flags]
  subprocess.run([*command, *options.flags], cwd=ROOT, check=True, stdout=sys.stderr)
  results = json.loads((workdir / "results.json").read_text(encoding="utf-8"))
  records = [r for r in read_records(workdir / "metrics.jsonl") if r["stage"] == "grpo"]
  medians = {name: statistics.median(r[name] for r in records) for name in FIGURES if name in records[-1]}
  return {
    "off_policy_steps": steps,
    "seed": seed,
    "before": results["before"]["solved"],
    "solved": results["after"]["solved"],
    "solved_interval": results["after"]["solved_interval"],
    "n": results["after"]["n"],
    "seconds": results["seconds"]["grpo"],
    **medians,
  }


def main() -> None:
  """Runs all seeds at every staleness."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
  parser.add_argument("--steps", type=int, nargs="+", default=[0, 1, 2], help="off_policy_steps; 0 is needed")
  parser.add_argument("--size", default="tiny", choices=("tiny", "smoke"))
  parser.add_argument("--folder", type=Path, default=Path("runs/staleness"), help="finished work directories are read")
  parser.add_argument("flags", nargs="*", help="further flags of every run, behind --")
  options = parser.parse_args()
  print(json.dumps({"size": options.size, **timing.host()}), flush=True)
  lines = []
  for seed in options.seeds:
    for steps in options.steps:
      lines.append(run(steps, seed, options))
      print(json.dumps(lines[-1]), flush=True)
  solved = {steps: [100 * x["solved"] for x in lines if x["off_policy_steps"] == steps] for steps in options.steps}
  low, high, rows = min(solved[0]), max(solved[0]), []
  for steps, shares in solved.items():
    mean = statistics.mean(shares)
    within = "" if not steps else "yes" if low <= mean <= high else "above" if mean > high else "below"
    rows.append((steps, f"{mean:.1f}%", ", ".join(f"{share:.1f}" for share in shares), within))
  print(markdown(("off_policy_steps", "solved", "seeds", f"within {low:.1f} to {high:.1f}"), rows))


if __name__ == "__main__":
  main()
