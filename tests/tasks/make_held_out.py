"""Writes d1jax/tasks/held_out.txt from the answers that d1 published: `python -m tests.tasks.make_held_out`.

Run it from the root of the repository, with the shared data in place (or D1JAX_DATA naming it).
"""

import gzip
import json
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

from d1jax.tasks import held_out


def of_text(row: dict[str, Any]) -> str:
  return held_out.fingerprint(held_out.normalize(row["question"]))


def of_numbers(row: dict[str, Any]) -> str:
  return held_out.fingerprint(" ".join(map(str, sorted(row["ground_truth"][0]))))


def of_puzzle(row: dict[str, Any]) -> str:
  (puzzle,) = re.findall(r"Sudoku puzzle: ([0-4]{16})\n", row["question"])
  return puzzle


FILES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
  "countdown": ("countdown", of_numbers),
  "gsm8k": ("gsm8k", of_text),
  "math": ("math500", of_text),
  "sudoku": ("sudoku", of_puzzle),
}


def rows(data_root: str, name: str) -> Iterator[dict[str, Any]]:
  """The rows of one of d1's files."""
  with gzip.open(f"{data_root}/generations/{name}_128.jsonl.gz", "rt", encoding="utf-8") as file:
    yield from map(json.loads, file)


def contents(data_root: str) -> str:
  """What the list has to be."""
  entries = {(task, entry_of(row)) for task, (name, entry_of) in FILES.items() for row in rows(data_root, name)}
  return "".join(f"{task} {entry}\n" for task, entry in sorted(entries))


if __name__ == "__main__":
  held_out.FILE.write_text(contents(os.environ.get("D1JAX_DATA", "../shared/data")), encoding="ascii")
  print(f"{held_out.FILE}: {len(held_out.FILE.read_text().splitlines())} questions")
