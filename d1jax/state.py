"""The homes of weights, and the one place that applies an optimiser."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int, Key

Params = Any


class TrainState(NamedTuple):
  """All that a step reads and writes; donated to each step, and what a checkpoint holds.

  Attributes:
    step: optimiser steps taken.
    trainable: float32 weights that the optimiser changes.
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
    base: what `trainable` is added to; empty in full fine-tuning.
    reference: the policy at the start of reinforcement learning, towards which the KL term pulls.
  """

  base: Params
  reference: Params


def merge(trainable: Params, frozen: Frozen) -> Params:
  """The parameters that a denoiser takes. Full fine-tuning: the trainable weights themselves."""
  del frozen
  return trainable


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
