"""Two meshes of one job, one for updates and one for rollouts: their devices, and what goes from one to the other."""

import collections
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
from jax.sharding import Mesh, NamedSharding

from d1jax.parallel import chips
from d1jax.parallel.mesh import make_mesh, twin


def sub_meshes(
  sizes: Mapping[str, int], rollout_sizes: Mapping[str, int], devices: Sequence[Any] | None = None
) -> tuple[Mesh, Mesh]:
  """The mesh of updates and that of rollouts, on devices of their own; without sizes for rollouts, one mesh for both.

  Each process gives as many devices to rollouts as every other one, its last ones. What goes from one mesh to the other
  then stays inside of its process, and no process waits for a program in which it has no device.

  Args:
    sizes: devices along the axes of the first, see `make_mesh`; one may be -1: all that rollouts leave.
    rollout_sizes: the same of the second; one may be -1 if none of `sizes` is.
    devices: of both; default: all devices of all processes.

  Raises:
    ValueError: the two do not share the devices without overlap, or the processes not alike; see also `make_mesh`.
  """
  devices = list(jax.devices() if devices is None else devices)
  if not rollout_sizes:
    mesh = make_mesh(sizes, devices)
    return mesh, mesh
  taken, drawing = (math.prod(map(int, each.values())) for each in (sizes, rollout_sizes))
  if drawing < 0 <= taken:
    drawing = len(devices) - taken
  left = len(devices) - drawing
  if not 0 < drawing < len(devices) or (taken >= 0 and taken != left):
    said = " and ".join(
      f"{name} ({', '.join(f'{axis}={size}' for axis, size in each.items())})"
      for name, each in (("mesh", sizes), ("rollout_mesh", rollout_sizes))
    )
    raise ValueError(
      f"{said} do not share {len(devices)} devices, each of which belongs to one of the two: let the products of their"
      f" sizes add up to {len(devices)} (a size of -1 in one of the two takes what the other one leaves)"
    )
  processes = sorted({device.process_index for device in devices})
  own = [[device for device in devices if device.process_index == process] for process in processes]
  if len(own) > 1 and (drawing % len(own) or left != drawing or len(set(map(len, own))) > 1):
    raise ValueError(
      f"rollout_mesh takes {drawing} of the {len(devices)} devices of {len(own)} processes: let it take half of them,"
      " half of each process, because each process passes weights on from its devices to its devices"
    )
  each = drawing // len(own)
  updates = [device for group in own for device in group[: len(group) - each]]
  rollouts = [device for group in own for device in group[len(group) - each :]]
  return make_mesh(sizes, updates), make_mesh(rollout_sizes, rollouts)


def check_apart(mesh: Mesh, rollout_mesh: Mesh) -> None:
  """Raises a ValueError if the two meshes share some devices without being the same."""
  shared = set(mesh.devices.flat) & set(rollout_mesh.devices.flat)
  if shared and mesh != rollout_mesh:
    raise ValueError(
      f"mesh and rollout_mesh overlap: both have {len(shared)} of their {mesh.size} and {rollout_mesh.size} devices."
      " Give each its own devices, as d1jax.parallel.sides.sub_meshes does, or leave rollout_mesh out"
    )


def check_holds(tree: Any, name: str) -> None:
  """Raises a ValueError if arrays need more memory of a device than it has; if that is not known, nothing is checked.

  `tree` has shapes, types and placements, all of one mesh, and `name` is the field of that mesh.
  """
  leaves = jax.tree.leaves(tree)
  needed = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
  has = device_bytes(leaves[0].sharding.mesh)
  if has is not None and needed > has:
    raise ValueError(
      f"{name} does not hold the weights: they take {needed / 2**30:.3g} GiB of each of its devices, which have"
      f" {has / 2**30:.3g}: give {name} more devices along fsdp or tensor, over which weights are shared"
    )


def device_bytes(mesh: Mesh) -> int | None:
  """The bytes of memory of each device; None if its kind is not known, as that of CPUs."""
  chip = chips.of(mesh.devices.flat[0].device_kind)
  return None if chip is None else chip.hbm_bytes


def across(tree: Any, placements: Any) -> Any:
  """The same arrays on the devices of the other mesh. The copies are asynchronous; no other device waits for them.

  Args:
    tree: arrays on one mesh.
    placements: a placement on the other mesh for all arrays, or a tree of placements.
  """
  if isinstance(placements, NamedSharding):
    return jax.tree.map(lambda x: _copied(x, placements), tree)
  return jax.tree.map(_copied, tree, placements)


def _copied(x: jax.Array, target: NamedSharding) -> jax.Array:
  """An array on other devices.

  JAX copies between any two placements of one process. Of several processes each only has its own shards. There the
  array is first placed on its own devices as the target is placed on its devices; then each device copies what it has
  to its partner, which is of the same process.
  """
  if jax.process_count() == 1:
    return jax.device_put(x, target)
  free = collections.defaultdict(list)
  for device in cast(NamedSharding, x.sharding).mesh.devices.flat:
    free[device.process_index].append(device)
  partners = [free[device.process_index].pop(0) for device in target.mesh.devices.flat]
  laid_out = jax.device_put(x, twin(target, partners))
  data = {shard.device: shard.data for shard in laid_out.addressable_shards}
  pairs = zip(partners, target.mesh.devices.flat, strict=True)
  copies = [jax.device_put(data[source], device) for source, device in pairs if source in data]
  return jax.make_array_from_single_device_arrays(x.shape, target, copies)
