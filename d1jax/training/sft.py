"""Masked supervised fine-tuning on demonstrations, as in LLaDA and d1."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from d1jax import keys
from d1jax.data.packing import PackedBatch, packed_batches, row_shape
from d1jax.data.sft_batches import SftBatch, sft_batches
from d1jax.data.tokenizer import Tokenizer
from d1jax.diffusion.corruption import LLADA, NoiseSpec, mask_prompt
from d1jax.diffusion.denoiser import Denoiser
from d1jax.diffusion.likelihood import denoising_loss, targets
from d1jax.diffusion.packed import packed_loss
from d1jax.microbatch import split_rows, sum_over_parts
from d1jax.model import Model, with_blocks
from d1jax.models.transformer import shaken
from d1jax.state import Frozen, Params, TrainState, apply_gradients, merge
from d1jax.training import steps
from d1jax.training.sft_data import Demonstrations, Options, packer_of


def sft_step(
  state: TrainState,
  frozen: Frozen,
  batch: Any,
  *,
  denoiser: Denoiser,
  optimizer: optax.GradientTransformation,
  accumulation: int = 1,
  p_mask_prompt: float = 0.0,
  noise: NoiseSpec = LLADA,
  mask_noise_steps: int = 0,
  pad_id: int | None = None,
  logits_tile: int | None = None,
  dropout: bool = False,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """Takes one optimiser step on `denoising_loss` over an `SftBatch` of device arrays; a pure function.

  Of a `PackedBatch` it is a step on `packed_loss`, whose mean is over the demonstrations of the batch.

  Every completion token of the batch, including end-of-sequence padding, has the weight 1 / (B C). Because all
  completions are padded to the same length, this equals both d1's mean over tokens and LLaDA's mean over sequences of
  means over tokens. A block-causal network learns nothing behind the block in which an answer ends, and the loss is
  SDAR's, the mean over sequences of means over the tokens that each one learns.

  Each prompt token is masked with probability `p_mask_prompt`, as in the scores of diffu-GRPO. With few demonstrations,
  this keeps the network from memorising which prompt belongs to which. d1's own fine-tuning does not do this (0).

  Args:
    state: the weights, and the moments of the optimiser.
    frozen: the base of adapters.
    batch: demonstrations.
    denoiser: the mask predictor.
    optimizer: the optimiser.
    accumulation: micro-batches.
    p_mask_prompt: the probability that a prompt token is masked.
    noise: how completions are masked; complementary copies double the rows of a micro-batch.
    mask_noise_steps: in the first steps, so many, Gaussian noise is added to the mask's embedding (LLaDA2). It is as
      large as an average embedding at first, and falls to none.
    pad_id: fills the last block of a block-causal network; None: the denoiser's first stop id.
    logits_tile: vocabulary ids per tile of logits; None: no tiles.
    dropout: turns on the adapters' dropout, which is used only here.
  """
  key = keys.purpose_key(state.key, keys.Purpose.CORRUPTION, state.step)
  mask_key = keys.purpose_key(state.key, keys.Purpose.SFT_PROMPT_MASK, state.step)
  packed = isinstance(batch, PackedBatch)
  if packed:
    weights = jnp.full(len(batch.tokens), 1 / jnp.maximum(jnp.sum(batch.sample_id >= 0), 1))
  else:
    prompt = mask_prompt(mask_key, batch.sample_id, batch.prompt, batch.prompt_valid, p_mask_prompt, denoiser.mask_id)
    fill = denoiser.stop_ids[0] if pad_id is None else pad_id
    tokens, weights = targets(denoiser, batch.prompt_valid, batch.completion, fill=fill, rows=len(batch.completion))
    batch = batch._replace(prompt=prompt, completion=tokens)
  dropout_key = keys.purpose_key(state.key, keys.Purpose.DROPOUT, state.step) if dropout else None
  complement: jax.Array | None = None
  if noise.complementary:
    batch, weights = jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0), (batch, weights / 2))
    complement = jnp.arange(weights.shape[0]) % 2 == 1

  def loss(params: Params, part: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    rows, weights, complement = part
    params = merge(params, frozen)
    if mask_noise_steps:
      size = jnp.maximum(1 - state.step / mask_noise_steps, 0.0)
      noise_key = keys.purpose_key(state.key, keys.Purpose.MASK_EMBEDDING, state.step)
      params = shaken(params, denoiser.mask_id, noise_key, size)
    options: Any = dict(noise=noise, complement=complement, tile=logits_tile, dropout_key=dropout_key)
    if packed:
      options |= dict(prompt_key=mask_key, p_mask_prompt=p_mask_prompt)
      return packed_loss(
        denoiser, params, rows.tokens, rows.segment, rows.answer, rows.sample_id, weights, key, **options
      )
    return denoising_loss(
      denoiser, params, rows.prompt, rows.prompt_valid, rows.completion, weights, rows.sample_id, key, **options
    )

  gradient = jax.value_and_grad(loss, has_aux=True)
  parts = split_rows((batch, weights, complement), accumulation)
  (total, metrics), grads = sum_over_parts(lambda part: gradient(state.trainable, part), parts)
  norm = optax.tree.norm(grads)
  finite = jnp.isfinite(total) & jnp.isfinite(norm)
  metrics = {
    "loss": total,
    "grad_norm": norm,
    "finite": finite,
    "masked_ce": metrics["masked_ce"] / accumulation,
  }
  return apply_gradients(state, grads, optimizer, finite), metrics


class Steps(steps.Steps):
  """The compiled SFT step for every pair of prompt and completion bucket, or for packed rows, and its FLOPs."""

  def __init__(self, model: Model, options: Options, optimizer: optax.GradientTransformation, block: int | None = None):
    """Compiles the steps.

    `block` is the block length of the network in these steps; None: its own.
    """
    lora = model.weights.lora
    self._model, self._options, self._optimizer = model, options, optimizer
    self._denoiser = model.denoiser if block is None else with_blocks(model.denoiser, model.network, block)
    self._dropout = lora is not None and lora.dropout > 0
    rows = steps.abstract_rows(model, options.batch_size)
    batches: list[tuple[Any, ...]]
    if options.packed:
      length, documents = row_shape(options.prompt_buckets, options.completion_buckets, model.denoiser.block)
      batches = [PackedBatch(rows(documents), rows(length), rows(length), rows(length, dtype=jnp.bool_))]
    else:
      pairs = itertools.product(options.prompt_buckets, options.completion_buckets)
      batches = [SftBatch(rows(), rows(p), rows(p, dtype=jnp.bool_), rows(c)) for p, c in pairs]
    super().__init__(model, self._program, batches, optimizer, answers=options.batch_size)

  def _program(self, state: TrainState, frozen: Frozen, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
    options = self._options
    return sft_step(
      state,
      frozen,
      batch,
      denoiser=self._denoiser,
      optimizer=self._optimizer,
      accumulation=options.accumulation,
      p_mask_prompt=options.p_mask_prompt,
      noise=options.noise,
      mask_noise_steps=options.mask_noise_steps,
      pad_id=cast(Tokenizer, self._model.tokenizer).pad_id,
      logits_tile=options.logits_tile,
      dropout=self._dropout,
    )


def advancer(
  model: Model,
  found: Demonstrations,
  options: Options,
  optimizer: optax.GradientTransformation,
  position: int,
  *,
  seed: int,
  iterations: int,
) -> Callable[[TrainState, int], tuple[TrainState, dict[str, float]]]:
  """Returns the function that runs one iteration of the SFT stage: one compiled step on the next batch.

  With `Options.grow`, equal parts of the stage have the block lengths that it names, and the last part has the model's;
  with grow=(1, 4) and blocks of 32, each is a third. All that is still to come is compiled before the first step.
  `found` are the demonstrations, `position` is the index of the batch to start at, and `iterations` counts all
  iterations of the stage.
  """
  pad_id = cast(Tokenizer, model.tokenizer).pad_id
  batches: Iterator[Any]
  if options.packed:
    packer = packer_of(found, options, model.denoiser.block, pad_id)
    batches = packed_batches(packer, seed=seed, batch_size=options.batch_size, position=position)
  else:
    batches = sft_batches(
      found.prompts,
      found.completions,
      seed=seed,
      batch_size=options.batch_size,
      buckets=options.prompt_buckets,
      completion_buckets=options.completion_buckets,
      pad_id=pad_id,
      truncate=options.truncate,
      position=position,
    )
  lengths = (*options.grow, None)
  part_of = lambda index: min(index * len(lengths) // iterations, len(options.grow))
  programs = {part: Steps(model, options, optimizer, lengths[part]) for part in range(part_of(position), len(lengths))}
  return steps.advancer(model, batches, lambda iteration: programs[part_of(iteration)], model.weights.frozen)
