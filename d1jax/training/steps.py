"""What stages that train on data share: one compiled step for each shape of a batch, and the iteration around it."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import optax

from d1jax.model import Model
from d1jax.parallel.mesh import place
from d1jax.state import Frozen, TrainState
from d1jax.telemetry import flops, ledger
from d1jax.telemetry.cost import Work

Program = Callable[[TrainState, Frozen, Any], tuple[TrainState, dict[str, jax.Array]]]
"""A step of training, `(state, frozen, batch) -> (state, figures)`."""


def abstract_rows(model: Model, rows: int) -> Callable[..., Any]:
  """What makes abstract arrays of so many rows on the placement of batches: `(*shape, dtype=int32)`."""
  return lambda *shape, dtype="int32": jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=model.by_row)


class Steps:
  """The compiled step of a stage for every shape of its batches, and its FLOPs.

  Attributes:
    compiled: the program for each `batch.lengths`, the lengths of a batch's prompts and answers.
    work: its work.
  """

  def __init__(
    self,
    model: Model,
    program: Program,
    batches: Sequence[Any],
    optimizer: optax.GradientTransformation,
    *,
    answers: int,
    with_reference: bool = False,
  ):
    """Compiles the steps.

    `program` is the step, `batches` has an abstract batch of each shape, and a batch has so many `answers`.
    `with_reference` says whether `Frozen.reference` holds a copy of the trained weights.
    """
    weights = model.weights
    placement, frozen_placement = weights.state_placement(optimizer), weights.frozen_placement()
    state, frozen = weights.abstract_state(optimizer), weights.abstract_frozen()
    if with_reference:
      frozen_placement = frozen_placement._replace(reference=weights.trainable_placement)
      frozen = frozen._replace(reference=weights.abstract_trainable)
    step = jax.jit(
      program,
      in_shardings=(placement, frozen_placement, model.by_row),
      out_shardings=(placement, model.replicated),
      donate_argnums=0,
    )
    self.compiled: dict[tuple[int, int], Any] = {}
    self.work: dict[tuple[int, int], Work] = {}
    for batch in batches:
      traced = step.trace(state, frozen, batch)
      self.compiled[batch.lengths] = traced.lower().compile()
      self.work[batch.lengths] = Work.of(flops.count(traced), tokens=answers * batch.lengths[1])

  def __call__(self, state: TrainState, frozen: Frozen, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step on a placed batch; `state` is donated."""
    return self.compiled[batch.lengths](state, frozen, batch)


def advancer(
  model: Model, batches: Iterator[Any], steps_of: Callable[[int], Steps], frozen: Frozen
) -> Callable[[TrainState, int], tuple[TrainState, dict[str, float]]]:
  """Returns the function that runs one iteration of a stage: one compiled step on the next batch.

  `batches` are on the host, from the first iteration that is still to come; `steps_of` gives the compiled steps of an
  iteration.
  """
  mesh = model.weights.mesh

  def advance(state: TrainState, iteration: int) -> tuple[TrainState, dict[str, float]]:
    batch = place(next(batches), model.by_row)  # the pipeline itself counts batches
    steps = steps_of(iteration)
    began = time.perf_counter()
    with jax.profiler.TraceAnnotation("update"):
      state, metrics = steps(state, frozen, batch)
      values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    seconds = {"update": time.perf_counter() - began}
    work = {"update": steps.work[batch.lengths]}
    spent = ledger.entry(mesh.size, mesh.devices.flat[0].device_kind, seconds, work)
    return state, values | spent | {"tokens": float(work["update"].tokens)}

  return advance
