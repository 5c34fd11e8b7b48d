"""AdamW, as in d1, or Muon, with warm-up, decay and gradient clipping, and optionally an average of the weights."""

import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float

from d1jax.state import Params, TrainState

log = logging.getLogger(__name__)


def decayed(params: Params) -> Params:
  """True for the weights with weight decay: all except scales of norms and biases, which are not in a product."""

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
  """The learning rate of each optimiser step, for the log; see `schedule`."""
  return np.asarray(schedule(learning_rate, steps, warmup_steps, decay)(np.arange(steps)))


class AverageState(NamedTuple):
  """An exponential moving average of the weights; it is saved and placed like the optimiser's moments."""

  average: Params


def averaging(decay: float) -> optax.GradientTransformation:
  """Keeps `average = decay * average + (1 - decay) * weights`, starting at the weights; it changes no update.

  It must be the last transformation of the chain, because its input must be the update that is added to the weights.
  """

  def init(params: Params) -> AverageState:
    return AverageState(jax.tree.map(jnp.copy, params))

  def update(updates: Params, state: AverageState, params: Params) -> tuple[Params, AverageState]:
    weights = optax.apply_updates(params, updates)
    mean = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.average, weights)
    return updates, AverageState(mean)

  return optax.GradientTransformation(init, update)


def evaluated(state: TrainState) -> Params:
  """The weights that are validated, evaluated and exported: their average if a state has one, or the weights."""
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
  """AdamW (moments in float32) after gradient clipping by global norm.

  Args:
    learning_rate: the rate at the end of the warm-up.
    steps: the optimiser steps of the whole run.
    warmup_steps: the length of the linear warm-up.
    decay: see `schedule`.
    b1: the decay of the first moment.
    b2: the decay of the second moment.
    weight_decay: decoupled, on everything except norms and biases.
    max_grad_norm: the global norm to which larger gradients are scaled down.
    ema_decay: the decay of the average of the weights, see `averaging`; None: there is no average.
  """
  rate = schedule(learning_rate, steps, warmup_steps, decay)
  return _clipped(optax.adamw(rate, b1=b1, b2=b2, weight_decay=weight_decay, mask=decayed), max_grad_norm, ema_decay)


def muon(
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
  """Muon for the matrices inside the layers, AdamW for all other weights (Jordan 2024; Liu et al., arXiv 2502.16982).

  An update of a matrix is its momentum with all singular values set to about 1, scaled so that it is as large as one of
  AdamW. The learning rates of AdamW therefore fit. A network that starts from random weights learns in a fraction of
  the steps.
  The arguments are those of `adamw`. `b1` and `b2` are AdamW's alone, since the momentum of matrices is 0.95, and the
  weight decay is on the matrices alone.
  """
  step = optax.contrib.muon(
    schedule(learning_rate, steps, warmup_steps, decay),
    weight_decay=weight_decay,
    adam_b1=b1,
    adam_b2=b2,
    consistent_rms=0.2,
    muon_weight_dimension_numbers=_matrices,
  )
  return _clipped(step, max_grad_norm, ema_decay)


def _clipped(
  step: optax.GradientTransformation, max_grad_norm: float, ema_decay: float | None
) -> optax.GradientTransformation:
  """An optimiser behind gradient clipping, with an average of the weights if `ema_decay` is given."""
  averaged = () if ema_decay is None else (averaging(ema_decay),)
  return optax.chain(optax.clip_by_global_norm(max_grad_norm), step, *averaged)


def _matrices(params: Params) -> Params:
  """Which axes of the weights are rows and columns; None for those that are not matrices of a layer."""

  def axes(path: Any, weight: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
    stacked = "blocks" in jax.tree_util.keystr(path)
    return optax.contrib.MuonDimensionNumbers(1, 2) if stacked and weight.ndim == 3 else None

  return jax.tree_util.tree_map_with_path(axes, params)


OPTIMIZERS: Mapping[str, Callable[..., optax.GradientTransformation]] = {"adamw": adamw, "muon": muon}
"""The optimisers by the names of the field `optimizer`."""


def warn_of_warm_up(stage: str, *, learning_rate: float, steps: int, warmup_steps: int) -> None:
  """Warns if more than half of a stage's optimiser steps are its warm-up."""
  if 2 * warmup_steps > steps:
    log.warning(
      "%s.warmup_steps=%d is more than half of the run's %d optimiser steps, so that most have less than"
      " %s.learning_rate=%s: lower warmup_steps, or raise steps",
      *(stage, warmup_steps, steps, stage, learning_rate),
    )
