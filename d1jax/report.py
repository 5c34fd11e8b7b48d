"""The closing report of a run: a table, sample completions, a picture of the learning curves."""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from d1jax.evaluation.evaluator import Evaluation, tables
from d1jax.run.metrics import read_records
from d1jax.run.workdir import Folder, write_atomically
from d1jax.telemetry import ledger

SMOOTHING = 20
"""The number of iterations over which training curves are averaged."""


def samples(evaluation: Evaluation, count: int = 5) -> list[dict[str, Any]]:
  """A few completions, spread evenly over the split."""
  chosen = np.linspace(0, len(evaluation.records) - 1, min(count, len(evaluation.records))).astype(int)
  return [
    {
      "record": dict(evaluation.records[i]),
      "completion": evaluation.graded.texts[i],
      "reward": float(evaluation.graded.rewards[i]),
      "solved": bool(evaluation.graded.grades[i].metrics["solved"][0]),
    }
    for i in chosen
  ]


def summary(results: Mapping[str, Any], workdir: Folder) -> str:
  """The text of the closing report."""
  rows = {"constant answer": results["baseline"]}
  stages = [name for name in ("SFT", "diffu-GRPO") if name.removeprefix("diffu-").lower() in results["seconds"]]
  if "before" in results:
    rows[" + ".join(stages[:-1]) or "start"] = results["before"]
  rows[" + ".join(stages)] = results["after"]
  seconds = ", ".join(f"{stage} {value:.0f} s" for stage, value in results["seconds"].items())
  lines = [
    f"Held-out split of {results['task']}, greedy:",
    "",
    tables(rows),
    "",
    "Sample completions:",
  ]
  for sample in results["samples"]:
    shown = {k: v for k, v in sample["record"].items() if k != "solution"}
    lines.append(f"  {shown} -> {sample['completion']!r}  {'solved' if sample['solved'] else 'wrong'}")
  return "\n".join(
    [
      *lines,
      "",
      *([f"Cost, on {results['device']}:", ledger.table(results["cost"]), ""] if "cost" in results else []),
      f"Time:             {seconds.replace('this_invocation', 'this command')}",
      f"Learning curves:  {workdir / 'learning_curves.png'}",
      f"Page:             {workdir / 'report.html'}",
      f"Completions:      {workdir / 'completions'}",
      f"Results:          {workdir / 'results.json'}",
      f"Checkpoint:       {results['checkpoint']}",
    ]
  )


def reprint(results: dict[str, Any], workdir: Folder) -> dict[str, Any]:
  """Prints the closing report of a finished run again, and returns its results."""
  print(f"{workdir} is finished; this is its result again.\n")
  print(summary(results, workdir))
  return results


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
  """The running mean over up to `window` values, shorter at the start."""
  total = np.cumsum(np.insert(values, 0, 0.0))
  end = np.arange(1, len(values) + 1)
  start = np.maximum(end - window, 0)
  return (total[end] - total[start]) / (end - start)


def plot_learning_curves(workdir: Folder) -> Folder:
  """Draws `learning_curves.png` from `metrics.jsonl`, with one panel per stage."""
  records = read_records(workdir / "metrics.jsonl")
  stages = list(dict.fromkeys(r["stage"] for r in records))
  figure = Figure(figsize=(5.5 * max(len(stages), 1), 3.8), layout="constrained")
  axes = figure.subplots(1, max(len(stages), 1), squeeze=False)  # without records, one empty panel is drawn
  curves = {"sft": [("loss", "loss"), ("validation", "validation: solved")]}
  curves["grpo"] = [
    ("reward", "reward"),
    ("solved", "training: solved"),
    ("validation", "validation: solved"),
  ]
  titles = {"sft": "Masked SFT", "grpo": "diffu-GRPO"}
  for axis, stage in zip(axes[0], stages, strict=bool(stages)):
    own = [r for r in records if r["stage"] == stage]
    for name, label in curves[stage]:
      points = np.asarray([(r["iteration"], r[name]) for r in own if name in r], float).reshape(-1, 2)
      is_validation = name == "validation"
      values = points[:, 1] if is_validation else smoothed(points[:, 1], SMOOTHING)
      if is_validation and np.any(values < 0):  # after fine-tuning on a file, this is minus the held-out loss
        values, label = -values, "held-out loss"
      axis.plot(points[:, 0], values, marker="o" if is_validation else None, markersize=4, label=label)
    axis.set(title=titles[stage], xlabel="iteration", ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
  path, picture = workdir / "learning_curves.png", io.BytesIO()
  figure.savefig(picture, format="png", dpi=120)
  write_atomically(path, picture.getvalue())
  return path
