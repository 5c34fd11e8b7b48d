"""How many completions a second are graded on one core: `python -m benchmarks.grading --data=../shared/data`.

The completions are those that d1 published (`generations/*_128.jsonl.gz`); `strict` grades them up to their first stop
token, `d1` whole. It prints a JSON line for each task and protocol. `per_second` is the median of passes that remember
no verdict and, for MATH, have to start the process of `math-verify` (half a second) and fill its tables;
`warm_per_second`, of passes in which it runs already, is what a long run sees.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from d1jax import tasks
from d1jax.evaluation import generations
from d1jax.tasks import PROTOCOLS, Task, equivalence, verifier

FILES = {"sudoku": "sudoku", "countdown": "countdown", "gsm8k": "gsm8k", "math": "math500"}
"""The name of each task in those of the files."""


def measure(task: Task, completions: Sequence[generations.Generation], protocol: str, passes: int) -> dict[str, Any]:
  """One line: completions a second, the median of several passes.

  Args:
    task: the grader.
    completions: of that task, with their records.
    protocol: of the grader.
    passes: over all completions.
  """
  pairs = [(c.shown if protocol == "strict" else c.raw, c.record) for c in completions]
  cold, warm = [], []
  for _ in range(passes):
    equivalence.compare.cache_clear()
    verifier.shared.close()
    cold.append(_seconds(task, pairs, protocol))
    equivalence.compare.cache_clear()
    warm.append(_seconds(task, pairs, protocol))
  return {
    "task": task.name,
    "protocol": protocol,
    "completions": len(pairs),
    "per_second": round(len(pairs) / statistics.median(cold)),
    "warm_per_second": round(len(pairs) / statistics.median(warm)),
  }


def _seconds(task: Task, pairs: Sequence[tuple[str, tasks.Record]], protocol: str) -> float:
  start = time.perf_counter()
  for text, record in pairs:
    task.grade(text, record, protocol)
  return time.perf_counter() - start


def main() -> None:
  """Measures every task under every protocol."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--data", type=Path, required=True, help="the data folder, with generations/")
  parser.add_argument("--passes", type=int, default=5)
  options = parser.parse_args()
  for name, file in FILES.items():
    completions = generations.read(options.data / f"generations/{file}_128.jsonl.gz", name)
    for protocol in PROTOCOLS:
      print(json.dumps(measure(tasks.build(name), completions, protocol, options.passes)), flush=True)


if __name__ == "__main__":
  main()
