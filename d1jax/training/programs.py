"""The compiled programs of a diffu-GRPO iteration: publish the weights, roll out, update."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from d1jax import keys
from d1jax.data import pipeline
from d1jax.diffusion.replay import replay
from d1jax.diffusion.rollout import Rollout, SamplerSpec
from d1jax.diffusion.sampler import sample
from d1jax.parallel import mesh as meshes
from d1jax.parallel.mesh import constrained, place
from d1jax.publish import Publisher
from d1jax.rl.grading import Grader
from d1jax.rl.selection import with_signal
from d1jax.rl.update import Metrics, update
from d1jax.run.experiment import Experiment
from d1jax.state import Frozen, TrainState, merge, merge_for_rollout
from d1jax.telemetry import flops
from d1jax.training import drift, method

Prompts = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
"""prompt[B P], prompt_valid[B P], sample_id[B], group_id[B]."""

GAP_POSITIONS = 16
"""Completion positions at which merged and unmerged logits are compared."""


class Compiled(NamedTuple):
  """The programs of one prompt bucket; `gap` where adapters are merged for rollouts, `exact` (the rollout without a
  cache) and `drift` where a cache is watched; `counted` are the products of `rollout`, `update` and `exact`.
  """

  rollout: Any
  update: Any
  counted: Mapping[str, flops.Counted]
  gap: Any
  exact: Any = None
  drift: Any = None


class Programs:
  """The programs of an iteration, compiled for every prompt bucket before the first one, and the grader between them.

  Rollouts take weights that `publish` has merged, cast and moved to the placements of `rollout_rules`: the one place
  where placements of rollouts and of updates meet. Completions come back at the placement of updates.

  Attributes:
    grader: whose workers, if any, end with `with programs.grader:`.
    shaping: makes rewards of grades.
    watch: over the drift of a cached sampler; None where nothing is to be seen.
    method: of the updates.
    compiled: the programs of each prompt bucket.
  """

  def __init__(
    self, experiment: Experiment, optimizer: optax.GradientTransformation, publisher: Publisher | None = None
  ):
    """Prepares the programs; nothing is compiled yet.

    Args:
      experiment: network, task and mesh.
      optimizer: of the updates.
      publisher: of the weights, where evaluations share it; None: one of its own.
    """
    config = experiment.config.grpo
    self.grader = Grader(experiment.task, config.grading_workers)
    self._experiment = experiment
    self._optimizer = optimizer
    self._num_generations = config.num_generations
    self._oversample = config.oversample
    self._rows = config.oversample * config.prompts_per_iteration * config.num_generations
    self._chunks = config.rollout_chunks
    watch = drift.Watch(config.drift_every, config.drift_limit)
    self.watch = watch if watch.every and experiment.sampler.cache != "none" else None
    if experiment.sampler.temperature == 0 and (self.watch or config.importance_cap is not None):
      raise ValueError(
        f"grpo.importance_cap={config.importance_cap} and grpo.drift_every={config.drift_every} compare the"
        " probabilities of draws, but rollout.temperature=0 takes the argmax: raise it, or leave the two out"
      )
    if self._rows % (self._chunks * experiment.rollout_ways):
      raise ValueError(
        f"a rollout of {self._rows} completions in grpo.rollout_chunks={self._chunks} does not divide over the"
        f" {experiment.rollout_ways} devices that rollout_rules share rows over: change one of them"
      )
    self.shaping = method.shaping(config, experiment.task, experiment.config.task.protocol, experiment.sampler)
    self.method = method.build(config, experiment.sampler)
    self.compiled: dict[int, Compiled] = {}
    self._publish = publisher or Publisher(experiment.weights, experiment.weights.abstract_trainable)
    self._jit()

  def _jit(self) -> None:
    experiment, weights = self._experiment, self._experiment.weights
    placement = weights.state_placement(self._optimizer)
    base, frozen = weights.frozen_placement(), weights.frozen_placement(with_reference=self.needs_reference)
    rows, scalar, params = experiment.by_row, experiment.replicated, self._publish.placement
    self._rollout, self._exact = (
      jax.jit(
        functools.partial(self._rollout_program, sampler),
        in_shardings=(params, experiment.rollout_by_row, scalar, scalar),
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
    self._drift = jax.jit(self._drift_program, in_shardings=(params, rows, rows), out_shardings=scalar)

  @property
  def needs_reference(self) -> bool:
    """Whether the update scores a reference policy beside the base."""
    return self.method.scores_reference

  @property
  def publish_bytes(self) -> int:
    """Bytes that a device receives when weights are published: the most of any device."""
    return self._publish.received_bytes

  def _rollout_program(
    self, sampler: SamplerSpec, params: Any, prompts: Prompts, key: jax.Array, iteration: jax.Array
  ) -> Rollout:
    key = keys.purpose_key(key, keys.Purpose.ROLLOUT, iteration)
    experiment = self._experiment
    rollout = sample(
      experiment.rollout_denoiser, params, *prompts, key, spec=sampler, row_multiple=experiment.rollout_ways
    )
    return constrained(rollout, experiment.rollout_by_row)  # the loop's rows stay where its weights want them

  def _update_program(
    self, state: TrainState, frozen: Frozen, chunks: tuple[Rollout, ...], rewards: jax.Array
  ) -> tuple[TrainState, Metrics, jax.Array]:
    rollout = jax.tree.map(lambda *x: jnp.concatenate(x), *chunks)
    advantages = self.method.advantage(rewards, self._num_generations)
    trained = (rollout, advantages)
    if self._oversample > 1:
      rows = with_signal(rewards, self._num_generations, self._rows // self._oversample)
      trained = constrained(jax.tree.map(lambda x: x[rows], trained), self._experiment.by_row)
    state, metrics = update(
      state,
      frozen,
      *trained,
      method=self.method,
      denoiser=self._experiment.denoiser,
      sampler=self._experiment.sampler,
      optimizer=self._optimizer,
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

  def _drift_program(self, params: Any, cached: Rollout, exact: Rollout) -> dict[str, jax.Array]:
    experiment = self._experiment
    cached, exact = constrained((cached, exact), experiment.rollout_by_row)
    exact_logp = replay(experiment.rollout_denoiser, params, cached, experiment.sampler)
    return drift.drift(cached, exact, exact_logp)

  def _arguments(self, width: int) -> tuple[Any, ...]:
    """What the rollout takes for prompts of `width` tokens: shapes, types and placements."""
    experiment = self._experiment
    rows, by_row = self._rows // self._chunks, experiment.rollout_by_row
    row = lambda *shape, dtype=jnp.int32: jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=by_row)
    prompts = (row(width), row(width, dtype=jnp.bool_), row(), row())
    iteration = jax.ShapeDtypeStruct((), jnp.int32, sharding=experiment.replicated)
    key = experiment.weights.abstract_state(self._optimizer).key
    return self._publish.abstract, prompts, key, iteration

  def _chunk(self, arguments: tuple[Any, ...]) -> Rollout:
    """What it returns."""
    return meshes.with_placement(jax.eval_shape(self._rollout, *arguments), self._experiment.by_row)

  def tracing(self, width: int) -> Mapping[str, Callable[[], jax.stages.Traced]]:
    """Functions that trace `publish`, and the `rollout` and the `update` for prompts of `width` tokens, from shapes
    alone.
    """
    experiment, arguments = self._experiment, self._arguments(width)
    state = experiment.weights.abstract_state(self._optimizer)
    frozen = experiment.weights.abstract_frozen(with_reference=self.needs_reference)
    rewards = jax.ShapeDtypeStruct((self._rows,), jnp.float32, sharding=experiment.by_row)
    chunks = (self._chunk(arguments),) * self._chunks
    return {
      "publish": self._publish.trace,
      "rollout": lambda: self._rollout.trace(*arguments),
      "update": lambda: self._update.trace(state, frozen, chunks, rewards),
    }

  def compile(self) -> None:
    """Compiles every program for every prompt bucket; a later call with other shapes is an error, not a compilation."""
    weights = self._experiment.weights
    for width in self._experiment.buckets("train")[1]:
      tracing, arguments = self.tracing(width), self._arguments(width)
      traced = {"rollout": tracing["rollout"](), "update": tracing["update"]()}
      traced |= {"exact": self._exact.trace(*arguments)} if self.watch else {}
      compiled = {name: each.lower().compile() for name, each in traced.items()}
      chunk, trained = self._chunk(arguments), (weights.abstract_state(self._optimizer).trainable,)
      self.compiled[width] = Compiled(
        **compiled,
        counted={name: flops.count(each) for name, each in traced.items()},
        gap=self._gap.lower(*trained, weights.abstract_frozen(), chunk).compile() if weights.merges else None,
        drift=self._drift.lower(arguments[0], chunk, chunk).compile() if self.watch else None,
      )
    self._publish.compile()

  def place(self, prompts: pipeline.PromptBatch, iteration: int) -> tuple[list[Prompts], jax.Array]:
    """Puts a batch of prompts, in chunks, and the iteration's number where the rollout takes them."""
    arrays = (prompts.prompt, prompts.prompt_valid, prompts.sample_id, prompts.group_id)
    chunks = zip(*(np.split(x, self._chunks) for x in arrays), strict=True)
    experiment = self._experiment
    placed = [place(chunk, experiment.rollout_by_row) for chunk in chunks]
    return placed, place(np.int32(iteration), experiment.replicated)

  def publish(self, state: TrainState, frozen: Frozen) -> Any:
    """What rollouts take of the current weights; where nothing is merged, cast or moved, these arrays themselves.

    An update donates the state, and with it what is shared: publish anew behind it, and keep nothing for its duration.
    """
    return self._publish(state.trainable, frozen.base)

  def rollout(
    self, params: Any, chunks: list[Prompts], key: jax.Array, iteration: jax.Array, *, cached: bool = True
  ) -> tuple[Rollout, ...]:
    """Completes placed prompts under published weights; the arrays of one chunk arrive after the other.

    Args:
      params: of `publish`.
      chunks: of `place`.
      key: the run's.
      iteration: of `place`.
      cached: without, a watched sampler's cache is left aside.
    """
    programs = self.compiled[chunks[0][0].shape[1]]
    program = programs.rollout if cached else programs.exact
    return tuple(program(params, chunk, key, iteration) for chunk in chunks)

  def update(
    self, state: TrainState, frozen: Frozen, chunks: tuple[Rollout, ...], rewards: np.ndarray
  ) -> tuple[TrainState, Metrics, jax.Array]:
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

  def drift(self, params: Any, cached: Rollout, exact: Rollout) -> dict[str, jax.Array]:
    """The figures of `drift.drift` of a chunk that was completed both ways under published weights."""
    return self.compiled[cached.prompt.shape[1]].drift(params, cached, exact)
