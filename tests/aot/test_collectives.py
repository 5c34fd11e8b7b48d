import jax
import jax.numpy as jnp
import pytest

from d1jax.aot import collectives, hlo
from tests.aot import programs

MINE = 8 * 128 * 4
"""Bytes of a device's part of float32 [64, 128] over eight devices."""

COLUMNS = ((0, 2, 4, 6), (1, 3, 5, 7))
PAIRS = ((0, 1), (2, 3), (4, 5), (6, 7))

gather = lambda x, axis: jax.lax.all_gather(x, axis, tiled=True)
scatter = lambda x, axis: jax.lax.psum_scatter(x, axis, tiled=True)


def found(platform, function, *shapes):
  program = hlo.parse(programs.compiled(platform, function, *shapes).as_text())
  return collectives.find(program, 8)


@pytest.mark.parametrize("platform", programs.PLATFORMS)
@pytest.mark.parametrize(
  ("function", "kind", "received", "groups"),
  [
    (lambda x: jax.lax.psum(x, "b"), "all-reduce", MINE, PAIRS),
    (lambda x: jax.lax.psum(x, "a"), "all-reduce", 2 * MINE * 3 // 4, COLUMNS),
    (lambda x: jnp.sin(gather(x, "a"))[:8] + x, "all-gather", 3 * MINE, COLUMNS),
    (lambda x: jax.lax.all_to_all(x, "a", 0, 1), "all-to-all", MINE * 3 // 4, COLUMNS),
  ],
  ids=["pairs", "columns", "gather", "all-to-all"],
)
def test_each_kind_is_found_with_its_bytes(platform, function, kind, received, groups):
  step = lambda x, _: (jnp.sin(function(x)).reshape(x.shape), None)
  looped = lambda x: jax.lax.scan(step, x, length=7)[0]
  shape = (64, 128) if kind != "all-to-all" else (32, 32, 32)
  if kind == "all-to-all":
    received = 4 * 32 * 32 * 4 * 3 // 4
  (each,) = found(platform, looped, shape)
  assert (each.kind, each.bytes, each.times, each.in_loop) == (kind, received, 7, True)
  assert sorted(map(sorted, each.groups)) == sorted(map(list, groups))


@pytest.mark.parametrize("platform", programs.PLATFORMS)
def test_a_sum_that_is_scattered(platform):
  (each,) = found(platform, lambda x: scatter(jnp.sin(x), "b"), (128, 128))
  assert not each.in_loop
  # The TPU's compiler may add everything where that is as fast.
  assert (each.kind, each.bytes) in {("reduce-scatter", MINE), ("all-reduce", 2 * MINE)}


@pytest.mark.parametrize("platform", programs.PLATFORMS)
def test_a_permutation(platform):
  ring = [(i, (i + 1) % 4) for i in range(4)]
  (each,) = found(platform, lambda x: jax.lax.ppermute(x, "a", ring), (64, 128))
  assert (each.kind, each.bytes, each.times) == ("collective-permute", MINE, 1)
  assert set(each.groups) == {(2 * i + b, 2 * ((i + 1) % 4) + b) for i in range(4) for b in range(2)}


@pytest.mark.slow(reason="compiles for TPUs")
def test_a_gather_that_is_spread_over_products_counts_once():
  def function(x, w):
    layer = lambda x, w: (jnp.tanh(jnp.tanh(x @ gather(w[0], "a")) @ gather(w[1], "a")), None)
    return jax.lax.scan(layer, x, w.reshape(4, 2, 256, 1024))[0]

  text = programs.compiled("v5e:2x4", function, (8 * 4096, 1024), (8 * 2048, 1024)).as_text()
  assert text.count(" all-gather(") > 2, "the gather is not spread: another example is needed"
  weights = [each for each in collectives.find(hlo.parse(text), 8) if each.kind == "all-gather"]
  assert [(each.times, each.bytes) for each in weights] == [(4, 3 * 256 * 1024 * 2)] * 2, "in bfloat16"


@pytest.mark.parametrize(
  ("attributes", "groups"),
  [
    ("replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}", PAIRS),
    ("replica_groups=[4,2]<=[8], dimensions={0}", PAIRS),
    ("replica_groups=[2,4]<=[4,2]T(1,0), use_global_device_ids=true", COLUMNS),
    ("replica_groups=mesh['axis_0'=4,'axis_1'=1,'axis_2'=2] {'axis_2'}, to_apply=%add", PAIRS),
    ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", COLUMNS),
    ("replica_groups=mesh['axis_0'=2,'axis_1'=1,'axis_2'=4], device_ids=([4,2]T(1,0)) {'axis_0'}", PAIRS),
    ("replica_groups=mesh['axis_0'=2,'axis_1'=1,'axis_2'=4], device_ids=([4,2]T(1,0)) {'axis_2'}", COLUMNS),
    ("source_target_pairs={{0,1},{1,0}}, channel_id=3", ((0, 1), (1, 0))),
    ("channel_id=1", (tuple(range(8)),)),
  ],
)
def test_groups(attributes, groups):
  assert sorted(collectives.groups_of(attributes, 8)) == sorted(groups)


def test_a_part_of_an_axis_is_not_understood():
  with pytest.raises(ValueError, match="a part of an axis"):
    collectives.groups_of("replica_groups=mesh['a'=8] {'a':(1)2}", 8)


@pytest.mark.parametrize(
  ("kind", "expected"),
  [("all-gather", 75), ("reduce-scatter", 300), ("all-reduce", 150), ("all-to-all", 75), ("collective-permute", 100)],
)
def test_bytes_of_a_ring(kind, expected):
  assert collectives.received_bytes(kind, 100, 4) == expected
