"""Compiles the programs of a diffu-GRPO iteration for absent chips, and reports memory, work and time of each."""

import time
from typing import Any

import jax

from d1jax import keys
from d1jax.aot import collectives, hlo, invariants, memory, network, roofline, traffic
from d1jax.aot.memory import bytes_a_device
from d1jax.completer import Completer
from d1jax.parallel.chips import Chip
from d1jax.run.experiment import Experiment
from d1jax.telemetry import cost, flops
from d1jax.telemetry.cost import Work
from d1jax.training.programs import Programs

MOVES = ("all-gather", "all-to-all", "collective-permute")
"""The kinds of collectives that move data between devices without adding it."""


class Analysis:
  """The memory, work and time of an iteration's programs on the chips of the experiment's mesh."""

  def __init__(self, experiment: Experiment, programs: Programs, chip: Chip, width: int):
    """Stores the arguments; nothing is compiled yet.

    The experiment was built on these chips, and `width` is the length of the prompts.
    """
    self._chip, self._devices = chip, list(experiment.model.weights.mesh.devices.flat)
    self.experiment, self._width = experiment, width
    self.tracing = programs.tracing(width)
    config, weights = experiment.config.grpo, experiment.model.weights
    self._state = weights.abstract_state(experiment.optimizer(config, config.steps * config.num_iterations))
    self._frozen = weights.abstract_frozen(with_reference=programs.method.scores_reference)

  def placements(self) -> dict[str, str]:
    """The sharding of each trained, frozen or published array, by its path."""
    trees = {"trained": self._state.trainable, "frozen": self._frozen, "made": self.tracing["publish"]().out_info}
    return {
      name + jax.tree_util.keystr(path): f"{x.dtype}{list(x.shape)} {x.sharding.spec}"
      for name, tree in trees.items()
      for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }

  def program(self, name: str) -> dict[str, Any]:
    """Compiles one program.

    Returns:
      `compile_seconds` and `fits`. A program that does not fit has `needed`, `available` (bytes of a device) and
      `largest` (buffers). One that the compiler accepts has `memory` (see `memory.Memory`), `flops` and `repeated` of
      all devices, `traffic` (bytes of a device's HBM), `collectives`, `largest_in_loops`, `weights_in_loop`
      (collectives that move the same weights again in each pass of a loop), `open_loops` (loops of unknown length,
      which count as one pass; a loop that data may end earlier counts as often as it may run), `seconds` (see
      `roofline.Roofline`) and `bound`.
    """
    began = time.perf_counter()
    traced = self.tracing[name]()
    compiled, refused = _compiled(traced.lower())
    found = {"compile_seconds": time.perf_counter() - began}
    return found | (refused or self._read(name, compiled, traced))

  def evaluation(self) -> dict[str, Any]:
    """Compiles the largest batch of a validation: greedy, without a cache, with the published weights.

    Returns:
      `rows`, `width` of the prompts, `fits`; and `memory`, or the fields of `program` for a program that does not fit.
    """
    experiment, model = self.experiment, self.experiment.model
    section, ways = experiment.config.evaluation, model.rollout_ways
    rows, width = -(-section.batch_size // ways) * ways, max(section.prompt_buckets)
    completer = Completer.of(model, keys.Purpose.EVALUATION)
    compiled, refused = _compiled(completer.traced(experiment.sampler.greedy(), rows, width).lower())
    found = {"rows": rows, "width": width}
    if refused:
      return found | refused
    taken = memory.memory(compiled, *self._held("rollout", compiled))
    fits = taken.total <= self._chip.hbm_bytes
    found |= {"fits": fits, "memory": taken._asdict() | {"total": taken.total}}
    return found if fits else found | {"needed": taken.total, "available": self._chip.hbm_bytes}

  def work(self, name: str, traced: jax.stages.Traced) -> Work:
    """The computation of one run of a program, on all devices together.

    It assumes that rollouts take every step. If confidence or stop ids end them early, this is an upper limit.
    """
    counted = flops.count(traced)
    if name != "rollout":
      return Work.of(counted, tokens=0)
    experiment, config = self.experiment, self.experiment.config.grpo
    rows = config.oversample * config.prompts_per_iteration * config.num_generations // config.rollout_chunks
    sampler, denoiser = experiment.sampler, experiment.model.rollout_denoiser
    return cost.rollout(counted, sampler, denoiser, self._width, cost.whole(sampler, 1, rows, denoiser.block))

  def _read(self, name: str, compiled: Any, traced: jax.stages.Traced) -> dict[str, Any]:
    program = hlo.parse(compiled.as_text())
    exchanged = collectives.find(program, len(self._devices))
    again = invariants.repeated(program)
    exchanges = network.summary(exchanged, self._chip, self._devices)
    moved, work = traffic.traffic(program), self.work(name, traced)
    computed = (work.flops + work.repeated) / len(self._devices)
    line = roofline.roofline(self._chip, computed, moved, sum(each["seconds"] for each in exchanges))
    taken = memory.memory(compiled, *self._held(name, compiled))
    found = {
      "fits": taken.total <= self._chip.hbm_bytes,
      "memory": taken._asdict() | {"total": taken.total},
      "flops": work.flops,
      "repeated": work.repeated,
      "traffic": moved,
      "collectives": exchanges,
      "largest_in_loops": network.largest_in_loops(exchanged),
      "weights_in_loop": sum(each.kind in MOVES and each.name in again for each in exchanged),
      "open_loops": program.open_loops(),
      "seconds": line._asdict(),
      "bound": line.bound,
    }
    if not found["fits"]:
      largest = [buffer._asdict() for buffer in memory.largest(program, taken)]
      found |= {"needed": taken.total, "available": self._chip.hbm_bytes, "largest": largest}
    return found

  def _held(self, name: str, compiled: Any) -> tuple[dict[str, int], int]:
    """The bytes of a program's arguments by kind, and the bytes of other arrays that the run holds meanwhile.

    Published weights that are shared with the state count once.
    """
    arguments = list(zip(compiled.args_info[0], compiled.input_shardings[0], strict=True))
    owned = bytes_a_device((self._state.trainable, self._state.opt_state, self._frozen))
    if name == "rollout":
      weights = memory.bytes_placed(*arguments[0])
      shared = weights - bytes_a_device(self.tracing["publish"]().out_info)
      return {"weights": weights}, owned - shared
    if name == "publish":
      trees = dict(zip(("trained", "base"), arguments, strict=True))
    else:
      (state, at), (frozen, frozen_at) = arguments[:2]
      trees = {
        "trained": (state.trainable, at.trainable),
        "moments": (state.opt_state, at.opt_state),
        "base": (frozen.base, frozen_at.base),
        "reference": (frozen.reference, frozen_at.reference),
      }
    named = {kind: memory.bytes_placed(*tree) for kind, tree in trees.items()}
    return named, owned - sum(named.values())


def _compiled(lowered: Any) -> tuple[Any, dict[str, Any]]:
  """The compiled program; or None and the error, if the compiler rejects it."""
  try:
    return lowered.compile(), {}
  except jax.errors.JaxRuntimeError as error:
    refused = memory.refusal(str(error), lowered.as_text())
    return None, {"fits": False} | refused._asdict() | {"largest": [buffer._asdict() for buffer in refused.largest]}


def iteration(programs: dict[str, dict[str, Any]]) -> dict[str, Any]:
  """The shortest possible time of an iteration in seconds, and the share in which the chips multiply matrices.

  Args:
    programs: the result of `Analysis.program` for each program, and its `runs` in an iteration.
  """
  lines = [roofline.Roofline(**found["seconds"]).times(found["runs"]) for found in programs.values()]
  share = roofline.efficiency(lines)
  return {
    "seconds": sum(line.seconds for line in lines),
    "seconds_apart": sum(line.apart for line in lines),
    "compute_share": share.overlapped,
    "compute_share_apart": share.apart,
  }
