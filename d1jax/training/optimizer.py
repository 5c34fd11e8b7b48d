"""AdamW with a warm-up, a decay and a clip, as the d1 runs use it."""

import logging
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import Float

from d1jax.state import Params

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


def build(
  *,
  learning_rate: float,
  steps: int,
  warmup_steps: int,
  decay: str,
  b1: float,
  b2: float,
  weight_decay: float,
  max_grad_norm: float,
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
  """
  return optax.chain(
    optax.clip_by_global_norm(max_grad_norm),
    optax.adamw(
      schedule(learning_rate, steps, warmup_steps, decay),
      b1=b1,
      b2=b2,
      weight_decay=weight_decay,
      mask=decayed,
    ),
  )


def warn_of_warm_up(stage: str, *, learning_rate: float, steps: int, warmup_steps: int) -> None:
  """Warns where more than half of a stage's optimiser steps are its warm-up."""
  if 2 * warmup_steps > steps:
    log.warning(
      "%s.warmup_steps=%d is more than half of the run's %d optimiser steps, so that most have less than"
      " %s.learning_rate=%s: lower warmup_steps, or raise steps",
      *(stage, warmup_steps, steps, stage, learning_rate),
    )
