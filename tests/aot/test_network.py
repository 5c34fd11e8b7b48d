import dataclasses
import types

import pytest

from d1jax.aot import network
from d1jax.aot.collectives import Collective
from d1jax.aot.hlo import Shape
from d1jax.parallel import chips

V5E, V5P, H100 = (chips.of(kind) for kind in ("TPU v5 lite", "TPU v5", "NVIDIA H100 80GB HBM3"))


def torus(*sizes, slices=1):
  """Chips in the order of their coordinates, the last axis fastest, slice by slice."""
  x, y, z = (*sizes, 1)[:3]
  places = [(i, j, k) for i in range(x) for j in range(y) for k in range(z)]
  return [types.SimpleNamespace(coords=place, slice_index=s) for s in range(slices) for place in places]


def collective(group, size=4_000_000, kind="all-gather", **changes):
  fields = dict(name="it", kind=kind, shapes=(), bytes=size, groups=(tuple(group),), times=1.0, in_loop=True)
  return Collective(**(fields | changes))


@pytest.mark.parametrize(
  ("chip", "sizes", "group", "links"),
  [
    (V5E, (2, 4), (0, 1, 2, 3), 1),  # along an open axis
    (V5E, (2, 4), range(8), 2),  # both open axes
    (V5E, (2, 4), (0, 2), 1 / 2),  # every other chip: shared with the group (1, 3)
    (V5E, (16, 16), range(16), 2),  # a ring
    (V5E, (16, 16), range(256), 4),
    (V5E, (16, 16), range(8), 1),  # half of it does not close
    (V5E, (16, 16), range(0, 16, 2), 1),  # a ring shared by two groups
    (V5E, (8, 16), range(128), 3),  # one axis closes
    (V5P, (2, 2, 4), range(4), 1),  # too few chips for a closed axis
    (V5P, (4, 4, 4), range(4), 2),
    (V5P, (4, 4, 4), range(64), 6),
    (V5P, (4, 4, 8), (0, 1), 1),
  ],
)
def test_links_of_a_group(chip, sizes, group, links):
  devices = torus(*sizes)
  assert network.links(chip, [devices[i] for i in group], devices) == links


def test_seconds_on_a_torus():
  # Two of the four links of 200 GB/s.
  assert network.seconds(collective(range(8)), V5E, torus(2, 4)) == pytest.approx(4e6 / 100e9)
  assert network.seconds(collective(range(64)), V5P, torus(4, 4, 4)) == pytest.approx(4e6 / 600e9)


def test_seconds_behind_a_switch():
  assert network.seconds(collective(range(8)), H100, [object()] * 8) == pytest.approx(4e6 / 450e9)


def test_seconds_between_slices():
  """Each of the four chips of a slice sends a quarter across."""
  devices = torus(2, 2, slices=2)
  within, across = 4e6 / 100e9, 1e6 / 3.125e9
  assert network.seconds(collective(range(8)), V5E, devices) == pytest.approx(within + across)
  assert network.seconds(collective((0, 4)), V5E, devices) == pytest.approx(4e6 / 3.125e9)
  assert network.seconds(collective((0, 1, 2, 3)), V5E, devices) == pytest.approx(within)


def test_what_stays_takes_no_time():
  devices = torus(2, 4)
  assert network.seconds(collective((3,), size=0), V5E, devices) == 0
  some = dataclasses.replace(collective(()), kind="collective-permute", groups=((0, 0), (1, 2)))
  assert network.seconds(some, V5E, devices) == pytest.approx(4e6 / 50e9)
  assert network.seconds(dataclasses.replace(some, groups=((0, 0), (1, 1))), V5E, devices) == 0


def test_summary_counts_runs():
  devices = torus(2, 4)
  exchanged = [
    collective(range(8), times=3.0),
    collective(range(8), size=1000, times=2.0),
    collective(range(8), in_loop=False),
    collective(range(8), kind="all-reduce"),
  ]
  found = network.summary(exchanged, V5E, devices)
  assert [(each["kind"], each["in_loop"], each["count"], each["bytes"]) for each in found] == [
    ("all-gather", True, 5, 12_002_000),
    ("all-gather", False, 1, 4_000_000),
    ("all-reduce", True, 1, 4_000_000),
  ]
  assert found[0]["seconds"] == pytest.approx(12_002_000 / 100e9)


def test_permutations_of_both_ways_share_no_link():
  devices, ring = torus(2, 4), [(i, (i + 1) % 4) for i in range(4)]
  forward, backward = (
    dataclasses.replace(collective(()), kind="collective-permute", groups=tuple(pairs))
    for pairs in (ring, [(b, a) for a, b in ring])
  )
  (found,) = network.summary([forward, backward, forward], V5E, devices)
  assert (found["count"], found["bytes"]) == (3, 12_000_000)
  assert found["seconds"] == pytest.approx(8e6 / 50e9)


def test_the_largest_arrays_in_loops():
  small, large = Shape("bf16", (4, 8), False), Shape("f32", (4, 8), False)
  exchanged = [
    collective(range(8), shapes=(small, large), kind="all-reduce", times=6.0),
    collective(range(8), shapes=(small,), times=6.0),
    collective(range(8), shapes=(small,), times=30.0),
    collective(range(8), shapes=(Shape("f32", (99, 99), False),), in_loop=False),
  ]
  assert network.largest_in_loops(exchanged) == [
    {"count": 30, "kind": "all-gather", "dtype": "bf16", "dims": [4, 8], "bytes": 64},
    {"count": 6, "kind": "all-reduce", "dtype": "f32", "dims": [4, 8], "bytes": 128},
  ]
  assert network.largest_in_loops(exchanged[3:]) == []
