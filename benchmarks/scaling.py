"""How the cost of a denoising step and of an update grows: `python -m benchmarks.scaling`.

From one small network, each of batch, completion length, vocabulary and depth is halved and doubled while the others
stay. It prints a JSON line about the machine, one for each axis and program (`exact` and `dual`: seconds of a step, the
refreshes among them; `update`: of a whole update with mu = 4), with the exponent of a power law fitted to it, and draws
`--picture`. An exponent below 1 is a part of the cost that the axis does not touch.
"""

import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure

from benchmarks import case as cases
from benchmarks import rollout, timing, update
from benchmarks.case import Case
from d1jax import look
from d1jax.models.transformer import TransformerSize
from d1jax.parallel import multihost

BASE = Case(TransformerSize(8192, 256, 4, 768, 4), "float32", (4,), 64, 64, 32, 16)
STEPS_PER_BLOCK = BASE.steps * BASE.block // BASE.completion
AXES = {"batch": (2, 4, 8, 16), "completion": (32, 64, 128, 256), "vocabulary": (4096, 8192, 16384, 32768)}
AXES |= {"depth": (2, 4, 8, 16)}
PROGRAMS = {"exact": "exact step", "dual": "dual step", "update": "update"}
"""What is measured, and how the plot names it."""

UNITS = {"batch": "rows", "completion": "tokens", "vocabulary": "ids", "depth": "layers"}


class Point(NamedTuple):
  """One value of one axis; the base is a point of each."""

  axis: str
  value: int
  program: str


def moved(axis: str, value: int) -> Case:
  """The base with another value on one axis; denoising steps a block stay."""
  if axis == "batch":
    return dataclasses.replace(BASE, batches=(value,))
  if axis == "completion":
    return dataclasses.replace(BASE, completion=value, steps=value // BASE.block * STEPS_PER_BLOCK)
  if axis == "vocabulary":
    return dataclasses.replace(BASE, size=dataclasses.replace(BASE.size, vocab=value))
  return dataclasses.replace(BASE, size=dataclasses.replace(BASE.size, layers=value))


def programs(case: Case) -> dict[str, tuple[Callable[[], Any], int]]:
  """What runs each program, and by what its seconds are divided."""
  model, reference = (cases.build(case, jax.devices(), seed) for seed in (0, 1))
  batch = case.batches[0]
  found = {mode: (rollout.rollout_arm(case, model, mode, batch).run, case.steps) for mode in ("exact", "dual")}
  given = update.work(case, model, batch)
  return {**found, "update": (update.own_arm(case, model, reference, given, 1, None).run, 1)}


def exponent(values: list[int], seconds: list[float]) -> float:
  """Of the power law through these points, by least squares of the logarithms."""
  return float(np.polyfit(np.log(values), np.log(seconds), 1)[0])


@look.styled()
def plot(lines: list[dict[str, Any]]) -> Figure:
  """A panel an axis, a line a program with its exponent."""
  figure = look.panels(2, 2, width=5, height=3, sharey=True)
  figure.suptitle("Time of a step and of an update; behind each name, the exponent of a power law", x=0.01, ha="left")
  programs = list(PROGRAMS)
  for axes, axis in zip(figure.axes, AXES, strict=True):
    for line in (line for line in lines if line["axis"] == axis):
      color = look.LINES[programs.index(line["program"])]
      name = f"{PROGRAMS[line['program']]} {line['exponent']:.2f}"
      look.points(axes, line["values"], 1e3 * np.array(line["seconds"]), color, name)
    look.logarithmic(axes, "x", "y")
    axes.set_xticks(AXES[axis], [str(value) for value in AXES[axis]])
    axes.set(xlabel=f"{axis}, {UNITS[axis]}")
  for axes in figure.axes[::2]:
    axes.set(ylabel="time, ms")
  return figure


def main() -> None:
  """Measures all points in turns."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--repeats", type=int, default=5, help="rounds")
  parser.add_argument("--devices", type=int, default=timing.cores(), help="into which a CPU is split")
  parser.add_argument("--picture", type=Path, default=Path("scaling.png"), help="where the plot goes")
  options = parser.parse_args()
  multihost.split_cpu(options.devices)
  print(json.dumps({"base": cases.described(BASE), **timing.machine(len(jax.devices()))}), flush=True)
  built: dict[Case, dict[str, tuple[Callable[[], Any], int]]] = {}
  arms, parts = {}, {}
  for axis, values in AXES.items():
    for value in values:
      case = moved(axis, value)
      if case not in built:
        built[case] = programs(case)
      for program, (run, divisor) in built[case].items():
        arms[Point(axis, value, program)], parts[Point(axis, value, program)] = run, divisor
  seconds = timing.interleaved(arms, options.repeats)
  lines = []
  for axis, values in AXES.items():
    for program in PROGRAMS:
      points = [Point(axis, value, program) for value in values]
      cost = [statistics.median(seconds[point]) / parts[point] for point in points]
      fitted = exponent(list(values), cost)
      lines.append({"axis": axis, "program": program, "exponent": fitted, "values": values, "seconds": cost})
      print(json.dumps(lines[-1]), flush=True)
  options.picture.write_bytes(look.png(plot(lines)))


if __name__ == "__main__":
  main()
