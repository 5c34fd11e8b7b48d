"""What the host does between the programs of an iteration: it grades, and puts the numbers together.

Each process grades the rows that it holds. Between processes go the rewards and a few sums.
"""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from d1jax.diffusion.rollout import Rollout
from d1jax.errors import RunError
from d1jax.parallel import multihost
from d1jax.rl.grading import Graded, Grader, WorkersDiedError, graded_texts
from d1jax.rl.losses import RATIO_EDGES
from d1jax.rl.prompts import Prompts
from d1jax.rl.selection import NO_SIGNAL
from d1jax.rl.shaping import UNSHAPED, Shaping
from d1jax.tasks.base import TaskError

QUANTILES = (0.01, 0.5, 0.99)
"""Of the ratios to the old policy, that a run logs."""

ROUNDING = 1e-5
"""By how much a sum of shares may miss."""

Sums = Mapping[str, tuple[float, float]]
"""Numerator and denominator of each figure of a batch; both add up over rows and processes."""


class Visit(NamedTuple):
  """What came of a visit to the host.

  Attributes:
    rewards: of the whole batch, the same on every process.
    sums: over the whole batch.
    arrived: the moment (`time.perf_counter`) at which the last chunk was here.
    rows: the places in the batch of the rows that this process graded.
    rollout: these rows, on the host.
    graded: what they say and earn.
    overlapped: seconds that this process spent on decoding and grading before the last chunk was here.
  """

  rewards: Float[np.ndarray, "B"]
  sums: Sums
  arrived: float
  rows: Int[np.ndarray, "R"]
  rollout: Rollout
  graded: Graded
  overlapped: float = 0.0


class Grading(NamedTuple):
  """How the completions of a run are graded.

  Attributes:
    prompts: the training split.
    grader: of its task, whose workers, if any, end with `with grading.grader:`.
    protocol: of the grades.
    shaping: makes rewards of grades.
  """

  prompts: Prompts
  grader: Grader
  protocol: str
  shaping: Shaping = UNSHAPED


def grade_chunks(grading: Grading, record: np.ndarray, chunks: tuple[Rollout, ...]) -> Visit:
  """Grades each chunk while the next one is computed.

  Args:
    grading: how.
    record: the record of each row of the batch.
    chunks: the batch, on devices.

  Raises:
    RunError: the grader's workers died twice over a chunk, or the task does not keep its contract, on any process.
  """
  prompts, protocol = grading.prompts, grading.protocol
  fetched: list[Rollout] = []
  places, written, pending, arrived, overlapped = [], [], [], 0.0, 0.0
  for first, chunk in zip(range(0, len(record), len(record) // len(chunks)), chunks, strict=True):
    overlapped += time.perf_counter() - arrived if fetched else 0.0
    with jax.profiler.TraceAnnotation("rollout"):
      rows, host = multihost.local_rows(chunk)
    arrived = time.perf_counter()
    rows = first + rows
    with jax.profiler.TraceAnnotation("grading"):
      prefills = [prompts.prefills[i] for i in record[rows]]
      said = graded_texts(prompts.tokenizer, prefills, host.completion, host.completion_mask, protocol)
      pending.append(grading.grader.submit(said, [prompts.records[i] for i in record[rows]], protocol))
    places.append(rows)
    fetched.append(host)
    written += said
  failure, grades = "", []
  try:
    with jax.profiler.TraceAnnotation("grading"):
      grades = [grade for wait in pending for grade in wait()]
  except TaskError as error:
    failure = str(error)
  except WorkersDiedError as error:
    failure = f"{error}. It is --config.grpo.grading_workers"
  rollout = jax.tree.map(lambda *x: np.concatenate(x), *fetched)
  counted = rollout.completion_mask.sum(axis=1).tolist()
  grades = [
    grading.shaping(grade, n, rollout.completion.shape[1]) for grade, n in zip(grades, counted, strict=bool(grades))
  ]
  own = Graded(written, grades, np.asarray([grade.reward for grade in grades], np.float32))
  return _shared(failure, np.concatenate(places), rollout, own, arrived)._replace(overlapped=overlapped)


def _shared(failure: str, rows: np.ndarray, rollout: Rollout, own: Graded, arrived: float) -> Visit:
  """Exchanges rewards and sums with the other processes."""
  found = multihost.gather(
    {"failure": failure, "rows": rows.tolist(), "rewards": own.rewards.tolist(), "sums": sums(rollout, own)}
  )
  for part in found:
    if part["failure"]:
      raise RunError(part["failure"])
  rewards = np.zeros(sum(len(part["rows"]) for part in found), np.float32)
  for part in found:
    rewards[part["rows"]] = part["rewards"]
  return Visit(rewards, added(part["sums"] for part in found), arrived, rows, rollout, own)


def sums(rollout: Rollout, graded: Graded) -> Sums:
  """The figures of some rows: of what was drawn, `reward/COMPONENT` over the rows that have it, the tasks' metrics."""
  mask, parts = rollout.completion_mask, []
  for grade in graded.grades:
    parts.append({f"reward/{name}": (value, 1) for name, value in grade.components.items()} | dict(grade.metrics))
  own = {
    "entropy": (float(-(rollout.reveal_logp.astype(np.float64) * mask).sum()), int(mask.sum())),
    "completion_length": (int(mask.sum()), len(mask)),
  }
  return {**own, **added(parts)}


def added(parts: Iterable[Sums]) -> Sums:
  """The sums of several parts of a batch."""
  found: dict[str, list[tuple[float, float]]] = {}
  for part in parts:
    for name, pair in part.items():
      found.setdefault(name, []).append(pair)
  return {
    name: (math.fsum(top for top, _ in pairs), sum(bottom for _, bottom in pairs)) for name, pairs in found.items()
  }


def summarise(
  rewards: Float[np.ndarray, "B"],
  found: Sums,
  metrics: Mapping[str, np.ndarray],
  num_generations: int,
  tasks: Sequence[str],
) -> dict[str, float]:
  """Host numbers of one iteration.

  Args:
    rewards: of the batch.
    found: its sums.
    metrics: of the update: means over its inner steps, `finite` of all and `sampling_gap` before the first.
    num_generations: rows of a group.
    tasks: the task of each row, where several are mixed; none otherwise.

  Returns:
    `reward`, and `TASK/reward` for each of several tasks; `reward/COMPONENT`, a mean over the rows that have it; the
    tasks' metrics, pooled over the batch, but for those that no row counts for; the numbers of rollout and update.
  """
  groups = rewards.reshape(-1, num_generations)
  values = {
    "reward": float(rewards.mean()),
    "reward_std": float(groups.std(axis=1).mean()),
    "no_signal": float((np.ptp(groups, axis=1) < NO_SIGNAL).mean()),
  }
  for task in dict.fromkeys(tasks):
    values[f"{task}/reward"] = float(rewards[np.asarray(tasks) == task].mean())
  values |= {name: top / bottom for name, (top, bottom) in found.items() if bottom}
  for name, figure in metrics.items():
    if figure.ndim > 1:
      values |= ratio_quantiles(name, np.mean(figure, axis=0))
    else:
      values[name] = float(np.mean(figure))
  return values | {"finite": float(np.min(metrics["finite"])), "sampling_gap": float(metrics["sampling_gap"][0])}


def ratio_quantiles(name: str, below: Float[np.ndarray, "edges"]) -> dict[str, float]:
  """Quantiles of a figure of ratios, `NAME/p50`, from their distribution function at `RATIO_EDGES`.

  Each is the middle of the step that it lies in, so that its logarithm is right to a third; ratios within 1e-5 of 1 are
  1, and those beyond exp(+-10) are that.
  """
  least = np.concatenate([RATIO_EDGES[:1], RATIO_EDGES])
  most = np.concatenate([RATIO_EDGES, RATIO_EDGES[-1:]])
  middle = np.where(least * most > 0, np.sign(most) * np.sqrt(np.abs(least * most)), 0.0)
  places = [int(np.sum(below < share - ROUNDING)) for share in QUANTILES]
  return {f"{name}/p{100 * share:g}": float(np.exp(middle[i])) for share, i in zip(QUANTILES, places, strict=True)}
