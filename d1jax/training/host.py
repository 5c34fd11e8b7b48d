"""What the host does between the two programs of an iteration: it grades, and puts the numbers together."""

import time
from collections.abc import Sequence

import jax
import numpy as np

from d1jax.diffusion.rollout import Rollout
from d1jax.errors import RunError
from d1jax.rl.grading import Graded, Grader, WorkersDiedError, graded_texts
from d1jax.rl.update import UpdateMetrics
from d1jax.training.experiment import Experiment, Texts

NO_SIGNAL = 1e-6
"""A group whose rewards differ by less teaches nothing."""


def grade_chunks(
  experiment: Experiment, grader: Grader, texts: Texts, record: np.ndarray, chunks: tuple[Rollout, ...]
) -> tuple[Rollout, Graded, float]:
  """Grades each chunk while the next one is computed.

  Returns:
    The whole rollout on the host, its grades, and the moment (`time.perf_counter`) at which the last chunk was there.

  Raises:
    RunError: the grader's workers died twice over a chunk.
  """
  protocol = experiment.config.task.protocol
  fetched, written, pending, arrived = [], [], [], 0.0
  for chunk, rows in zip(chunks, np.split(record, len(chunks)), strict=True):
    host = jax.device_get(chunk)
    arrived = time.perf_counter()
    prefills = [texts.prefills[i] for i in rows]
    said = graded_texts(experiment.tokenizer, prefills, host.completion, host.completion_mask, protocol)
    fetched.append(host)
    written += said
    pending.append(grader.submit(said, [texts.records[i] for i in rows], protocol))
  try:
    grades = [grade for wait in pending for grade in wait()]
  except WorkersDiedError as error:
    raise RunError(f"{error}. It is --config.grpo.grading_workers") from error
  rollout = jax.tree.map(lambda *x: np.concatenate(x), *fetched)
  return rollout, Graded(written, grades, np.asarray([grade.reward for grade in grades], np.float32)), arrived


def summarise(
  graded: Graded, rollout: Rollout, metrics: UpdateMetrics, num_generations: int, tasks: Sequence[str]
) -> dict[str, float]:
  """Host numbers of one iteration.

  Args:
    graded: the batch.
    rollout: the batch, on the host.
    metrics: of the update.
    num_generations: rows of a group.
    tasks: the task of each row, where several are mixed; none otherwise.

  Returns:
    `reward`, and `TASK/reward` for each of several tasks; `reward/COMPONENT`, a mean over the rows that have it; the
    tasks' metrics, pooled over the batch, but for those that no row counts for; the numbers of rollout and update.
  """
  groups = graded.rewards.reshape(-1, num_generations)
  mask = rollout.completion_mask
  values = {
    "reward": float(graded.rewards.mean()),
    "reward_std": float(groups.std(axis=1).mean()),
    "no_signal": float((np.ptp(groups, axis=1) < NO_SIGNAL).mean()),
    "entropy": float(-(rollout.reveal_logp * mask).sum() / mask.sum()),
    "completion_length": float(mask.sum(axis=1).mean()),
  }
  for task in dict.fromkeys(tasks):
    values[f"{task}/reward"] = float(graded.rewards[np.asarray(tasks) == task].mean())
  for name in dict.fromkeys(name for grade in graded.grades for name in grade.components):
    values[f"reward/{name}"] = float(np.mean([g.components[name] for g in graded.grades if name in g.components]))
  for name in dict.fromkeys(name for grade in graded.grades for name in grade.metrics):
    top, bottom = np.sum([g.metrics[name] for g in graded.grades if name in g.metrics], axis=0)
    if bottom:
      values[name] = float(top / bottom)
  importance = {"importance/effective_sample_size": metrics.effective_sample_size}
  for name, value in (metrics._replace(effective_sample_size=None)._asdict() | importance).items():
    if value is not None:
      values[name] = float(np.min(value) if name == "finite" else np.mean(value))
  return values
