"""Does reinforcement learning teach what the demonstrations do not? The recipe against more supervised learning in the
same time.

`python -m benchmarks.learning` trains, for each seed, the default recipe of `configs/grpo.py` (arm `recipe`: SFT, then
diffu-GRPO) and `configs/sft.py` on the same demonstrations (arm `control`), one after the other on an otherwise idle
machine. Both choose their checkpoint on the validation questions and look at the held-out questions once. It prints a
JSON line a run, and writes the table and the curves to `learning.md` and `learning.png` in `--docs`.

`--preset small,word_problems` does the same with word problems, and writes `word_problems.md` and `.png`. Fields
after the arguments, such as `--config.cpu_devices=1`, are for both arms.
"""

import argparse
import json
import resource
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from d1jax import look
from d1jax.run.metrics import read_records

ROOT = Path(__file__).parent.parent
ARMS = ("recipe", "control")


class Comparison(NamedTuple):
  """What is compared.

  Attributes:
    control_steps: of the control: calibrated once so that it takes as long as the recipe's two stages; never a clock.
    name: of the table and of the picture in `docs/`.
    also: the share of the answers that is told beside the solved ones.
  """

  control_steps: int
  name: str
  also: str


PRESETS = {
  "": Comparison(7000, "learning", "cell_accuracy"),
  "small,word_problems": Comparison(4000, "word_problems", "well_formed"),
}


def command(arm: str, preset: str, seed: int, workdir: Path, fields: Sequence[str]) -> list[str]:
  """The command line of an arm."""
  words, steps = preset and f":{preset}", PRESETS[preset].control_steps
  own = {
    "recipe": [f"--config=configs/grpo.py{words}"],
    "control": [
      f"--config=configs/sft.py{words}",
      f"--config.sft.steps={steps}",
      f"--config.sft.validate_every={steps // 20}",
    ],
  }
  where = [f"--config.seed={seed}", f"--config.workdir={workdir}"]
  return [sys.executable, "-m", "d1jax.main", *own[arm], *where, *fields]


def run(arm: str, preset: str, seed: int, workdir: Path, fields: Sequence[str]) -> dict[str, Any]:
  """Trains one arm and returns its line; a finished work directory is read, not run again."""
  subprocess.run(command(arm, preset, seed, workdir, fields), cwd=ROOT, check=True, stdout=sys.stderr)
  results = json.loads((workdir / "results.json").read_text(encoding="utf-8"))
  after = results["after"]
  shares = [r["compiled_share"] for r in read_records(workdir / "metrics.jsonl") if "compiled_share" in r]
  return {
    "seed": seed,
    "arm": arm,
    "solved": after["solved"],
    "solved_interval": after["solved_interval"],
    "also": after[PRESETS[preset].also],
    "n": after["n"],
    "seconds": results["seconds"]["this_invocation"],
    "training_seconds": sum(results["seconds"][stage] for stage in ("sft", "grpo") if stage in results["seconds"]),
    "before": results["before"]["solved"] if "before" in results else None,
    "baseline_also": results["baseline"][PRESETS[preset].also],
    "compiled_share": statistics.median(shares) if shares else None,
    "peak_memory_gib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20,
  }


def table(lines: list[dict[str, Any]], also: str) -> str:
  """The runs in Markdown, and the gap between the arms a seed; `also` names the share beside the solved ones."""
  rows = [
    f"| seed | arm | solved | 95% interval | {also.replace('_', ' ')} | n | training s | all s |",
    "|--:|---|--:|---|--:|--:|--:|--:|",
  ]
  for line in lines:
    low, high = line["solved_interval"]
    rows.append(
      f"| {line['seed']} | {line['arm']} | {100 * line['solved']:.1f}% | {100 * low:.1f} to {100 * high:.1f}"
      f" | {100 * line['also']:.1f}% | {line['n']} | {line['training_seconds']:.0f} | {line['seconds']:.0f} |"
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
  """Training seconds and solved validation questions in percent of a run; and the second in which diffu-GRPO starts."""
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
    ylabel="validation questions solved, %",
    xlim=(0, None),
    ylim=(0, 100),
  )
  return figure


def main() -> None:
  """Runs all seeds and arms."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--preset", choices=list(PRESETS), default="", help="words of configs/grpo.py")
  parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
  parser.add_argument(
    "--folder", type=Path, default=Path("runs/learning"), help="work directories; finished ones are read"
  )
  parser.add_argument(
    "--docs", type=Path, default=Path("runs/learning"), help="where the table and the picture go; docs: the page's own"
  )
  options, fields = parser.parse_known_args()
  made = PRESETS[options.preset]
  workdirs = {(arm, seed): options.folder.absolute() / f"{arm}-{seed}" for seed in options.seeds for arm in ARMS}
  lines = []
  for (arm, seed), workdir in workdirs.items():
    lines.append(run(arm, options.preset, seed, workdir, fields))
    print(json.dumps(lines[-1]), flush=True)
  options.docs.mkdir(parents=True, exist_ok=True)
  curves = {arm: [curve(arm, workdirs[arm, seed]) for seed in options.seeds] for arm in ARMS}
  (options.docs / f"{made.name}.png").write_bytes(look.png(plot(curves)))
  printed_by = shlex.join(["python", "-m", "benchmarks.learning", *sys.argv[1:]])
  head = f"# Recipe against control\n\nWritten by `{printed_by}`.\n\n"
  text = f"{head}{table(lines, made.also)}\n\n![curves]({made.name}.png)\n"
  (options.docs / f"{made.name}.md").write_text(text, encoding="utf-8")
  print(table(lines, made.also), file=sys.stderr)


if __name__ == "__main__":
  main()
