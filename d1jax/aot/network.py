"""The time of collectives on the links of a torus, and the bytes that they move."""

import itertools
from collections.abc import Sequence
from typing import Any

from d1jax.aot.collectives import KINDS, Collective
from d1jax.aot.hlo import Shape
from d1jax.parallel.chips import Chip


def seconds(collective: Collective, chip: Chip, devices: Sequence[Any]) -> float:
  """The seconds of one run of a collective, if nothing else uses the links.

  On a torus, a group uses links along each axis that it spans: both links of a chip if the axis is closed, and one if
  it is open. If the members of a group are k chips apart, it shares these links with k - 1 other groups. The chips of
  a slice share the bytes that cross slices.

  Args:
    collective: a collective of a program over these devices.
    chip: the kind of the devices.
    devices: the devices in the order of the mesh, with `coords` and `slice_index` on TPUs.
  """
  others = [group for group in collective.groups if len(set(group)) > 1]  # a permutation may map devices to themselves
  if not others:
    return 0.0
  if chip.torus is None:
    return collective.bytes / chip.link_bandwidth
  members = [devices[i] for i in others[0]]
  slices = {getattr(device, "slice_index", 0) for device in members}
  found = 0.0
  within = [device for device in members if getattr(device, "slice_index", 0) == min(slices)]
  if len(within) > 1:
    found += collective.bytes / (links(chip, within, devices) * chip.link_bandwidth / (2 * chip.torus.axes))
  if len(slices) > 1:
    found += collective.bytes / len(within) / chip.torus.slice_bandwidth
  return found


def links(chip: Chip, members: Sequence[Any], devices: Sequence[Any]) -> float:
  """The number of links that a chip can use for a group of chips in one slice."""
  assert chip.torus is not None
  shape = [len({device.coords[axis] for device in devices}) for axis in range(chip.torus.axes)]
  rings = [size % chip.torus.ring == 0 for size in shape]
  if chip.torus.axes == 3:
    rings = [all(rings)] * 3
  found = 0.0
  for axis, (size, ring) in enumerate(zip(shape, rings, strict=True)):
    places = sorted({device.coords[axis] for device in members})
    if len(places) > 1:
      apart = min(b - a for a, b in itertools.pairwise(places))
      found += (2 if ring and len(places) * apart == size else 1) / apart
  return found


def summary(exchanged: Sequence[Collective], chip: Chip, devices: Sequence[Any]) -> list[dict[str, Any]]:
  """The collectives of one run by kind, inside and outside of loops: number, bytes that a device receives, seconds.

  Collectives run one after the other. Only permutations in opposite directions share no link, and XLA runs both at the
  same time when it gathers weights piece by piece between products.
  """
  found = []
  for kind, in_loop in itertools.product(KINDS, (True, False)):
    of_kind = [each for each in exchanged if (each.kind, each.in_loop) == (kind, in_loop)]
    if of_kind:
      ways = [0.0, 0.0]
      for each in of_kind:
        ways[_is_backward(each)] += each.times * seconds(each, chip, devices)
      found.append(
        {
          "kind": kind,
          "in_loop": in_loop,
          "count": round(sum(each.times for each in of_kind)),
          "bytes": round(sum(each.times * each.bytes for each in of_kind)),
          "seconds": max(ways),
        }
      )
  return found


def _is_backward(collective: Collective) -> bool:
  """Whether a permutation mostly sends to devices with lower numbers."""
  pairs = collective.groups if collective.kind == "collective-permute" else ()
  return sum(target < source for source, target in pairs) > len(pairs) / 2


def largest_in_loops(exchanged: Sequence[Collective]) -> list[dict[str, Any]]:
  """The largest array that a collective makes in loops of each length, in descending order of length.

  The layers of a rollout run most often: in its passes over the canvas or, with a cache, over a window.
  """
  found: dict[float, tuple[Shape, str]] = {}
  for each in exchanged:
    for shape in each.shapes if each.in_loop else ():
      if each.times not in found or shape.bytes > found[each.times][0].bytes:
        found[each.times] = shape, each.kind
  return [
    {"count": round(times), "kind": kind, "dtype": shape.dtype, "dims": list(shape.dims), "bytes": shape.bytes}
    for times, (shape, kind) in sorted(found.items(), reverse=True)
  ]
