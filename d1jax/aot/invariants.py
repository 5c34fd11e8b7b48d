"""Finds collectives that a loop repeats with the same data, such as those of weights in a rollout."""

from collections.abc import Iterator, Mapping

from d1jax.aot.collectives import KINDS, inside
from d1jax.aot.hlo import Instruction, Program

_VALUES = ("constant", "iota")
_SAME = ("copy", "copy-start", "copy-done", "bitcast", "reshape")
"""Operations whose result equals their operand."""


def repeated(program: Program) -> set[str]:
  """The names of collectives inside loops whose data no pass of the outermost loop changes.

  The data that they exchange (or from which the loop's counter chooses a part) enters and leaves the loop unchanged.
  """
  return set(_search(program, program.entry, None))


def _search(program: Program, name: str, fixed: set[int] | None) -> Iterator[str]:
  """Searches a computation; `fixed` holds the elements of its argument that never change, None outside of loops."""
  lines = program.computations[name]
  known: dict[str, bool] = {}
  for line in lines.values():
    known[line.name] = _is_fixed(lines, known, line, fixed)
    if line.opcode == "while":
      kept = _kept(program, line) & _elements(lines, known, line.operands[0])
      yield from _search(program, line.called("body")[0], kept)
    elif line.opcode == "conditional":
      for branch, argument in zip(line.called("branch_computations"), line.operands[1:], strict=False):
        yield from _search(program, branch, None if fixed is None else _elements(lines, known, argument))
    elif fixed is not None and known[line.name]:
      for inner in inside(program, line):
        if inner.opcode.removesuffix("-start") in KINDS:
          yield inner.name


def _is_fixed(
  lines: Mapping[str, Instruction], known: Mapping[str, bool], line: Instruction, fixed: set[int] | None
) -> bool:
  if line.opcode == "parameter":
    return fixed is None
  if line.opcode == "get-tuple-element" and lines[line.operands[0]].opcode == "parameter":
    return fixed is None or _index(line) in fixed
  if line.opcode in ("while", "conditional"):
    return False
  if line.opcode in _VALUES:
    return True
  # Scalars only choose a part, such as the layer whose weights are taken.
  arrays = [name for name in line.operands if any(shape.dims for shape in lines[name].shapes)]
  return bool(arrays) and all(known[name] for name in arrays)


def _index(line: Instruction) -> int:
  return int(line.attributes.partition("index=")[2].split(",")[0])


def _kept(program: Program, loop: Instruction) -> set[int]:
  """The elements of a loop's state that its body returns unchanged."""
  body = program.computations[loop.called("body")[0]]
  root = list(body.values())[-1]
  handed = enumerate(root.operands if root.opcode == "tuple" else ())
  return {place for place, name in handed if _origin(program, body, body[name]) == place}


def _origin(program: Program, lines: Mapping[str, Instruction], line: Instruction) -> int | None:
  """The element of a computation's argument that a value equals, also through copies and loops that keep it."""
  while True:
    source = lines[line.operands[0]] if line.operands else line
    if line.opcode in _SAME:
      line = source
    elif line.opcode == "get-tuple-element" and source.opcode == "parameter":
      return _index(line)
    elif line.opcode == "get-tuple-element" and source.opcode == "while" and _index(line) in _kept(program, source):
      line = lines[lines[source.operands[0]].operands[_index(line)]]
    else:
      return None


def _elements(lines: Mapping[str, Instruction], known: Mapping[str, bool], name: str) -> set[int]:
  """The fixed elements of a tuple."""
  line = lines[name]
  return {place for place, each in enumerate(line.operands) if known[each]} if line.opcode == "tuple" else set()
