"""What an iteration computes, by formula: FLOPs and tokens of rollout, score and update.

The model's FLOPs are those of the mathematics, on the whole canvas, padding included. What is computed twice to save
memory is counted apart, so that a utilisation from the model's FLOPs does not grow with wasted work (PaLM,
arXiv 2204.02311, appendix B).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from d1jax.diffusion.blocks import window_of
from d1jax.diffusion.rollout import Rollout, SamplerSpec
from d1jax.diffusion.sampler import batch_sizes
from d1jax.models import flops
from d1jax.models.flops import Products
from d1jax.models.lora import LoraSpec
from d1jax.models.transformer import TransformerSize
from d1jax.parallel import multihost
from d1jax.rl.method import Method
from d1jax.run.experiment import Experiment


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


@dataclasses.dataclass(frozen=True)
class Model:
  """What the formulas know of a network.

  Attributes:
    size: its sizes.
    lora: the adapters, if they are what is trained.
    merges: whether rollouts have them merged into the base.
    remat: whether blocks are computed again in the backward pass.
    shift: of the denoiser.
  """

  size: TransformerSize
  lora: LoraSpec | None
  merges: bool
  remat: bool
  shift: int = 0


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


def rollout(model: Model, sampler: SamplerSpec, canvas: int, reach: Reach) -> Work:
  """A rollout of all chunks: a pass over the canvas each refresh period, passes over the window in between.

  Args:
    model: the network.
    sampler: draws.
    canvas: L, prompt and completion.
    reach: how far it went.
  """
  passes = 2 if sampler.cfg_scale else 1
  total = 0
  made = passes * int((reach.steps * reach.rows).sum())
  for taken, rows_of in zip(reach.steps.tolist(), reach.rows.tolist(), strict=True):
    for steps, rows, window in zip(taken, rows_of, _windows(sampler, canvas, model.shift), strict=True):
      refreshes = -(-steps // sampler.refresh_period)
      for width, count in ((canvas, refreshes), (window, steps - refreshes)):
        total += passes * count * sum(_pass(model, rows, width, canvas, sampler.block_length, not model.merges))
  return Work(total, int(reach.rows[:, 0].sum()) * sampler.completion_length, passes=made)


def update(
  model: Model, sampler: SamplerSpec, method: Method, canvas: int, reach: Reach, *, tiled: bool, oversample: int = 1
) -> tuple[Work, Work]:
  """The score (old and reference log-probabilities) and the optimiser steps of an update.

  Micro-batches change nothing.

  Args:
    model: the network.
    sampler: that made the rollout.
    method: of the update.
    canvas: L.
    reach: of the rollout.
    tiled: whether logits exist in tiles, which are computed again in the backward pass.
    oversample: groups that are drawn for each that is trained on.
  """
  rows, mu, length = int(reach.rows[:, 0].sum()) // oversample, method.num_iterations, sampler.completion_length
  each = method.estimator.passes(sampler)
  passes = each.times * (int(reach.steps.max(axis=0).sum()) if each.number is None else each.number)
  policy, reference = (
    _times(passes, _pass(model, rows, canvas, canvas, each.predicted or length, beside)) for beside in (True, False)
  )
  old, ref = (mu - 1) * method.scores_old, mu * method.scores_reference
  if not method.estimator.redraws:  # the same states at each optimiser step
    old, ref = min(old, 1), min(ref, 1)
  scored = old + ref
  score = Work(old * sum(policy) + ref * sum(reference), scored * rows * length, passes=scored * rows * passes)
  repeated = sum(policy) if each.repeated else 0
  steps = _step(model, policy, rows * length, repeated + (policy.head if tiled and not each.repeated else 0))
  return score, Work(mu * steps.flops, mu * steps.tokens, mu * steps.repeated, mu * rows * passes)


def fine_tuning(model: Model, rows: int, canvas: int, length: int, *, tiled: bool) -> Work:
  """One step of supervised fine-tuning on `rows` completions of `length` tokens; `tiled` as in `update`."""
  policy = _pass(model, rows, canvas, canvas, length, True)
  return _step(model, policy, rows * length, policy.head if tiled else 0)._replace(passes=rows)


def model_of(experiment: Experiment) -> Model:
  """What the formulas know of an experiment's network."""
  weights, denoiser = experiment.model.weights, experiment.model.denoiser
  return Model(weights.network.size, weights.lora, weights.merges, bool(experiment.config.model.remat), denoiser.shift)


def of_fine_tuning(experiment: Experiment, tiled: bool) -> Callable[[int, int, int], Work]:
  """The work of a step of an experiment's fine-tuning, by rows, canvas and length of completions."""
  return functools.partial(fine_tuning, model_of(experiment), tiled=tiled)


def iteration(experiment: Experiment, method: Method, found: Rollout, *, cached: bool) -> dict[str, Work]:
  """The work of one iteration of diffu-GRPO: `rollout`, `score` and `update`; collective as `reached` is.

  Args:
    experiment: network, sampler and batch.
    method: of the update.
    found: the rollout on the host, the rows of this process, chunk after chunk.
    cached: whether the sampler's cache, if it has one, was used.
  """
  config, model = experiment.config.grpo, model_of(experiment)
  sampler = experiment.sampler if cached else experiment.sampler.with_cache("none")
  count = config.rollout_chunks
  chunks = [Rollout(*parts) for parts in zip(*(np.split(x, count) for x in found), strict=True)]
  rows = config.oversample * config.prompts_per_iteration * config.num_generations // count
  reach = reached(sampler, chunks, rows, experiment.model.rollout_ways)
  canvas = found.prompt.shape[1] + sampler.completion_length
  tiled = config.logits_tile is not None
  score, steps = update(model, sampler, method, canvas, reach, tiled=tiled, oversample=config.oversample)
  return {"rollout": rollout(model, sampler, canvas, reach), "score": score, "update": steps}


def _pass(model: Model, rows: int, window: int, canvas: int, predicted: int, beside: bool) -> Products:
  """A forward pass, with adapters beside their weights or without."""
  return flops.products(model.size, rows, window, canvas, predicted, model.lora if beside else None)


def _times(count: int, products: Products) -> Products:
  return Products(*(count * each for each in products))


def _step(model: Model, policy: Products, tokens: int, repeated: int) -> Work:
  """Forward and backward pass; of a block that is computed again, the last product is not needed."""
  if model.remat:
    weights = [inner * outer for inner, outer in flops.projections(model.size).values()]
    repeated += sum(policy) - policy.head - policy.projections * weights[-1] // sum(weights)
  return Work(sum(policy) + flops.backward(policy), tokens, repeated)
