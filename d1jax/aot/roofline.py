"""How long a program takes at least: its arithmetic, its memory and its network, each at the chip's full speed."""

from typing import NamedTuple

from d1jax.parallel.chips import Chip


class Roofline(NamedTuple):
  """Seconds of one run of a program on a device.

  Attributes:
    compute: of matrix products.
    memory: of what is read and written in HBM.
    network: of collectives, one after the other.
  """

  compute: float
  memory: float
  network: float

  @property
  def seconds(self) -> float:
    """If the three overlap without a gap: the longest."""
    return max(self)

  @property
  def apart(self) -> float:
    """If nothing hides the network: products and memory overlap, collectives come on top."""
    return max(self.compute, self.memory) + self.network

  @property
  def bound(self) -> str:
    """What is the longest."""
    return self._fields[self.index(self.seconds)]

  def times(self, count: int) -> "Roofline":
    """Of so many runs."""
    return Roofline(*(count * each for each in self))


def roofline(chip: Chip, flops: float, memory_bytes: float, network_seconds: float) -> Roofline:
  """The times of a program.

  Args:
    chip: the device.
    flops: of the device's share.
    memory_bytes: that it reads and writes.
    network_seconds: of its collectives, see `d1jax.aot.collectives.seconds`.
  """
  return Roofline(flops / chip.flops, memory_bytes / chip.hbm_bandwidth, network_seconds)


class Efficiency(NamedTuple):
  """The share of the time in which the chips multiply: of an iteration, or of one program.

  Attributes:
    overlapped: if programs overlap their arithmetic, memory and network without a gap.
    apart: if nothing hides the network.
  """

  overlapped: float
  apart: float


def efficiency(programs: list[Roofline]) -> Efficiency:
  """The predicted compute share of programs that run one after the other."""
  compute = sum(each.compute for each in programs)
  return Efficiency(compute / sum(each.seconds for each in programs), compute / sum(each.apart for each in programs))
