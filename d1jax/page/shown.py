"""The samples as the page's script takes them: few enough for a page, and the same questions of both runs."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from d1jax.page.run_files import RunFiles
from d1jax.page.samples import Validated

LOOKS = 40
"""The largest number of validations of a run on a page."""

ROOM = 300_000
"""The characters that the samples of a run may take there; the first and the last validation are always shown."""


def data(runs: Sequence[RunFiles]) -> dict[str, Any]:
  """The samples of all runs.

  Returns:
    `questions`: the fields of each question of the first run; `runs`: for each run, its validations, each with its
    stage, iteration, share of solved questions, and its samples in the order of the questions (null: none).
  """
  questions: list[dict[str, str]] = []
  for validated in runs[0].validated:
    questions += [sample.record for sample in validated.samples if sample.record not in questions]
  return {"questions": questions, "runs": [[_look(one, questions) for one in fitting(run.validated)] for run in runs]}


def fitting(validated: Sequence[Validated]) -> list[Validated]:
  """As many validations as a page has room for, evenly spread, the first, the last and the best among them."""
  if not validated:
    return []
  best = max(range(len(validated)), key=lambda place: validated[place].solved[0])
  sizes = [len(json.dumps(one)) for one in validated]
  count = min(len(validated), LOOKS)
  while True:
    places = sorted({best, *np.linspace(0, len(validated) - 1, count).round().astype(int).tolist()})
    if count <= 2 or sum(sizes[place] for place in places) <= ROOM:
      return [validated[place] for place in places]
    count = max(2, count * 3 // 4)


def _look(one: Validated, questions: Sequence[dict[str, str]]) -> dict[str, Any]:
  own = [next((sample for sample in one.samples if sample.record == record), None) for record in questions]
  return {
    "stage": one.stage,
    "iteration": one.iteration,
    "solved": [round(100 * end, 2) for end in one.solved],
    "samples": [
      None
      if sample is None
      else {
        "text": sample.text,
        "reward": round(sample.reward, 4),
        "solved": sample.solved,
        "pieces": sample.pieces,
        "steps": sample.steps,
      }
      for sample in own
    ],
  }
