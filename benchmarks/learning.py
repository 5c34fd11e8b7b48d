"""Does reinforcement learning teach what the demonstrations do not? The recipe against more supervised learning in the
same time.

`python -m benchmarks.learning` trains, for each seed, the default recipe of `configs/grpo.py` (arm `recipe`: SFT, then
diffu-GRPO) and `configs/sft.py` on the same demonstrations (arm `control`), one after the other on an otherwise idle
machine. Both choose their checkpoint on the validation grids and look at the held-out grids once. It prints a JSON line
a run, and writes the table and the curves to `learning.md` and `learning.png` in `--docs`.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from d1jax import look
from d1jax.run.metrics import read_records

ROOT = Path(__file__).parent.parent
CONTROL_STEPS = 7000
"""Steps of the control: calibrated once so that it takes as long as the recipe's two stages; never a clock."""

ARMS = {
  "recipe": ("--config=configs/grpo.py",),
  "control": (
    "--config=configs/sft.py",
    f"--config.sft.steps={CONTROL_STEPS}",
    f"--config.sft.validate_every={CONTROL_STEPS // 20}",
  ),
}


def run(arm: str, seed: int, workdir: Path) -> dict[str, Any]:
  """Trains one arm and returns its line; a finished work directory is read, not run again."""
  command = [sys.executable, "-m", "d1jax.main", *ARMS[arm], f"--config.seed={seed}", f"--config.workdir={workdir}"]
  subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
  results = json.loads((workdir / "results.json").read_text(encoding="utf-8"))
  after = results["after"]
  shares = [r["compiled_share"] for r in read_records(workdir / "metrics.jsonl") if "compiled_share" in r]
  return {
    "seed": seed,
    "arm": arm,
    "solved": after["solved"],
    "solved_interval": after["solved_interval"],
    "cell_accuracy": after["cell_accuracy"],
    "n": after["n"],
    "seconds": results["seconds"]["this_invocation"],
    "training_seconds": sum(results["seconds"][stage] for stage in ("sft", "grpo") if stage in results["seconds"]),
    "before": results["before"]["solved"] if "before" in results else None,
    "baseline_cell_accuracy": results["baseline"]["cell_accuracy"],
    "compiled_share": statistics.median(shares) if shares else None,
    "peak_memory_gib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20,
  }


def table(lines: list[dict[str, Any]]) -> str:
  """The runs in Markdown, and the gap between the arms a seed."""
  rows = [
    "| seed | arm | solved | 95% interval | cell accuracy | n | training s | all s |",
    "|--:|---|--:|---|--:|--:|--:|--:|",
  ]
  for line in lines:
    low, high = line["solved_interval"]
    rows.append(
      f"| {line['seed']} | {line['arm']} | {100 * line['solved']:.1f}% | {100 * low:.1f} to {100 * high:.1f}"
      f" | {100 * line['cell_accuracy']:.1f}% | {line['n']} | {line['training_seconds']:.0f} | {line['seconds']:.0f} |"
    )
  by_arm = {arm: {x["seed"]: x["solved"] for x in lines if x["arm"] == arm} for arm in ARMS}
  gaps = [by_arm["recipe"][seed] - by_arm["control"][seed] for seed in by_arm["recipe"] if seed in by_arm["control"]]
  if gaps:
    means = ", ".join(f"{arm} {100 * statistics.mean(by_arm[arm].values()):.1f}%" for arm in ARMS)
    rows += [
      "",
      f"Mean solved: {means}. The recipe is ahead by {100 * statistics.mean(gaps):.1f} points on average,"
      f" by {100 * min(gaps):.1f} to {100 * max(gaps):.1f} a seed.",
    ]
  return "\n".join(rows)


def curve(arm: str, workdir: Path) -> tuple[list[float], list[float], float]:
  """Training seconds and solved validation grids in percent of one run; and when its diffu-GRPO starts, in seconds."""
  offset, seconds, solved = 0.0, [], []
  for stage in ("sft", "grpo"):
    own = [r for r in read_records(workdir / "metrics.jsonl") if r["stage"] == stage]
    seconds += [offset + r["elapsed"] for r in own if "validation" in r]
    solved += [100 * r["validation"] for r in own if "validation" in r]
    if own and arm == "recipe" and stage == "sft":
      offset = own[-1]["elapsed"]
  return seconds, solved, offset


@look.styled()
def plot(curves: Mapping[str, Sequence[tuple[list[float], list[float], float]]]) -> Figure:
  """Validation over training seconds, a line a run; `curves` has those of each arm."""
  figure = look.panels(width=8, height=4)
  axes = figure.axes[0]
  colours, names = {"recipe": "line0", "control": "muted"}, {"recipe": "SFT + diffu-GRPO", "control": "SFT only"}
  for arm, runs in curves.items():
    for seconds, solved, _ in runs:
      look.line(axes, seconds, solved, colours[arm], names[arm])
  starts = [offset for _, _, offset in curves.get("recipe", [])]
  if starts:
    start = statistics.mean(starts)
    axes.axvline(start, color=look.LIGHT["muted"], linewidth=0.8, linestyle=":", label="_start")
    axes.annotate("diffu-GRPO starts", (start, 97), xytext=(4, 0), textcoords="offset points", va="top", fontsize=9)
  axes.set(
    title="The recipe against more SFT in the same time, a line a seed",
    xlabel="time of training, s",
    ylabel="validation puzzles solved, %",
    xlim=(0, None),
    ylim=(0, 100),
  )
  return figure


def main() -> None:
  """Runs all seeds and arms."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
  parser.add_argument(
    "--folder", type=Path, default=Path("runs/learning"), help="work directories; finished ones are read"
  )
  parser.add_argument(
    "--docs", type=Path, default=Path("runs/learning"), help="where the table and the picture go; docs: the page's own"
  )
  options = parser.parse_args()
  workdirs = {(arm, seed): options.folder.absolute() / f"{arm}-{seed}" for seed in options.seeds for arm in ARMS}
  lines = []
  for (arm, seed), workdir in workdirs.items():
    lines.append(run(arm, seed, workdir))
    print(json.dumps(lines[-1]), flush=True)
  head = "# Recipe against control\n\nWritten by `python -m benchmarks.learning --docs docs`.\n\n"
  options.docs.mkdir(parents=True, exist_ok=True)
  curves = {arm: [curve(arm, workdirs[arm, seed]) for seed in options.seeds] for arm in ARMS}
  (options.docs / "learning.png").write_bytes(look.png(plot(curves)))
  text = f"{head}{table(lines)}\n\n![curves](learning.png)\n"
  (options.docs / "learning.md").write_text(text, encoding="utf-8")
  print(table(lines), file=sys.stderr)


if __name__ == "__main__":
  main()
