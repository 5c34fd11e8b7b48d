"""Parses the text of an optimised XLA program: its instructions, and how often each one runs."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

BITS = {"pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "token": 0, "opaque": 0}
"""The bits of a number in memory, for types whose name does not contain them."""

_SHAPE = re.compile(r"([a-z]+[0-9a-z]*)\[([\d,]*)\](?:\{([^}]*)\})?")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


class Shape(NamedTuple):
  """An array.

  Attributes:
    dtype: XLA's name, e.g. `bf16`.
    dims: the lengths of its axes.
    on_chip: whether it is in the core's own memory (a layout with `S(1)`), not in HBM.
  """

  dtype: str
  dims: tuple[int, ...]
  on_chip: bool

  @property
  def bytes(self) -> int:
    """The size in bytes, without the padding of tiles."""
    digits = re.match(r"[a-z]+(\d+)", self.dtype)
    bits = BITS[self.dtype] if self.dtype in BITS else int(digits[1]) if digits else 0
    return -(-math.prod(self.dims) * bits // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation.

  Attributes:
    name: unique in the program.
    opcode: the operation, e.g. `all-gather-start`.
    shapes: the shape of the result; several for a tuple.
    arguments: the text in the parentheses.
    attributes: the rest of the line.
  """

  name: str
  opcode: str
  shapes: tuple[Shape, ...]
  arguments: str
  attributes: str

  @functools.cached_property
  def operands(self) -> tuple[str, ...]:
    """The names of its operands, which are instructions of the same computation."""
    return tuple(re.findall(r"%([\w.\-]+)", self.arguments))

  def called(self, attribute: str) -> tuple[str, ...]:
    """The computations that an attribute names, e.g. `body`."""
    found = re.search(rf"\b{attribute}=(?:\{{([^}}]*)\}}|(%?[\w.\-]+))", self.attributes)
    return tuple(re.findall(r"%?([\w.\-]+)", found[1] or found[2])) if found else ()


class Run(NamedTuple):
  """An instruction in a run of the program.

  Attributes:
    instruction: the line.
    computation: the computation that contains it.
    times: how often it runs; each of n branches counts 1/n.
    in_loop: whether it runs inside a loop.
  """

  instruction: Instruction
  computation: str
  times: float
  in_loop: bool


@dataclasses.dataclass(frozen=True)
class Program:
  """The computations of a program, each an ordered mapping of its instructions by name.

  Attributes:
    computations: by name.
    entry: the name of the computation that runs first.
  """

  computations: Mapping[str, Mapping[str, Instruction]]
  entry: str

  def runs(self) -> Iterator[Run]:
    """Yields every instruction that runs, also in loops, calls and branches; a fusion is one instruction."""
    yield from self._runs(self.entry, 1.0, False)

  def _runs(self, computation: str, times: float, in_loop: bool) -> Iterator[Run]:
    for instruction in self.computations[computation].values():
      yield Run(instruction, computation, times, in_loop)
      if instruction.opcode == "while":
        trips = trip_count(self, computation, instruction) or 1
        for inner in instruction.called("body"):
          yield from self._runs(inner, times * trips, True)
      elif instruction.opcode == "conditional":
        branches = instruction.called("branch_computations")
        branches = branches or instruction.called("true_computation") + instruction.called("false_computation")
        for inner in branches:
          yield from self._runs(inner, times / len(branches), in_loop)
      elif instruction.opcode in ("call", "async-start"):
        for inner in instruction.called("to_apply") or instruction.called("calls"):
          yield from self._runs(inner, times, in_loop)

  def open_loops(self) -> int:
    """The number of loops that nothing but data ends; `runs` counts one pass of each."""
    loops = [run for run in self.runs() if run.instruction.opcode == "while"]
    return sum(trip_count(self, run.computation, run.instruction) is None for run in loops)


def trip_count(program: Program, computation: str, loop: Instruction) -> int | None:
  """How often the body of a `while` runs, at most if data may end it earlier; None if that is unknown.

  Compilers for CPUs and GPUs state this number. The TPU compiler does not; there it follows from a counter that starts
  at a constant, grows by a constant and is compared with a constant: `i < 8`, or `i < 8 and more`.
  """
  if found := _TRIPS.search(loop.attributes):
    return int(found[1])
  condition, body = (program.computations[loop.called(name)[0]] for name in ("condition", "body"))
  root = _root(condition)
  sides = [condition[name] for name in root.operands] if root.opcode == "and" else [root]
  tests = [side for side in sides if side.opcode == "compare" and "direction=LT" in side.attributes]
  if len(tests) != 1:
    return None
  (test,) = tests
  counter, bound = condition[test.operands[0]], _constant(condition, test.operands[1])
  if counter.opcode != "get-tuple-element":
    return None
  index = int(counter.attributes.partition("index=")[2].split(",")[0])
  before, after = program.computations[computation][loop.operands[0]], _root(body)
  if before.opcode != "tuple" or after.opcode != "tuple":
    return None
  first = _constant(program.computations[computation], before.operands[index])
  added = _uncopied(body, after.operands[index])
  step = _constant(body, added.operands[1]) if added.opcode == "add" else None
  if bound is None or first is None or not step:
    return None
  return max(0, -(-(bound - first) // step))


def _root(computation: Mapping[str, Instruction]) -> Instruction:
  return list(computation.values())[-1]


def _uncopied(computation: Mapping[str, Instruction], name: str) -> Instruction:
  """The original of a value that is a copy."""
  while computation[name].opcode == "copy":
    name = computation[name].operands[0]
  return computation[name]


def _constant(computation: Mapping[str, Instruction], name: str) -> int | None:
  """The value of an integer constant or of its copy; None for anything else."""
  instruction = _uncopied(computation, name)
  is_integer = instruction.opcode == "constant" and re.fullmatch(r"-?\d+", instruction.arguments)
  return int(instruction.arguments) if is_integer else None


def parse(text: str) -> Program:
  """Parses the text of `jax.stages.Compiled.as_text`.

  Raises:
    ValueError: there is no entry computation.
  """
  computations: dict[str, dict[str, Instruction]] = {}
  current: dict[str, Instruction] = {}
  entry = None
  for line in text.splitlines():
    if head := _COMPUTATION.match(line):
      current = computations.setdefault(head[2], {})
      entry = head[2] if head[1] else entry
    elif found := _INSTRUCTION.match(line):
      current[found[1]] = _instruction(found[1], found[2])
  if entry is None:
    raise ValueError(f"no ENTRY computation in a program of {len(text)} characters: not an optimised XLA program")
  return Program(computations, entry)


def _instruction(name: str, text: str) -> Instruction:
  end = _closing(text) if text.startswith("(") else text.index(" ")
  result, rest = text[:end], text[end:].lstrip()
  opcode, _, rest = rest.partition("(")
  end = _closing("(" + rest) - 1
  shapes = tuple(shapes_of(result))
  return Instruction(name, opcode, shapes, rest[: end - 1], rest[end:])


def _closing(text: str) -> int:
  """The position after the parenthesis that closes the first one."""
  depth = 0
  for position, character in enumerate(text):
    depth += (character == "(") - (character == ")")
    if depth == 0:
      return position + 1
  raise ValueError(f"unbalanced parentheses in {text[:80]!r}")


def shapes_of(text: str) -> Iterator[Shape]:
  """The arrays of a type."""
  for dtype, dims, layout in _SHAPE.findall(text):
    yield Shape(dtype, tuple(int(n) for n in dims.split(",") if n), "S(" in layout)
