"""diffu-GRPO: roll out, grade, update. Two compiled programs an iteration, one visit to the host between them."""

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from d1jax import keys
from d1jax.data import pipeline
from d1jax.diffusion.likelihood import Estimator, one_step
from d1jax.diffusion.replay import replay
from d1jax.diffusion.rollout import Rollout, SamplerSpec
from d1jax.diffusion.sampler import sample
from d1jax.parallel.mesh import place
from d1jax.rl.advantage import group_relative
from d1jax.rl.grading import Grader
from d1jax.rl.trajectory import trajectory
from d1jax.rl.update import UpdateMetrics, UpdateSpec, update
from d1jax.state import Frozen, TrainState, merge, merge_for_rollout
from d1jax.tasks import Mixture
from d1jax.tasks.common import check_choice
from d1jax.training import drift, dump
from d1jax.training.checkpoint import with_placement
from d1jax.training.experiment import Experiment, Texts
from d1jax.training.host import grade_chunks, summarise
from d1jax.training.metrics import read_records

SHOWN = ("reward", "loss", "tokens_per_second")
ESTIMATORS = ("one_step", "trajectory")

Prompts = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
"""prompt[B P], prompt_valid[B P], sample_id[B], group_id[B]."""


GAP_POSITIONS = 16
"""Completion positions at which merged and unmerged logits are compared."""


class Compiled(NamedTuple):
  """The programs of one prompt bucket; `gap` where adapters are merged for rollouts, `exact` (the rollout without a
  cache) and `drift` where a cache is watched.
  """

  rollout: Any
  update: Any
  gap: Any
  exact: Any = None
  drift: Any = None


class Programs:
  """The programs of an iteration, compiled for every prompt bucket before the first one, and the grader between them.

  Attributes:
    grader: whose workers, if any, end with `with programs.grader:`.
    watch: over the drift of a cached sampler; None where nothing is to be seen.
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
    watch = drift.Watch(config.drift_every, config.drift_limit)
    self.watch = watch if watch.every and experiment.sampler.cache != "none" else None
    check_choice("grpo.estimator", config.estimator, ESTIMATORS)
    if experiment.sampler.temperature == 0 and (self.watch or config.importance_cap is not None):
      raise ValueError(
        f"grpo.importance_cap={config.importance_cap} and grpo.drift_every={config.drift_every} compare the"
        " probabilities of draws, but rollout.temperature=0 takes the argmax: raise it, or leave the two out"
      )
    self._spec = UpdateSpec(
      config.num_iterations,
      config.accumulation,
      config.epsilon,
      config.beta,
      config.aggregation,
      recorded_states=config.estimator == "trajectory",
      importance_cap=config.importance_cap,
    )
    one: Estimator = functools.partial(one_step, p_mask_prompt=config.p_mask_prompt, tile=config.logits_tile)
    self._estimator = trajectory if self._spec.recorded_states else one
    weights = experiment.weights
    placement = weights.state_placement(optimizer)
    base, frozen = weights.frozen_placement(), weights.frozen_placement(with_reference=self.needs_reference)
    rows, scalar = experiment.by_row, experiment.replicated
    self._rollout, self._exact = (
      jax.jit(
        functools.partial(self._rollout_program, sampler),
        in_shardings=(weights.trainable_placement, base, rows, scalar, scalar),
        out_shardings=rows,
      )
      for sampler in (experiment.sampler, experiment.sampler.with_cache("none"))
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
    self._drift = jax.jit(
      self._drift_program,
      in_shardings=(weights.trainable_placement, base, rows, rows),
      out_shardings=scalar,
    )
    self.compiled: dict[int, Compiled] = {}

  @property
  def needs_reference(self) -> bool:
    """Whether the update scores a reference policy beside the base."""
    return self._spec.beta > 0

  def _rollout_program(
    self,
    sampler: SamplerSpec,
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
    return sample(
      experiment.denoiser,
      params,
      prompt,
      valid,
      sample_id,
      group_id,
      key,
      spec=sampler,
      row_multiple=experiment.ways,
    )

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
      return denoiser.logits(params, hidden)

    merged, unmerged = logits(merge_for_rollout(trainable, frozen)), logits(merge(trainable, frozen))
    gap = jnp.where(jnp.isneginf(merged), 0.0, jnp.abs(merged - unmerged))
    return {"merge_gap_mean": jnp.mean(gap), "merge_gap_max": jnp.max(gap)}

  def _drift_program(self, trainable: Any, frozen: Frozen, cached: Rollout, exact: Rollout) -> dict[str, jax.Array]:
    params = merge_for_rollout(trainable, frozen)
    exact_logp = replay(self._experiment.denoiser, params, cached, self._experiment.sampler)
    return drift.drift(cached, exact, exact_logp)

  def _arguments(self, width: int) -> tuple[Any, ...]:
    """What the rollout takes for prompts of `width` tokens: shapes, types and placements."""
    experiment = self._experiment
    state = experiment.weights.abstract_state(self._optimizer)
    rows = self._rows // self._chunks
    row = lambda *shape, dtype=jnp.int32: jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=experiment.by_row)
    prompts = (row(width), row(width, dtype=jnp.bool_), row(), row())
    iteration = jax.ShapeDtypeStruct((), jnp.int32, sharding=experiment.replicated)
    return state.trainable, experiment.weights.abstract_frozen(), prompts, state.key, iteration

  def _chunk(self, arguments: tuple[Any, ...]) -> Rollout:
    """What it returns."""
    return with_placement(jax.eval_shape(self._rollout, *arguments), self._experiment.by_row)

  def lowering(self, width: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Functions that lower the rollout and the update for prompts of `width` tokens, from shapes alone."""
    experiment, arguments = self._experiment, self._arguments(width)
    state = experiment.weights.abstract_state(self._optimizer)
    frozen = experiment.weights.abstract_frozen(with_reference=self.needs_reference)
    rewards = jax.ShapeDtypeStruct((self._rows,), jnp.float32, sharding=experiment.by_row)
    chunks = (self._chunk(arguments),) * self._chunks
    return lambda: self._rollout.lower(*arguments), lambda: self._update.lower(state, frozen, chunks, rewards)

  def compile(self) -> None:
    """Compiles every program for every prompt bucket; a later call with other shapes is an error, not a compilation."""
    for width in self._experiment.buckets("train")[1]:
      rollout, update = (lower().compile() for lower in self.lowering(width))
      arguments = self._arguments(width)
      weights, chunk = arguments[:2], self._chunk(arguments)
      gap = self._gap.lower(*weights, chunk).compile() if self._experiment.weights.merges else None
      exact = self._exact.lower(*arguments).compile() if self.watch else None
      seen = self._drift.lower(*weights, chunk, chunk).compile() if self.watch else None
      self.compiled[width] = Compiled(rollout, update, gap, exact, seen)

  def place(self, prompts: pipeline.PromptBatch, iteration: int) -> tuple[list[Prompts], jax.Array]:
    """Puts a batch of prompts, in chunks, and the iteration's number where the rollout takes them."""
    arrays = (prompts.prompt, prompts.prompt_valid, prompts.sample_id, prompts.group_id)
    chunks = zip(*(np.split(x, self._chunks) for x in arrays), strict=True)
    experiment = self._experiment
    return [place(chunk, experiment.by_row) for chunk in chunks], place(np.int32(iteration), experiment.replicated)

  def rollout(
    self, state: TrainState, frozen: Frozen, chunks: list[Prompts], iteration: jax.Array, *, cached: bool = True
  ) -> tuple[Rollout, ...]:
    """Completes placed prompts under the current weights; the arrays of one chunk arrive after the other.

    Without `cached` a watched sampler's cache is left aside.
    """
    programs, base = self.compiled[chunks[0][0].shape[1]], frozen._replace(reference={})
    program = programs.rollout if cached else programs.exact
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

  def drift(self, state: TrainState, frozen: Frozen, cached: Rollout, exact: Rollout) -> dict[str, jax.Array]:
    """The figures of `drift.drift` of a chunk that was completed both ways."""
    program = self.compiled[cached.prompt.shape[1]].drift
    return program(state.trainable, frozen._replace(reference={}), cached, exact)


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
    workdir: of the run; its records say whether the cache is still trusted, and rollouts are dumped there, every
      `grpo.dump_every` iterations.
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

  watch = programs.watch
  cached = watch is None or watch.trusts(read_records(workdir / "metrics.jsonl"), position)

  def look(
    state: TrainState, placed: tuple[list[Prompts], jax.Array], record: np.ndarray, chunk: Rollout, rewards: np.ndarray
  ) -> dict[str, float]:
    """Completes the prompts of the first chunk without the cache too, and compares."""
    exact = programs.rollout(state, frozen, placed[0][:1], placed[1], cached=False)
    figures = programs.drift(state, frozen, chunk, *exact)
    rows = len(chunk.sample_id)
    _, graded, _ = grade_chunks(experiment, programs.grader, texts, record[:rows], exact)
    return drift.named(figures, float(rewards[:rows].mean() - graded.rewards.mean()))

  def advance(state: TrainState, iteration: int) -> tuple[TrainState, dict[str, float]]:
    nonlocal cached
    batch = next(batches)
    placed = programs.place(batch, iteration)
    rolling = time.perf_counter()
    chunks = programs.rollout(state, frozen, *placed, cached=cached)
    host_rollout, graded, arrived = grade_chunks(experiment, programs.grader, texts, batch.record, chunks)
    updating = time.perf_counter()
    seen: dict[str, float] = {} if cached else {"cache_off": 1.0}
    if watch and cached and watch.due(iteration):
      seen = look(state, placed, batch.record, chunks[0], graded.rewards)
      if watch.beyond(seen):
        watch.warn(iteration + 1, seen, experiment.sampler.cache)
        cached = False
    state, metrics, advantages = programs.update(state, frozen, chunks, graded.rewards)
    host_metrics = jax.device_get(metrics)
    compiled = (arrived - rolling) + (time.perf_counter() - updating)
    gap = programs.merge_gap(state, frozen, chunks[0]) if iteration % config.validate_every == 0 else {}
    tasks = [names[i] for i in batch.record] if names else []
    values = seen | gap | summarise(graded, host_rollout, host_metrics, config.num_generations, tasks)
    if config.dump_every and iteration % config.dump_every == 0:
      dump.write(workdir / "rollouts", iteration, host_rollout, graded, jax.device_get(advantages))
    return state, values | {"compiled_seconds": compiled, "tokens": float(host_rollout.completion.size)}

  return advance
