"""d1's accuracies on its published completions beside the strict ones: `python -m benchmarks.protocols DATA`.

DATA is a data folder with `generations/`. Prints the table of docs/evaluation.md; with `--flips` also every completion
on which the protocols disagree. `--save=FILE` keeps what every completion earns, as JSON lines; after a change of a
grader, `--since=FILE` prints each completion that earns something else.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from d1jax import tasks
from d1jax.evaluation import generations
from d1jax.evaluation.evaluator import grade_text
from d1jax.intervals import Share, clustered
from d1jax.tasks.base import Grade

FILES = {"gsm8k": "gsm8k", "math": "math500", "countdown": "countdown", "sudoku": "sudoku"}


def pooled(grades: list[Grade], metric: str) -> Share:
  pairs = [grade.metrics[metric] for grade in grades if grade.metrics[metric][1]]
  return clustered([p[0] for p in pairs], [p[1] for p in pairs], range(len(pairs)))


def shown(share: Share) -> str:
  return f"{100 * share.value:.2f} [{100 * share.low:.1f}, {100 * share.high:.1f}]"


def earned(name: str, place: int, strict: Grade, other: Grade) -> dict[str, Any]:
  """What a completion earns under `strict` and under `d1`, whose grade has the metrics of both."""
  rewards = {"strict": strict.components, "d1": other.components, "metrics": other.metrics}
  return json.loads(json.dumps({"task": name, "completion": place, "read": strict.answer, **rewards}))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("data", type=Path)
  parser.add_argument("--length", type=int, default=128)
  parser.add_argument("--flips", action="store_true")
  parser.add_argument("--save", type=Path)
  parser.add_argument("--since", type=Path)
  arguments = parser.parse_args()
  print("| task | n | d1 | strict: solved | n of strict | constant answer, d1 and strict | only d1 | only strict |")
  print("|---|--:|--:|--:|--:|--:|--:|--:|")
  flips, verdicts = [], []
  for name, file in FILES.items():
    task = tasks.build(name)
    found = generations.read(arguments.data / "generations" / f"{file}_{arguments.length}.jsonl.gz", name)
    grades = [grade_text(task, g.record, g.shown, g.raw, "d1") for g in found]
    constant = [task.grade(task.baseline(g.record, generations.STYLE), g.record, "d1") for g in found]
    for place, (generation, grade) in enumerate(zip(found, grades, strict=True)):
      verdicts.append(earned(name, place, task.grade(generation.shown, generation.record), grade))
    d1, strict = pooled(grades, "d1_accuracy"), pooled(grades, "solved")
    right = [(g.metrics["d1_accuracy"] == (1, 1), g.metrics["solved"] == (1, 1)) for g in grades]
    only = " | " if name == "sudoku" else f"{right.count((True, False))} | {right.count((False, True))}"
    base = f"{100 * pooled(constant, 'd1_accuracy').value:.1f}, {100 * pooled(constant, 'solved').value:.1f}"
    print(f"| {name} | {d1.n} | {shown(d1)} | {shown(strict)} | {strict.n} | {base} | {only} |")
    if name != "sudoku":
      flips += [(name, *r, g, x.answer) for r, g, x in zip(right, found, grades, strict=True) if r[0] != r[1]]
  for name, by_d1, _, generation, answer in flips if arguments.flips else ():
    fields = {"task": name, "right_by": "d1" if by_d1 else "strict", "read": answer, "record": generation.record}
    print(json.dumps(fields | {"text": generation.shown[-200:]}))
  if arguments.save:
    arguments.save.write_text("".join(json.dumps(verdict) + "\n" for verdict in verdicts))
  earlier = arguments.since.read_text().splitlines() if arguments.since else ()
  for before, after in zip(map(json.loads, earlier), verdicts, strict=bool(earlier)):
    if before != after:
      print(json.dumps({"before": before, "after": after}))


if __name__ == "__main__":
  main()
