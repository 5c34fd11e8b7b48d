"""diffu-GRPO: publish the weights, roll out, grade, update; only grading runs on the host, once per iteration."""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from d1jax.completer import PromptArrays
from d1jax.diffusion.rollout import Rollout
from d1jax.parallel import multihost
from d1jax.rl.curriculum import Curriculum
from d1jax.run.metrics import read_records
from d1jax.run.workdir import Folder
from d1jax.state import Frozen, TrainState
from d1jax.tasks import Mixture
from d1jax.telemetry import cost, ledger
from d1jax.training import drift, dump
from d1jax.training.host import Grading, grade_chunks, rewarded, summarise
from d1jax.training.programs import Programs

SHOWN = ("reward", "loss", "tokens_per_second")


def advancer(
  programs: Programs,
  grading: Grading,
  frozen: Frozen,
  position: int,
  workdir: Folder,
  *,
  seed: int,
  gap_every: int,
  dump_every: int = 0,
  curriculum: Curriculum | None = None,
) -> Callable[[TrainState, int], tuple[TrainState, dict[str, float]]]:
  """Returns the function that runs one iteration of the GRPO stage.

  Args:
    programs: the compiled programs.
    grading: the grading of the training prompts.
    frozen: the base and the reference policy.
    position: the iteration to start at.
    workdir: the work directory; its records tell whether the cache is still used, and rollouts are dumped there.
    seed: the seed of the order of prompts.
    gap_every: iterations between measurements of the difference between merged and unmerged adapters.
    dump_every: iterations between dumps; 0: never.
    curriculum: draws the prompts; None: each prompt comes once an epoch.
  """
  prompts, shape, watch, mesh = grading.prompts, programs.shape, programs.watch, programs.model.weights.mesh
  names = [record["task"] for record in prompts.records] if isinstance(prompts.task, Mixture) else []
  batches = prompts.batches(prompts=shape.groups, num_generations=shape.num_generations, seed=seed, position=position)
  cached = watch is None or multihost.from_main(lambda: watch.trusts(read_records(workdir / "metrics.jsonl"), position))

  def look(
    params: Any,
    placed: list[PromptArrays],
    key: jax.Array,
    number: jax.Array,
    record: np.ndarray,
    chunk: Rollout,
    rewards: np.ndarray,
  ) -> dict[str, float]:
    """Completes the prompts of the first chunk also without the cache, and compares."""
    exact = programs.rollout(params, placed[:1], key, number, cached=False)
    figures = programs.drift(params, chunk, *exact)
    rows = len(chunk.sample_id)
    visit = grade_chunks(grading, record[:rows], exact)
    return drift.named(figures, float(rewards[:rows].mean() - visit.rewards.mean()))

  def advance(state: TrainState, iteration: int) -> tuple[TrainState, dict[str, float]]:
    nonlocal cached
    used = cached
    batch = curriculum.batch(iteration) if curriculum else next(batches)
    placed, number = programs.place(batch, iteration)
    rolling = time.perf_counter()
    params = programs.publish(state, frozen)
    chunks = programs.rollout(params, placed, state.key, number, cached=cached)
    visit = grade_chunks(grading, batch.record, chunks)
    rewards, shaped = rewarded(grading.shaping, visit, shape.num_generations, iteration)
    shaped |= curriculum.learn(batch.record, visit.solved) if curriculum else {}
    graded = time.perf_counter()
    seen: dict[str, float] = {} if cached else {"cache_off": 1.0}
    if watch and cached and watch.due(iteration):
      seen = look(params, placed, state.key, number, batch.record, chunks[0], visit.rewards)
      if watch.beyond(seen):
        watch.warn(iteration + 1, seen, programs.sampler.cache)
        cached = False
    del params  # the update needs the memory
    updating = time.perf_counter()
    with jax.profiler.TraceAnnotation("update"):
      state, metrics, advantages = programs.update(state, frozen, chunks, rewards)
      host_metrics = jax.device_get(metrics)
    updated = time.perf_counter()
    gap = programs.merge_gap(state, frozen, chunks[0]) if iteration % gap_every == 0 else {}
    seconds = {"rollout": visit.arrived - rolling, "grading": graded - visit.arrived, "update": updated - updating}
    if seen or gap:
      seconds["validation"] = updating - graded + time.perf_counter() - updated
    counted = programs.compiled[batch.prompt.shape[1]].counted
    work = cost.iteration(
      {"rollout": counted["rollout" if used else "exact"], "update": counted["update"]},
      visit.rollout,
      sampler=programs.sampler if used else programs.sampler.with_cache("none"),
      denoiser=programs.model.denoiser,
      method=programs.method,
      oversample=shape.oversample,
      chunks=shape.chunks,
      rows=shape.rows // shape.chunks,
      ways=programs.model.rollout_ways,
      slots=shape.slots,
    )
    spent = ledger.entry(mesh.size, mesh.devices.flat[0].device_kind, seconds, work)
    tasks = [names[i] for i in batch.record] if names else []
    values = seen | gap | shaped | summarise(rewards, visit.sums, host_metrics, shape.num_generations, tasks)
    if dump_every and iteration % dump_every == 0:
      dump.write(workdir / "rollouts", iteration, chunks, visit._replace(rewards=rewards), advantages)
    sizes = {
      "tokens": float(batch.record.size * programs.sampler.completion_length),
      "reshard_bytes": float(programs.publish_bytes),
      "cost/grading_overlapped": visit.overlapped,
    }
    return state, values | sizes | spent

  return advance
