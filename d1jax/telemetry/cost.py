"""The computation of an iteration: FLOPs and tokens of rollout, score and update.

FLOPs are counted in the traced programs (`d1jax.telemetry.flops`) and multiplied by the steps that rollouts took. The
model's FLOPs are those of the mathematics on the whole canvas, including padding. Work that is repeated to save memory
is counted separately, so that it does not increase the utilisation (PaLM, arXiv 2204.02311, appendix B).
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
  """The computation of one part of an iteration, on all devices together.

  Attributes:
    flops: the model's FLOPs.
    tokens: completion tokens, counted each time they are generated, scored or trained on, also after a stop id.
    repeated: further FLOPs, of blocks and logits that the backward pass computes again.
    passes: forward passes of a row, over the canvas or a window of it, without those repeated in the backward pass.
  """

  flops: int
  tokens: int
  repeated: int = 0
  passes: int = 0

  @classmethod
  def of(cls, counted: Counted, tokens: int) -> "Work":
    """The work of a traced program."""
    return cls(tokens=tokens, **total(counted.values())._asdict())


class Reach(NamedTuple):
  """The denoising steps that the rollouts of an iteration took.

  Attributes:
    steps: the denoising steps taken at each block.
    rows: the rows for which they were computed.
  """

  steps: Int[np.ndarray, "chunks blocks"]
  rows: Int[np.ndarray, "chunks blocks"]


def whole(sampler: SamplerSpec, chunks: int, rows: int) -> Reach:
  """The reach of rollouts that take every step for every row, with the static schedule and without early exits."""
  shape = (chunks, sampler.blocks)
  return Reach(np.full(shape, sampler.steps_per_block), np.full(shape, rows))


def reached(sampler: SamplerSpec, chunks: Sequence[Rollout], rows: int, ways: int) -> Reach:
  """The reach of finished rollouts. If it depends on the samples, all processes must call this together.

  Args:
    sampler: their sampler; it has `early_exit` only if the denoiser has stop ids.
    chunks: the rows of this process, on the host.
    rows: the rows of one chunk on all processes.
    ways: the number of devices that share a batch.
  """
  if sampler.schedule == "static" and not sampler.early_exit:
    return whole(sampler, len(chunks), rows)
  before = sampler.block_length * np.arange(sampler.blocks)
  steps = [sampler.steps_taken(np.asarray(chunk.reveal_step)) for chunk in chunks]
  # A row has ended at a block if its first stop id lies before that block.
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
  """For each block, the positions that a pass computes between two passes over the whole canvas."""
  if sampler.cache == "none":
    return (canvas,) * sampler.blocks
  starts = range(canvas - sampler.completion_length, canvas, sampler.block_length)
  return tuple(window_of(sampler, start, canvas, shift).width for start in starts)


def rollout(counted: Counted, sampler: SamplerSpec, canvas: int, shift: int, reach: Reach) -> Work:
  """The work of a rollout of all chunks: one pass over the canvas per refresh period, and window passes in between.

  Args:
    counted: the products of the rollout program of one chunk.
    sampler: the sampler.
    canvas: L, the length of prompt and completion.
    shift: the denoiser's shift.
    reach: the steps that were taken.
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
  """The work of an update: of the score (old and reference log-probabilities), and of the optimiser steps.

  Args:
    counted: the products of the update program.
    sampler: the sampler of the rollout.
    method: the method of the update.
    reach: the steps of the rollout.
    oversample: groups drawn for each one trained on.
  """
  taken, steps = int(reach.steps.max(axis=0).sum()), sampler.blocks * sampler.steps_per_block
  parts: dict[bool, list[Products]] = {True: [], False: []}
  for scopes, found in counted.items():
    made = Products(*(number * taken // steps for number in found)) if EACH_STEP in scopes else found
    parts[SCORE in scopes].append(made)
  mu = method.num_iterations
  old, reference = (mu - 1) * method.scores_old, mu * method.scores_reference
  if not method.estimator.redraws:  # each optimiser step scores the same states
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
  """The work of one iteration of diffu-GRPO: `rollout`, `score` and `update`; for processes see `reached`.

  Args:
    counted: the products of the programs `rollout` and `update`.
    found: this process's rows of the rollout on the host, chunk by chunk.
    sampler: the sampler that was used, with or without its cache.
    method: the method of the update.
    oversample: groups drawn for each one trained on.
    chunks: the number of parts of the rollout.
    rows: the rows of a chunk on all processes.
    ways: the number of devices over which they are split.
    shift: the denoiser's shift.
  """
  parts = [Rollout(*part) for part in zip(*(np.split(x, chunks) for x in found), strict=True)]
  reach = reached(sampler, parts, rows, ways)
  canvas = found.prompt.shape[1] + sampler.completion_length
  drawn = rollout(counted["rollout"], sampler, canvas, shift, reach)
  score, steps = update(counted["update"], sampler, method, reach, oversample=oversample)
  return {"rollout": drawn, "score": score, "update": steps}
