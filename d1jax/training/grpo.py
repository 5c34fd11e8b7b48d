"""diffu-GRPO: publish the weights, roll out, grade, update; one visit to the host an iteration, to grade."""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from d1jax.data import pipeline
from d1jax.diffusion.rollout import Rollout
from d1jax.parallel import multihost
from d1jax.run.experiment import Experiment, Texts
from d1jax.run.metrics import read_records
from d1jax.run.workdir import Folder
from d1jax.state import Frozen, TrainState
from d1jax.tasks import Mixture
from d1jax.telemetry import cost, ledger
from d1jax.training import drift, dump
from d1jax.training.host import grade_chunks, summarise
from d1jax.training.programs import Programs, Prompts

SHOWN = ("reward", "loss", "tokens_per_second")


def advancer(
  experiment: Experiment,
  texts: Texts,
  frozen: Frozen,
  programs: Programs,
  position: int,
  workdir: Folder,
) -> Callable[[TrainState, int], tuple[TrainState, dict[str, float]]]:
  """One iteration of the GRPO stage.

  Args:
    experiment: network, task and mesh.
    texts: the training prompts.
    frozen: the base, and the reference policy.
    programs: compiled.
    position: the iteration to start at.
    workdir: of the run; its records say whether the cache is still trusted, and rollouts are dumped there, every
      `grpo.dump_every` iterations.
  """
  config, task, mesh = experiment.config.grpo, experiment.task, experiment.weights.mesh
  parts = [pipeline.Part(*part) for part in task.parts(texts.records)] if isinstance(task, Mixture) else []
  names = [record["task"] for record in texts.records] if parts else []
  batches = pipeline.prompt_batches(
    texts.prompts,
    seed=experiment.config.seed,
    prompts_per_batch=config.oversample * config.prompts_per_iteration,
    num_generations=config.num_generations,
    buckets=experiment.buckets("train")[1],
    pad_id=experiment.tokenizer.pad_id,
    position=position,
    parts=parts,
  )

  watch = programs.watch
  cached = watch is None or multihost.from_main(lambda: watch.trusts(read_records(workdir / "metrics.jsonl"), position))

  def look(
    params: Any,
    prompts: list[Prompts],
    key: jax.Array,
    number: jax.Array,
    record: np.ndarray,
    chunk: Rollout,
    rewards: np.ndarray,
  ) -> dict[str, float]:
    """Completes the prompts of the first chunk without the cache too, and compares."""
    exact = programs.rollout(params, prompts[:1], key, number, cached=False)
    figures = programs.drift(params, chunk, *exact)
    rows = len(chunk.sample_id)
    visit = grade_chunks(experiment, programs.grader, texts, record[:rows], exact, programs.shaping)
    return drift.named(figures, float(rewards[:rows].mean() - visit.rewards.mean()))

  def advance(state: TrainState, iteration: int) -> tuple[TrainState, dict[str, float]]:
    nonlocal cached
    used = cached
    batch = next(batches)
    prompts, number = programs.place(batch, iteration)
    rolling = time.perf_counter()
    params = programs.publish(state, frozen)
    chunks = programs.rollout(params, prompts, state.key, number, cached=cached)
    visit = grade_chunks(experiment, programs.grader, texts, batch.record, chunks, programs.shaping)
    graded = time.perf_counter()
    seen: dict[str, float] = {} if cached else {"cache_off": 1.0}
    if watch and cached and watch.due(iteration):
      seen = look(params, prompts, state.key, number, batch.record, chunks[0], visit.rewards)
      if watch.beyond(seen):
        watch.warn(iteration + 1, seen, experiment.sampler.cache)
        cached = False
    del params  # the update needs the memory
    updating = time.perf_counter()
    with jax.profiler.TraceAnnotation("update"):
      state, metrics, advantages = programs.update(state, frozen, chunks, visit.rewards)
      host_metrics = jax.device_get(metrics)
    updated = time.perf_counter()
    gap = programs.merge_gap(state, frozen, chunks[0]) if iteration % config.validate_every == 0 else {}
    seconds = {"rollout": visit.arrived - rolling, "grading": graded - visit.arrived, "update": updated - updating}
    if seen or gap:
      seconds["validation"] = updating - graded + time.perf_counter() - updated
    counted = programs.compiled[batch.prompt.shape[1]].counted
    work = cost.iteration(experiment, programs.method, counted, visit.rollout, cached=used)
    spent = ledger.entry(mesh.size, mesh.devices.flat[0].device_kind, seconds, work)
    tasks = [names[i] for i in batch.record] if names else []
    values = seen | gap | summarise(visit.rewards, visit.sums, host_metrics, config.num_generations, tasks)
    if config.dump_every and iteration % config.dump_every == 0:
      dump.write(workdir / "rollouts", iteration, chunks, visit, advantages)
    sizes = {
      "tokens": float(batch.record.size * chunks[0].completion.shape[1]),
      "reshard_bytes": float(programs.publish_bytes),
      "cost/grading_overlapped": visit.overlapped,
    }
    return state, values | sizes | spent

  return advance
