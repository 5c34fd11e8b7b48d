"""Where the time of a compiled program goes, read from a profiler's trace without TensorBoard."""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(")
CALLS = re.compile(r"calls=%?([\w.\-]+)")
SOURCE = re.compile(r'op_name="([^"]*)"')

CONTROL = {"while", "call", "conditional"}
"""Their time is that of what they run."""

PRODUCTS = {"dot", "custom-call", "convolution"}
REDUCTIONS = {"reduce", "sort", "reduce-window"}
COMMUNICATION = {"all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"}
MOVES = {
  *("bitcast", "broadcast", "concatenate", "copy", "copy-start", "copy-done", "dynamic-slice", "dynamic-update-slice"),
  *("gather", "get-tuple-element", "iota", "pad", "parameter", "constant", "reshape", "reverse", "scatter", "slice"),
  *("transpose", "tuple"),
}


class Operation(NamedTuple):
  """An instruction of the optimised program: its kind, the operation that it comes from, its result's type."""

  kind: str
  source: str
  result: str


def kind(opcodes: set[str]) -> str:
  """What a fusion of these operations mostly pays for."""
  for name, known in (("products", PRODUCTS), ("communication", COMMUNICATION), ("reductions", REDUCTIONS)):
    if opcodes & known:
      return name
  return "moves" if opcodes <= MOVES else "elementwise"


def operations(text: str) -> dict[str, Operation]:
  """The instructions of an optimised program by name, without those that only run others."""
  inside: dict[str, set[str]] = {}
  lines: list[tuple[str, str, str, str]] = []
  computation = ""
  for line in text.splitlines():
    if header := COMPUTATION.match(line):
      computation = header[1]
    elif instruction := INSTRUCTION.match(line):
      name, result, opcode = instruction.groups()
      inside.setdefault(computation, set()).add(opcode)
      lines.append((name, re.sub(r"\{.*?\}", "", result), opcode, line))
  found = {}
  for name, result, opcode, line in lines:
    called, source = CALLS.search(line), SOURCE.search(line)
    opcodes = inside.get(called[1], {opcode}) if called else {opcode}
    if opcode not in CONTROL:
      found[name] = Operation(kind(opcodes), source[1].rpartition("/")[2] if source else opcode, result)
  return found


def shares(run: Callable[[], Any], text: str, folder: Path, top: int = 12) -> dict[str, Any]:
  """Runs a program under the profiler.

  Args:
    run: calls it.
    text: its optimised HLO.
    folder: where the trace goes.
    top: operations that are listed.

  Returns:
    `busy_seconds`, summed over devices and threads; `kinds`, the share of each kind; `top`, those operations that took
    most, layers taken together: kind, source, type of the result, share.
  """
  options = jax.profiler.ProfileOptions()
  options.python_tracer_level = 0
  with jax.profiler.trace(str(folder), profiler_options=options):
    jax.block_until_ready(run())
  trace = max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
  known = operations(text)
  time: Counter[Operation] = Counter()
  for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
    for line in plane.lines:
      for event in line.events:
        name = dict(event.stats).get("hlo_op")
        if name in known:
          time[known[name]] += event.duration_ns
  total = sum(time.values())
  if not total:
    raise SystemExit(f"{trace} names no operation of the program")
  kinds: Counter[str] = Counter()
  for operation, nanoseconds in time.items():
    kinds[operation.kind] += nanoseconds
  return {
    "busy_seconds": total / 1e9,
    "kinds": {name: nanoseconds / total for name, nanoseconds in kinds.most_common()},
    "top": [[*operation, nanoseconds / total] for operation, nanoseconds in time.most_common(top)],
  }
