"""What an iteration computes: FLOPs and tokens of rollout, score and update.

FLOPs are those that the traced programs have (`d1jax.telemetry.flops`), times how far rollouts went. The model's FLOPs
are those of the mathematics, on the whole canvas, padding included. What is computed twice to save memory is counted
apart, so that a utilisation from the model's FLOPs does not grow with wasted work (PaLM, arXiv 2204.02311, appendix B).
"""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from d1jax.diffusion.blocks import pass_over, window_of
from d1jax.diffusion.replay import EACH_STEP
from d1jax.diffusion.rollout import Rollout, SamplerSpec
from d1jax.diffusion.sampler import batch_sizes
from d1jax.parallel import multihost
from d1jax.rl.method import Method
from d1jax.rl.update import SCORE
from d1jax.telemetry.flops import Counted, Products, total


class Work(NamedTuple):
  """What one part of an iteration computes, on all devices together.

  Attributes:
    flops: of the model.
    tokens: of completions, as often as each is generated, scored or trained on; those behind a stop id included.
    repeated: FLOPs beyond the model's: of blocks and logits that the backward pass computes again.
    passes: forward passes of a row, over the canvas or a window of it; what the backward pass repeats is not counted.
  """

  flops: int
  tokens: int
  repeated: int = 0
  passes: int = 0

  @classmethod
  def of(cls, counted: Counted, tokens: int) -> "Work":
    """The work of a program as it was traced."""
    return cls(tokens=tokens, **total(counted.values())._asdict())


class Reach(NamedTuple):
  """How far the rollouts of an iteration went.

  Attributes:
    steps: denoising steps taken at each block.
    rows: rows that they were computed for.
  """

  steps: Int[np.ndarray, "chunks blocks"]
  rows: Int[np.ndarray, "chunks blocks"]


def whole(sampler: SamplerSpec, chunks: int, rows: int) -> Reach:
  """The reach of rollouts that take every step with every row: the static schedule's, without early exits."""
  shape = (chunks, sampler.blocks)
  return Reach(np.full(shape, sampler.steps_per_block), np.full(shape, rows))


def reached(sampler: SamplerSpec, chunks: Sequence[Rollout], rows: int, ways: int) -> Reach:
  """The reach of finished rollouts; collective where it depends on what was drawn.

  Args:
    sampler: that made them; `early_exit` only where the denoiser has stop ids.
    chunks: on the host, the rows of this process.
    rows: of one chunk, those of all processes.
    ways: devices that share a batch.
  """
  if sampler.schedule == "static" and not sampler.early_exit:
    return whole(sampler, len(chunks), rows)
  before = sampler.block_length * np.arange(sampler.blocks)
  steps = [sampler.steps_taken(np.asarray(chunk.reveal_step)) for chunk in chunks]
  # A row whose first stop id lies before a block has ended there.
  unfinished = [np.sum(chunk.completion_mask.sum(axis=1)[:, None] > before, axis=0) for chunk in chunks]
  everyone = multihost.gather((np.asarray(steps).tolist(), np.asarray(unfinished).tolist()))
  steps_taken = np.max([found for found, _ in everyone], axis=0)
  if not sampler.early_exit:
    return Reach(steps_taken, np.full_like(steps_taken, rows))
  going_on = np.sum([found for _, found in everyone], axis=0)
  sizes = np.asarray(sorted(batch_sizes(rows, ways, sampler)))
  return Reach(steps_taken, np.where(going_on > 0, sizes[np.searchsorted(sizes, going_on)], 0))


@functools.lru_cache
def _windows(sampler: SamplerSpec, canvas: int, shift: int) -> tuple[int, ...]:
  """Positions that the passes of each block compute between two over the whole canvas."""
  if sampler.cache == "none":
    return (canvas,) * sampler.blocks
  starts = range(canvas - sampler.completion_length, canvas, sampler.block_length)
  return tuple(window_of(sampler, start, canvas, shift).width for start in starts)


def rollout(counted: Counted, sampler: SamplerSpec, canvas: int, shift: int, reach: Reach) -> Work:
  """A rollout of all chunks: a pass over the canvas each refresh period, passes over the window in between.

  Args:
    counted: of the program that rolls a chunk out.
    sampler: draws.
    canvas: L, prompt and completion.
    shift: of the denoiser.
    reach: how far it went.
  """
  times = 2 if sampler.cfg_scale else 1
  flops = 0
  made = times * int((reach.steps * reach.rows).sum())
  for taken, rows_of in zip(reach.steps.tolist(), reach.rows.tolist(), strict=True):
    for steps, rows, window in zip(taken, rows_of, _windows(sampler, canvas, shift), strict=True):
      refreshes = -(-steps // sampler.refresh_period)
      for width, count in ((canvas, refreshes), (window, steps - refreshes)):
        if count:
          each = counted[frozenset({pass_over(width)})]
          flops += times * count * rows * each.flops // each.passes
  return Work(flops, int(reach.rows[:, 0].sum()) * sampler.completion_length, passes=made)


def update(
  counted: Counted, sampler: SamplerSpec, method: Method, reach: Reach, *, oversample: int = 1
) -> tuple[Work, Work]:
  """The score (old and reference log-probabilities) and the optimiser steps of an update.

  Args:
    counted: of the program.
    sampler: that made the rollout.
    method: of the update.
    reach: of the rollout.
    oversample: groups that are drawn for each that is trained on.
  """
  taken, steps = int(reach.steps.max(axis=0).sum()), sampler.blocks * sampler.steps_per_block
  parts: dict[bool, list[Products]] = {True: [], False: []}
  for scopes, found in counted.items():
    made = Products(*(number * taken // steps for number in found)) if EACH_STEP in scopes else found
    parts[SCORE in scopes].append(made)
  mu = method.num_iterations
  old, reference = (mu - 1) * method.scores_old, mu * method.scores_reference
  if not method.estimator.redraws:  # the same states at each optimiser step
    old, reference = min(old, 1), min(reference, 1)
  tokens = int(reach.rows[:, 0].sum()) // oversample * sampler.completion_length
  score, update = (total(parts[scored])._asdict() for scored in (True, False))
  return Work(tokens=(old + reference) * tokens, **score), Work(tokens=mu * tokens, **update)


def iteration(
  counted: Mapping[str, Counted],
  found: Rollout,
  *,
  sampler: SamplerSpec,
  method: Method,
  oversample: int,
  chunks: int,
  rows: int,
  ways: int,
  shift: int,
) -> dict[str, Work]:
  """The work of one iteration of diffu-GRPO: `rollout`, `score` and `update`; collective as `reached` is.

  Args:
    counted: of the programs `rollout` and `update`.
    found: the rollout on the host, the rows of this process, chunk after chunk.
    sampler: that was used, with its cache or without.
    method: of the update.
    oversample: groups that are drawn for each that is trained on.
    chunks: parts of the rollout.
    rows: of a chunk, on all processes.
    ways: over how many devices they are split.
    shift: of the denoiser.
  """
  parts = [Rollout(*part) for part in zip(*(np.split(x, chunks) for x in found), strict=True)]
  reach = reached(sampler, parts, rows, ways)
  canvas = found.prompt.shape[1] + sampler.completion_length
  drawn = rollout(counted["rollout"], sampler, canvas, shift, reach)
  score, steps = update(counted["update"], sampler, method, reach, oversample=oversample)
  return {"rollout": drawn, "score": score, "update": steps}
