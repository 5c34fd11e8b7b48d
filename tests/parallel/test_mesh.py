import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, PartitionSpec

from d1jax.parallel.mesh import (
  MESH_AXES,
  RULES,
  batch_ways,
  changed,
  constrainer,
  make_mesh,
  moved,
  per_device,
  place,
  received_bytes,
  sharding,
  shardings,
  ways,
)


def mesh_of(*sizes: int) -> Mesh:
  devices = jax.devices()[: int(np.prod(sizes))]
  return make_mesh(dict(zip(MESH_AXES, sizes, strict=False)), devices)


def test_a_mesh_is_over_data_fsdp_tensor_and_sequence():
  mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  assert mesh.axis_names == ("data", "fsdp", "tensor", "sequence")
  assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2, "sequence": 1}
  assert mesh.devices.ravel().tolist() == jax.devices()


@pytest.mark.parametrize(
  ("sizes", "shape"),
  [((-1, 1, 1), (8, 1, 1)), ((1, -1, 2), (1, 4, 2)), ((2, 2, -1), (2, 2, 2)), ((8, -1, 1), (8, 1, 1))],
)
def test_minus_one_takes_the_devices_that_are_left(sizes, shape):
  mesh = make_mesh(dict(zip(MESH_AXES, sizes, strict=False)))
  assert tuple(mesh.shape.values()) == (*shape, 1)


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 3, 1), (-1, -1, 1), (0, 1, 1), (-1, 0, 1), (4, 4, 1), (-2, -4, 1)])
def test_sizes_that_do_not_multiply_to_the_devices_are_refused(sizes):
  wanted = "data={} fsdp={} tensor={} sequence=1 does not fit 8 devices".format(*sizes)
  with pytest.raises(ValueError, match=wanted):
    make_mesh(dict(zip(MESH_AXES, sizes, strict=False)))


def test_unknown_mesh_axes_are_refused():
  with pytest.raises(ValueError, match="data, model; expected data, fsdp, tensor, sequence"):
    make_mesh({"data": 8, "model": 1})


def test_a_placement_follows_the_rules():
  mesh = mesh_of(2, 2, 2)
  assert sharding(mesh, RULES, "batch", None, "vocab").spec == PartitionSpec(("data", "fsdp"), None, "tensor")
  assert sharding(mesh, RULES).spec == PartitionSpec()
  tree = shardings(mesh, RULES, {"a": ("embed", "mlp"), "b": {"c": ("norm",)}})
  assert tree["a"].spec == PartitionSpec("fsdp", "tensor")
  assert tree["b"]["c"].spec == PartitionSpec(None)


def test_rules_are_changed_by_name():
  assert changed(RULES, {"embed": None, "mlp": ("fsdp", "tensor")}) == {
    **RULES,
    "embed": None,
    "mlp": ("fsdp", "tensor"),
  }
  with pytest.raises(ValueError, match="logical axis 'experts' has no rule"):
    changed(RULES, {"experts": None})


@pytest.mark.parametrize(
  ("source", "target", "received"),
  [
    (("embed", "mlp"), ("embed", "mlp"), 0),
    (("embed", None), (None, None), 4 * 6 * 4),  # the other half of the rows
    ((None, None), ("embed", "mlp"), 0),
    (("embed", "mlp"), ("mlp", "embed"), 4 * 3 * 4),  # a device off the diagonal has nothing of it
    (("batch", None), (None, "mlp"), (8 - 2) * 3 * 4),
  ],
)
def test_bytes_that_a_move_brings(source, target, received):
  """Of a matrix of 8 x 6 float32 on two devices an axis."""
  mesh = mesh_of(2, 2, 2)
  x = jax.ShapeDtypeStruct((8, 6), jnp.float32)
  assert received_bytes([x], [sharding(mesh, RULES, *source)], [sharding(mesh, RULES, *target)]) == received


@pytest.mark.parametrize(
  ("rule", "kinds"),
  [
    ({"embed": ("fsdp", "tensor"), "mlp": None}, {"all-to-all", "all-gather"}),
    ({"embed": ("fsdp", "tensor"), "mlp": "data"}, {"all-to-all", "all-gather", "collective-permute"}),
  ],
)
def test_a_move_gathers_no_array_whole(rule, kinds):
  mesh = mesh_of(2, 2, 2)
  x = np.random.default_rng(0).normal(size=(16, 32)).astype(np.float32)
  source = sharding(mesh, {**RULES, **rule}, "embed", "mlp")
  target = sharding(mesh, {**RULES, "embed": None}, "embed", "mlp")
  program = jax.jit(lambda x: moved(x, source, target), in_shardings=source, out_shardings=target)
  np.testing.assert_array_equal(program(jax.device_put(x, source)), x)
  text = program.lower(x).compile().as_text()
  found = re.findall(r"f32\[([\d,]+)\][^ ]* (all-to-all|all-gather|collective-permute)\(", text)
  assert {kind for _, kind in found} <= kinds
  assert found
  assert max(np.prod([int(n) for n in shape.split(",")]) for shape, _ in found) == 16 * 32 // 2


@pytest.fixture(scope="module")
def slices():
  """Two slices of four TPUs."""
  if importlib.util.find_spec("libtpu") is None:
    pytest.skip("libtpu is not installed: tests/requirements.txt names the one that goes with this JAX")
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("TPU_SKIP_MDS_QUERY", "1")  # no machine to ask what it is
    patch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    yield topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2", num_slices=2).devices


@pytest.mark.parametrize("sizes", [(2, 2, 2), (4, 1, 2), (8, 1, 1), (-1, 1, 2, 2)])
def test_the_data_axis_goes_across_slices(slices, sizes):
  mesh = make_mesh(dict(zip(MESH_AXES, sizes, strict=False)), slices)
  assert set(mesh.devices.flat) == set(slices)
  half = mesh.shape["data"] // 2
  for part in (mesh.devices[:half], mesh.devices[half:]):
    assert len({device.slice_index for device in part.flat}) == 1


def test_other_axes_do_not_go_across_slices(slices):
  message = "data=1 fsdp=4 tensor=2 sequence=1 does not fit 2 slices: only data, 1, .* must be a multiple of 2"
  with pytest.raises(ValueError, match=message):
    make_mesh({"data": 1, "fsdp": 4, "tensor": 2}, slices)


def test_a_length_that_the_mesh_does_not_divide_stays_whole():
  constrain = constrainer(mesh_of(1, 2, 1, 4), RULES)
  place = jax.jit(lambda x: constrain(x, ("batch", "length", None)))
  assert {s.data.shape for s in place(jnp.zeros((4, 8, 3))).addressable_shards} == {(2, 2, 3)}
  assert {s.data.shape for s in place(jnp.zeros((4, 9, 3))).addressable_shards} == {(2, 9, 3)}


def test_an_axis_without_a_rule_is_named():
  with pytest.raises(ValueError, match="logical axis 'experts' has no rule; rules name: adapter, batch, embed"):
    sharding(mesh_of(1, 1, 1), RULES, "batch", "experts")
  with pytest.raises(ValueError, match="'experts'"):
    constrainer(mesh_of(1, 1, 1), RULES)(jnp.zeros((2, 2)), ("batch", "experts"))


def test_a_constraint_places_an_activation():
  mesh = mesh_of(2, 2, 2)
  constrain = constrainer(mesh, RULES)
  placed = jax.jit(lambda x: constrain(x, ("batch", "mlp")))(jnp.zeros((8, 4)))
  assert {s.data.shape for s in placed.addressable_shards} == {(2, 2)}


@pytest.mark.parametrize(
  ("rule", "ways"), [(("data", "fsdp"), 4), ("data", 2), (None, 1), ((), 1), (("data", "fsdp", "tensor"), 8)]
)
def test_batch_ways(rule, ways):
  assert batch_ways(mesh_of(2, 2, 2), {**RULES, "batch": rule}) == ways


def test_ways_of_an_axis():
  mesh = mesh_of(1, 2, 4)
  assert [ways(mesh, RULES, axis) for axis in ("batch", "heads", "adapter", "length")] == [2, 4, 8, 1]


def test_each_device_computes_its_part_alone():
  mesh, parts = mesh_of(2, 2, 2), []

  def rank(x, y):
    parts.append((x.shape, y.shape))
    return jnp.argsort(jnp.argsort(x * y, axis=1), axis=1)

  cut = per_device(rank, mesh, RULES, (("batch", "mlp"), ("batch", None)), ("batch", "mlp"))
  x, y = np.random.default_rng(0).normal(size=(8, 6)), np.ones((8, 1))
  expected = np.concatenate([half.argsort(1).argsort(1) for half in np.split(x, 2, axis=1)], axis=1)
  np.testing.assert_array_equal(jax.jit(cut)(x, y), expected)
  assert parts == [((2, 3), (2, 1))]


@pytest.mark.parametrize("processes", [1, 2])
def test_place_hands_each_device_its_rows(monkeypatch, processes):
  """With several processes each makes its own devices' parts of the same host array."""
  monkeypatch.setattr(jax, "process_count", lambda: processes)
  mesh = mesh_of(2, 2, 2)
  tree = {"x": np.arange(16, dtype=np.int32).reshape(8, 2), "y": np.arange(4.0, dtype=np.float32)}
  placed = place(tree, sharding(mesh, RULES, "batch"))
  for name, x in tree.items():
    np.testing.assert_array_equal(placed[name], x)
    assert placed[name].dtype == x.dtype
    for shard in placed[name].addressable_shards:
      assert len(shard.data) == len(x) // 4
      np.testing.assert_array_equal(shard.data, x[shard.index])
  scalar = place(np.int32(7), sharding(mesh, RULES))
  assert int(scalar) == 7
  assert len(scalar.addressable_shards) == 8
