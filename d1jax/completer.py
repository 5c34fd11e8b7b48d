"""The one way to complete prompts: rollouts, validation, evaluation and generation go through `Completer`."""

import contextlib
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp

from d1jax import keys
from d1jax.diffusion.continuous import sample_in_slots
from d1jax.diffusion.rollout import Rollout, SamplerSpec
from d1jax.diffusion.sampler import sample
from d1jax.model import Model
from d1jax.parallel.mesh import constrained
from d1jax.state import Params

PromptArrays = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
"""prompt[B P], prompt_valid[B P], sample_id[B], group_id[B]."""


class Completer:
  """The compiled sampling programs of a model, one for each sampler and shape of a batch.

  The programs take published weights, on the placements of rollouts: with the placements of updates, each weight would
  be gathered at every step. Completions are placed by row, as rollouts or as updates need them.
  """

  def __init__(self, model: Model, purpose: keys.Purpose, *, for_update: bool = False, slots: int | None = None):
    """Stores the arguments; nothing is compiled yet.

    Args:
      model: network and mesh.
      purpose: the purpose of the draws, a part of their keys.
      for_update: whether completions are moved to the placement of updates, if they have the same devices.
      slots: how many rows of a batch are computed at a time (`d1jax.diffusion.continuous`); None: all.
    """
    self.model, self._purpose, self._slots = model, purpose, slots
    self.placement = model.by_row if for_update and not model.weights.apart else model.rollout_by_row
    self._jitted: dict[SamplerSpec, Any] = {}
    self._compiled: dict[tuple[SamplerSpec, int, int], Any] = {}
    self.announce: Callable[[str], AbstractContextManager[Any]] = contextlib.nullcontext
    """Told what is being compiled, while it is: a command sets it; a library is silent."""

  @classmethod
  def of(cls, model: Model, purpose: keys.Purpose) -> "Completer":
    """The completer of a model for a purpose; the model keeps it, so that each program is compiled once."""
    if purpose not in model.programs:
      model.programs[purpose] = cls(model, purpose)
    found: Completer = model.programs[purpose]
    return found

  def _complete(
    self, sampler: SamplerSpec, params: Params, prompts: PromptArrays, key: jax.Array, step: jax.Array
  ) -> Rollout:
    model, key = self.model, keys.purpose_key(key, self._purpose, step)
    complete: Any = sample
    if self._slots is not None:
      by_row = functools.partial(constrained, placement=model.rollout_by_row)
      everywhere = functools.partial(constrained, placement=model.rollout_replicated)
      complete = functools.partial(sample_in_slots, slots=self._slots, by_row=by_row, everywhere=everywhere)
    rollout = complete(model.rollout_denoiser, params, *prompts, key, spec=sampler, row_multiple=model.rollout_ways)
    return constrained(rollout, model.rollout_by_row)  # rows stay on the placement that the weights need

  def jitted(self, sampler: SamplerSpec) -> Any:
    """The jitted program of a sampler: weights, prompts, key and step in, a rollout out."""
    if sampler not in self._jitted:
      model, scalar = self.model, self.model.rollout_replicated
      self._jitted[sampler] = jax.jit(
        functools.partial(self._complete, sampler),
        in_shardings=(model.publisher.placement, model.rollout_by_row, scalar, scalar),
        out_shardings=self.placement,
      )
    return self._jitted[sampler]

  def arguments(self, rows: int, width: int) -> tuple[Any, ...]:
    """The abstract arguments for `rows` prompts of `width` tokens: shapes, types and placements."""
    model, scalar, key = self.model, self.model.rollout_replicated, keys.seeded(0)
    row = lambda *shape, dtype=jnp.int32: jax.ShapeDtypeStruct(
      (rows, *shape), dtype, sharding=self.model.rollout_by_row
    )
    return (
      model.publisher.abstract,
      (row(width), row(width, dtype=jnp.bool_), row(), row()),
      jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=scalar),
      jax.ShapeDtypeStruct((), jnp.int32, sharding=scalar),
    )

  def traced(self, sampler: SamplerSpec, rows: int, width: int) -> jax.stages.Traced:
    """The traced program for batches of `rows` prompts of `width` tokens; JAX caches it."""
    return self.jitted(sampler).trace(*self.arguments(rows, width))

  def program(self, sampler: SamplerSpec, rows: int, width: int) -> Any:
    """The program for batches of `rows` prompts of `width` tokens; compiled once, from shapes alone."""
    shape = (sampler, rows, width)
    if shape not in self._compiled:
      answers = f"{sampler.completion_length} tokens for {rows} prompt{'s' * (rows > 1)} of {width}"
      with self.announce(f"compiling completions of {answers}"):
        self._compiled[shape] = self.traced(*shape).lower().compile()
    return self._compiled[shape]

  def __call__(
    self, sampler: SamplerSpec, params: Params, prompts: PromptArrays, key: jax.Array, step: jax.Array
  ) -> Rollout:
    """Completes placed prompts under published weights.

    Args:
      sampler: the sampler.
      params: the weights, from `Model.publish` or `Model.params`.
      prompts: the batch, placed at `Model.rollout_by_row`.
      key: the run's key, placed at `Model.rollout_replicated`.
      step: the number of the batch; each row's draws depend only on key, purpose, step and its sample id.
    """
    return self.program(sampler, *prompts[0].shape)(params, prompts, key, step)
