"""The cost of a run: the record of an iteration, the sums over a run, and their table.

A record holds the seconds of each part of an iteration, measured on the main process, and the number of devices;
device-seconds are their product. The sums are taken over `metrics.jsonl`, so that they include earlier attempts.
"""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from d1jax import columns
from d1jax.parallel import chips
from d1jax.telemetry.cost import Work

PARTS = ("rollout", "grading", "score", "update", "validation", "saving", "compilation", "idle")
"""The parts of a stage's time; each moment belongs to exactly one.

- `rollout`: from its start until the last chunk has arrived; meanwhile, earlier chunks are graded.
- `grading`: from then until everything is graded; the devices wait.
- `score`: old and reference log-probabilities. They are part of the compiled update and cannot be timed alone, so its
  seconds are divided in proportion to FLOPs, including repeated ones: with a quarter of the FLOPs, a quarter is theirs.
- `update`: the rest of the update, which is forward and backward passes and the optimiser.
- `validation`: validations, and measurements of merged weights and of a cache's drift.
- `saving`: copying a checkpoint or waiting for it, and drawing the page.
- `compilation`: compilation, and everything else before the first iteration of an attempt.
- `idle`: everything else, such as data and logging.
"""

SECONDS, FLOPS, TOKENS, PASSES = "cost/seconds/", "cost/flops/", "cost/tokens/", "cost/passes/"
SAVED = "cost/passes_saved/"


def entry(devices: int, kind: str, seconds: Mapping[str, float], work: Mapping[str, Work]) -> dict[str, float]:
  """The part of an iteration's record that the iteration itself provides.

  Args:
    devices: the number of devices of all processes.
    kind: JAX's name of the device kind.
    seconds: the seconds of each part; those of `update` are divided between `update` and `score` if `work` has a score.
    work: the work of each part.
  """
  seconds, computed = dict(seconds), {part: each.flops + each.repeated for part, each in work.items()}
  if "score" in work:
    seconds["score"] = seconds["update"] * computed["score"] / (computed["score"] + computed["update"])
    seconds["update"] -= seconds["score"]
  found = {SECONDS + part: value for part, value in seconds.items()}
  found |= {FLOPS + part: float(each.flops) for part, each in work.items()}
  found |= {TOKENS + part: float(each.tokens) for part, each in work.items()}
  found |= {PASSES + part: float(each.passes) for part, each in work.items()}
  found |= {SAVED + part: float(each.saved) for part, each in work.items() if each.saved is not None}
  found["cost/devices"] = devices
  if chip := chips.of(kind):
    found["cost/peak_flops"] = devices * chip.flops
  return found


class Clock:
  """The time of a stage, from record to record."""

  def __init__(self, began: float):
    """`began` is the start of the stage's preparation (`time.perf_counter`); its loop begins now."""
    self._marked, self._outside = began, defaultdict[str, float](float)
    self._outside["compilation"] = time.perf_counter() - began

  @contextlib.contextmanager
  def outside(self, part: str) -> Iterator[None]:
    """A context for work outside of iterations; it also names this work in a profile."""
    began = time.perf_counter()
    with jax.profiler.TraceAnnotation(part):
      yield
    self._outside[part] += time.perf_counter() - began

  def close(self, entry: Mapping[str, float]) -> dict[str, float]:
    """Ends a record now, and completes the values of `entry`.

    Returns:
      `cost/...`: the seconds of each part, the FLOPs and tokens, `cost/mfu` where the chip is known (the model's FLOPs
      over what the devices could have computed in `seconds`); `seconds`: of all parts but `validation`, `saving` and
      `compilation`; `compiled_share`: of `rollout`, `score` and `update` in them.
    """
    now = time.perf_counter()
    whole, self._marked = now - self._marked, now
    outside, self._outside = self._outside, defaultdict(float)
    spent = {part: entry.get(SECONDS + part, 0.0) + outside[part] for part in PARTS}
    spent["idle"] = whole - sum(spent.values())
    seconds = whole - spent["validation"] - spent["saving"] - spent["compilation"]
    found = {**entry, **{SECONDS + part: value for part, value in spent.items() if value}, "seconds": seconds}
    found["compiled_share"] = (spent["rollout"] + spent["score"] + spent["update"]) / seconds
    if "cost/peak_flops" in entry:
      total = sum(value for name, value in entry.items() if name.startswith(FLOPS))
      found["cost/mfu"] = total / (seconds * entry["cost/peak_flops"])
    return found


def total(records: Sequence[Mapping[str, Any]], seconds: Mapping[str, float]) -> dict[str, Any]:
  """The cost of the stages of a run.

  Args:
    records: the records of `metrics.jsonl`.
    seconds: the seconds of each stage, including earlier attempts; the time after its last record counts as saving.

  Returns:
    `{stage: {part: spent}}` and `{"total": spent}` with `device_seconds`, their `share` of the whole, `flops` of the
    model, `tokens`, and `mfu`: the FLOPs over what the devices could have computed in that time; None where there are
    no FLOPs, or where the peak of the devices is not known.
  """
  sums = {stage: _sums([r for r in records if r["stage"] == stage], taken) for stage, taken in seconds.items()}
  everything = np.sum([found for parts in sums.values() for found in parts.values()], axis=0)
  stages = {
    stage: {part: _spent(found, everything[0]) for part, found in parts.items() if found[0]}
    for stage, parts in sums.items()
  }
  return stages | {"total": _spent(everything, everything[0])}


def _sums(records: Sequence[Mapping[str, Any]], seconds: float) -> dict[str, np.ndarray]:
  """For each part of a stage: device-seconds, FLOPs, tokens, and the FLOPs that the devices could have computed."""
  sums = {part: np.zeros(4) for part in PARTS}
  for record in records:
    for part in PARTS:
      spent = record.get(SECONDS + part, 0.0)
      if part == "saving" and record is records[-1]:
        spent += max(seconds - record.get("elapsed", seconds), 0.0)
      work = [record.get(kind + part, 0.0) for kind in (FLOPS, TOKENS)]
      sums[part] += [record.get("cost/devices", 0) * spent, *work, record.get("cost/peak_flops", np.nan) * spent]
  return sums


def _spent(sums: np.ndarray, whole: float) -> dict[str, float | None]:
  device_seconds, flops, tokens, could = sums.tolist()
  mfu = flops / could if flops and not np.isnan(could) else None
  found = {
    "device_seconds": device_seconds,
    "share": device_seconds / whole if whole else 0.0,
    "flops": flops,
    "tokens": tokens,
  }
  return found | {"mfu": mfu}


def table(spent: Mapping[str, Any]) -> str:
  """The sums of `total` as text, one line per part of a stage."""
  rows = [
    (f"{stage} {part}", each) for stage, parts in spent.items() if stage != "total" for part, each in parts.items()
  ]
  cells = []
  for name, each in [*rows, ("total", spent["total"])]:
    tokens, flops = (f"{each['tokens']:,.0f}", f"{each['flops']:.2e}") if each["flops"] else ("", "")
    used = "" if each["mfu"] is None else f"{each['mfu']:.1%}"
    cells.append((name, f"{each['device_seconds']:,.1f}", f"{each['share']:.1%}", tokens, flops, used))
  return columns.table(("", "device-seconds", "share", "tokens", "FLOPs", "MFU"), cells)
