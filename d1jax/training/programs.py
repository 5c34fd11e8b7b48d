"""The compiled programs of a diffu-GRPO iteration: publish, rollout and update."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from d1jax import keys
from d1jax.completer import Completer, PromptArrays
from d1jax.data import pipeline
from d1jax.diffusion import continuous
from d1jax.diffusion.layout import predicting
from d1jax.diffusion.replay import replay
from d1jax.diffusion.rollout import Rollout, SamplerSpec
from d1jax.errors import reworded
from d1jax.model import Model
from d1jax.parallel import mesh as meshes
from d1jax.parallel.mesh import constrained, place
from d1jax.parallel.sides import across, check_holds
from d1jax.rl.behaviour import behaviour_logp
from d1jax.rl.method import Method
from d1jax.rl.selection import with_signal
from d1jax.rl.update import Metrics, inner_keys, update
from d1jax.state import Frozen, TrainState, merge, merge_for_rollout
from d1jax.telemetry import flops
from d1jax.training import drift, partial
from d1jax.training.shape import Shape

GAP_POSITIONS = 16
"""The number of completion positions at which merged and unmerged logits are compared."""


class Compiled(NamedTuple):
  """The programs of one prompt bucket besides its rollout.

  There is a `gap` if adapters are merged for rollouts, a `drift` if a cache is watched, and a `behaviour` if the policy
  that draws a rollout is scored. `counted` are the products of `rollout`, `update` and, if a cache is watched, `exact`.
  """

  update: Any
  counted: Mapping[str, flops.Counted]
  gap: Any
  drift: Any = None
  behaviour: Any = None


class Programs:
  """The programs of an iteration, compiled for every prompt bucket before the first iteration.

  Rollouts take weights that `publish` has merged, cast and moved to the placements of `rollout_rules`. Completions are
  returned on the placement of updates; if rollouts have devices of their own, `brought` moves them there.

  Attributes:
    model: network and mesh.
    sampler: the sampler of rollouts.
    method: the method of updates.
    shape: the shape of an iteration.
    watch: the watch over the drift of a cached sampler; None if the sampler has no cache or is not watched.
    compiled: the programs of each prompt bucket.
    partial: the program of partial rollouts; None: there are none.
  """

  def __init__(
    self,
    model: Model,
    sampler: SamplerSpec,
    method: Method,
    shape: Shape,
    optimizer: optax.GradientTransformation,
    watch: drift.Watch | None = None,
  ):
    """Defines the programs; nothing is compiled yet.

    The arguments are the attributes, and the optimiser of updates. A `watch` counts if the sampler has a cache.
    """
    self.model, self.sampler, self.method, self.shape = model, sampler, method, shape
    self._optimizer = optimizer
    self.watch = watch if watch and watch.every and sampler.cache != "none" else None
    if sampler.temperature == 0 and (self.watch or method.importance_cap is not None):
      raise ValueError(
        f"grpo.importance_cap={method.importance_cap} and grpo.drift_every={watch.every if watch else 0} compare the"
        " probabilities of draws, but rollout.temperature=0 takes the argmax: raise it, or leave the two out"
      )
    if shape.partial_age:
      partial.check(shape, sampler, method)
    if sampler.temperature == 0 and method.behaviour_cap is not None and not method.scores_behaviour:
      raise ValueError(
        f"grpo.off_policy_steps={shape.off_policy_steps} takes the probabilities of draws from the rollout, but"
        " rollout.temperature=0 takes the argmax: raise it, or set grpo.off_policy_steps=0"
      )
    if self.watch and shape.ahead:
      stale = "partial_age" if shape.partial_age else "off_policy_steps"
      raise ValueError(
        f"grpo.drift_every={self.watch.every} completes prompts again with the weights that completed them, which"
        f" grpo.{stale}={getattr(shape, stale)} does not keep: set grpo.drift_every=0, or rollout.cache=none"
      )
    if shape.rows % (shape.chunks * model.rollout_ways):
      raise ValueError(
        f"a rollout of {shape.rows} completions in grpo.rollout_chunks={shape.chunks} does not divide over the"
        f" {model.rollout_ways} devices that rollout_rules share rows over: change one of them"
      )
    if shape.slots is not None:
      with reworded("rollout."):
        continuous.check(sampler)
      with reworded("grpo.rollout_"):
        rows = shape.rows // shape.chunks * (1 + shape.partial_age)
        continuous.check_slots(shape.slots, rows, model.rollout_ways)
    self.compiled: dict[int, Compiled] = {}
    self._completer = Completer(model, keys.Purpose.ROLLOUT, for_update=True, slots=shape.slots)
    self.partial = partial.Partial(model, sampler, shape, self.drawn_placement) if shape.partial_age else None
    if model.weights.apart:
      check_holds(model.weights.abstract_state(optimizer), "mesh")
      check_holds(model.publisher.abstract, "rollout_mesh")
    self._jit()

  def _jit(self) -> None:
    model, weights = self.model, self.model.weights
    placement = weights.state_placement(self._optimizer)
    base, frozen = weights.frozen_placement(), weights.frozen_placement(with_reference=self.method.scores_reference)
    rows, scalar, params = model.by_row, model.replicated, model.publisher.placement
    stale = (rows, scalar) if self.method.behaviour_cap is not None else ()
    self._update = jax.jit(
      self._update_program,
      in_shardings=(placement, frozen, rows, rows, *stale),
      out_shardings=(placement, scalar, rows),
      donate_argnums=0,
    )
    drawn = self._completer.placement
    self._behaviour = jax.jit(
      self._behaviour_program, in_shardings=(params, drawn, *(model.rollout_replicated,) * 2), out_shardings=drawn
    )
    self._gap = jax.jit(
      self._gap_program,
      in_shardings=(weights.trainable_placement, base, rows),
      out_shardings=scalar,
    )
    self._drift = jax.jit(
      self._drift_program, in_shardings=(params, drawn, drawn), out_shardings=model.rollout_replicated
    )

  @property
  def drawn_placement(self) -> jax.sharding.NamedSharding:
    """Where rollouts place their completions."""
    return self._completer.placement

  @property
  def publish_bytes(self) -> int:
    """The bytes that a device receives when weights are published; the largest number of any device."""
    return self.model.publisher.received_bytes

  def _update_program(
    self,
    state: TrainState,
    frozen: Frozen,
    chunks: tuple[Rollout, ...],
    rewards: jax.Array,
    behaviour: tuple[jax.Array, ...] = (),
    number: jax.Array | None = None,
  ) -> tuple[TrainState, Metrics, jax.Array]:
    rollout = jax.tree.map(lambda *x: jnp.concatenate(x), *chunks)
    advantages = self.method.advantage(rewards, self.shape.num_generations)
    trained = (rollout, advantages, jnp.concatenate(behaviour) if behaviour else None)
    if self.shape.oversample > 1:
      rows = with_signal(rewards, self.shape.num_generations, self.shape.rows // self.shape.oversample)
      trained = constrained(jax.tree.map(lambda x: x[rows], trained), self.model.by_row)
    state, metrics = update(
      state,
      frozen,
      *trained,
      number,
      method=self.method,
      denoiser=self.model.denoiser,
      sampler=self.sampler,
      optimizer=self._optimizer,
    )
    return state, metrics, advantages

  def _behaviour_program(self, params: Any, rollout: Rollout, key: jax.Array, number: jax.Array) -> jax.Array:
    """Log p of a chunk under the weights that drew it, with the masks of the update of iteration `number`."""
    masks = inner_keys(key, number * self.method.num_iterations, 1)[0]
    model, rollout = self.model, constrained(rollout, self.model.rollout_by_row)
    return behaviour_logp(model.rollout_denoiser, params, rollout, masks, method=self.method, sampler=self.sampler)

  def _gap_program(self, trainable: Any, frozen: Frozen, rollout: Rollout) -> dict[str, jax.Array]:
    """The difference between the logits of merged weights, used in rollouts, and of the unmerged ones in updates."""
    denoiser, spec = self.model.denoiser, self.sampler
    masks = jnp.full_like(rollout.completion, denoiser.mask_id)
    positions = min(GAP_POSITIONS, spec.completion_length)

    def logits(params: Any) -> jax.Array:
      hidden = predicting(denoiser, params, rollout.prompt, rollout.prompt_valid, masks, rollout.completion)
      return denoiser.logits(params, hidden[:, :positions])

    merged, unmerged = logits(merge_for_rollout(trainable, frozen)), logits(merge(trainable, frozen))
    gap = jnp.where(jnp.isneginf(merged), 0.0, jnp.abs(merged - unmerged))
    return {"merge_gap_mean": jnp.mean(gap), "merge_gap_max": jnp.max(gap)}

  def _drift_program(self, params: Any, cached: Rollout, exact: Rollout) -> dict[str, jax.Array]:
    model = self.model
    cached, exact = constrained((cached, exact), model.rollout_by_row)
    return drift.drift(cached, exact, replay(model.rollout_denoiser, params, cached, self.sampler))

  def _rollout(self, width: int, sampler: SamplerSpec | None = None) -> jax.stages.Traced:
    """The traced rollout of prompts of `width` tokens."""
    if self.partial:
      return self.partial.traced()
    return self._completer.traced(sampler or self.sampler, self.shape.rows // self.shape.chunks, width)

  def chunk(self, width: int) -> Rollout:
    """The result of a rollout of one chunk of prompts of `width` tokens: shapes, types and placements."""
    found = self.partial.chunk(width) if self.partial else self._rollout(width).out_info
    return meshes.with_placement(found, self._completer.placement)

  def tracing(self, width: int) -> Mapping[str, Callable[[], jax.stages.Traced]]:
    """Functions that trace `publish`, and `rollout` and `update` for prompts of `width` tokens, from shapes alone."""
    weights = self.model.weights
    state = weights.abstract_state(self._optimizer)
    frozen = weights.abstract_frozen(with_reference=self.method.scores_reference)
    by_row, scalar = self.model.by_row, self.model.replicated
    rewards = jax.ShapeDtypeStruct((self.shape.rows,), jnp.float32, sharding=by_row)
    chunks = (meshes.with_placement(self.chunk(width), by_row),) * self.shape.chunks
    behaviour = tuple(meshes.with_placement(chunk.reveal_logp, by_row) for chunk in chunks)
    stale: tuple[Any, ...] = ()
    if self.method.behaviour_cap is not None:
      number = jax.ShapeDtypeStruct((), jnp.int32, sharding=scalar)
      stale = (behaviour if self.method.scores_behaviour else (), number)
    return {
      "publish": self.model.publisher.trace,
      "rollout": lambda: self._rollout(width),
      "update": lambda: self._update.trace(state, frozen, chunks, rewards, *stale),
    }

  def compile(self) -> None:
    """Compiles every program for every prompt bucket; a later call with other shapes is an error, not a compilation."""
    weights = self.model.weights
    trained = weights.abstract_state(self._optimizer).trainable
    samplers = {"rollout": self.sampler} | ({"exact": self.sampler.with_cache("none")} if self.watch else {})
    for width in self.shape.buckets:
      chunk, updating = self.chunk(width), self.tracing(width)["update"]()
      brought = meshes.with_placement(chunk, self.model.by_row)
      counted = {name: flops.count(self._rollout(width, each)) for name, each in samplers.items()}
      for each in samplers.values() if self.partial is None else ():
        self._completer.program(each, self.shape.rows // self.shape.chunks, width)
      self.compiled[width] = Compiled(
        update=updating.lower().compile(),
        counted=counted | {"update": flops.count(updating)},
        gap=self._gap.lower(trained, weights.abstract_frozen(), brought).compile() if weights.merges else None,
        drift=self._drift.lower(self.model.publisher.abstract, chunk, chunk).compile() if self.watch else None,
        behaviour=self._behaviour_lowered(chunk).compile() if self.method.scores_behaviour else None,
      )
    if self.partial:
      self.partial.compile()
    self.model.publisher.compile()

  def _behaviour_lowered(self, chunk: Rollout) -> jax.stages.Lowered:
    _, _, key, number = self._completer.arguments(*chunk.prompt.shape)
    return self._behaviour.lower(self.model.publisher.abstract, chunk, key, number)

  def place(self, prompts: pipeline.PromptBatch, iteration: int) -> tuple[list[PromptArrays], jax.Array]:
    """Places a batch of prompts, in chunks, and the iteration's number on the devices for a rollout."""
    chunks = zip(*(np.split(x, self.shape.chunks) for x in prompts.arrays), strict=True)
    placed = [place(chunk, self.model.rollout_by_row) for chunk in chunks]
    return placed, place(np.int32(iteration), self.model.rollout_replicated)

  def publish(self, state: TrainState, frozen: Frozen) -> Any:
    """The current weights in the form that rollouts take; arrays that need no change are shared with the state.

    An update donates the state together with shared arrays: drop the published weights before it, and publish again
    after it.
    """
    return self.model.publisher(state.trainable, frozen.base)

  def rollout(
    self, params: Any, chunks: list[PromptArrays], key: jax.Array, iteration: jax.Array, *, cached: bool = True
  ) -> tuple[Rollout, ...]:
    """Completes placed prompts under published weights; the arrays arrive chunk by chunk.

    `params` are those of `publish`, `key` is that of `key`, and chunks and iteration are from `place`. If `cached` is
    False, the cache of a watched sampler is not used.
    """
    sampler = self.sampler if cached else self.sampler.with_cache("none")
    return tuple(self._completer(sampler, params, chunk, key, iteration) for chunk in chunks)

  def behaviour(
    self, params: Any, chunks: tuple[Rollout, ...], key: jax.Array, iteration: jax.Array
  ) -> tuple[jax.Array, ...]:
    """Log p of a rollout under the weights that drew it; empty if the method needs none (`scores_behaviour`)."""
    if not self.method.scores_behaviour:
      return ()
    program = self.compiled[chunks[0].prompt.shape[1]].behaviour
    return tuple(program(params, chunk, key, iteration) for chunk in chunks)

  def key(self) -> jax.Array:
    """The run's key, placed for rollouts."""
    return place(self.model.weights.key, self.model.rollout_replicated)

  def brought(self, tree: Any) -> Any:
    """Rows of a rollout on the placement of updates."""
    return across(tree, self.model.by_row) if self.model.weights.apart else tree

  def update(
    self,
    state: TrainState,
    frozen: Frozen,
    chunks: tuple[Rollout, ...],
    rewards: np.ndarray,
    behaviour: tuple[jax.Array, ...] = (),
    iteration: int | None = None,
  ) -> tuple[TrainState, Metrics, jax.Array]:
    """Takes mu optimiser steps on a graded rollout and returns state, metrics and advantages.

    Args:
      state: the state, which is donated.
      frozen: the base and the reference.
      chunks: the rollout, see `brought`.
      rewards: one a completion.
      behaviour: log p of the policy that drew it, if the method scores it, see `brought`.
      iteration: the number of the iteration, if an older policy may have drawn it (`Shape.off_policy_steps`).
    """
    program = self.compiled[chunks[0].prompt.shape[1]].update
    stale = () if iteration is None else (behaviour, place(np.int32(iteration), self.model.replicated))
    return program(state, frozen, chunks, place(rewards, self.model.by_row), *stale)

  def merge_gap(self, state: TrainState, frozen: Frozen, chunk: Rollout) -> dict[str, float]:
    """The mean and maximum of |merged - unmerged logits|; empty if nothing is merged."""
    program = self.compiled[chunk.prompt.shape[1]].gap
    if program is None:
      return {}
    gap = program(state.trainable, frozen._replace(reference={}), chunk)
    return {name: float(value) for name, value in jax.device_get(gap).items()}

  def drift(self, params: Any, cached: Rollout, exact: Rollout) -> dict[str, jax.Array]:
    """The figures of `drift.drift` for a chunk that was completed both ways under published weights."""
    return self.compiled[cached.prompt.shape[1]].drift(params, cached, exact)
