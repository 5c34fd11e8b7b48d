"""The containers of weights, and the only function that applies an optimiser."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int, Key

from d1jax.models import lora

Params = Any


class TrainState(NamedTuple):
  """Everything that a step reads and writes. It is donated to each step, and saved in checkpoints.

  Attributes:
    step: the number of optimiser steps taken.
    trainable: the float32 weights that the optimiser changes: all weights, or adapters.
    opt_state: the optimiser's moments.
    key: the run's key, which never changes; the key of every draw is folded from it.
  """

  step: Int[Array, ""]
  trainable: Params
  opt_state: Any
  key: Key[Array, ""]


class Frozen(NamedTuple):
  """The weights that no step changes or donates.

  Attributes:
    base: the weights to which adapters are added; empty in full fine-tuning.
    reference: the policy at the start of reinforcement learning, for the KL term. It is empty without a KL term, and
      with adapters, because then the base is the reference.
  """

  base: Params
  reference: Params


def merge(trainable: Params, frozen: Frozen) -> Params:
  """The parameters that a denoiser takes: the trainable weights themselves, or the base with the adapters beside it."""
  return lora.overlay(frozen.base, trainable) if frozen.base else trainable


def merge_for_rollout(trainable: Params, frozen: Frozen) -> Params:
  """Like `merge`, with adapters added into a float base (in float32, cast once); a quantised base stays separate."""
  return lora.merged(merge(trainable, frozen))


def reference(frozen: Frozen) -> Params:
  """The parameters of the reference policy; with adapters, this is the base without them."""
  return frozen.base or frozen.reference


def create(
  init: Any, optimizer: optax.GradientTransformation, key: Key[Array, ""], init_key: Key[Array, ""]
) -> TrainState:
  """A new state at step 0, whose weights are drawn by `init(init_key)`."""
  trainable = init(init_key)
  return TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable), key)


def apply_gradients(
  state: TrainState,
  gradients: Params,
  optimizer: optax.GradientTransformation,
  finite: Bool[Array, ""],
) -> TrainState:
  """Takes one optimiser step; if `finite` is false, the state does not change, not even its step count."""
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
