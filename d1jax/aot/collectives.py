"""The collectives of a compiled program, and the bytes that each device receives from them."""

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

from d1jax.aot.hlo import Instruction, Program, Shape

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

Group = tuple[int, ...]

_NUMBERING = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective of a program.

  Attributes:
    name: the name of the instruction.
    kind: one of `KINDS`.
    shapes: the shapes of its results on a device.
    bytes: the bytes that a device receives each time, with the ring algorithm of this kind.
    groups: the groups of devices that exchange data, by their position in the mesh; for a permutation, the pairs.
    times: how often it runs in one run of the program.
    in_loop: whether it is inside a loop.
  """

  name: str
  kind: str
  shapes: tuple[Shape, ...]
  bytes: int
  groups: tuple[Group, ...]
  times: float
  in_loop: bool


def find(program: Program, devices: int) -> list[Collective]:
  """The collectives of a program over `devices` devices, including those inside fusions."""
  return list(_find(program, devices))


def _find(program: Program, devices: int) -> Iterator[Collective]:
  for run in program.runs():
    for instruction in inside(program, run.instruction):
      kind = instruction.opcode.removesuffix("-start")
      if kind not in KINDS:
        continue
      shapes = _results(instruction)
      groups = groups_of(instruction.attributes, devices)
      received = received_bytes(kind, sum(shape.bytes for shape in shapes), len(groups[0]))
      yield Collective(instruction.name, kind, shapes, received, groups, run.times, run.in_loop)


def inside(program: Program, instruction: Instruction) -> Iterator[Instruction]:
  """The instruction itself, or the instructions inside a fusion.

  The TPU compiler spreads a gather over the fusions of other work (a `chain_id`) and repeats it in each; only the first
  one counts.
  """
  if instruction.opcode != "fusion":
    yield instruction
    return
  for name in instruction.called("calls"):
    computation = program.computations[name].values()
    starts = any("AsyncCollectiveStart" in inner.attributes for inner in computation)
    for inner in computation:
      if starts or "chain_id=" not in inner.attributes:
        yield from inside(program, inner)


def _results(instruction: Instruction) -> tuple[Shape, ...]:
  """Only the results; the start of a transfer also lists its inputs and counters."""
  shapes = instruction.shapes
  if instruction.opcode in ("all-gather-start", "collective-permute-start"):
    operands = len(instruction.operands)
    return shapes[operands : 2 * operands]
  return shapes


def received_bytes(kind: str, result: int, group: int) -> int:
  """The bytes that a device receives with ring algorithms over a group, for a result of `result` = r bytes per device.

  For n devices: all-gather r (n - 1) / n, reduce-scatter r (n - 1), all-reduce 2 r (n - 1) / n (a reduce-scatter, then
  an all-gather), all-to-all r (n - 1) / n, collective-permute r.
  """
  if kind == "collective-permute":
    return result
  if kind == "reduce-scatter":
    return result * (group - 1)
  return (2 if kind == "all-reduce" else 1) * result * (group - 1) // group


def groups_of(attributes: str, devices: int) -> tuple[Group, ...]:
  """The groups in an instruction's attributes; if there are none, one group of all devices.

  They are written as a list, as numbers `[groups,size]<=[shape]T(order)`, or as axes of a mesh,
  `mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}`.
  """
  if found := re.search(r"source_target_pairs=\{(\{.*?\})\}", attributes):
    return _listed(found[1])
  if found := re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", attributes):
    return _listed(found[1])
  if found := re.search(rf"replica_groups=\[([\d,]+)\]<={_NUMBERING}", attributes):
    return _rows(_numbered(devices, *found.groups()[1:]).reshape(_integers(found[1])))
  if found := re.search(
    rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({_NUMBERING}\))? \{{([^}}]*)\}}", attributes
  ):
    sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", found[1])}
    named = re.findall(r"'([^']*)'", found[4])
    if ":" in found[4]:
      raise ValueError(f"replica groups over a part of an axis, {found[4]}, are not understood")
    ids = _numbered(devices, found[2], found[3]).reshape(list(sizes.values()))
    last = [list(sizes).index(name) for name in named]
    ids = ids.transpose([axis for axis in range(ids.ndim) if axis not in last] + last)
    return _rows(ids.reshape(-1, math.prod(sizes[name] for name in named)))
  return (tuple(range(devices)),)


def _integers(text: str) -> list[int]:
  return [int(n) for n in text.split(",")]


def _numbered(devices: int, shape: str | None, order: str | None) -> np.ndarray:
  """Devices in order; if a shape is given, reshaped to it, with its axes transposed by `order`."""
  ids = np.arange(devices)
  ids = ids.reshape(_integers(shape)) if shape else ids
  return ids.transpose(_integers(order)) if order else ids


def _rows(ids: np.ndarray) -> tuple[Group, ...]:
  return tuple(tuple(int(i) for i in group) for group in ids)


def _listed(text: str) -> tuple[Group, ...]:
  return tuple(tuple(int(i) for i in group.split(",")) for group in re.findall(r"\{([\d,]+)\}", text))
