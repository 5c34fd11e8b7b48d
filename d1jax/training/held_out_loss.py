"""The denoising loss of held-out demonstrations, which validates fine-tuning on a file."""

import itertools
import math
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from d1jax import keys
from d1jax.data.pipeline import bucket_for, pad_left
from d1jax.data.tokenizer import Tokenizer
from d1jax.diffusion.likelihood import denoising_loss, targets
from d1jax.diffusion.packed import packed_loss
from d1jax.model import Model
from d1jax.parallel.mesh import place
from d1jax.state import Frozen, Params, merge
from d1jax.training.loop import HELD_OUT
from d1jax.training.sft_data import Demonstrations, Options, packer_of

DRAWS = 4
"""The number of noise levels for each demonstration."""

LEVELS = 4
"""The number of ranges of the masking probability t for which the cross-entropy is told."""


class Found(NamedTuple):
  """The held-out loss of some weights.

  Attributes:
    loss: the loss a token, averaged over demonstrations and noise levels.
    by_level: the mean cross-entropy of the tokens that are masked, by `LEVELS` ranges of the masking probability; NaN
      where nothing was masked.
  """

  loss: float
  by_level: tuple[float, ...]

  @property
  def figures(self) -> dict[str, float]:
    """The loss, and the cross-entropy of each level that has masked tokens: `held_out_ce/t25` is of t below 25%."""
    names = [f"held_out_ce/t{100 * (level + 1) // LEVELS}" for level in range(LEVELS)]
    levels = {name: value for name, value in zip(names, self.by_level, strict=True) if not math.isnan(value)}
    return {HELD_OUT: self.loss} | levels


class HeldOutLoss:
  """The mean loss of some demonstrations; the noise is the same for all weights."""

  def __init__(self, model: Model, found: Demonstrations, config: Options):
    """Makes the batches; demonstrations that fit no bucket are left out."""
    pad_id = cast(Tokenizer, model.tokenizer).pad_id
    if config.packed:
      self._rows, batches = _packed(found, config, pad_id, model.denoiser.block)
    else:
      self._rows, batches = _in_buckets(found, config, pad_id)
    self._batches = [place(batch, model.by_row) for batch in batches]
    weights = model.weights

    def loss(trainable: Params, frozen: Frozen, batch: Any) -> tuple[jax.Array, jax.Array]:
      params = merge(trainable, frozen)
      key = keys.purpose_key(keys.seeded(0), keys.Purpose.EVALUATION)
      options: Any = dict(noise=config.noise, tile=config.logits_tile, levels=LEVELS)
      if config.packed:
        rows = batch.tokens, batch.segment, batch.answer, batch.sample_id, jnp.ones(len(batch.tokens))
        total, metrics = packed_loss(model.denoiser, params, *rows, key, **options)
        return total, metrics["by_level"]
      prompt, valid, completion, counts, sample_id = batch
      completion, weight = targets(model.denoiser, valid, completion, fill=pad_id, rows=1)
      total, metrics = denoising_loss(
        model.denoiser,
        params,
        prompt,
        valid,
        completion,
        weight * counts[:, None],
        sample_id,
        key,
        **options,
      )
      return total, metrics["by_level"]

    self._program = jax.jit(
      loss,
      in_shardings=(weights.trainable_placement, weights.frozen_placement(), model.by_row),
      out_shardings=model.replicated,
    )
    self._weights = weights
    self._compiled: dict[tuple[tuple[int, ...], ...], Any] = {}

  def compile(self) -> None:
    """Compiles everything that a call needs."""
    for batch in self._batches:
      shape = _shapes(batch)
      if shape not in self._compiled:
        given = self._weights.abstract_trainable, self._weights.abstract_frozen(), batch
        self._compiled[shape] = self._program.lower(*given).compile()

  def __call__(self, trainable: Params, frozen: Frozen) -> Found:
    """The loss of some weights."""
    self.compile()
    found = jax.device_get([self._compiled[_shapes(batch)](trainable, frozen, batch) for batch in self._batches])
    sums = np.asarray([levels for _, levels in found], np.float64).sum(axis=0)
    means = [total / count if count else math.nan for total, count in sums.tolist()]
    return Found(float(sum(loss for loss, _ in found)) / (self._rows * DRAWS), tuple(means))


def _packed(
  found: Demonstrations, config: Options, pad_id: int, block: int | None
) -> tuple[int, list[tuple[Any, ...]]]:
  """How many demonstrations fit, and packed batches in which each comes `DRAWS` times."""
  often = Demonstrations(*([ids for ids in side for _ in range(DRAWS)] for side in found))
  packer = packer_of(often, config, block, pad_id)
  rows, size = packer.rows(packer.records), config.batch_size // config.accumulation
  batches = [packer.batch(rows[first : first + size], size) for first in range(0, len(rows), size)]
  return len(packer.records) // DRAWS, list(batches)


def _in_buckets(found: Demonstrations, config: Options, pad_id: int) -> tuple[int, list[tuple[Any, ...]]]:
  """How many demonstrations fit, and batches of one pair of buckets each, in which each comes `DRAWS` times."""
  longest = max(config.completion_buckets)
  by_pair: dict[tuple[int, int], list[int]] = {}
  answers = [ids[:longest] if config.truncate else ids for ids in found.completions]
  for i, (prompt, answer) in enumerate(zip(found.prompts, answers, strict=True)):
    pair = bucket_for(len(prompt), config.prompt_buckets), bucket_for(len(answer), config.completion_buckets)
    if pair[0] is not None and pair[1] is not None:
      by_pair.setdefault((pair[0], pair[1]), []).append(i)
  if not by_pair:
    raise ValueError("no held-out demonstration fits the buckets of sft: raise them, or hold out more")
  # A batch has at most the rows of a training micro-batch, so that smaller micro-batches also save memory here.
  size = config.batch_size // config.accumulation
  batches: list[tuple[Any, ...]] = []
  for (width, length), members in sorted(by_pair.items()):
    jobs = list(itertools.product(members, range(DRAWS)))
    for first in range(0, len(jobs), size):
      part = jobs[first : first + size]
      counts = np.arange(size) < len(part)
      part += part[:1] * (size - len(part))
      prompts, valid = pad_left([found.prompts[i] for i, _ in part], width, pad_id)
      completions = np.full((size, length), pad_id, np.int32)
      for row, (i, _) in enumerate(part):
        completions[row, : len(answers[i])] = answers[i]
      sample_id = np.asarray([i * DRAWS + draw for i, draw in part], np.int32)
      batches.append((prompts, valid, completions, counts, sample_id))
  return sum(map(len, by_pair.values())), batches


def _shapes(batch: Any) -> tuple[tuple[int, ...], ...]:
  return tuple(x.shape for x in batch)
