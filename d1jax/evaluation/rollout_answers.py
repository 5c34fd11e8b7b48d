"""Graded answers of a checkpoint to training questions: what preference pairs and rejection sampling are made of."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from d1jax import keys
from d1jax.completer import Completer
from d1jax.diffusion import blocks
from d1jax.diffusion.rollout import SamplerSpec
from d1jax.errors import reworded
from d1jax.evaluation.evaluator import Evaluator, grade_completions
from d1jax.model import Model
from d1jax.parallel import multihost
from d1jax.rl.prompts import Prompts
from d1jax.state import Params

METRIC = "solved"
"""An answer is right if its grade counts it as solved."""


class Answer(NamedTuple):
  """A graded answer that ended with a stop id.

  Attributes:
    right: whether it is solved.
    text: what follows the prefill.
    sample: its number among the answers to its question, from 0.
    reward: of its grade, by the protocol `strict`.
    length: its tokens, with the stop id.
  """

  right: bool
  text: str
  sample: int
  reward: float
  length: int


def asking(model: Model, prompts: Prompts, sampler: SamplerSpec, questions: int, batch_size: int) -> Evaluator:
  """What asks the first `questions` prompts of a model, in batches of so many rows.

  Raises:
    ValueError: the sampler does not fit the model's blocks.
  """
  with reworded("rollout."):
    blocks.check(model.denoiser, sampler)
  some = {name: getattr(prompts, name)[:questions] for name in ("records", "ids", "prefills")}
  completer = Completer.of(model, keys.Purpose.ROLLOUT)
  return Evaluator(completer, dataclasses.replace(prompts, **some), sampler, batch_size)


def sample(
  evaluator: Evaluator, params: Params, *, samples: int, seed: int, pause: Callable[[], None]
) -> list[list[Answer]]:
  """Samples and grades answers to all questions.

  Only answers that end with a stop id count, each text once.

  Args:
    evaluator: the questions, and the sampler.
    params: published weights.
    samples: answers to each question.
    seed: of the draws; answer number s to question i depends on the seed, s and i.
    pause: is called between two batches, and may raise an exception to stop.

  Returns:
    Of each question its different answers, in the order of the samples.
  """
  prompts = evaluator.prompts
  stops = np.asarray(prompts.tokenizer.stop_ids)
  answers: list[list[Answer]] = [[] for _ in prompts.records]
  for number in range(samples):
    places, found = [], []
    for batch in range(len(evaluator.batches)):
      pause()
      done = evaluator.complete(batch, params, seed=seed, sample=number)
      own, prefills = [prompts.records[i] for i in done.rows], [prompts.prefills[i] for i in done.rows]
      graded = grade_completions(prompts.task, prompts.tokenizer, own, prefills, done.completion, done.mask, "strict")
      ended = np.any(done.mask & np.isin(done.completion, stops), axis=1)
      places.append(done.rows)
      for text, grade, prefill, end, length in zip(*graded, prefills, ended, done.mask.sum(axis=1), strict=True):
        reached, possible = grade.metrics[METRIC]
        answer = (bool(reached == possible), text[len(prefill) :], number, float(grade.reward), int(length))
        found.append((bool(end), answer))
    everyone = multihost.gather_rows(np.concatenate(places), found)
    for row, (end, fields) in enumerate(everyone):
      answer = Answer(*fields)
      if end and answer.text.strip() and answer.text not in [known.text for known in answers[row]]:
        answers[row].append(answer)
  return answers
