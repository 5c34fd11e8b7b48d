"""The device memory of a compiled program, and the compiler's message if it does not fit."""

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from d1jax.aot.hlo import Program
from d1jax.aot.traffic import FREE

GIB = 2**30
SHOWN = 5
"""The number of buffers in a report of a program that does not fit."""

_UNITS = {"B": 1, "K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}
_BITS = {"i1": 8, "i2": 2, "i4": 4, "ui2": 2, "ui4": 4}


class Memory(NamedTuple):
  """The memory of a device in bytes.

  Attributes:
    arguments: the arguments by kind; `rest` is the batch and the padding of tiles.
    outputs: the outputs that do not reuse memory of arguments.
    temporaries: the temporaries of the program.
    code: the program itself.
    elsewhere: other arrays that the run holds meanwhile.
  """

  arguments: Mapping[str, int]
  outputs: int
  temporaries: int
  code: int
  elsewhere: int

  @property
  def program(self) -> int:
    """The sum of the compiler's numbers."""
    return sum(self.arguments.values()) + self.outputs + self.temporaries + self.code

  @property
  def total(self) -> int:
    """The sum, including `elsewhere`."""
    return self.program + self.elsewhere


class Buffer(NamedTuple):
  """A large array: its bytes, its shape and its origin."""

  bytes: int
  shape: str
  source: str


def bytes_a_device(tree: Any) -> int:
  """The bytes of a device's share of arrays, from their shapes and placements, without the padding of tiles."""
  return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def bytes_placed(shapes: Any, placements: Any) -> int:
  """Like `bytes_a_device`, with the placements in a separate tree; None stands for an array that nothing reads."""
  pairs = zip(jax.tree.leaves(shapes), jax.tree.leaves(placements, is_leaf=lambda x: x is None), strict=True)
  return sum(math.prod(p.shard_shape(x.shape)) * x.dtype.itemsize for x, p in pairs if p is not None)


def memory(compiled: Any, named: Mapping[str, int], elsewhere: int) -> Memory:
  """The memory of a compiled program.

  `named` has the bytes of its arguments by kind, as far as they are known, and `elsewhere` those of other arrays that
  the run holds.
  """
  found = compiled.memory_analysis()
  arguments = dict(named) | {"rest": found.argument_size_in_bytes - sum(named.values())}
  outputs = found.output_size_in_bytes - found.alias_size_in_bytes
  return Memory(arguments, outputs, found.temp_size_in_bytes, found.generated_code_size_in_bytes, elsewhere)


class Refusal(NamedTuple):
  """The compiler's report of a program that does not fit.

  Attributes:
    needed: bytes of only the temporaries, or of everything.
    available: the available bytes.
    largest: the largest buffers, in descending order.
  """

  needed: int
  available: int
  largest: list[Buffer]


def refusal(message: str, lowered: str) -> Refusal:
  """Parses the compiler's message.

  The message lists the largest buffers, unless the compiler gave up before it allocated any. In that case, the largest
  arrays of the lowered program are used, which are not yet divided over devices.
  `message` is the text of the exception, and `lowered` the program's StableHLO.

  Raises:
    ValueError: the message is about something else.
  """
  used = re.search(r"Used ([\d.]+\w) of ([\d.]+\w)", message)
  used = used or re.search(r"temporaries \(([\d.]+\w)\) exceeds available HBM \(([\d.]+\w)\)", message)
  if used is None:
    raise ValueError(f"not about memory: {message.splitlines()[0][:160]}")
  pattern = r"Size: ([\d.]+\w)\s+(?:Operator: op_name=\"([^\"]*)\"[^\n]*\s+)?Shape: (\w+\[[\d,]*\])"
  listed = [Buffer(_bytes(size), shape, name or "") for size, name, shape in re.findall(pattern, message)]
  return Refusal(_bytes(used[1]), _bytes(used[2]), (listed or _largest(lowered))[:SHOWN])


def largest(program: Program, taken: Memory) -> list[Buffer]:
  """The largest users of memory: arrays that a program makes, its arguments by kind, and arrays held elsewhere."""
  sizes: dict[str, Buffer] = {}
  for run in program.runs():
    line = run.instruction
    for shape in line.shapes if line.opcode not in FREE else ():
      if not shape.on_chip:
        source = re.search(r'op_name="([^"]*)"', line.attributes)
        dims = f"{shape.dtype}[{','.join(map(str, shape.dims))}]"
        sizes.setdefault(dims, Buffer(shape.bytes, dims, source[1].replace("\\'", "'") if source else line.name))
  held = [Buffer(size, kind, "arguments") for kind, size in taken.arguments.items()]
  held.append(Buffer(taken.elsewhere, "elsewhere", "of the run, beside the program"))
  return sorted([*sizes.values(), *held], reverse=True)[:SHOWN]


def _bytes(text: str) -> int:
  """Converts a text like `15.75G` into bytes."""
  return round(float(text[:-1]) * _UNITS[text[-1]])


def _largest(lowered: str) -> list[Buffer]:
  """The largest arrays of a program in StableHLO, before they are divided over devices."""
  sizes: Counter[str] = Counter()
  for shape, dtype in sorted(set(re.findall(r"tensor<((?:\d+x)+)([a-z]\w*)>", lowered))):
    dims = shape.rstrip("x").split("x")
    bits = _BITS.get(dtype) or int(re.sub(r"\D", "", dtype) or 8)
    sizes[f"{dtype}[{','.join(dims)}]"] = math.prod(map(int, dims)) * bits // 8
  return [Buffer(size, shape, "before it is divided") for shape, size in sizes.most_common(SHOWN)]
