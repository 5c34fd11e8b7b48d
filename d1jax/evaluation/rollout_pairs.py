"""Preference pairs from graded rollouts: of each question, right answers against wrong ones."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from d1jax.evaluation.evaluator import Evaluator, grade_completions
from d1jax.parallel import multihost
from d1jax.state import Params

METRIC = "solved"
"""An answer is right if its grade counts it as solved."""


def make(
  evaluator: Evaluator,
  params: Params,
  *,
  samples: int,
  seed: int,
  made: Mapping[str, Any],
  pause: Callable[[], None],
) -> list[dict[str, Any]]:
  """Samples answers to all questions, and pairs each right one with a wrong one to the same question.

  Only answers that end with a stop id count, each text once. With 3 right and 5 wrong answers a question has 3 pairs,
  in the order of the samples.

  Args:
    evaluator: the questions, and the sampler.
    params: published weights.
    samples: answers to each question.
    seed: of the draws; answer number s to question i depends on the seed, s and i.
    made: what every row says about its origin.
    pause: is called between two batches, and may raise an exception to stop.

  Returns:
    Rows of a file of pairs (`d1jax.data.pairs`), whose field `made` also has the question and the two samples.
  """
  prompts = evaluator.prompts
  stops = np.asarray(prompts.tokenizer.stop_ids)
  answers: list[list[tuple[bool, str, int]]] = [[] for _ in prompts.records]
  for sample in range(samples):
    places, found = [], []
    for batch in range(len(evaluator.batches)):
      pause()
      done = evaluator.complete(batch, params, seed=seed, sample=sample)
      own, prefills = [prompts.records[i] for i in done.rows], [prompts.prefills[i] for i in done.rows]
      graded = grade_completions(prompts.task, prompts.tokenizer, own, prefills, done.completion, done.mask, "strict")
      ended = np.any(done.mask & np.isin(done.completion, stops), axis=1)
      places.append(done.rows)
      for text, grade, prefill, end in zip(*graded, prefills, ended, strict=True):
        reached, possible = grade.metrics[METRIC]
        found.append((bool(end), bool(reached == possible), text[len(prefill) :]))
    everyone = multihost.gather_rows(np.concatenate(places), found)
    for row, (end, right, text) in enumerate(everyone):
      if end and text.strip() and text not in [known for _, known, _ in answers[row]]:
        answers[row].append((right, text, sample))
  rows = []
  for row, own_answers in enumerate(answers):
    right, wrong = ([one for one in own_answers if one[0] == side] for side in (True, False))
    messages, prefill = prompts.task.prompt(prompts.records[row], prompts.style)
    for (_, chosen, first), (_, rejected, second) in zip(right, wrong, strict=False):
      origin = {**made, "question": row, "samples": [first, second]}
      start = {"prefill": prefill} if prefill else {}
      rows.append({"messages": messages, **start, "chosen": chosen, "rejected": rejected, "made": origin})
  return rows
