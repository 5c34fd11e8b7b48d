"""Rejection sampling: right ones of graded answers as demonstrations to fine-tune on (DeepSeek-R1's third stage)."""

from collections.abc import Mapping, Sequence
from typing import Any

from d1jax.evaluation.rollout_answers import Answer
from d1jax.rl.prompts import Prompts

KEEP = ("shortest", "distinct")
"""Which right answers of a question are kept: the shortest one, or several different ones."""


def rows(
  prompts: Prompts, answers: Sequence[Sequence[Answer]], *, keep: str, most: int, made: Mapping[str, Any]
) -> list[dict[str, Any]]:
  """The right answers that are kept, as rows that `sft.data` reads.

  Args:
    prompts: the questions.
    answers: those to each question, from `rollout_answers.sample`.
    keep: `shortest`: the one with the fewest tokens, of several the first; `distinct`: the first `most` different ones.
    most: see there.
    made: what every row says about its origin.

  Returns:
    Rows with `messages`, whose last turn is the answer with its prefill; their field `made` also has the question's
    number and record, the sample, the reward and the length in tokens.
  """
  found = []
  for row, own in enumerate(answers):
    right = [one for one in own if one.right]
    kept = sorted(right, key=lambda one: one.length)[:1] if keep == "shortest" else right[:most]
    record = prompts.records[row]
    turns, prefill = prompts.task.prompt(record, prompts.style)
    for one in kept:
      answer = {"role": "assistant", "content": prefill + one.text}
      origin: dict[str, Any] = {**made, "question": row, "record": dict(record), "sample": one.sample}
      origin |= {"reward": one.reward, "length": one.length}
      found.append({"messages": [*turns, answer], "made": origin})
  return found
