"""diffu-GRPO: publish the weights, roll out, grade, update; only grading runs on the host, once per iteration.

`d1jax.training.ahead` has the loop whose rollouts do not wait for the last updates.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from d1jax.completer import PromptArrays
from d1jax.data.pipeline import PromptBatch
from d1jax.diffusion.continuous import Taken
from d1jax.diffusion.rollout import Rollout
from d1jax.parallel import multihost
from d1jax.rl.curriculum import Curriculum
from d1jax.run.metrics import read_records
from d1jax.run.workdir import Folder
from d1jax.state import Frozen, TrainState
from d1jax.tasks import Mixture
from d1jax.telemetry import cost, ledger
from d1jax.training import drift, dump
from d1jax.training.host import Grading, Visit, grade_chunks, rewarded, summarise
from d1jax.training.lengths import Lengths
from d1jax.training.programs import Programs

SHOWN = ("reward", "loss", "tokens_per_second")


def batches(
  programs: Programs, grading: Grading, seed: int, position: int, curriculum: Curriculum | None = None
) -> Iterator[PromptBatch]:
  """The prompts of each iteration from `position` on, a function of the seed, of the iteration and of the curriculum's
  rates when they are taken.
  """
  shape = programs.shape
  if curriculum:
    return map(curriculum.batch, itertools.count(position))
  return grading.prompts.batches(
    prompts=shape.groups, num_generations=shape.num_generations, seed=seed, position=position
  )


def iteration_record(
  programs: Programs,
  grading: Grading,
  batch: PromptBatch,
  visit: Visit,
  metrics: Mapping[str, np.ndarray],
  seconds: Mapping[str, float],
  *,
  cached: bool = True,
  taken: Taken | None = None,
) -> dict[str, float]:
  """The record of an iteration: its figures, its work and its seconds.

  Args:
    programs: the compiled programs.
    grading: the grading of the training prompts.
    batch: the prompts.
    visit: the grades.
    metrics: the figures of the update, on the host.
    seconds: the seconds of each part, see `ledger.entry`.
    cached: whether the rollout used the cache of its sampler.
    taken: what the turns of a partial rollout took, on the host.
  """
  shape, weights, prompts = programs.shape, programs.model.weights, grading.prompts
  counted = programs.compiled[batch.prompt.shape[1]].counted
  work = cost.iteration(
    {"rollout": counted["rollout" if cached else "exact"], "update": counted["update"]},
    visit.rollout,
    sampler=programs.sampler if cached else programs.sampler.with_cache("none"),
    denoiser=programs.model.denoiser,
    method=programs.method,
    oversample=shape.oversample,
    chunks=shape.chunks,
    rows=shape.rows // shape.chunks,
    ways=programs.model.rollout_ways,
    slots=shape.slots,
    taken=taken,
    width=max(shape.buckets) if taken else None,
  )
  devices = weights.mesh.size + (weights.sampling_mesh.size if weights.apart else 0)
  spent = ledger.entry(devices, weights.mesh.devices.flat[0].device_kind, seconds, work)
  tasks = [prompts.records[i]["task"] for i in batch.record] if isinstance(prompts.task, Mixture) else []
  values = summarise(visit.rewards, visit.sums, metrics, shape.num_generations, tasks)
  sizes = {
    "tokens": float(batch.record.size * programs.sampler.completion_length),
    "reshard_bytes": float(programs.publish_bytes),
    "cost/grading_overlapped": visit.overlapped,
  }
  return values | sizes | spent


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
  lengths: Lengths | None = None,
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
    lengths: has the programs of each iteration; None: all have `programs`.
  """
  prompts, key = batches(programs, grading, seed, position, curriculum), programs.key()
  shape, watch = programs.shape, programs.watch
  cached = watch is None or multihost.from_main(lambda: watch.trusts(read_records(workdir / "metrics.jsonl"), position))

  def look(
    programs: Programs,
    grading: Grading,
    params: Any,
    placed: list[PromptArrays],
    number: jax.Array,
    rows: np.ndarray,
    chunk: Rollout,
    rewards: np.ndarray,
  ) -> dict[str, float]:
    """Completes the prompts of the first chunk also without the cache, and compares."""
    exact = programs.rollout(params, placed[:1], key, number, cached=False)
    figures = programs.drift(params, chunk, *exact)
    count = len(chunk.sample_id)
    visit = grade_chunks(grading, rows[:count], exact)
    return drift.named(figures, float(rewards[:count].mean() - visit.rewards.mean()))

  def advance(state: TrainState, iteration: int) -> tuple[TrainState, dict[str, float]]:
    nonlocal cached
    used = cached
    batch = next(prompts)
    now = lengths.programs if lengths else programs
    own = grading._replace(length=lengths.tokens) if lengths else grading
    placed, number = now.place(batch, iteration)
    rolling = time.perf_counter()
    params = now.publish(state, frozen)
    chunks = now.rollout(params, placed, key, number, cached=cached)
    visit = grade_chunks(own, batch.record, chunks)
    rewards, shaped = rewarded(grading.shaping, visit, shape.num_generations, iteration)
    shaped |= curriculum.learn(batch.record, visit.solved) if curriculum else {}
    shaped |= lengths.learn(visit) if lengths else {}
    graded = time.perf_counter()
    seen: dict[str, float] = {} if cached else {"cache_off": 1.0}
    if watch and cached and watch.due(iteration):
      seen = look(now, own, params, placed, number, batch.record, chunks[0], visit.rewards)
      if watch.beyond(seen):
        watch.warn(iteration + 1, seen, now.sampler.cache)
        cached = False
    del params  # the update needs the memory
    chunks = now.brought(chunks)
    updating = time.perf_counter()
    with jax.profiler.TraceAnnotation("update"):
      state, metrics, advantages = now.update(state, frozen, chunks, rewards)
      host_metrics = jax.device_get(metrics)
    updated = time.perf_counter()
    gap = now.merge_gap(state, frozen, chunks[0]) if iteration % gap_every == 0 else {}
    seconds = {"rollout": visit.arrived - rolling, "grading": graded - visit.arrived, "update": updated - updating}
    if seen or gap:
      seconds["validation"] = updating - graded + time.perf_counter() - updated
    visit = visit._replace(rewards=rewards)
    values = iteration_record(now, grading, batch, visit, host_metrics, seconds, cached=used)
    if dump_every and iteration % dump_every == 0:
      dump.write(workdir / "rollouts", iteration, chunks, visit, advantages)
    return state, seen | gap | shaped | values

  return advance
