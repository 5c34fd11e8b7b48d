"""Completions of held-out prompts, which show how far a fine-tuning has come."""

import json
from collections.abc import Sequence

import numpy as np

from d1jax.completer import Completer
from d1jax.data.pipeline import Ids
from d1jax.diffusion.rollout import SamplerSpec
from d1jax.evaluation.evaluator import Evaluator
from d1jax.parallel import multihost
from d1jax.rl.grading import decode
from d1jax.rl.prompts import Prompts
from d1jax.run.experiment import Experiment
from d1jax.run.workdir import Folder, write_atomically
from d1jax.state import Params

GIVEN = 32
"""The tokens of a plain text that are given; the rest is completed."""

SHOWN = 200
"""The characters of a prompt and of a completion that are shown."""


class Samples:
  """Greedy completions of the same few prompts, validation after validation."""

  def __init__(self, completer: Completer, prompts: Prompts, expected: Sequence[Ids], sampler: SamplerSpec):
    """Prepares the batches.

    The prompts have no task; `expected` are the ids of the right answers.
    """
    self._evaluator = Evaluator(completer, prompts, sampler, len(prompts.ids))
    self._tokenizer = prompts.tokenizer
    self._asked = self._tokenizer.decode_all(prompts.ids)
    self._expected = self._tokenizer.decode_all(expected)

  @classmethod
  def of(
    cls, completer: Completer, experiment: Experiment, prompts: Sequence[Ids], answers: Sequence[Ids], count: int
  ) -> "Samples":
    """The samples of the first `count` held-out prompts that fit a bucket of evaluations.

    A plain text, whose prompt is its start token alone, is given up to `GIVEN` tokens of itself.

    Raises:
      ValueError: none fits.
    """
    buckets = tuple(experiment.config.evaluation.prompt_buckets)
    asked: list[list[int]] = []
    expected: list[Ids] = []
    for prompt, answer in zip(prompts, answers, strict=True):
      given = GIVEN if len(prompt) == 1 else 0
      whole = [*prompt, *answer[:given]]
      if len(whole) <= max(buckets) and len(asked) < count:
        asked.append(whole)
        expected.append(answer[given:])
    if not asked:
      raise ValueError(
        f"every held-out prompt is longer than evaluation.prompt_buckets={buckets}, the shortest"
        f" {min(map(len, prompts))}: raise it, or use sft.samples=0"
      )
    empty = [""] * len(asked)
    chosen = Prompts(experiment.task, experiment.tokenizer, [{}] * len(asked), asked, empty, buckets, "")
    return cls(completer, chosen, expected, experiment.sampler.greedy())

  def compile(self) -> None:
    """Compiles everything that `write` needs."""
    self._evaluator.compile()

  def write(self, params: Params, path: Folder) -> list[str]:
    """Completes the prompts under published weights and writes one JSON line for each; returns lines to be shown."""
    places, texts = [], []
    for batch in range(len(self._evaluator.batches)):
      done = self._evaluator.complete(batch, params)
      places.append(done.rows)
      texts += decode(self._tokenizer, done.completion, done.mask)
    completions = multihost.gather_rows(np.concatenate(places), texts)
    rows = list(zip(self._asked, completions, self._expected, strict=True))
    lines = [json.dumps(dict(zip(("prompt", "completion", "expected"), row, strict=True))) for row in rows]
    if multihost.is_main():
      path.parent.mkdir(parents=True, exist_ok=True)
      write_atomically(path, ("\n".join(lines) + "\n").encode())
    return [shown(prompt, completion) for prompt, completion, _ in rows]


def shown(prompt: str, completion: str) -> str:
  """A line with the end of a prompt and the start of its completion."""
  return (
    f"  ...{prompt[-SHOWN:]!r} -> {completion[:SHOWN]!r}"
    if len(prompt) > SHOWN
    else f"  {prompt!r} -> {completion[:SHOWN]!r}"
  )
