"""Interleaved timing of compiled programs, and what is said of the machine."""

import datetime
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax


class Program(NamedTuple):
  """A compiled program.

  Attributes:
    run: calls it.
    compile_seconds: of tracing, lowering and compiling.
    peak_bytes: temporaries and results on each device; arguments, the weights among them, are not counted. None where
      the compiler does not say.
    text: its optimised HLO.
  """

  run: Callable[..., Any]
  compile_seconds: float
  peak_bytes: int | None
  text: str


def compiled(function: Callable[..., Any], placements: Any, results: Any, arguments: Any, **options: Any) -> Program:
  """Compiles `function` for these arguments.

  Args:
    function: pure.
    placements: of the arguments.
    results: placements of the results.
    arguments: arrays or their shapes.
    **options: of `jax.jit`.
  """
  began = time.perf_counter()
  program = jax.jit(function, in_shardings=placements, out_shardings=results, **options).lower(*arguments).compile()
  seconds = time.perf_counter() - began
  memory = program.memory_analysis()
  peak = None
  if memory is not None:
    peak = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
  return Program(program, seconds, peak, program.as_text() or "")


def timed(function: Callable[[], Any]) -> float:
  """The seconds of one call, its result awaited."""
  began = time.perf_counter()
  jax.block_until_ready(function())
  return time.perf_counter() - began


def interleaved(arms: Mapping[Any, Callable[[], Any]], repeats: int) -> dict[Any, list[float]]:
  """Seconds of each arm, which take turns, so that what else the machine does hits all of them alike.

  Args:
    arms: what is timed; each has run before.
    repeats: rounds.
  """
  seconds: dict[Any, list[float]] = {name: [] for name in arms}
  for _ in range(repeats):
    for name, function in arms.items():
      seconds[name].append(timed(function))
  return seconds


def spread(seconds: list[float]) -> dict[str, float]:
  """The median, the fastest and the slowest."""
  return {"seconds": statistics.median(seconds), "fastest": min(seconds), "slowest": max(seconds)}


def cores() -> int:
  """The cores that this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine(devices: int) -> dict[str, Any]:
  """Where and when: the first line of every benchmark that computes itself."""
  return {"device": jax.devices()[0].device_kind, "devices": devices, **host()}


def host() -> dict[str, Any]:
  """What can be said without taking an accelerator from the processes that this one starts."""
  versions: dict[str, str | None] = {}
  for package in ("jax", "jaxlib", "numpy", "torch"):
    try:
      versions[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      versions[package] = None
  return {
    "processor": _processor(),
    "cores": cores(),
    "load": os.getloadavg()[0],
    "python": platform.python_version(),
    **versions,
    "date": datetime.date.today().isoformat(),
  }


def _processor() -> str:
  info = Path("/proc/cpuinfo")
  if info.exists():
    for line in info.read_text(encoding="utf-8").splitlines():
      if line.startswith("model name"):
        return line.partition(":")[2].strip()
  return platform.processor()


def peak_growth(function: Callable[[], Any]) -> int | None:
  """Bytes by which the process's resident memory grew at most during a call; None where Linux does not say.

  For programs whose memory no compiler knows. Memory that the process holds already and uses again is not seen.
  """
  try:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak
    before = _status("VmRSS")
    function()
    return max(_status("VmHWM") - before, 0)
  except OSError:
    return None


def _status(field: str) -> int:
  lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
  return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
