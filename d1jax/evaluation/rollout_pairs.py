"""Preference pairs from graded answers: of each question, right answers against wrong ones."""

from collections.abc import Mapping, Sequence
from typing import Any

from d1jax.evaluation.rollout_answers import Answer
from d1jax.rl.prompts import Prompts


def rows(prompts: Prompts, answers: Sequence[Sequence[Answer]], made: Mapping[str, Any]) -> list[dict[str, Any]]:
  """Pairs each right answer with a wrong one to the same question.

  With 3 right and 5 wrong answers a question has 3 pairs, in the order of the samples.

  Args:
    prompts: the questions.
    answers: those to each question, from `rollout_answers.sample`.
    made: what every row says about its origin.

  Returns:
    Rows of a file of pairs (`d1jax.data.pairs`), whose field `made` also has the question and the two samples.
  """
  found = []
  for row, own in enumerate(answers):
    right, wrong = ([one for one in own if one.right == side] for side in (True, False))
    messages, prefill = prompts.task.prompt(prompts.records[row], prompts.style)
    for chosen, rejected in zip(right, wrong, strict=False):
      origin = {**made, "question": row, "samples": [chosen.sample, rejected.sample]}
      start = {"prefill": prefill} if prefill else {}
      found.append({"messages": messages, **start, "chosen": chosen.text, "rejected": rejected.text, "made": origin})
  return found
