"""The closing report of a run: a table and sample completions."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from d1jax.evaluation.evaluator import Evaluation, tables
from d1jax.run.workdir import Folder
from d1jax.telemetry import ledger

TITLES = {"sft": "SFT", "dpo": "DPO", "grpo": "diffu-GRPO"}
"""The stages of a run in their order, as readers know them."""


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


def by_level(figures: Mapping[str, float]) -> str:
  """A line with the held-out cross-entropy of masked tokens by the masking probability t of their row."""
  name = "held_out_ce/t"
  found = [f"{value:.2f} (to {key.removeprefix(name)}%)" for key, value in figures.items() if key.startswith(name)]
  return f"  cross-entropy of masked tokens by the share t that is masked: {', '.join(found)}"


def _held_out(results: Mapping[str, Any]) -> list[str]:
  """The closing lines of a run without a task."""
  figures, iteration = results["held_out"], results["best_iteration"]["sft"]
  loss = f"{figures['held_out_loss']:.3f} a token" if figures else "not known"
  return [
    f"Held-out loss of {results['config']['sft']['data']} at iteration {iteration}: {loss}",
    *([by_level(figures)] if figures else []),
    "",
    "Sample completions:",
    *(f"  {sample['prompt'][-200:]!r} -> {sample['completion']!r}" for sample in results["samples"]),
  ]


def _graded(results: Mapping[str, Any]) -> list[str]:
  """The closing lines of a run with a task: the table, and samples."""
  rows = {"constant answer": results["baseline"]}
  stages = [title for stage, title in TITLES.items() if stage in results["seconds"]]
  if "before" in results:
    rows[" + ".join(stages[:-1]) or "start"] = results["before"]
  rows[" + ".join(stages)] = results["after"]
  lines = [
    f"Held-out split of {results['task']}, greedy, shares with 95% intervals:",
    "",
    tables(rows),
    "",
    "Sample completions:",
  ]
  for sample in results["samples"]:
    shown = {k: v for k, v in sample["record"].items() if k != "solution"}
    lines.append(f"  {shown} -> {sample['completion']!r}  {'solved' if sample['solved'] else 'wrong'}")
  return lines


def summary(results: Mapping[str, Any], workdir: Folder) -> str:
  """The text of the closing report."""
  seconds = ", ".join(f"{stage} {value:.0f} s" for stage, value in results["seconds"].items())
  completions = workdir / ("samples" if "held_out" in results else "completions")
  return "\n".join(
    [
      *(_held_out(results) if "held_out" in results else _graded(results)),
      "",
      *([f"Cost, on {results['device']}:", ledger.table(results["cost"]), ""] if "cost" in results else []),
      f"Time:             {seconds.replace('this_invocation', 'this command')}",
      f"Learning curves:  {workdir / 'learning_curves.png'}",
      f"Page:             {workdir / 'report.html'}",
      f"Completions:      {completions}",
      f"Results:          {workdir / 'results.json'}",
      f"Checkpoint:       {results['checkpoint']}",
    ]
  )


def reprint(results: dict[str, Any], workdir: Folder) -> dict[str, Any]:
  """Prints the closing report of a finished run again, and returns its results."""
  print(f"{workdir} is finished; this is its result again.\n")
  print(summary(results, workdir))
  return results
