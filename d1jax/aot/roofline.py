"""The shortest possible time of a program: its arithmetic, memory and network, each at the chip's full speed."""

from typing import NamedTuple

from d1jax.parallel.chips import Chip


class Roofline(NamedTuple):
  """The seconds of one run of a program on a device.

  Attributes:
    compute: the time of matrix products.
    memory: the time of reads and writes in HBM.
    network: the time of collectives, one after the other.
  """

  compute: float
  memory: float
  network: float

  @property
  def seconds(self) -> float:
    """The time if the three overlap perfectly, which is the longest of them."""
    return max(self)

  @property
  def apart(self) -> float:
    """The time if products and memory overlap, but collectives overlap with nothing."""
    return max(self.compute, self.memory) + self.network

  @property
  def bound(self) -> str:
    """The name of the longest of the three."""
    return self._fields[self.index(self.seconds)]

  def times(self, count: int) -> "Roofline":
    """The times of `count` runs."""
    return Roofline(*(count * each for each in self))


def roofline(chip: Chip, flops: float, memory_bytes: float, network_seconds: float) -> Roofline:
  """The times of a program.

  FLOPs and bytes are those of the device's share; for the network see `d1jax.aot.network.seconds`.
  """
  return Roofline(flops / chip.flops, memory_bytes / chip.hbm_bandwidth, network_seconds)


class Efficiency(NamedTuple):
  """The share of time in which the chips multiply matrices, in an iteration or in one program.

  Attributes:
    overlapped: the share if arithmetic, memory and network overlap perfectly.
    apart: the share if collectives overlap with nothing.
  """

  overlapped: float
  apart: float


def efficiency(programs: list[Roofline]) -> Efficiency:
  """The predicted compute share of programs that run one after the other."""
  compute = sum(each.compute for each in programs)
  return Efficiency(compute / sum(each.seconds for each in programs), compute / sum(each.apart for each in programs))
