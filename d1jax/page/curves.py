"""The curves of a page: which figures of the records it draws, and as which points."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from d1jax.intervals import wilson
from d1jax.page.run_files import RunFiles
from d1jax.telemetry.alarms import Limits

SMOOTHING = 20
"""The number of iterations over which training curves are averaged."""

POINTS = 120
"""The largest number of points of a line, and of pairs of a smallest and a largest value of its single values."""

LARGEST = 1e60
"""Values beyond it are left out, like those that are not finite: no axis could show them."""

_LIMITS = Limits()


class Figure(NamedTuple):
  """A figure of the records, as the page shows it.

  Attributes:
    name: its name in the records.
    title: its title.
    unit: `%` for shares, which the records hold as fractions; otherwise what the numbers count.
    limit: the value from which on it raises an alarm, as the records have it; None: it raises none.
    limit_name: what the page calls the limit.
  """

  name: str
  title: str
  unit: str = ""
  limit: float | None = None
  limit_name: str = ""

  @property
  def factor(self) -> float:
    """The factor from the records to the page."""
    return 100.0 if self.unit == "%" else 1.0


class Curve(NamedTuple):
  """A figure of one stage of one run, in the units of the page.

  Attributes:
    x: iterations.
    y: the values, or their moving mean.
    low: the lower ends of 95% intervals; empty: they are not known.
    high: their upper ends.
    raw_x: the iterations of single values under a moving mean; empty: `y` are the values.
    raw_y: these values: of many neighbours, the smallest and the largest one.
    last: the last value of `y`.
  """

  x: Float[np.ndarray, "n"]
  y: Float[np.ndarray, "n"]
  low: Float[np.ndarray, "m"]
  high: Float[np.ndarray, "m"]
  raw_x: Float[np.ndarray, "k"]
  raw_y: Float[np.ndarray, "k"]

  @property
  def last(self) -> float:
    """The last value."""
    return float(self.y[-1])


VALIDATION = Figure("validation", "Solved, validation questions", "%")
HELD_OUT_LOSS = Figure("validation", "Held-out loss", "nats a token")
TRAINING = Figure("solved", "Solved, training samples", "%")

GROUPS: Mapping[str, tuple[Figure, ...]] = {
  "What it learns": (
    TRAINING,
    Figure("reward", "Reward"),
    Figure("reward_std", "Spread of rewards in a group", "std"),
    Figure("well_formed", "Well-formed answers, training", "%"),
    Figure("cell_accuracy", "Right cells, training", "%"),
  ),
  "Signal and exploration": (
    Figure("no_signal", "Groups without signal", "%", _LIMITS.no_signal, "alarm above"),
    Figure("entropy", "Entropy of the samples", "nats a token", _LIMITS.entropy, "alarm below"),
    Figure("kl", "KL to the reference", "nats a token", _LIMITS.kl, "alarm above"),
    Figure("completion_length", "Completion length", "tokens"),
  ),
  "Optimisation": (
    Figure("loss", "Loss"),
    Figure("masked_ce", "Masked cross-entropy", "nats a token"),
    Figure("grad_norm", "Norm of the gradient"),
    Figure("clip_fraction", "Clipped ratios", "%"),
    Figure("learning_rate", "Learning rate"),
  ),
  "Speed": (
    Figure("seconds", "Time of an iteration", "seconds"),
    Figure("tokens_per_second", "Completion tokens", "a second"),
    Figure("cost/mfu", "Model FLOPs utilisation", "%"),
  ),
}
OTHERS = "Other figures"
LOGARITHMIC = {"loss", "masked_ce", "grad_norm"}
"""Figures that are drawn on a logarithmic axis where their values span more than `DECADES`."""
DECADES = 30.0
"""The ratio of the largest to the smallest value."""

_APART = ("stage", "iteration", "alarms", "validation", "elapsed", "compiled_share", "reshard_bytes")


def figures(stages: Iterable[Sequence[Mapping[str, Any]]]) -> dict[str, list[Figure]]:
  """The figures of some records besides the validation, by group; one that no group names is in the last.

  Components of the reward (`reward/NAME`) and the rewards of mixed tasks (`TASK/reward`) stand with the reward.
  """
  names = dict.fromkeys(name for records in stages for record in records for name in record)
  found: dict[str, list[Figure]] = {
    group: [figure for figure in own if figure.name in names] for group, own in GROUPS.items()
  }
  named = {figure.name for own in GROUPS.values() for figure in own}
  rest = [n for n in names if n not in named and n not in _APART and not n.startswith("cost/")]
  rewards = [n for n in rest if n.startswith("reward/") or n.endswith("/reward")]
  titles = {n: n.removeprefix("reward/").removesuffix("/reward").replace("_", " ") for n in rewards}
  found["What it learns"] += [Figure(n, f"Reward: {titles[n]}") for n in rewards]
  found[OTHERS] = [Figure(n, n.replace("_", " ")) for n in rest if n not in rewards]
  return {group: own for group, own in found.items() if own}


def values(records: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
  """The iterations that have a figure, and its values; those that no axis can show are left out."""
  found = np.asarray([(r["iteration"], r[name]) for r in records if name in r], float).reshape(-1, 2)
  found = found[np.all(np.abs(found) < LARGEST, axis=1)]
  return found[:, 0], found[:, 1]


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
  """The running mean over up to `window` values, shorter at the start."""
  total = np.cumsum(np.insert(values, 0, 0.0))
  end = np.arange(1, len(values) + 1)
  start = np.maximum(end - window, 0)
  return (total[end] - total[start]) / (end - start)


def curve(records: Sequence[Mapping[str, Any]], figure: Figure) -> Curve | None:
  """The moving mean of a figure over its single values; None without any."""
  x, y = values(records, figure.name)
  if not len(x):
    return None
  y, none = y * figure.factor, np.zeros(0)
  mean = smoothed(y, SMOOTHING)
  few, (raw_x, raw_y) = _evenly(len(x)), _extremes(x, y)
  return Curve(x[few], mean[few], none, none, raw_x, raw_y)


def validation(run: RunFiles, stage: str) -> tuple[Figure, Curve] | None:
  """The validations of a stage: shares of solved questions with intervals, or held-out losses; None without any."""
  x, y = values(run.records.get(stage, []), VALIDATION.name)
  if not len(x):
    return None
  none = np.zeros(0)
  if np.any(y < 0):  # after fine-tuning on a file, a score is minus the held-out loss
    few = _evenly(len(x))
    return HELD_OUT_LOSS, Curve(x[few], -y[few], none, none, none, none)
  y = np.clip(y, 0, 1)
  known = {(one.stage, one.iteration): one.solved for one in run.validated}
  size = run.questions
  ends = [
    known.get((stage, int(i)), (share, *wilson(share, size)) if size else None) for i, share in zip(x, y, strict=True)
  ]
  few = np.union1d(_evenly(len(x)), [int(np.argmax(y))])
  low, high = none, none
  if all(ends):
    low, high = (100 * np.asarray([end[place] for end in ends if end])[few] for place in (1, 2))
  return VALIDATION, Curve(x[few], 100 * y[few], low, high, none, none)


def best(run: RunFiles, stage: str) -> tuple[int, float] | None:
  """The iteration of the best validation of a stage, the last of equals, and its recorded score; None without any."""
  x, y = values(run.records.get(stage, []), VALIDATION.name)
  place = len(y) - 1 - int(np.argmax(y[::-1])) if len(y) else 0
  return (int(x[place]), float(y[place])) if len(y) else None


def alarmed(records: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, int]]:
  """The first and the last iteration of each time in which an alarm was on."""
  found: list[tuple[int, int]] = []
  before = False
  for record in records:
    raised = record.get("alarms")
    now = isinstance(raised, list) and name in raised
    if now:
      found = [*found[:-1], (found[-1][0], record["iteration"])] if before else [*found, (record["iteration"],) * 2]
    before = now
  return found


def _evenly(count: int) -> np.ndarray:
  """At most `POINTS` places in a list, evenly spread, the first and the last among them."""
  return np.unique(np.linspace(0, count - 1, min(count, POINTS)).round().astype(int))


def _extremes(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Points that look like all points where there are too many: the smallest and the largest value of neighbours."""
  size = -(-len(x) // POINTS)
  if size <= 2:
    return x, y
  parts = np.pad(y, (0, -len(y) % size), mode="edge").reshape(-1, size)
  first = np.arange(len(parts)) * size
  places = np.unique([first + np.argmin(parts, axis=1), first + np.argmax(parts, axis=1)])
  return x[places], y[places]
