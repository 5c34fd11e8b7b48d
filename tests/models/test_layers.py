import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from d1jax.models import layers


def random(*shape: int, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_rms_norm_in_float32():
  norm = layers.RMSNorm(6, eps=1e-5, rngs=nnx.Rngs(0))
  scale = random(6)
  norm.scale[...] = jnp.asarray(scale)
  x = 1e-3 * random(3, 5, 6, seed=1)  # small enough for eps to matter
  expected = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-5) * scale
  np.testing.assert_allclose(norm(jnp.asarray(x)), expected, rtol=1e-5, atol=1e-6)


def test_rms_norm_casts_back_before_it_scales():
  norm = layers.RMSNorm(64, eps=1e-5, rngs=nnx.Rngs(0))
  norm.scale[...] = jnp.asarray(1 + 0.3 * random(64))
  x = jnp.asarray(3 * random(8, 64, seed=1), jnp.bfloat16)
  y = np.asarray(x, np.float32)
  normalised = jnp.asarray(y / np.sqrt((y * y).mean(-1, keepdims=True) + np.float32(1e-5)), jnp.bfloat16)
  expected = normalised * jnp.broadcast_to(norm.scale[...].astype(jnp.bfloat16), x.shape)
  assert norm(x).dtype == jnp.bfloat16
  np.testing.assert_array_equal(np.asarray(norm(x), np.float32), np.asarray(expected, np.float32))


def turned(x, theta):
  return layers.rotary(x, layers.rotary_frequencies(x.shape[-1] // 2, theta))


@pytest.mark.parametrize("theta", [100.0, 5e5])
def test_rotary_turns_coordinate_i_with_coordinate_i_plus_half(theta):
  x = random(2, 7, 3, 8)
  expected = np.zeros(x.shape, np.float64)
  for position in range(7):
    for i in range(4):
      angle = position * theta ** (-2 * i / 8)
      first, second = x[:, position, :, i], x[:, position, :, i + 4]
      expected[:, position, :, i] = first * np.cos(angle) - second * np.sin(angle)
      expected[:, position, :, i + 4] = second * np.cos(angle) + first * np.sin(angle)
  np.testing.assert_allclose(turned(jnp.asarray(x), theta), expected, rtol=1e-5, atol=1e-5)


def test_rotary_scores_depend_on_distance_alone():
  q, k = (jnp.broadcast_to(random(8, seed=s)[None, None, None], (1, 12, 1, 8)) for s in (0, 1))
  scores = np.asarray(jnp.einsum("bqnh,bknh->qk", turned(q, 100.0), turned(k, 100.0)))
  for offset in range(-11, 12):
    diagonal = np.diagonal(scores, offset)
    np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-5)


def test_rotary_is_computed_in_float32():
  x = jnp.asarray(random(1, 2000, 1, 8), jnp.bfloat16)
  exact = turned(x.astype(jnp.float32), 100.0)
  assert turned(x, 100.0).dtype == jnp.bfloat16
  np.testing.assert_array_equal(
    np.asarray(turned(x, 100.0), np.float32), np.asarray(exact.astype(jnp.bfloat16), np.float32)
  )


def test_attention_is_a_softmax_over_valid_keys_on_both_sides():
  q, k, v = (random(2, 5, 3, 4, seed=s) for s in range(3))
  valid = np.asarray([[False, False, True, True, True], [True] * 5])
  scores = np.einsum("bqnh,bknh->bnqk", q, k).astype(np.float64) / np.sqrt(4)
  scores = np.where(valid[:, None, None, :], scores, -np.inf)
  share = np.exp(scores - scores.max(-1, keepdims=True))
  share /= share.sum(-1, keepdims=True)
  expected = np.einsum("bnqk,bknh->bqnh", share, v)
  found = layers.plain_attention(*(jnp.asarray(x) for x in (q, k, v, valid)))
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_gated_mlp():
  mlp = layers.GatedMlp(6, 10, dtype=jnp.float32, rngs=nnx.Rngs(0))
  x = random(2, 3, 6)
  gate, up, down = (np.asarray(w[...], np.float64) for w in (mlp.gate, mlp.up, mlp.down))
  gated = x @ gate
  expected = (gated / (1 + np.exp(-gated)) * (x @ up)) @ down
  np.testing.assert_allclose(mlp(jnp.asarray(x)), expected, rtol=1e-5, atol=1e-5)


def test_weights_are_float32_whatever_the_compute_type():
  attention = dict(heads=2, kv_heads=1, head_dim=6, bias=True, theta=100.0, scaling=None)
  block = layers.Block(8, 12, **attention, eps=1e-5, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
  assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(block))} == {jnp.dtype("float32")}
  x = jnp.asarray(random(1, 3, 8), jnp.bfloat16)
  out = jax.eval_shape(lambda x: block(x, jnp.ones((1, 3), bool), layers.plain_attention), x)
  assert (out.shape, out.dtype) == (x.shape, jnp.bfloat16)


def test_no_constraint_is_the_identity():
  x = jnp.ones(3)
  assert layers.no_constraint(x, ("batch",)) is x
