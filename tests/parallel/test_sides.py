"""Devices of updates and of rollouts: which are whose, and what goes from one side to the other."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from d1jax.parallel import sides
from d1jax.parallel.mesh import RULES, make_mesh, place, sharding, with_placement


def devices_of(*processes: int):
  """Devices of several processes, as far as the choice of a side looks at them."""
  return [SimpleNamespace(id=i, process_index=p, platform="cpu") for i, p in enumerate(processes)]


def test_each_side_has_its_own_devices():
  mesh, rollout_mesh = sides.sub_meshes({"data": -1, "fsdp": 2}, {"data": 1, "tensor": 2})
  assert dict(mesh.shape) == {"data": 3, "fsdp": 2, "tensor": 1, "sequence": 1}
  assert [*mesh.devices.flat, *rollout_mesh.devices.flat] == jax.devices()
  assert sides.sub_meshes({"data": 2}, {"data": -1})[1].size == 6
  one, same = sides.sub_meshes({"data": -1}, {})
  assert one is same
  assert one.size == 8


@pytest.mark.parametrize(
  ("sizes", "rollout_sizes"),
  [({"data": 8}, {"data": 4}), ({"data": 2}, {"data": 2}), ({"data": -1}, {"data": 8}), ({"data": -1}, {"data": -1})],
)
def test_sides_that_overlap_or_leave_devices_out_are_refused(sizes, rollout_sizes):
  with pytest.raises(ValueError, match=r"do not share 8 devices.*add up to 8"):
    sides.sub_meshes(sizes, rollout_sizes)


@pytest.mark.parametrize("processes", [(0, 0, 0, 0, 1, 1, 1, 1), (0, 0, 0, 1)])
def test_processes_that_do_not_share_alike_are_refused(processes):
  with pytest.raises(ValueError, match="let it take half of them, half of each process"):
    sides.sub_meshes({"data": -1}, {"data": 2 if len(processes) == 8 else 1}, devices_of(*processes))


def test_meshes_that_overlap_are_refused():
  devices = jax.devices()
  mesh = make_mesh({"data": 4}, devices[:4])
  sides.check_apart(mesh, mesh)
  sides.check_apart(mesh, make_mesh({"data": 4}, devices[4:]))
  with pytest.raises(ValueError, match="overlap: both have 2 of their 4 and 4 devices"):
    sides.check_apart(mesh, make_mesh({"data": 4}, devices[2:6]))


def test_a_side_that_does_not_hold_the_weights_is_refused(monkeypatch):
  mesh = make_mesh({"fsdp": 2}, jax.devices()[:2])
  weights = with_placement({"w": np.zeros((2**8, 2**9), np.float32)}, sharding(mesh, RULES, "embed", "mlp"))
  assert sides.device_bytes(mesh) is None
  sides.check_holds(weights, "rollout_mesh")
  monkeypatch.setattr(sides, "device_bytes", lambda mesh: 2**18)
  sides.check_holds(weights, "rollout_mesh")
  monkeypatch.setattr(sides, "device_bytes", lambda mesh: 2**18 - 1)
  with pytest.raises(ValueError, match=r"rollout_mesh does not hold the weights: .* along fsdp or tensor"):
    sides.check_holds(weights, "rollout_mesh")


@pytest.mark.parametrize("several", [False, True])
def test_arrays_are_the_same_on_the_other_side(monkeypatch, several):
  """Also the way that several processes take, in which each device gives to a partner."""
  mesh, rollout_mesh = sides.sub_meshes({"data": 2, "fsdp": 2}, {"fsdp": 1, "tensor": 4})
  x = np.arange(64, dtype=np.float32).reshape(8, 8)
  tree = {"w": place(x, sharding(mesh, RULES, "embed", "mlp")), "rows": place(x + 1, sharding(mesh, RULES, "batch"))}
  if several:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
  target = sharding(rollout_mesh, RULES, "embed", "mlp")
  for placements in (target, {"w": target, "rows": sharding(rollout_mesh, RULES)}):
    found = sides.across(tree, placements)
    np.testing.assert_array_equal(found["w"], x)
    np.testing.assert_array_equal(found["rows"], x + 1)
    assert found["w"].sharding == target
    assert set(found["rows"].devices()) == set(rollout_mesh.devices.flat)
