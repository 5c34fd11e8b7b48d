import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d1jax.models.lora import Adapted
from d1jax.models.quantize import Quantized
from d1jax.publish import Publisher
from d1jax.run import experiment as experiments
from d1jax.state import Frozen, merge_for_rollout
from tests.jobs import small

MESH = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}
TENSOR = dict.fromkeys(("vocab", "heads", "kv_heads", "mlp", "adapter"), ("fsdp", "tensor"))
ROLLOUTS = {"batch": "data", "embed": None, **TENSOR}


def built(tmp_path, rollout_rules=None, **changes):
  """An experiment, its weights behind some training, and what publishes them."""
  fields = {"model__overrides__heads": 4, "model__overrides__embed": 64, **changes}
  config = small(tmp_path, **fields)
  with config.unlocked():
    config.rollout_rules = rollout_rules or {}
  experiment = experiments.build(config, None)
  optimizer = experiment.optimizer(config.grpo, 1)
  trained = experiment.model.weights.start()
  trained = jax.tree.map(lambda x: x + 0.01 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), trained)
  trained = jax.device_put(trained, experiment.model.weights.trainable_placement)
  return (
    experiment,
    trained,
    Publisher(experiment.model.weights, experiment.model.weights.abstract_state(optimizer).trainable),
  )


def publish(publisher, trained, base):
  publisher.compile()
  return publisher(trained, base)


def assert_placed(params, publisher):
  for (path, x), expected in zip(
    jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(publisher.abstract), strict=True
  ):
    assert (x.shape, x.dtype) == (expected.shape, expected.dtype), path
    assert x.sharding.is_equivalent_to(expected.sharding, x.ndim), path


def missing_bytes(before, after):
  """Bytes of each device's parts that it did not have, by marking every element; the most of any device."""
  missing = dict.fromkeys(jax.devices(), 0)
  for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
    held = {shard.device: shard.index for shard in old.addressable_shards}
    for shard in new.addressable_shards:
      wanted = np.zeros(new.shape, bool)
      wanted[shard.index] = True
      wanted[held[shard.device]] = False
      missing[shard.device] += int(wanted.sum()) * new.dtype.itemsize
  return max(missing.values())


@pytest.mark.slow(reason="compiles programs of its own")
def test_weights_that_need_no_change_are_handed_over(tmp_path):
  experiment, trained, publisher = built(tmp_path, **MESH)
  params = publish(publisher, trained, experiment.model.weights.frozen.base)
  assert all(a is b for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(trained), strict=True))
  assert publisher.received_bytes == 0
  assert "dot" not in publisher.trace().lower().as_text()


@pytest.mark.slow(reason="compiles programs of its own")
def test_rules_that_cut_alike_on_this_mesh_move_nothing(tmp_path):
  experiment, trained, publisher = built(tmp_path, ROLLOUTS, mesh__data=8)
  params = publish(publisher, trained, experiment.model.weights.frozen.base)
  assert all(a is b for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(trained), strict=True))
  assert publisher.received_bytes == 0


@pytest.mark.slow(reason="compiles programs of its own")
def test_all_weights_are_cast_before_they_move(tmp_path):
  experiment, trained, publisher = built(tmp_path, ROLLOUTS, model__dtype="bfloat16", **MESH)
  params = publish(publisher, trained, experiment.model.weights.frozen.base)
  assert_placed(params, publisher)
  for x, w in zip(jax.tree.leaves(params), jax.tree.leaves(trained), strict=True):
    assert x.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(w.astype(jnp.bfloat16), np.float32))
  up = params["blocks"]["mlp"]["up"]
  assert {s.data.shape for s in up.addressable_shards} == {(1, 64, 64 // 4)}
  assert publisher.received_bytes == missing_bytes(jax.tree.map(lambda w: w.astype(jnp.bfloat16), trained), params)


@pytest.mark.slow(reason="compiles programs of its own")
@pytest.mark.parametrize("rules", [None, ROLLOUTS], ids=["where they are", "moved"])
def test_adapters_are_added_into_a_float_base(tmp_path, rules):
  experiment, trained, publisher = built(tmp_path, rules, lora__rank=4, lora__targets=("q_proj", "up_proj"), **MESH)
  base = experiment.model.weights.frozen.base
  params = publish(publisher, trained, base)
  assert_placed(params, publisher)
  merged = merge_for_rollout(trained, Frozen(base, {}))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), params, merged)
  assert not np.array_equal(params["blocks"]["mlp"]["up"], base["blocks"]["mlp"]["up"])
  assert (params["blocks"]["mlp"]["down"] is base["blocks"]["mlp"]["down"]) == (rules is None)
  np.testing.assert_array_equal(params["blocks"]["mlp"]["down"], base["blocks"]["mlp"]["down"])
  before = jax.device_put(merged, experiment.model.weights.base_placement)
  assert publisher.received_bytes == missing_bytes(before, params)
  assert (publisher.received_bytes > 0) == (rules is not None)


@pytest.mark.slow(reason="compiles programs of its own")
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantised_base_moves_in_its_few_bits(tmp_path, kind):
  few = {"model__quantize": kind, "lora__rank": 4, "model__overrides__embed": 256, "model__overrides__mlp": 256}
  experiment, trained, publisher = built(tmp_path, ROLLOUTS, model__dtype="bfloat16", **few, **MESH)
  base = experiment.model.weights.frozen.base
  params = publish(publisher, trained, base)
  assert_placed(params, publisher)
  adapted = params["blocks"]["attention"]["query"]
  assert isinstance(adapted, Adapted)
  assert isinstance(adapted.base, Quantized)
  jax.tree.map(np.testing.assert_array_equal, adapted.base, base["blocks"]["attention"]["query"])
  assert adapted.adapter.a.dtype == jnp.bfloat16
  assert {s.data.shape for s in adapted.adapter.b.addressable_shards} == {(1, 4, 256 // 4)}
  codes = adapted.base.codes
  assert {s.data.shape[-1] for s in codes.addressable_shards} == {codes.shape[-1] // 4}


def test_heads_that_the_rollouts_mesh_does_not_divide_are_refused(tmp_path):
  with pytest.raises(
    ValueError, match=r"rollout_rules cut heads over 4 devices, but the network has 2: change rollout_"
  ):
    built(tmp_path, ROLLOUTS, model__overrides__heads=2, **MESH)


def test_an_unknown_axis_in_rollout_rules_is_refused(tmp_path):
  with pytest.raises(ValueError, match="logical axis 'experts' has no rule; rules name: adapter"):
    built(tmp_path, {"experts": None}, **MESH)


@pytest.mark.slow(reason="compiles programs of its own")
def test_weights_that_the_rollouts_mesh_does_not_divide_are_refused(tmp_path):
  with pytest.raises(ValueError, match=r"does not divide \['blocks'\]\['mlp'\]\['down'\]"):
    built(tmp_path, ROLLOUTS, model__overrides__mlp=66, **MESH)


def test_rollouts_on_devices_of_their_own_get_copies(tmp_path):
  """Also of weights that need no change, so that an update may take the trained ones."""
  sides = {"mesh__data": 4, "rollout_mesh__data": 2, "rollout_mesh__tensor": 2}
  experiment, trained, publisher = built(tmp_path, **sides)
  weights = experiment.model.weights
  found = publish(publisher, trained, weights.frozen.base)
  assert_placed(found, publisher)
  jax.tree.map(np.testing.assert_array_equal, found, trained)
  assert {device for x in jax.tree.leaves(found) for device in x.devices()} == set(weights.rollout_mesh.devices.flat)
  largest = max(shard.data.nbytes for x in jax.tree.leaves(found) for shard in x.addressable_shards)
  assert publisher.received_bytes >= largest
