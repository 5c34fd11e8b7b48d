"""Preference tuning on pairs of answers: the compiled step, and the look at held-out pairs."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from d1jax import keys
from d1jax.data.pairs import PairBatch, PairTokens, batch_of, fitting, pair_batches
from d1jax.data.pipeline import bucket_for
from d1jax.data.tokenizer import Tokenizer
from d1jax.diffusion.denoiser import Denoiser
from d1jax.microbatch import split_rows, sum_over_parts
from d1jax.model import Model
from d1jax.parallel.mesh import place
from d1jax.rl.preference import Preference, bounds
from d1jax.state import Frozen, Params, TrainState, apply_gradients, merge
from d1jax.training import steps

SHOWN = ("loss", "accuracy", "margin")
"""The figures on the progress line."""

DRAWS = 4
"""How many times as many masks a held-out pair gets as one that is trained on."""


@dataclasses.dataclass(frozen=True)
class Options:
  """The options of preference tuning.

  Attributes:
    loss: the loss.
    batch_size: pairs per step.
    prompt_buckets: the prompt lengths that are compiled.
    completion_buckets: the answer lengths that are compiled, each one with each prompt length.
    samples: masks of an answer, a noise level each.
    accumulation: micro-batches per step.
    logits_tile: vocabulary ids per tile of logits; None: no tiles.
  """

  loss: Preference
  batch_size: int
  prompt_buckets: tuple[int, ...]
  completion_buckets: tuple[int, ...]
  samples: int = 8
  accumulation: int = 1
  logits_tile: int | None = None


def judged(
  loss: Preference,
  denoiser: Denoiser,
  trainable: Params,
  frozen: Frozen,
  batch: Any,
  weight: jax.Array,
  key: jax.Array,
  *,
  samples: int,
  tile: int | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The loss and the figures of a `PairBatch`: policy and reference are scored with the same masks.

  The reference is a copy of the trained weights, `frozen.reference`: of all weights, or of the adapters alone.
  """
  score = lambda trained: bounds(denoiser, merge(trained, frozen), batch, key, samples=samples, tile=tile)
  reference = jax.lax.stop_gradient(score(frozen.reference))
  return loss(score(trainable), reference, batch.length, weight)


def dpo_step(
  state: TrainState,
  frozen: Frozen,
  batch: Any,
  *,
  denoiser: Denoiser,
  optimizer: optax.GradientTransformation,
  loss: Preference,
  samples: int,
  accumulation: int = 1,
  logits_tile: int | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """Takes one optimiser step on the mean loss over a `PairBatch` of device arrays; a pure function.

  Args:
    state: the weights, and the moments of the optimiser.
    frozen: the base of adapters, and the reference.
    batch: pairs.
    denoiser: the mask predictor.
    optimizer: the optimiser.
    loss: the loss.
    samples: masks of an answer, a noise level each; the same for policy and reference.
    accumulation: micro-batches.
    logits_tile: vocabulary ids per tile of logits; None: no tiles.
  """
  key = keys.purpose_key(state.key, keys.Purpose.PREFERENCE, state.step)

  def part_loss(trainable: Params, part: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    rows, weight = part
    return judged(loss, denoiser, trainable, frozen, rows, weight, key, samples=samples, tile=logits_tile)

  gradient = jax.value_and_grad(part_loss, has_aux=True)
  pairs = len(batch.prompt)
  parts = split_rows((batch, jnp.full(pairs, 1 / pairs)), accumulation)
  (total, figures), grads = sum_over_parts(lambda part: gradient(state.trainable, part), parts)
  norm = optax.tree.norm(grads)
  finite = jnp.isfinite(total) & jnp.isfinite(norm)
  return apply_gradients(state, grads, optimizer, finite), {
    "loss": total,
    "grad_norm": norm,
    "finite": finite,
    **figures,
  }


def _shapes(model: Model, options: Options, rows: int) -> list[PairBatch]:
  """An abstract batch of so many pairs for each pair of buckets."""
  row = steps.abstract_rows(model, rows)
  lengths = itertools.product(options.prompt_buckets, options.completion_buckets)
  return [PairBatch(row(), row(p), row(p, dtype="bool"), row(2, c), row(2)) for p, c in lengths]


def advancer(
  model: Model,
  found: PairTokens,
  options: Options,
  optimizer: optax.GradientTransformation,
  frozen: Frozen,
  position: int,
  *,
  seed: int,
) -> Callable[[TrainState, int], tuple[TrainState, dict[str, float]]]:
  """Returns the function that runs one iteration: one compiled step on the next batch of pairs.

  Args:
    model: network and mesh.
    found: the pairs.
    options: the options of the stage.
    optimizer: the optimiser of the stage.
    frozen: the base, and the reference: the trained weights at the start of the stage.
    position: the index of the batch to start at.
    seed: the seed of the order of pairs.
  """

  def program(state: TrainState, frozen: Frozen, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
    return dpo_step(
      state,
      frozen,
      batch,
      denoiser=model.denoiser,
      optimizer=optimizer,
      loss=options.loss,
      samples=options.samples,
      accumulation=options.accumulation,
      logits_tile=options.logits_tile,
    )

  batches = pair_batches(
    found,
    seed=seed,
    batch_size=options.batch_size,
    buckets=options.prompt_buckets,
    answer_buckets=options.completion_buckets,
    pad_id=cast(Tokenizer, model.tokenizer).pad_id,
    position=position,
  )
  shapes = _shapes(model, options, options.batch_size)
  compiled = steps.Steps(model, program, shapes, optimizer, answers=2 * options.batch_size, with_reference=True)
  return steps.advancer(model, batches, lambda iteration: compiled, frozen)


class HeldOutPairs:
  """The loss and the figures of held-out pairs; the masks are the same for all weights."""

  def __init__(self, model: Model, options: Options):
    """Keeps the arguments; a batch has the pairs of a training micro-batch.

    Args:
      model: network and mesh.
      options: the options of the stage.
    """
    self._model, self._options = model, options
    self._size = options.batch_size // options.accumulation
    self._compiled: dict[tuple[int, int], Any] = {}
    weights = model.weights

    def program(trainable: Params, frozen: Frozen, batch: Any, weight: jax.Array) -> dict[str, jax.Array]:
      key = keys.purpose_key(keys.seeded(0), keys.Purpose.EVALUATION)
      samples, tile = DRAWS * options.samples, options.logits_tile
      loss, figures = judged(
        options.loss, model.denoiser, trainable, frozen, batch, weight, key, samples=samples, tile=tile
      )
      return {"loss": loss, **figures}

    placement = weights.frozen_placement()._replace(reference=weights.trainable_placement)
    self._program = jax.jit(
      program,
      in_shardings=(weights.trainable_placement, placement, model.by_row, model.by_row),
      out_shardings=model.replicated,
    )

  def compile(self) -> None:
    """Compiles a program for each pair of buckets."""
    weights = self._model.weights
    frozen = weights.abstract_frozen()._replace(reference=weights.abstract_trainable)
    row = steps.abstract_rows(self._model, self._size)
    for batch in _shapes(self._model, self._options, self._size):
      if batch.lengths not in self._compiled:
        arguments = weights.abstract_trainable, frozen, batch, row(dtype="float32")
        self._compiled[batch.lengths] = self._program.lower(*arguments).compile()

  def __call__(self, found: PairTokens, trainable: Params, frozen: Frozen) -> dict[str, float]:
    """Means over the pairs that fit the buckets: `loss`, and the figures of `Preference`."""
    self.compile()
    options, by_lengths = self._options, dict[tuple[int, int], list[int]]()
    kept, longest = fitting(found, options.prompt_buckets, options.completion_buckets), found.longest
    for i in kept:
      sizes = ((len(found.prompts[i]), options.prompt_buckets), (len(longest[i]), options.completion_buckets))
      prompt, answer = (bucket_for(*each) or 0 for each in sizes)
      by_lengths.setdefault((prompt, answer), []).append(i)
    sums = []
    for lengths, members in sorted(by_lengths.items()):
      for first in range(0, len(members), self._size):
        part = members[first : first + self._size]
        weight = (np.arange(self._size) < len(part)) / np.float32(len(kept))
        part += part[:1] * (self._size - len(part))
        pad_id = cast(Tokenizer, self._model.tokenizer).pad_id
        batch = batch_of(found, part, np.asarray(part, np.int32), lengths, pad_id)
        placed = place((batch, weight.astype(np.float32)), self._model.by_row)
        sums.append(self._compiled[lengths](trainable, frozen, *placed))
    each = jax.device_get(sums)
    return {name: float(sum(one[name] for one in each)) for name in each[0]}
