import pytest

from d1jax.aot.roofline import Roofline, efficiency, roofline
from d1jax.parallel.chips import Chip

CHIP = Chip("made up", 10, flops=1e12, hbm_bandwidth=1e9, link_bandwidth=1e8)


def test_each_time_is_work_over_speed():
  found = roofline(CHIP, flops=3e12, memory_bytes=2e9, network_seconds=1.5)
  assert found == Roofline(3.0, 2.0, 1.5)
  assert (found.seconds, found.apart, found.bound) == (3.0, 4.5, "compute")
  assert found.times(2) == Roofline(6.0, 4.0, 3.0)


@pytest.mark.parametrize(
  ("line", "bound", "seconds", "apart"),
  [(Roofline(1, 4, 2), "memory", 4, 6), (Roofline(1, 2, 5), "network", 5, 7), (Roofline(3, 3, 3), "compute", 3, 6)],
)
def test_the_longest_bounds(line, bound, seconds, apart):
  assert (line.bound, line.seconds, line.apart) == (bound, seconds, apart)


def test_efficiency_is_of_all_programs_together():
  found = efficiency([Roofline(3, 2, 1), Roofline(1, 0, 5)])
  assert found.overlapped == pytest.approx(4 / (3 + 5))
  assert found.apart == pytest.approx(4 / (4 + 6))
