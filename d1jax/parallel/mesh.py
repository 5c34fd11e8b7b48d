"""The mesh over (data, fsdp, tensor), and where logical axes live on it: the only file that builds a Mesh or a
PartitionSpec.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from d1jax.state import TrainState

MESH_AXES = ("data", "fsdp", "tensor")
Rules = Mapping[str, Any]
"""Logical axis name -> mesh axis name, tuple of names, or None for replicated."""

RULES: Rules = {
  "batch": ("data", "fsdp"),
  "length": None,
  "vocab": "tensor",
  "embed": "fsdp",
  "heads": "tensor",
  "kv_heads": "tensor",
  "mlp": "tensor",
  "adapter": ("tensor", "fsdp"),
  "norm": None,
  "layers": None,
}
"""Weights sharded over `fsdp` and `tensor`, batches over `data` and `fsdp`: what the configurations start from."""


def first_device() -> list[Any]:
  """The first device of this process, for a mesh of one."""
  return [jax.local_devices()[0]]


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
  """A mesh over all devices; one size may be -1, "the devices that are left".

  Args:
    sizes: devices along data, fsdp and tensor.
    devices: default: all devices of all processes.

  Raises:
    ValueError: the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  if set(sizes) != set(MESH_AXES):
    raise ValueError(f"mesh axes are {', '.join(sizes)}; expected {', '.join(MESH_AXES)}")
  shape = [int(sizes[axis]) for axis in MESH_AXES]
  if shape.count(-1) == 1:
    known = math.prod(n for n in shape if n != -1)
    shape[shape.index(-1)] = len(devices) // known if known > 0 else 0
  if min(shape) < 1 or math.prod(shape) != len(devices):
    wanted = " ".join(f"{axis}={sizes[axis]}" for axis in MESH_AXES)
    raise ValueError(
      f"mesh {wanted} does not fit {len(devices)} devices: the sizes must multiply to {len(devices)}"
      " (one of them may be -1)"
    )
  if devices[0].platform == "cpu":
    grid = np.asarray(devices).reshape(shape)
  else:
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _spec(axes: Sequence[str | None], rules: Rules) -> PartitionSpec:
  for axis in axes:
    if axis is not None and axis not in rules:
      raise ValueError(f"logical axis {axis!r} has no rule; rules name: {', '.join(sorted(rules))}")
  return PartitionSpec(*(None if axis is None else rules[axis] for axis in axes))


def sharding(mesh: Mesh, rules: Rules, *axes: str | None) -> NamedSharding:
  """The placement of an array with these logical axes; no axes: replicated."""
  return NamedSharding(mesh, _spec(axes, rules))


def shardings(mesh: Mesh, rules: Rules, axes: Any) -> Any:
  """A tree of placements for a tree of logical axes (tuples of names)."""
  return jax.tree.map(lambda a: sharding(mesh, rules, *a), axes, is_leaf=lambda a: isinstance(a, tuple))


def check_divides(abstract: Any, placements: Any) -> None:
  """Raises a ValueError that names the first array whose axes the mesh does not divide.

  Args:
    abstract: shapes.
    placements: a NamedSharding for each.
  """
  leaves = jax.tree_util.tree_leaves_with_path(abstract)
  for (path, x), placement in zip(leaves, jax.tree.leaves(placements), strict=True):
    try:
      placement.shard_shape(x.shape)
    except ValueError:
      mesh = ", ".join(f"{axis}={size}" for axis, size in placement.mesh.shape.items())
      raise ValueError(
        f"a mesh of {mesh} does not divide {jax.tree_util.keystr(path)}, {x.shape} cut along {placement.spec}:"
        " change the mesh or the rules"
      ) from None


def constrainer(mesh: Mesh, rules: Rules) -> Callable[[jax.Array, tuple[str | None, ...]], jax.Array]:
  """`constrain(x, axes)` for a model: the one way that it states where an activation lives."""
  return lambda x, axes: jax.lax.with_sharding_constraint(x, sharding(mesh, rules, *axes))


def state_shardings(mesh: Mesh, rules: Rules, axes: Any, abstract: Any, optimizer: optax.GradientTransformation) -> Any:
  """Where a TrainState lives, as a TrainState of placements: moments beside their parameter, scalars replicated.

  Args:
    mesh: the devices.
    rules: placement of logical axes.
    axes: logical axes of the trainable weights.
    abstract: their shapes.
    optimizer: whose state is placed.
  """
  replicated = sharding(mesh, rules)
  by_parameter = shardings(mesh, rules, axes)
  moments = optax.tree.map_params(
    optimizer,
    lambda _, placement: placement,
    jax.eval_shape(optimizer.init, abstract),
    by_parameter,
    transform_non_params=lambda _: replicated,
  )
  placements: tuple[Any, ...] = (replicated, by_parameter, moments, replicated)
  return TrainState(*placements)


def ways(mesh: Mesh, rules: Rules, axis: str) -> int:
  """Over how many devices a logical axis is split; an array that is cut along it must be a multiple long."""
  names = rules[axis]
  names = (names,) if isinstance(names, str) else tuple(names or ())
  return math.prod(mesh.shape[name] for name in names)


def batch_ways(mesh: Mesh, rules: Rules) -> int:
  """Over how many devices the batch axis is split; a batch must be a multiple of it."""
  return ways(mesh, rules, "batch")


def per_device(
  function: Callable[..., jax.Array],
  mesh: Mesh,
  rules: Rules,
  arguments: Sequence[Sequence[str | None]],
  result: Sequence[str | None],
) -> Callable[..., jax.Array]:
  """A function of global arrays of which each device computes its part from its parts of the arguments, alone.

  Args:
    function: of the parts; no device needs what another holds.
    mesh: the devices.
    rules: placement of logical axes.
    arguments: logical axes of each argument.
    result: logical axes of the result.
  """
  specs = tuple(_spec(axes, rules) for axes in arguments)
  # Kernels do not say over which axes their results vary, so that there is nothing to check.
  return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=_spec(result, rules), check_vma=False)


def place(tree: Any, placement: NamedSharding) -> Any:
  """Host arrays, the same on every process, as global arrays of which each device holds its part."""
  if jax.process_count() == 1:
    return jax.device_put(tree, placement)
  return jax.tree.map(
    lambda x: jax.make_array_from_callback(np.shape(x), placement, lambda index: np.asarray(x)[index]),
    tree,
  )
