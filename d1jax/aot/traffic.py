"""Bytes that a compiled program reads from a device's memory and writes to it.

Every instruction reads its operands and writes its results once, unless they are in the core's own memory. If a fusion
only slices an operand, it reads only the slice; if it updates one in place, it writes only the update.
"""

from collections.abc import Mapping

from d1jax.aot.hlo import Instruction, Program, Shape

FREE = frozenset(
  {"parameter", "constant", "iota", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"}
  | {"after-all", "partition-id", "replica-id", "opt-barrier"}
)
"""Instructions that move no bytes themselves; the bodies of loops, calls and branches do."""

_SLICES = ("dynamic-slice", "slice", "gather")
_VIEWS = ("bitcast", "reshape", "get-tuple-element", "opt-barrier")
_CHAIN = ("AsyncCollectiveStart", "AsyncCollectiveDone")


def traffic(program: Program) -> int:
  """The bytes that one run of the program moves on one device."""
  return round(sum(run.times * _moved(program, run.computation, run.instruction) for run in program.runs()))


def _moved(program: Program, computation: str, instruction: Instruction) -> int:
  opcode, lines = instruction.opcode, program.computations[computation]
  if opcode in FREE or opcode.endswith("-done"):
    return 0
  if opcode == "fusion":
    return _of_fusion(program, computation, instruction)
  shapes = [shape for name in instruction.operands for shape in lines[name].shapes]
  if opcode == "copy-start":  # target, source and a counter
    return _in_memory(instruction.shapes[0]) + (0 if shapes[0].on_chip else instruction.shapes[0].bytes)
  if opcode in ("slice-start", "dynamic-slice-start"):  # source, target and a counter
    target = instruction.shapes[1]
    return _in_memory(target) + (0 if shapes[0].on_chip else target.bytes)
  if opcode in _SLICES:
    found = sum(shape.bytes for shape in instruction.shapes)
    return (0 if shapes[0].on_chip else found) + sum(map(_in_memory, instruction.shapes))
  if opcode == "dynamic-update-slice":
    return 0 if instruction.shapes[0].on_chip else 2 * shapes[1].bytes
  results = instruction.shapes[len(instruction.operands) :] if opcode.endswith("-start") else instruction.shapes
  return sum(map(_in_memory, shapes)) + sum(map(_in_memory, results))


def _in_memory(shape: Shape) -> int:
  return 0 if shape.on_chip else shape.bytes


def _of_fusion(program: Program, computation: str, fusion: Instruction) -> int:
  inner = program.computations[fusion.called("calls")[0]]
  parameters = [name for name, each in inner.items() if each.opcode == "parameter"]
  parameters.sort(key=lambda name: int(inner[name].arguments))
  found = 0
  for name, operand in zip(parameters, fusion.operands, strict=True):
    shapes = program.computations[computation][operand].shapes
    if len(shapes) == 1 and not shapes[0].on_chip:
      found += min(shapes[0].bytes, _read(program, inner, name))
  root = list(inner.values())[-1]
  results = root.operands if root.opcode == "tuple" else (root.name,)
  for name, shape in zip(results, fusion.shapes, strict=False):
    found += 0 if shape.on_chip else _written(inner, inner[name], shape)
  return found


def _read(program: Program, inner: Mapping[str, Instruction], name: str) -> int:
  """The bytes of a value inside a fusion that its users read."""
  found = 0
  for user in inner.values():
    if name not in user.operands:
      continue
    first = user.operands[0] == name
    if user.opcode in _VIEWS:
      found += _read(program, inner, user.name)
    elif user.opcode in _SLICES and first:
      found += user.shapes[0].bytes
    elif user.opcode == "fusion":
      nested = program.computations[user.called("calls")[0]]
      for place, operand in enumerate(user.operands):
        if operand == name:
          found += _read(program, nested, _parameter(nested, place))
    elif not (user.opcode == "tuple" or (user.opcode == "dynamic-update-slice" and first) or _passes(user)):
      return inner[name].shapes[0].bytes
  return found


def _parameter(inner: Mapping[str, Instruction], place: int) -> str:
  return next(name for name, each in inner.items() if each.opcode == "parameter" and int(each.arguments) == place)


def _passes(user: Instruction) -> bool:
  """Whether it is a later part of a gather that is spread over several fusions, of which only the first counts."""
  repeated = "chain_id=" in user.attributes and '"flag_start":"-1"' not in user.attributes
  return repeated or any(name in user.attributes for name in _CHAIN)


def _written(inner: Mapping[str, Instruction], result: Instruction, shape: Shape) -> int:
  while result.opcode in _VIEWS and inner[result.operands[0]].shapes:
    result = inner[result.operands[0]]
  if result.opcode == "parameter" or _passes(result):
    return 0
  if result.opcode == "dynamic-update-slice":
    return inner[result.operands[1]].shapes[0].bytes
  return shape.bytes
