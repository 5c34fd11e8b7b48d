"""diffu-GRPO: roll out, grade, update. Two compiled programs an iteration, one visit to the host between them."""

import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from d1jax import keys
from d1jax.data import pipeline
from d1jax.diffusion.likelihood import one_step
from d1jax.diffusion.rollout import Rollout
from d1jax.diffusion.sampler import sample
from d1jax.errors import RunError
from d1jax.parallel.mesh import place
from d1jax.rl.advantage import group_relative
from d1jax.rl.grading import Graded, Grader, WorkersDiedError, graded_texts
from d1jax.rl.update import UpdateMetrics, UpdateSpec, update
from d1jax.state import Frozen, TrainState, merge, merge_for_rollout
from d1jax.tasks import Mixture
from d1jax.training import dump
from d1jax.training.checkpoint import with_placement
from d1jax.training.experiment import Experiment, Texts

SHOWN = ("reward", "loss", "tokens_per_second")
NO_SIGNAL = 1e-6
"""A group whose rewards differ by less teaches nothing."""


Prompts = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
"""prompt[B P], prompt_valid[B P], sample_id[B], group_id[B]."""


GAP_POSITIONS = 16
"""Completion positions at which merged and unmerged logits are compared."""


class Compiled(NamedTuple):
  """The programs of one prompt bucket; `gap` where adapters are merged for rollouts."""

  rollout: Any
  update: Any
  gap: Any


class Programs:
  """The programs of an iteration, compiled for every prompt bucket before the first one, and the grader between them.

  Attributes:
    grader: whose workers, if any, end with `with programs.grader:`.
    compiled: the programs of each prompt bucket.
  """

  def __init__(self, experiment: Experiment, optimizer: optax.GradientTransformation):
    config = experiment.config.grpo
    self.grader = Grader(experiment.task, config.grading_workers)
    self._experiment = experiment
    self._optimizer = optimizer
    self._num_generations = config.num_generations
    self._rows = config.prompts_per_iteration * config.num_generations
    self._chunks = config.rollout_chunks
    self._divide_by_std = config.scale_rewards
    self._spec = UpdateSpec(config.num_iterations, config.accumulation, config.epsilon, config.beta, config.aggregation)
    self._estimator = functools.partial(one_step, p_mask_prompt=config.p_mask_prompt, chunk=config.logits_chunk)
    weights = experiment.weights
    placement = weights.state_placement(optimizer)
    base, frozen = weights.frozen_placement(), weights.frozen_placement(with_reference=self.needs_reference)
    rows, scalar = experiment.by_row, experiment.replicated
    self._rollout = jax.jit(
      self._rollout_program,
      in_shardings=(weights.trainable_placement, base, rows, scalar, scalar),
      out_shardings=rows,
    )
    self._update = jax.jit(
      self._update_program,
      in_shardings=(placement, frozen, rows, rows),
      out_shardings=(placement, scalar, rows),
      donate_argnums=0,
    )
    self._gap = jax.jit(
      self._gap_program,
      in_shardings=(weights.trainable_placement, base, rows),
      out_shardings=scalar,
    )
    self.compiled: dict[int, Compiled] = {}

  @property
  def needs_reference(self) -> bool:
    """Whether the update scores a reference policy beside the base."""
    return self._spec.beta > 0

  def _rollout_program(
    self,
    trainable: Any,
    frozen: Frozen,
    prompts: tuple[jax.Array, ...],
    key: jax.Array,
    iteration: jax.Array,
  ) -> Rollout:
    key = keys.purpose_key(key, keys.Purpose.ROLLOUT, iteration)
    experiment = self._experiment
    prompt, valid, sample_id, group_id = prompts
    params = merge_for_rollout(trainable, frozen)
    return sample(experiment.denoiser, params, prompt, valid, sample_id, group_id, key, spec=experiment.sampler)

  def _update_program(
    self, state: TrainState, frozen: Frozen, chunks: tuple[Rollout, ...], rewards: jax.Array
  ) -> tuple[TrainState, UpdateMetrics, jax.Array]:
    rollout = jax.tree.map(lambda *x: jnp.concatenate(x), *chunks)
    advantages = group_relative(rewards, self._num_generations, divide_by_std=self._divide_by_std)
    state, metrics = update(
      state,
      frozen,
      rollout,
      advantages,
      denoiser=self._experiment.denoiser,
      estimator=self._estimator,
      sampler=self._experiment.sampler,
      optimizer=self._optimizer,
      spec=self._spec,
    )
    return state, metrics, advantages

  def _gap_program(self, trainable: Any, frozen: Frozen, rollout: Rollout) -> dict[str, jax.Array]:
    """How far the logits of the merged weights, which roll out, are from those of the unmerged, which are trained."""
    denoiser, spec = self._experiment.denoiser, self._experiment.sampler
    masks = jnp.full_like(rollout.completion, denoiser.mask_id)
    canvas = jnp.concatenate([rollout.prompt, masks], axis=1)
    valid = jnp.concatenate([rollout.prompt_valid, jnp.ones_like(masks, bool)], axis=1)
    positions = rollout.prompt.shape[1] + jnp.arange(min(GAP_POSITIONS, spec.completion_length))

    def logits(params: Any) -> jax.Array:
      hidden = denoiser.hidden_predicting(denoiser.encode(params, canvas, valid), positions)
      return denoiser.unembed(params, hidden)

    gap = jnp.abs(logits(merge_for_rollout(trainable, frozen)) - logits(merge(trainable, frozen)))
    return {"merge_gap_mean": jnp.mean(gap), "merge_gap_max": jnp.max(gap)}

  def lowering(self, width: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Functions that lower the rollout and the update for prompts of `width` tokens, from shapes alone."""
    experiment = self._experiment
    weights = experiment.weights
    state = weights.abstract_state(self._optimizer)
    base, frozen = weights.abstract_frozen(), weights.abstract_frozen(with_reference=self.needs_reference)
    rows = self._rows // self._chunks
    row = lambda *shape, dtype=jnp.int32: jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=experiment.by_row)
    rewards = jax.ShapeDtypeStruct((self._rows,), jnp.float32, sharding=experiment.by_row)
    iteration = jax.ShapeDtypeStruct((), jnp.int32, sharding=experiment.replicated)
    prompts = (row(width), row(width, dtype=jnp.bool_), row(), row())
    arguments = (state.trainable, base, prompts, state.key, iteration)
    rollout = with_placement(jax.eval_shape(self._rollout_program, *arguments), experiment.by_row)
    chunks = (rollout,) * self._chunks
    return lambda: self._rollout.lower(*arguments), lambda: self._update.lower(state, frozen, chunks, rewards)

  def compile(self) -> None:
    """Compiles every program for every prompt bucket; a later call with other shapes is an error, not a compilation."""
    weights = self._experiment.weights
    for width in self._experiment.buckets("train")[1]:
      rollout, update = (lower() for lower in self.lowering(width))
      gap = None
      if weights.merges:
        trainable = weights.abstract_state(self._optimizer).trainable
        chunk = with_placement(rollout.out_info, self._experiment.by_row)
        gap = self._gap.lower(trainable, weights.abstract_frozen(), chunk).compile()
      self.compiled[width] = Compiled(rollout.compile(), update.compile(), gap)

  def place(self, prompts: pipeline.PromptBatch, iteration: int) -> tuple[list[Prompts], jax.Array]:
    """Puts a batch of prompts, in chunks, and the iteration's number where the rollout takes them."""
    arrays = (prompts.prompt, prompts.prompt_valid, prompts.sample_id, prompts.group_id)
    chunks = zip(*(np.split(x, self._chunks) for x in arrays), strict=True)
    experiment = self._experiment
    return [place(chunk, experiment.by_row) for chunk in chunks], place(np.int32(iteration), experiment.replicated)

  def rollout(
    self, state: TrainState, frozen: Frozen, chunks: list[Prompts], iteration: jax.Array
  ) -> tuple[Rollout, ...]:
    """Completes placed prompts under the current weights; the arrays of one chunk arrive after the other."""
    program, base = self.compiled[chunks[0][0].shape[1]].rollout, frozen._replace(reference={})
    return tuple(program(state.trainable, base, chunk, state.key, iteration) for chunk in chunks)

  def update(
    self, state: TrainState, frozen: Frozen, chunks: tuple[Rollout, ...], rewards: np.ndarray
  ) -> tuple[TrainState, UpdateMetrics, jax.Array]:
    """Takes mu optimiser steps on a graded rollout; `state` is donated. Returns the state, metrics and advantages."""
    program = self.compiled[chunks[0].prompt.shape[1]].update
    return program(state, frozen, chunks, place(rewards, self._experiment.by_row))

  def merge_gap(self, state: TrainState, frozen: Frozen, chunk: Rollout) -> dict[str, float]:
    """Mean and maximum of |merged - unmerged logits|; empty where nothing is merged."""
    program = self.compiled[chunk.prompt.shape[1]].gap
    if program is None:
      return {}
    gap = program(state.trainable, frozen._replace(reference={}), chunk)
    return {name: float(value) for name, value in jax.device_get(gap).items()}


def grade_chunks(
  experiment: Experiment, grader: Grader, texts: Texts, record: np.ndarray, chunks: tuple[Rollout, ...]
) -> tuple[Rollout, Graded, float]:
  """Grades each chunk while the next one is computed.

  Returns:
    The whole rollout on the host, its grades, and the moment (`time.perf_counter`) at which the last chunk was there.

  Raises:
    RunError: the grader's workers died twice over a chunk.
  """
  protocol = experiment.config.task.protocol
  fetched, written, pending, arrived = [], [], [], 0.0
  for chunk, rows in zip(chunks, np.split(record, len(chunks)), strict=True):
    host = jax.device_get(chunk)
    arrived = time.perf_counter()
    prefills = [texts.prefills[i] for i in rows]
    said = graded_texts(experiment.tokenizer, prefills, host.completion, host.completion_mask, protocol)
    fetched.append(host)
    written += said
    pending.append(grader.submit(said, [texts.records[i] for i in rows], protocol))
  try:
    grades = [grade for wait in pending for grade in wait()]
  except WorkersDiedError as error:
    raise RunError(f"{error}. It is --config.grpo.grading_workers") from error
  rollout = jax.tree.map(lambda *x: np.concatenate(x), *fetched)
  return rollout, Graded(written, grades, np.asarray([grade.reward for grade in grades], np.float32)), arrived


def summarise(
  graded: Graded, rollout: Rollout, metrics: UpdateMetrics, num_generations: int, tasks: Sequence[str]
) -> dict[str, float]:
  """Host numbers of one iteration.

  Args:
    graded: the batch.
    rollout: the batch, on the host.
    metrics: of the update.
    num_generations: rows of a group.
    tasks: the task of each row, where several are mixed; none otherwise.

  Returns:
    `reward`, and `TASK/reward` for each of several tasks; `reward/COMPONENT`, a mean over the rows that have it; the
    tasks' metrics, pooled over the batch, but for those that no row counts for; the numbers of rollout and update.
  """
  groups = graded.rewards.reshape(-1, num_generations)
  mask = rollout.completion_mask
  values = {
    "reward": float(graded.rewards.mean()),
    "reward_std": float(groups.std(axis=1).mean()),
    "no_signal": float((np.ptp(groups, axis=1) < NO_SIGNAL).mean()),
    "entropy": float(-(rollout.reveal_logp * mask).sum() / mask.sum()),
    "completion_length": float(mask.sum(axis=1).mean()),
  }
  for task in dict.fromkeys(tasks):
    values[f"{task}/reward"] = float(graded.rewards[np.asarray(tasks) == task].mean())
  for name in dict.fromkeys(name for grade in graded.grades for name in grade.components):
    values[f"reward/{name}"] = float(np.mean([g.components[name] for g in graded.grades if name in g.components]))
  for name in dict.fromkeys(name for grade in graded.grades for name in grade.metrics):
    top, bottom = np.sum([g.metrics[name] for g in graded.grades if name in g.metrics], axis=0)
    if bottom:
      values[name] = float(top / bottom)
  for name, value in metrics._asdict().items():
    values[name] = float(np.min(value) if name == "finite" else np.mean(value))
  return values


def advancer(
  experiment: Experiment,
  texts: Texts,
  frozen: Frozen,
  programs: Programs,
  position: int,
  workdir: Path,
) -> Callable[[TrainState, int], tuple[TrainState, dict[str, float]]]:
  """One iteration of the GRPO stage.

  Args:
    experiment: network, task and mesh.
    texts: the training prompts.
    frozen: the base, and the reference policy.
    programs: compiled.
    position: the iteration to start at.
    workdir: where rollouts are dumped, every `grpo.dump_every` iterations.
  """
  config, task = experiment.config.grpo, experiment.task
  parts = [pipeline.Part(*part) for part in task.parts(texts.records)] if isinstance(task, Mixture) else []
  names = [record["task"] for record in texts.records] if parts else []
  batches = pipeline.prompt_batches(
    texts.prompts,
    seed=experiment.config.seed,
    prompts_per_batch=config.prompts_per_iteration,
    num_generations=config.num_generations,
    buckets=experiment.buckets("train")[1],
    pad_id=experiment.tokenizer.pad_id,
    position=position,
    parts=parts,
  )

  def advance(state: TrainState, iteration: int) -> tuple[TrainState, dict[str, float]]:
    batch = next(batches)
    placed = programs.place(batch, iteration)
    rolling = time.perf_counter()
    chunks = programs.rollout(state, frozen, *placed)
    host_rollout, graded, arrived = grade_chunks(experiment, programs.grader, texts, batch.record, chunks)
    updating = time.perf_counter()
    state, metrics, advantages = programs.update(state, frozen, chunks, graded.rewards)
    host_metrics = jax.device_get(metrics)
    compiled = (arrived - rolling) + (time.perf_counter() - updating)
    gap = programs.merge_gap(state, frozen, chunks[0]) if iteration % config.validate_every == 0 else {}
    tasks = [names[i] for i in batch.record] if names else []
    values = gap | summarise(graded, host_rollout, host_metrics, config.num_generations, tasks)
    if config.dump_every and iteration % config.dump_every == 0:
      dump.write(workdir / "rollouts", iteration, host_rollout, graded, jax.device_get(advantages))
    return state, values | {"compiled_seconds": compiled, "tokens": float(host_rollout.completion.size)}

  return advance
