"""The mesh over (data, fsdp, tensor, sequence), and the placement of logical axes on it: the only file that builds a
Mesh or a PartitionSpec.
"""

import collections
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from d1jax.state import TrainState

MESH_AXES = ("data", "fsdp", "tensor", "sequence")
Rules = Mapping[str, Any]
"""From the name of a logical axis to a mesh axis, a tuple of mesh axes, or None for replicated."""

RULES: Rules = {
  "batch": ("data", "fsdp"),
  "length": "sequence",
  "vocab": "tensor",
  "embed": "fsdp",
  "heads": "tensor",
  "kv_heads": "tensor",
  "mlp": "tensor",
  "adapter": ("tensor", "fsdp"),
  "norm": None,
  "layers": None,
}
"""The default rules: weights are sharded over `fsdp` and `tensor`, batches over `data` and `fsdp`, positions over
`sequence`.
"""


def changed(rules: Rules, changes: Rules) -> Rules:
  """The rules with some of them replaced.

  Raises:
    ValueError: there is no such rule to replace.
  """
  for axis in changes:
    _check_known(axis, rules)
  return {**rules, **changes}


def first_device() -> list[Any]:
  """The first device of this process, for a mesh of one."""
  return [jax.local_devices()[0]]


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
  """A mesh over all devices; one size may be -1, which stands for the devices that are left.

  The network between TPU slices is slower than that within a slice. For this reason only the data axis may go across
  slices.

  Args:
    sizes: devices along data, fsdp, tensor and sequence; an axis that is not named has one.
    devices: default: all devices of all processes.

  Raises:
    ValueError: an axis is unknown, the sizes do not multiply to the number of devices, or the slices do not share the
      data axis.
  """
  devices = jax.devices() if devices is None else devices
  if not set(sizes) <= set(MESH_AXES):
    raise ValueError(f"mesh axes are {', '.join(sizes)}; expected {', '.join(MESH_AXES)}")
  shape = [int(sizes.get(axis, 1)) for axis in MESH_AXES]
  wanted = " ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, shape, strict=True))
  if shape.count(-1) == 1:
    known = math.prod(n for n in shape if n != -1)
    shape[shape.index(-1)] = len(devices) // known if known > 0 else 0
  if min(shape) < 1 or math.prod(shape) != len(devices):
    raise ValueError(
      f"mesh {wanted} does not fit {len(devices)} devices: the sizes must multiply to {len(devices)}"
      " (one of them may be -1)"
    )
  slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
  if shape[0] % slices:
    raise ValueError(
      f"mesh {wanted} does not fit {slices} slices: only data, {shape[0]}, may go across slices, and must be a multiple"
      f" of {slices}"
    )
  if devices[0].platform == "cpu":
    grid = np.asarray(devices).reshape(shape)
  elif slices > 1:
    within, across = (shape[0] // slices, *shape[1:]), (slices, *(1 for _ in shape[1:]))
    grid = mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
  else:
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _check_known(axis: str, rules: Rules) -> None:
  if axis not in rules:
    raise ValueError(f"logical axis {axis!r} has no rule; rules name: {', '.join(sorted(rules))}")


def _spec(axes: Sequence[str | None], rules: Rules) -> PartitionSpec:
  for axis in axes:
    if axis is not None:
      _check_known(axis, rules)
  return PartitionSpec(*(None if axis is None else rules[axis] for axis in axes))


def _disjoint(spec: PartitionSpec) -> PartitionSpec:
  """The spec with every axis of the mesh only where it stands last: (("data", "fsdp"), None, "fsdp") becomes
  (("data",), None, "fsdp").
  """
  entries = []
  for i, entry in enumerate(spec):
    later = set(itertools.chain(*map(_names, spec[i + 1 :])))
    names = _names(entry)
    entries.append(tuple(name for name in names if name not in later) if later & set(names) else entry)
  return PartitionSpec(*entries)


def sharding(mesh: Mesh, rules: Rules, *axes: str | None) -> NamedSharding:
  """The placement of an array with these logical axes; no axes: replicated."""
  return NamedSharding(mesh, _spec(axes, rules))


def shardings(mesh: Mesh, rules: Rules, axes: Any) -> Any:
  """A tree of placements for a tree of logical axes (tuples of names)."""
  return jax.tree.map(lambda a: sharding(mesh, rules, *a), axes, is_leaf=lambda a: isinstance(a, tuple))


def check_divides(abstract: Any, placements: Any) -> None:
  """Raises a ValueError that names the first array whose axes the mesh does not divide."""
  leaves = jax.tree_util.tree_leaves_with_path(abstract)
  for (path, x), placement in zip(leaves, jax.tree.leaves(placements), strict=True):
    try:
      placement.shard_shape(x.shape)
    except ValueError:
      mesh = ", ".join(f"{axis}={size}" for axis, size in placement.mesh.shape.items())
      raise ValueError(
        f"a mesh of {mesh} does not divide {jax.tree_util.keystr(path)} of shape {x.shape}, which is sharded as"
        f" {placement.spec}: change the mesh or the rules"
      ) from None


def constrainer(mesh: Mesh, rules: Rules) -> Callable[[jax.Array, tuple[str | None, ...]], jax.Array]:
  """`constrain(x, axes)` for a model: the only way in which a model states the placement of an activation.

  A length that the mesh does not divide, such as that of a cache's window, is not sharded. If two axes of an array
  would be sharded over the same axis of the mesh, only the last one is: with embed over `fsdp`, the axes ("batch",
  "length", "embed") shard the batch over `data` alone.
  """
  lengths = ways(mesh, rules, "length")

  def constrain(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    cut = [None if axis == "length" and size % lengths else axis for axis, size in zip(axes, x.shape, strict=True)]
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, _disjoint(_spec(cut, rules))))

  return constrain


def constrained(tree: Any, placement: NamedSharding) -> Any:
  """The same values, inside a compiled program, at this placement."""
  return jax.lax.with_sharding_constraint(tree, placement)


def moved(tree: Any, source: Any, target: Any) -> Any:
  """The same values, inside a compiled program, moved from one tree of placements to another.

  First, mesh axes that shard another axis of the array afterwards change over (an all-to-all). Then the others are
  gathered. Without these two steps XLA may gather whole arrays and shard them again. Stacks of matrices, which are not
  sharded along their first axis, are moved one matrix after the other, because XLA needs memory for two copies of what
  it moves.
  """

  # A matrix at ("fsdp", "tensor") is needed at (None, "fsdp"). `_halfway` is (None, ("fsdp", "tensor")): the all-to-all
  # takes `fsdp` from the rows to the columns, each device sends and receives only parts of what it holds, and an
  # all-gather over `tensor` follows. A gather first would hold the whole matrix on every device.
  def through(x: jax.Array, placements: Sequence[NamedSharding]) -> jax.Array:
    for placement in placements:
      x = constrained(x, placement)
    return x

  def move(x: jax.Array, old: NamedSharding, new: NamedSharding) -> jax.Array:
    if old == new:
      return x
    steps = (old, _halfway(old, new), new)
    if x.ndim < 3 or any(_names(step.spec[0]) for step in steps):
      return through(x, steps)
    each = [NamedSharding(step.mesh, PartitionSpec(*step.spec[1:])) for step in steps]
    return constrained(jax.lax.map(lambda matrix: through(matrix, each), constrained(x, old)), new)

  return jax.tree.map(move, tree, source, target)


def _halfway(source: NamedSharding, target: NamedSharding) -> NamedSharding:
  """Between two placements: mesh axes of both are where the target has them, axes of the source alone stay there."""
  before, after = ([_names(axis) for axis in placement.spec] for placement in (source, target))
  of_source, of_target = set(itertools.chain(*before)), set(itertools.chain(*after))
  spec = [
    (*(name for name in new if name in of_source), *(name for name in old if name not in of_target))
    for old, new in zip(before, after, strict=True)
  ]
  return NamedSharding(source.mesh, PartitionSpec(*spec))


def _names(axis: Any) -> tuple[str, ...]:
  return (axis,) if isinstance(axis, str) else tuple(axis or ())


def received_bytes(abstract: Any, source: Any, target: Any) -> int:
  """Bytes that a device must receive to hold its parts of arrays at other placements; the most of any device.

  `source` and `target` have the placement of each array of `abstract` before and after.
  """
  received: collections.Counter[Any] = collections.Counter()
  for x, before, after in zip(*map(jax.tree.leaves, (abstract, source, target)), strict=True):
    held = before.devices_indices_map(x.shape)
    nothing = tuple(slice(0, 0) for _ in x.shape)
    for device, part in after.devices_indices_map(x.shape).items():
      wanted = [range(*index.indices(size)) for index, size in zip(part, x.shape, strict=True)]
      owned = [range(*index.indices(size)) for index, size in zip(held.get(device, nothing), x.shape, strict=True)]
      shared = math.prod(
        max(0, min(a.stop, b.stop) - max(a.start, b.start)) for a, b in zip(wanted, owned, strict=True)
      )
      received[device] += (math.prod(map(len, wanted)) - shared) * x.dtype.itemsize
  return max(received.values())


def state_shardings(mesh: Mesh, rules: Rules, axes: Any, abstract: Any, optimizer: optax.GradientTransformation) -> Any:
  """The placement of a TrainState, as a TrainState of placements: moments like their parameter, scalars replicated.

  `axes` are the logical axes of the trainable weights, `abstract` their shapes.
  """
  replicated = sharding(mesh, rules)
  by_parameter = shardings(mesh, rules, axes)
  moments = optax.tree.map_params(
    optimizer,
    lambda moment, placement: moment if _is_masked(moment) else placement,
    jax.eval_shape(optimizer.init, abstract),
    by_parameter,
    transform_non_params=lambda _: replicated,
    is_leaf=_is_masked,
  )
  placements: tuple[Any, ...] = (replicated, by_parameter, moments, replicated)
  return TrainState(*placements)


def _is_masked(moment: Any) -> bool:
  """Whether it stands for a weight that another part of the optimiser updates."""
  return isinstance(moment, optax.MaskedNode)


def ways(mesh: Mesh, rules: Rules, axis: str) -> int:
  """Over how many devices a logical axis is sharded; its length must be a multiple of this number."""
  return math.prod(mesh.shape[name] for name in _names(rules[axis]))


def batch_ways(mesh: Mesh, rules: Rules) -> int:
  """Over how many devices the batch axis is sharded; a batch must be a multiple of this number."""
  return ways(mesh, rules, "batch")


def part_index(rules: Rules, axis: str) -> Int[Array, ""]:
  """In a function of `per_device`: the number of this device's part along a logical axis."""
  return jax.lax.axis_index(_spec((axis,), rules)[0])


def per_device(
  function: Callable[..., jax.Array],
  mesh: Mesh,
  rules: Rules,
  arguments: Sequence[Sequence[str | None]],
  result: Sequence[str | None],
) -> Callable[..., jax.Array]:
  """A function of global arrays in which each device computes its part of the result from its parts of the arguments.

  No device needs a part of another. `arguments` has the logical axes of each argument, `result` those of the result.
  """
  specs = tuple(_spec(axes, rules) for axes in arguments)
  # Kernels do not say over which axes their results vary: the check would have nothing to compare with.
  return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=_spec(result, rules), check_vma=False)


def twin(placement: NamedSharding, devices: Sequence[Any]) -> NamedSharding:
  """The same placement on other devices, each in the place of one of `placement`."""
  mesh = placement.mesh
  grid = np.asarray(devices, object).reshape(mesh.devices.shape)
  return NamedSharding(Mesh(grid, mesh.axis_names, axis_types=mesh.axis_types), placement.spec)


def place(tree: Any, placement: NamedSharding) -> Any:
  """Makes global arrays, of which each device holds its part, from host arrays that are the same on every process."""
  if jax.process_count() == 1:
    return jax.device_put(tree, placement)

  def spread(x: Any) -> jax.Array:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      return jax.random.wrap_key_data(spread(jax.random.key_data(x)))
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, placement, lambda index: host[index])

  return jax.tree.map(spread, tree)


def with_placements(abstract: Any, placements: Any) -> Any:
  """Shapes and dtypes with a placement for each leaf."""
  return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, placements)


def with_placement(abstract: Any, placement: Any) -> Any:
  """The same with one placement for every leaf."""
  return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=placement), abstract)
