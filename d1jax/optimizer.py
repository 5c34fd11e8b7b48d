"""AdamW with a warm-up, a decay and a clip, as the d1 runs use it; and an average of the weights, if one is wanted."""

import logging
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float

from d1jax.state import Params, TrainState

log = logging.getLogger(__name__)


def decayed(params: Params) -> Params:
  """True for the weights that decay: all but the norms' scales and the biases, which are not weights of a product."""

  def decays(path: Any, _: Any) -> bool:
    name = jax.tree_util.keystr(path)
    return "norm" not in name and not name.rstrip("']").endswith("bias")

  return jax.tree_util.tree_map_with_path(decays, params)


def schedule(learning_rate: float, steps: int, warmup_steps: int, decay: str) -> optax.Schedule:
  """Linear warm-up from 0, then `constant`, or `linear` to 0 at `steps`."""
  if decay == "constant":
    tail = optax.constant_schedule(learning_rate)
  elif decay == "linear":
    tail = optax.linear_schedule(learning_rate, 0.0, max(steps - warmup_steps, 1))
  else:
    raise ValueError(f"decay={decay!r} is unknown; known: constant, linear")
  return optax.join_schedules([optax.linear_schedule(0.0, learning_rate, max(warmup_steps, 1)), tail], [warmup_steps])


def rates(learning_rate: float, steps: int, warmup_steps: int, decay: str) -> Float[np.ndarray, "steps"]:
  """The learning rate of each optimiser step, to be logged; see `schedule`."""
  return np.asarray(schedule(learning_rate, steps, warmup_steps, decay)(np.arange(steps)))


class AverageState(NamedTuple):
  """An exponential moving average of the weights: it is kept, saved and placed as the moments are."""

  average: Params


def averaging(decay: float) -> optax.GradientTransformation:
  """Changes no update, and keeps `average = decay * average + (1 - decay) * weights`, which starts at the weights.

  It stands behind everything that changes updates: what it is given is what is added to the weights.
  """

  def init(params: Params) -> AverageState:
    return AverageState(jax.tree.map(jnp.copy, params))

  def update(updates: Params, state: AverageState, params: Params) -> tuple[Params, AverageState]:
    weights = optax.apply_updates(params, updates)
    mean = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.average, weights)
    return updates, AverageState(mean)

  return optax.GradientTransformation(init, update)


def evaluated(state: TrainState) -> Params:
  """What is validated, evaluated and exported of a state: the average of the weights if one is kept, or the weights."""
  average = optax.tree.get(state.opt_state, "average")
  return state.trainable if average is None else average


def adamw(
  learning_rate: float,
  steps: int,
  *,
  warmup_steps: int = 0,
  decay: str = "linear",
  b1: float = 0.9,
  b2: float = 0.99,
  weight_decay: float = 0.1,
  max_grad_norm: float = 1.0,
  ema_decay: float | None = None,
) -> optax.GradientTransformation:
  """AdamW (moments in float32) behind a clip by global norm.

  Args:
    learning_rate: at the end of the warm-up.
    steps: of the whole run, in optimiser steps.
    warmup_steps: of the linear warm-up.
    decay: see `schedule`.
    b1: decay of the first moment.
    b2: decay of the second moment.
    weight_decay: decoupled, on everything but norms and biases.
    max_grad_norm: gradients are scaled down to this global norm.
    ema_decay: of the average of the weights, see `averaging`; None: none is kept.
  """
  averaged = () if ema_decay is None else (averaging(ema_decay),)
  return optax.chain(
    optax.clip_by_global_norm(max_grad_norm),
    optax.adamw(
      schedule(learning_rate, steps, warmup_steps, decay),
      b1=b1,
      b2=b2,
      weight_decay=weight_decay,
      mask=decayed,
    ),
    *averaged,
  )


def warn_of_warm_up(stage: str, *, learning_rate: float, steps: int, warmup_steps: int) -> None:
  """Warns where more than half of a stage's optimiser steps are its warm-up."""
  if 2 * warmup_steps > steps:
    log.warning(
      "%s.warmup_steps=%d is more than half of the run's %d optimiser steps, so that most have less than"
      " %s.learning_rate=%s: lower warmup_steps, or raise steps",
      *(stage, warmup_steps, steps, stage, learning_rate),
    )
