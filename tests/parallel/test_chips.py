import pytest

from d1jax.parallel import chips
from d1jax.parallel.chips import GIB


@pytest.mark.parametrize(
  ("kind", "name", "memory", "flops"),
  [
    ("TPU v5 lite", "TPU v5e", 15.75, 197e12),
    ("TPU v5", "TPU v5p", 95.74, 459e12),
    ("TPU v6 lite", "TPU v6e", 31.25, 918e12),
    ("NVIDIA H100 80GB HBM3", "H100", 80, 989e12),
  ],
)
def test_chips_by_the_names_of_jax(kind, name, memory, flops):
  chip = chips.of(kind)
  assert chip is not None
  assert (chip.name, chip.hbm_bytes, chip.flops) == (name, int(memory * GIB), flops)


@pytest.mark.parametrize("kind", ["cpu", "TPU v5e", ""])
def test_what_is_not_listed_is_none(kind):
  assert chips.of(kind) is None


def test_links_of_a_torus_are_those_of_the_data_sheet():
  """Gigabits a second in both directions, over the links of a chip: the same 50 or 100 GB/s for each."""
  for kind, links, each in (("TPU v5 lite", 4, 50e9), ("TPU v5", 6, 100e9), ("TPU v6 lite", 4, 100e9)):
    chip = chips.of(kind)
    assert chip is not None
    assert chip.torus is not None
    assert (2 * chip.torus.axes, chip.link_bandwidth / links) == (links, each)
