"""Masked supervised fine-tuning on a task's demonstrations, as LLaDA and d1 do it."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from d1jax import keys
from d1jax.data import pipeline
from d1jax.diffusion.corruption import mask_prompt
from d1jax.diffusion.denoiser import Denoiser
from d1jax.diffusion.likelihood import denoising_loss
from d1jax.microbatch import split_rows, sum_over_parts
from d1jax.parallel.mesh import place
from d1jax.state import Params, TrainState, apply_gradients
from d1jax.training.experiment import Experiment, Texts


def sft_step(
  state: TrainState,
  batch: Any,
  *,
  denoiser: Denoiser,
  optimizer: optax.GradientTransformation,
  accumulation: int,
  p_mask_prompt: float,
  logits_chunk: int | None,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One optimiser step on `denoising_loss` over an `SftBatch` of device arrays; pure.

  Every completion token of the batch weighs 1 / (B C), its end-of-sequence padding included. As all completions are
  padded to the same length, that is both d1's mean over tokens and LLaDA's mean over sequences of means over tokens.

  Each prompt token is masked with probability `p_mask_prompt`, as diffu-GRPO does when it scores: with few
  demonstrations it keeps the network from telling them apart by their prompts. d1's own fine-tuning does not (0).
  """
  key = keys.purpose_key(state.key, keys.Purpose.CORRUPTION, state.step)
  mask_key = keys.purpose_key(state.key, keys.Purpose.SFT_PROMPT_MASK, state.step)
  prompt = mask_prompt(mask_key, batch.sample_id, batch.prompt, batch.prompt_valid, p_mask_prompt, denoiser.mask_id)
  batch = batch._replace(prompt=prompt)
  weights = jnp.full(batch.completion.shape, 1 / batch.completion.size)

  def loss(params: Params, part: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    rows, weights = part
    return denoising_loss(
      denoiser,
      params,
      rows.prompt,
      rows.prompt_valid,
      rows.completion,
      weights,
      rows.sample_id,
      key,
      chunk=logits_chunk,
    )

  gradient = jax.value_and_grad(loss, has_aux=True)
  parts = split_rows((batch, weights), accumulation)
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


def answers(experiment: Experiment, texts: Texts) -> list[list[int]]:
  """The tokenised demonstrations of some records, stop id included; those that are too long are reported, not cut.

  Raises:
    ValueError: none fits a completion.
  """
  style, length = experiment.config.task.style, experiment.sampler.completion_length
  ids = [experiment.tokenizer.completion(experiment.task.demonstration(r, style)) for r in texts.records]
  fitting = sum(len(answer) <= length for answer in ids)
  if not fitting:
    raise ValueError(f"no demonstration fits rollout.completion_length={length} tokens: raise it")
  if fitting < len(ids):
    print(f"demonstrations: left out {len(ids) - fitting} of {len(ids)} longer than {length} tokens")
  return ids


def advancer(
  experiment: Experiment,
  texts: Texts,
  completions: list[list[int]],
  optimizer: optax.GradientTransformation,
  position: int,
) -> Callable[[TrainState, int], tuple[TrainState, dict[str, float]]]:
  """One iteration of the SFT stage: next batch, one compiled step.

  Args:
    experiment: network, task and mesh.
    texts: the demonstrations.
    completions: their tokenised answers.
    optimizer: of this stage.
    position: the batch to start at.
  """
  config = experiment.config.sft
  batches = pipeline.sft_batches(
    texts.prompts,
    completions,
    seed=experiment.config.seed,
    batch_size=config.batch_size,
    buckets=experiment.buckets,
    completion_length=experiment.sampler.completion_length,
    pad_id=experiment.tokenizer.pad_id,
    position=position,
  )
  placement = experiment.state_placement(optimizer)

  def program(state: TrainState, batch: pipeline.SftBatch) -> tuple[TrainState, dict[str, jax.Array]]:
    return sft_step(
      state,
      batch,
      denoiser=experiment.denoiser,
      optimizer=optimizer,
      accumulation=config.accumulation,
      p_mask_prompt=config.p_mask_prompt,
      logits_chunk=config.logits_chunk,
    )

  step = jax.jit(
    program,
    in_shardings=(placement, experiment.by_row),
    out_shardings=(placement, experiment.replicated),
    donate_argnums=0,
  )

  def advance(state: TrainState, iteration: int) -> tuple[TrainState, dict[str, float]]:
    del iteration  # the pipeline counts along
    batch = place(next(batches), experiment.by_row)
    began = time.perf_counter()
    state, metrics = step(state, batch)
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    compiled = time.perf_counter() - began
    return state, values | {"compiled_seconds": compiled, "tokens": float(batch.completion.size)}

  return advance
