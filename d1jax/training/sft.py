"""Masked supervised fine-tuning on demonstrations of a task or of a file, as LLaDA and d1 do it."""

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from d1jax import keys
from d1jax.data import demonstrations as demonstration_files
from d1jax.data.sft_batches import SftBatch, padding, sft_batches
from d1jax.data.tokenizer import Tokenizer
from d1jax.diffusion.corruption import mask_prompt
from d1jax.diffusion.denoiser import Denoiser
from d1jax.diffusion.likelihood import denoising_loss
from d1jax.microbatch import split_rows, sum_over_parts
from d1jax.parallel.mesh import place
from d1jax.run.experiment import Experiment
from d1jax.state import Frozen, Params, TrainState, apply_gradients, merge
from d1jax.tasks import held_out as held_out_questions
from d1jax.telemetry import flops, ledger
from d1jax.telemetry.cost import Work


def sft_step(
  state: TrainState,
  frozen: Frozen,
  batch: Any,
  *,
  denoiser: Denoiser,
  optimizer: optax.GradientTransformation,
  accumulation: int,
  p_mask_prompt: float,
  logits_tile: int | None,
  dropout: bool = False,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One optimiser step on `denoising_loss` over an `SftBatch` of device arrays; pure.

  Every completion token of the batch weighs 1 / (B C), its end-of-sequence padding included. As all completions are
  padded to the same length, that is both d1's mean over tokens and LLaDA's mean over sequences of means over tokens.

  Each prompt token is masked with probability `p_mask_prompt`, as diffu-GRPO does when it scores: with few
  demonstrations it keeps the network from telling them apart by their prompts. d1's own fine-tuning does not (0).
  `dropout` turns on the adapters' dropout, here and nowhere else.
  """
  key = keys.purpose_key(state.key, keys.Purpose.CORRUPTION, state.step)
  mask_key = keys.purpose_key(state.key, keys.Purpose.SFT_PROMPT_MASK, state.step)
  prompt = mask_prompt(mask_key, batch.sample_id, batch.prompt, batch.prompt_valid, p_mask_prompt, denoiser.mask_id)
  batch = batch._replace(prompt=prompt)
  weights = jnp.full(batch.completion.shape, 1 / batch.completion.size)
  dropout_key = keys.purpose_key(state.key, keys.Purpose.DROPOUT, state.step) if dropout else None

  def loss(params: Params, part: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    rows, weights = part
    return denoising_loss(
      denoiser,
      merge(params, frozen),
      rows.prompt,
      rows.prompt_valid,
      rows.completion,
      weights,
      rows.sample_id,
      key,
      tile=logits_tile,
      dropout_key=dropout_key,
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


class Demonstrations(NamedTuple):
  """Tokenised prompts and answers, stop ids included."""

  prompts: list[list[int]]
  completions: list[list[int]]


def demonstrations(experiment: Experiment) -> tuple[Demonstrations, Demonstrations | None]:
  """What is learned from, and, from a file, what is held out of it to validate on.

  Without `sft.data` they are the task's own. Those that are too long are reported; whether they are cut is up to
  `sft.truncate`.
  """
  config, tokenizer = experiment.config, experiment.tokenizer
  if not config.sft.data:
    texts = experiment.texts("demonstrations")
    answers = [experiment.task.demonstration(record, config.task.style) for record in texts.records]
    found = Demonstrations(texts.prompts, [tokenizer.completion(answer) for answer in answers])
    _report(config.sft, "demonstrations", found)
    return found, None
  path = Path(config.data.root or "") / config.sft.data
  rows = demonstration_files.read(path)
  kept = [row for row in rows if not held_out_questions.is_listed(row.question)]
  if len(kept) < len(rows):
    print(f"{path}: left out {len(rows) - len(kept)} of {len(rows)} demonstrations, which answer test questions")
  sides = demonstration_files.split(kept, config.sft.held_out)
  found, held_out = (_tokenised(tokenizer, side) for side in sides)
  _report(config.sft, str(path), found)
  return found, held_out


def _tokenised(tokenizer: Tokenizer, side: list[demonstration_files.Demonstration]) -> Demonstrations:
  pairs = [demonstration_files.conversation(demonstration) for demonstration in side]
  prompts = [tokenizer.prompt(messages, "") for messages, _ in pairs]
  return Demonstrations(prompts, [tokenizer.completion(answer) for _, answer in pairs])


def _report(config: ConfigDict, name: str, found: Demonstrations) -> None:
  longest_prompt, longest = max(config.prompt_buckets), max(config.completion_buckets)
  shut_out = sum(len(prompt) > longest_prompt for prompt in found.prompts)
  too_long = sum(len(answer) > longest for answer in found.completions)
  count = len(found.prompts)
  if shut_out:
    print(f"{name}: left out {shut_out} of {count} prompts longer than {longest_prompt} tokens")
  if too_long:
    print(
      f"{name}: {'cut' if config.truncate else 'left out'} {too_long} of {count} answers longer than {longest} tokens"
    )
  used, computed = padding(*found, config.prompt_buckets, config.completion_buckets, truncate=config.truncate)
  if not used:
    raise ValueError(
      f"none of {count} demonstrations fits sft.prompt_buckets={config.prompt_buckets} and"
      f" sft.completion_buckets={config.completion_buckets}: raise them"
    )
  if config.data:
    print(f"{name}: {used:,} tokens in buckets of {computed:,} ({used / computed:.0%} used)")


class Steps:
  """The compiled SFT step of every pair of prompt and completion bucket, and its work."""

  def __init__(self, experiment: Experiment, optimizer: optax.GradientTransformation):
    config, weights = experiment.config.sft, experiment.weights
    placement = weights.state_placement(optimizer)
    self._experiment, self._optimizer = experiment, optimizer
    self._dropout = weights.lora is not None and weights.lora.dropout > 0
    self._step = jax.jit(
      self._program,
      in_shardings=(placement, weights.frozen_placement(), experiment.by_row),
      out_shardings=(placement, experiment.replicated),
      donate_argnums=0,
    )
    rows = lambda *shape, dtype=jnp.int32: jax.ShapeDtypeStruct(
      (config.batch_size, *shape), dtype, sharding=experiment.by_row
    )
    state, frozen = weights.abstract_state(optimizer), weights.abstract_frozen()
    self.compiled: dict[tuple[int, int], Any] = {}
    self.work: dict[tuple[int, int], Work] = {}
    for width, length in itertools.product(config.prompt_buckets, config.completion_buckets):
      parts: list[Any] = [rows(), rows(width), rows(width, dtype=jnp.bool_), rows(length)]
      batch = SftBatch(*parts)
      traced = self._step.trace(state, frozen, batch)
      self.compiled[width, length] = traced.lower().compile()
      self.work[width, length] = Work.of(flops.count(traced), tokens=config.batch_size * length)

  def _program(self, state: TrainState, frozen: Frozen, batch: SftBatch) -> tuple[TrainState, dict[str, jax.Array]]:
    config = self._experiment.config.sft
    return sft_step(
      state,
      frozen,
      batch,
      denoiser=self._experiment.denoiser,
      optimizer=self._optimizer,
      accumulation=config.accumulation,
      p_mask_prompt=config.p_mask_prompt,
      logits_tile=config.logits_tile,
      dropout=self._dropout,
    )

  def __call__(self, state: TrainState, frozen: Frozen, batch: SftBatch) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step on a placed batch; `state` is donated."""
    return self.compiled[batch.prompt.shape[1], batch.completion.shape[1]](state, frozen, batch)


def advancer(
  experiment: Experiment, found: Demonstrations, optimizer: optax.GradientTransformation, position: int
) -> Callable[[TrainState, int], tuple[TrainState, dict[str, float]]]:
  """One iteration of the SFT stage: next batch, one compiled step.

  Args:
    experiment: network, task and mesh.
    found: the demonstrations.
    optimizer: of this stage.
    position: the batch to start at.
  """
  config = experiment.config.sft
  batches = sft_batches(
    found.prompts,
    found.completions,
    seed=experiment.config.seed,
    batch_size=config.batch_size,
    buckets=config.prompt_buckets,
    completion_buckets=config.completion_buckets,
    pad_id=experiment.tokenizer.pad_id,
    truncate=config.truncate,
    position=position,
  )
  steps = Steps(experiment, optimizer)
  frozen, mesh = experiment.weights.frozen, experiment.weights.mesh

  def advance(state: TrainState, iteration: int) -> tuple[TrainState, dict[str, float]]:
    del iteration  # the pipeline counts along
    batch = place(next(batches), experiment.by_row)
    began = time.perf_counter()
    with jax.profiler.TraceAnnotation("update"):
      state, metrics = steps(state, frozen, batch)
      values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    seconds = {"update": time.perf_counter() - began}
    work = {"update": steps.work[batch.prompt.shape[1], batch.completion.shape[1]]}
    spent = ledger.entry(mesh.size, mesh.devices.flat[0].device_kind, seconds, work)
    return state, values | spent | {"tokens": float(batch.completion.size)}

  return advance
