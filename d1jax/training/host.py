"""The host's work between the programs of an iteration: it grades, and computes the metrics.

Each process grades its own rows. Processes exchange only the rewards and a few sums.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from d1jax.rl.shaping import LENGTH, UNSHAPED, Shaping, length_rewards
from d1jax.tasks.base import TaskError

QUANTILES = (0.01, 0.5, 0.99)
"""The quantiles that a run logs of the ratios to the old policy."""

ROUNDING = 1e-5
"""The rounding error that a sum of shares may have."""

SOLVED = "solved"
"""The metric of every task that says whether a completion is right."""

Sums = Mapping[str, tuple[float, float]]
"""The numerator and denominator of each figure of a batch; both are summed over rows and processes."""


class Visit(NamedTuple):
  """The result of grading on the host.

  Attributes:
    rewards: the rewards of the whole batch, the same on every process.
    solved: the task's verdict on each completion of the batch, from 0 to 1.
    lengths: the tokens of each completion of the batch, with its stop id.
    sums: the figures of the whole batch.
    arrived: the time (`time.perf_counter`) at which the last chunk arrived.
    rows: the indices in the batch of the rows that this process graded.
    rollout: these rows, on the host.
    graded: their texts and grades.
    overlapped: the seconds that this process spent on decoding and grading before the last chunk arrived.
  """

  rewards: Float[np.ndarray, "B"]
  solved: Float[np.ndarray, "B"]
  lengths: Int[np.ndarray, "B"]
  sums: Sums
  arrived: float
  rows: Int[np.ndarray, "R"]
  rollout: Rollout
  graded: Graded
  overlapped: float = 0.0


class Grading(NamedTuple):
  """The grading of a run's completions.

  Attributes:
    prompts: the training split.
    grader: the grader of its task; `with grading.grader:` stops its workers at the end.
    protocol: the protocol of the grades.
    shaping: converts grades into rewards.
    length: the tokens of a completion; None: all that are recorded.
  """

  prompts: Prompts
  grader: Grader
  protocol: str
  shaping: Shaping = UNSHAPED
  length: int | None = None


def grade_chunks(
  grading: Grading, record: np.ndarray, chunks: tuple[Rollout, ...], settle: Callable[[], None] = lambda: None
) -> Visit:
  """Grades each chunk while the next one is computed.

  `record` has the index of each row's record. `settle` is called before rewards are exchanged with other processes.

  Raises:
    RunError: on any process, the grader's workers died twice on a chunk, or the task breaks its contract.
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
      read = (host.completion[:, : grading.length], host.completion_mask[:, : grading.length])
      said = graded_texts(prompts.tokenizer, prefills, *read, protocol)
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
  length = grading.length or rollout.completion.shape[1]
  grades = [grading.shaping(grade, n, length) for grade, n in zip(grades, counted, strict=bool(grades))]
  own = Graded(written, grades, np.asarray([grade.reward for grade in grades], np.float32))
  settle()
  return _shared(failure, np.concatenate(places), rollout, own, arrived)._replace(overlapped=overlapped)


def _shared(failure: str, rows: np.ndarray, rollout: Rollout, own: Graded, arrived: float) -> Visit:
  """Exchanges rewards and sums with the other processes."""
  own_rows = {
    "rewards": own.rewards.tolist(),
    "solved": [top / bottom for top, bottom in (grade.metrics.get(SOLVED, (0, 1)) for grade in own.grades)],
    "lengths": rollout.completion_mask.sum(axis=1).tolist(),
  }
  found = multihost.gather({"failure": failure, "rows": rows.tolist(), "sums": sums(rollout, own)} | own_rows)
  for part in found:
    if part["failure"]:
      raise RunError(part["failure"])
  order = np.argsort(np.concatenate([part["rows"] for part in found]))
  rewards, solved, lengths = (np.concatenate([part[name] for part in found])[order] for name in own_rows)
  return Visit(
    rewards.astype(np.float32),
    solved.astype(np.float32),
    lengths.astype(np.int32),
    added(part["sums"] for part in found),
    arrived,
    rows,
    rollout,
    own,
  )


def rewarded(
  shaping: Shaping, visit: Visit, num_generations: int, iteration: int
) -> tuple[Float[np.ndarray, "B"], dict[str, float]]:
  """The rewards of a batch with the component that compares the lengths of a group, and the figure of this component.

  `iteration` is counted from 0.
  """
  weight = shaping.length_weight(iteration)
  if not weight:
    return visit.rewards, {}
  short = weight * length_rewards(visit.lengths, visit.solved == 1, num_generations)
  return visit.rewards + short, {f"reward/{LENGTH}": float(short.mean())}


def sums(rollout: Rollout, graded: Graded) -> Sums:
  """The figures of some rows: sampling figures, `reward/COMPONENT` over the rows that have it, the tasks' metrics."""
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
  """The metrics of one iteration, as numbers on the host.

  Args:
    rewards: the rewards of the batch.
    found: the sums of the batch.
    metrics: the update's metrics for each inner step; they are averaged, except `finite` (the minimum) and
      `sampling_gap` (the first).
    num_generations: the rows of a group.
    tasks: the task of each row if several are mixed; empty otherwise.

  Returns:
    `reward`, and `TASK/reward` for each of several tasks; `reward/COMPONENT`, a mean over the rows that have it; the
    tasks' metrics, pooled over the batch (without those that count no row); the metrics of rollout and update.
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
  """Quantiles of ratios, such as `NAME/p50`, from the distribution function of their logarithms at `RATIO_EDGES`.

  The logarithm of a quantile has a relative error of at most a third. Ratios within 1e-5 of 1 are reported as 1, and
  ratios beyond exp(+-10) as exp(+-10).
  """
  # A quantile lies between two neighbouring edges, and their geometric mean stands for it. If 30% of the log-ratios are
  # at most 0.1 and 80% are at most 0.178, the median lies between: the result is exp(sqrt(0.1 * 0.178)) = 1.14. Edges
  # are a factor 1.78 apart, so the mean is within a factor 1.33 of any value between. Around 0 the edges have opposite
  # signs, and the ratio is 1.
  least = np.concatenate([RATIO_EDGES[:1], RATIO_EDGES])
  most = np.concatenate([RATIO_EDGES, RATIO_EDGES[-1:]])
  middle = np.where(least * most > 0, np.sign(most) * np.sqrt(np.abs(least * most)), 0.0)
  places = [int(np.sum(below < share - ROUNDING)) for share in QUANTILES]
  return {f"{name}/p{100 * share:g}": float(np.exp(middle[i])) for share, i in zip(QUANTILES, places, strict=True)}
