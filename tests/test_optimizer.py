import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from d1jax import optimizer
from d1jax.models import lora
from d1jax.models.transformer import TransformerSize, build
from d1jax.parallel import mesh as meshes

SETTINGS = {
  "learning_rate": 0.1,
  "steps": 10,
  "warmup_steps": 0,
  "decay": "constant",
  "b1": 0.9,
  "b2": 0.99,
  "weight_decay": 0.0,
  "max_grad_norm": 1e9,
}


@pytest.mark.parametrize(
  ("warmup", "decay", "expected"),
  [
    (0, "constant", {0: 2.0, 1: 2.0, 9: 2.0, 10: 2.0, 50: 2.0}),
    (4, "constant", {0: 0.0, 1: 0.5, 2: 1.0, 4: 2.0, 10: 2.0, 50: 2.0}),
    (0, "linear", {0: 2.0, 1: 1.8, 5: 1.0, 10: 0.0, 50: 0.0}),
    (2, "linear", {0: 0.0, 1: 1.0, 2: 2.0, 6: 1.0, 10: 0.0, 50: 0.0}),
  ],
)
def test_schedule_values(warmup, decay, expected):
  rate = optimizer.schedule(2.0, 10, warmup, decay)
  for step, value in expected.items():
    np.testing.assert_allclose(rate(step), value, rtol=1e-6, atol=1e-7)
  logged = optimizer.rates(2.0, 10, warmup, decay)
  np.testing.assert_allclose(logged, [rate(step) for step in range(10)], rtol=1e-6, atol=1e-7)


def test_an_unknown_decay_is_refused():
  with pytest.raises(ValueError, match="decay='cosine' is unknown; known: constant, linear"):
    optimizer.schedule(1.0, 10, 0, "cosine")


def test_all_but_the_norm_scales_and_the_biases_decay():
  shapes = jax.eval_shape(build(TransformerSize(8, 8, 2, 8, 1, qkv_bias=True)).init, jax.random.key(0))
  marked = jax.tree_util.tree_leaves_with_path(optimizer.decayed(shapes))
  kept = {jax.tree_util.keystr(path) for path, decays in marked if not decays}
  assert kept == {
    "['blocks']['attention']['key_bias']",
    "['blocks']['attention']['query_bias']",
    "['blocks']['attention']['value_bias']",
    "['blocks']['attention_norm']['scale']",
    "['blocks']['mlp_norm']['scale']",
    "['final_norm']['scale']",
  }


def test_adapters_decay():
  """Those of a network with biases too: an adapter is of a weight."""
  shapes = jax.eval_shape(build(TransformerSize(8, 8, 2, 8, 1, qkv_bias=True)).init, jax.random.key(0))
  adapters = jax.eval_shape(lambda key: lora.init(key, lora.LoraSpec(2, 2.0), shapes), jax.random.key(0))
  assert all(jax.tree.leaves(optimizer.decayed(adapters)))


def adamw(params, gradients, *, rate, b1, b2, decay, clip):
  """Adam with decoupled decay by hand, in float64."""
  m = v = 0.0
  for t, g in enumerate(gradients, 1):
    g = g * min(1.0, clip / np.linalg.norm(g))
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
    step = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + 1e-8)
    params = params - rate * (step + decay * params)
  return params


@pytest.mark.parametrize(("name", "decays"), [("weight", 1.0), ("final_norm", 0.0), ("key_bias", 0.0)])
def test_steps_are_adamw_behind_a_clip(name, decays):
  rng = np.random.default_rng(0)
  start, gradients = rng.normal(size=4), [rng.normal(size=4) for _ in range(3)]
  made = optimizer.adamw(**SETTINGS | {"weight_decay": 0.3, "max_grad_norm": 0.5})
  params = {name: jnp.asarray(start, jnp.float32)}
  state = made.init(params)
  for g in gradients:
    updates, state = made.update({name: jnp.asarray(g, jnp.float32)}, state, params)
    params = jax.tree.map(jnp.add, params, updates)
  expected = adamw(start, gradients, rate=0.1, b1=0.9, b2=0.99, decay=0.3 * decays, clip=0.5)
  np.testing.assert_allclose(params[name], expected, rtol=1e-5)


def test_moments_are_float32():
  state = optimizer.adamw(**SETTINGS).init({"w": jnp.ones(3)})
  kinds = {leaf.dtype for leaf in jax.tree.leaves(state) if leaf.ndim}
  assert kinds == {jnp.dtype("float32")}


@pytest.mark.parametrize(("steps", "warned"), [(1000, False), (999, True)])
def test_a_warm_up_of_most_of_the_run_is_warned_about(steps, warned, caplog):
  optimizer.warn_of_warm_up("grpo", learning_rate=3e-06, steps=steps, warmup_steps=500)
  text = (
    "grpo.warmup_steps=500 is more than half of the run's 999 optimiser steps, so that most have less than"
    " grpo.learning_rate=3e-06: lower warmup_steps, or raise steps"
  )
  assert caplog.messages == ([text] if warned else [])


def test_muon_gives_matrices_of_layers_singular_values_of_one_size():
  params = build(TransformerSize(8, 8, 2, 12, 3)).init(jax.random.key(0))
  gradients = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), params)
  chosen = optimizer.muon(**SETTINGS)
  updates, _ = chosen.update(gradients, chosen.init(params), params)
  for name, update in updates["blocks"]["mlp"].items():
    values = jnp.linalg.svd(update, compute_uv=False) / (0.1 * 0.2 * np.sqrt(12))
    assert values.shape == (3, 8), name
    np.testing.assert_allclose(values, 0.95, atol=0.35)
  adam = optax.nadamw(0.1, b2=0.99, weight_decay=0.0)
  expected, _ = adam.update(gradients, adam.init(params), params)
  for name in ("head", "embedding", "final_norm"):
    jax.tree.map(np.testing.assert_array_equal, updates[name], expected[name])


def test_momentum_of_muon_lies_where_its_weight_lies():
  network = build(TransformerSize(8, 8, 2, 12, 3))
  mesh = meshes.make_mesh({"data": 1, "fsdp": 8, "tensor": 1})
  shapes = jax.eval_shape(network.init, jax.random.key(0))
  chosen = optimizer.muon(**SETTINGS, ema_decay=0.9)
  placed = meshes.state_shardings(mesh, meshes.RULES, network.axes, shapes, chosen)
  state = jax.eval_shape(chosen.init, shapes)
  assert jax.tree.structure(placed.opt_state) == jax.tree.structure(state)
  momentum = placed.opt_state[1].inner_states["muon"].inner_state[0].mu["blocks"]["mlp"]["up"]
  assert momentum == placed.trainable["blocks"]["mlp"]["up"]
  assert "fsdp" in str(momentum.spec)
