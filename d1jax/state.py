"""The homes of weights, and the one place that applies an optimiser."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int, Key

from d1jax.models import lora

Params = Any


class TrainState(NamedTuple):
  """All that a step reads and writes; donated to each step, and what a checkpoint holds.

  Attributes:
    step: optimiser steps taken.
    trainable: float32 weights that the optimiser changes: all of them, or adapters.
    opt_state: its moments.
    key: the run's key; never changes, every draw is folded from it.
  """

  step: Int[Array, ""]
  trainable: Params
  opt_state: Any
  key: Key[Array, ""]


class Frozen(NamedTuple):
  """Weights that no step changes or donates.

  Attributes:
    base: what adapters are added to; empty in full fine-tuning.
    reference: the policy at the start of reinforcement learning, towards which the KL term pulls; empty with adapters,
      where the base is the reference, and where no KL is wanted.
  """

  base: Params
  reference: Params


def merge(trainable: Params, frozen: Frozen) -> Params:
  """The parameters that a denoiser takes: the trainable weights themselves, or the base with the adapters beside it."""
  return lora.overlay(frozen.base, trainable) if frozen.base else trainable


def merge_for_rollout(trainable: Params, frozen: Frozen) -> Params:
  """The same with adapters added into a float base, in float32 and cast once; on a quantised base they stay apart."""
  return lora.merged(merge(trainable, frozen))


def reference(frozen: Frozen) -> Params:
  """The reference policy's parameters: with adapters, the base without them."""
  return frozen.base or frozen.reference


def create(
  init: Any, optimizer: optax.GradientTransformation, key: Key[Array, ""], init_key: Key[Array, ""]
) -> TrainState:
  """A fresh state at step 0, its weights drawn by `init(init_key)`."""
  trainable = init(init_key)
  return TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable), key)


def apply_gradients(
  state: TrainState,
  gradients: Params,
  optimizer: optax.GradientTransformation,
  finite: Bool[Array, ""],
) -> TrainState:
  """One optimiser step; the state stays as it was, step count included, where `finite` is false."""
  updates, opt_state = optimizer.update(gradients, state.opt_state, state.trainable)
  new = state._replace(
    step=state.step + 1,
    trainable=optax.apply_updates(state.trainable, updates),
    opt_state=opt_state,
  )
  keep = lambda a, b: jnp.where(finite, a, b)
  return new._replace(
    step=keep(new.step, state.step),
    trainable=jax.tree.map(keep, new.trainable, state.trainable),
    opt_state=jax.tree.map(keep, new.opt_state, state.opt_state),
  )


def all_finite(state: TrainState) -> Bool[Array, ""]:
  """Whether every weight and every moment is finite."""
  leaves = jax.tree.leaves((state.trainable, state.opt_state))
  return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact)]))
