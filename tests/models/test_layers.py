import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from d1jax.aot import collectives, hlo
from d1jax.models import layers
from d1jax.models.visibility import BlockCausal, TwoStreams
from d1jax.parallel import mesh as meshes

SIZE = layers.TransformerSize(vocab=4, embed=8, heads=2, mlp=12, layers=1, rope_theta=100.0, kv_heads=1, head_dim=6)


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
  return layers.rotary(x, layers.rotary_frequencies(x.shape[-1] // 2, theta), jnp.arange(x.shape[1]))


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


def test_rotary_turns_each_row_by_its_own_position():
  x, frequency = jnp.asarray(random(2, 7, 3, 8)), layers.rotary_frequencies(4, 100.0)
  found = layers.rotary(x[:, [5, 3]], frequency, jnp.asarray([5, 3]))
  np.testing.assert_array_equal(found, layers.rotary(x, frequency, jnp.arange(7))[:, [5, 3]])


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
  found = layers.plain_attention(*map(jnp.asarray, (q, k, v)), layers.Visible(jnp.asarray(valid)))
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_fewer_queries_than_keys():
  q, k, v = (jnp.asarray(random(2, 5, 4, 4, seed=s)) for s in range(3))
  visible = layers.Visible(jnp.asarray([[False, False, True, True, True], [True] * 5]))
  whole = layers.plain_attention(q, k, v, visible)
  np.testing.assert_allclose(layers.plain_attention(q[:, 1:3], k, v, visible), whole[:, 1:3], rtol=1e-6, atol=1e-6)


def looped(q, k, v, seen):
  """Softmax attention, a row, a head and a query at a time; `seen[b, t, s]`."""
  out = np.zeros(q.shape)
  for b, t, n in np.ndindex(q.shape[:3]):
    keys = np.flatnonzero(seen[b, t])
    scores = np.exp(k[b, keys, n].astype(np.float64) @ q[b, t, n] / np.sqrt(q.shape[3]))
    out[b, t, n] = scores @ v[b, keys, n] / scores.sum()
  return out


RULES = {"both ways": None, "causal": BlockCausal(1), "blocks": BlockCausal(3), "two streams": TwoStreams(2, 4, 2)}
SEGMENTS = np.asarray([[1, 1, 1, 2, 2, 2, 2], [3] * 7])


@pytest.mark.parametrize("segment", [None, SEGMENTS], ids=["alone", "packed"])
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("window", [slice(0, 7), slice(2, 6)], ids=str)
def test_a_query_sees_the_valid_keys_of_its_segment_that_the_rule_allows(name, window, segment):
  rule, index = RULES[name], np.arange(7)
  valid = np.asarray([[True] * 7, [False, False, True, True, True, True, True]])
  q, k, v = (random(2, 7, 3, 4, seed=s) for s in range(3))
  allowed = np.ones((7, 7), bool) if rule is None else rule(index[:, None], index[None])
  seen = valid[:, None, :] & allowed[None, window]
  if segment is not None:
    seen = seen & (segment[:, window, None] == segment[:, None, :])
  keep = seen.any(-1)
  expected = looped(q[:, window], k, v, np.where(keep[..., None], seen, True))
  visible = layers.Visible(jnp.asarray(valid), rule, window.start, None if segment is None else jnp.asarray(segment))
  found = np.asarray(layers.plain_attention(*map(jnp.asarray, (q[:, window], k, v)), visible))
  np.testing.assert_allclose(found[keep], expected[keep], rtol=1e-5, atol=1e-5)
  assert np.isfinite(found).all(), "a query that sees nothing"


@pytest.mark.slow(reason="compiles programs of its own")
def test_what_is_kept_is_handed_through_a_block():
  block = layers.Block(SIZE, dtype=jnp.float32, rngs=nnx.Rngs(0))
  x = jnp.asarray(random(2, 3, 8))
  _, (q, k, v) = block(x, 4 + jnp.arange(3), lambda q, k, v: (jnp.zeros_like(q), (q, k, v)))
  assert (q.shape, k.shape, v.shape) == ((2, 3, 2, 6), (2, 3, 1, 6), (2, 3, 1, 6))
  normed = block.attention_norm(x)
  expected = (normed @ block.attention.key[...]).reshape(2, 3, 1, 6)
  turned_from_4 = layers.rotary(expected, layers.rotary_frequencies(3, 100.0), 4 + jnp.arange(3))
  np.testing.assert_allclose(k, turned_from_4, rtol=1e-5, atol=1e-6)


def test_grouped_heads_are_heads_with_repeated_keys_and_values():
  """Query head n reads key-value head n // (N / K)."""
  attend = jax.jit(layers.plain_attention)
  q, k, v = random(2, 5, 6, 4), random(2, 5, 2, 4, seed=1), random(2, 5, 2, 4, seed=2)
  visible = layers.Visible(jnp.asarray([[False, True, True, True, True], [True] * 5]))
  grouped = attend(*map(jnp.asarray, (q, k, v)), visible)
  repeated = attend(*(jnp.asarray(x) for x in (q, np.repeat(k, 3, axis=2), np.repeat(v, 3, axis=2))), visible)
  np.testing.assert_allclose(grouped, repeated, rtol=1e-6, atol=1e-6)
  tiled = layers.plain_attention(
    *(jnp.asarray(x) for x in (q, np.tile(k, (1, 1, 3, 1)), np.tile(v, (1, 1, 3, 1)))), visible
  )
  assert np.abs(np.asarray(grouped - tiled)).mean() > 0.05, "the order of the heads is of no account here"


def attention_of(**options):
  """A layer of embed 8 with two heads of 6, one key-value head, its biases far from zero."""
  size = dataclasses.replace(SIZE, **options)
  layer = size.attention_layer(size, dtype=jnp.float32, rngs=nnx.Rngs(0))
  if layer.bias:
    for seed, name in enumerate(("query_bias", "key_bias", "value_bias")):
      getattr(layer, name)[...] = jnp.asarray(random(*getattr(layer, name).shape, seed=seed))
  return layer


def attending(valid):
  return lambda q, k, v: (layers.plain_attention(q, k, v, layers.Visible(valid)), None)


@pytest.mark.few(1, reason="each case compiles programs of its own")
@pytest.mark.parametrize("bias", [False, True])
def test_attention_projects_adds_biases_turns_and_mixes(bias):
  layer = attention_of(qkv_bias=bias)
  x, valid = jnp.asarray(random(2, 5, 8)), jnp.ones((2, 5), bool)

  def heads(name, count):
    y = np.asarray(x) @ np.asarray(getattr(layer, name)[...])
    y = y + np.asarray(getattr(layer, f"{name}_bias")[...]) if bias else y
    return jnp.asarray(y.reshape(2, 5, count, 6))

  q, k, v = turned(heads("query", 2), 100.0), turned(heads("key", 1), 100.0), heads("value", 1)
  mixed = np.asarray(layers.plain_attention(q, k, v, layers.Visible(valid))).reshape(2, 5, 12)
  expected = mixed @ np.asarray(layer.out[...])
  graph, weights = nnx.split(layer)
  found = jax.jit(lambda weights: nnx.merge(graph, weights)(x, jnp.arange(x.shape[1]), attending(valid))[0])(weights)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_biases_start_at_zero_and_only_where_they_are_asked_for():
  options = dict(dtype=jnp.float32, rngs=nnx.Rngs(0))
  sizes = (dataclasses.replace(SIZE, qkv_bias=bias) for bias in (False, True))
  without, with_biases = (layers.SelfAttention(size, **options) for size in sizes)
  names = {"query_bias", "key_bias", "value_bias"}
  assert {path[0] for path, _ in nnx.to_flat_state(nnx.state(with_biases))} - {
    path[0] for path, _ in nnx.to_flat_state(nnx.state(without))
  } == names
  assert not any(getattr(with_biases, name)[...].any() for name in names)


def transformers_llama3(inv_freq, factor, low_freq_factor, high_freq_factor, old_context_len):
  """`_compute_llama3_parameters` of transformers' modeling_rope_utils.py, with numpy in the place of torch."""
  low_freq_wavelen = old_context_len / low_freq_factor
  high_freq_wavelen = old_context_len / high_freq_factor

  wavelen = 2 * math.pi / inv_freq
  # wavelen < high_freq_wavelen: do nothing
  # wavelen > low_freq_wavelen: divide by factor
  inv_freq_llama = np.where(wavelen > low_freq_wavelen, inv_freq / factor, inv_freq)
  # otherwise: interpolate between the two, using a smooth factor
  smooth_factor = (old_context_len / wavelen - low_freq_factor) / (high_freq_factor - low_freq_factor)
  smoothed_inv_freq = (1 - smooth_factor) * inv_freq_llama / factor + smooth_factor * inv_freq_llama
  is_medium_freq = ~(wavelen < high_freq_wavelen) * ~(wavelen > low_freq_wavelen)
  return np.where(is_medium_freq, smoothed_inv_freq, inv_freq_llama)


@pytest.mark.few(2, reason="each case compiles programs of its own")
@pytest.mark.parametrize(
  ("half", "theta", "scaling"),
  [
    (64, 5e5, layers.RopeScaling(8.0, 1.0, 4.0, 8192)),  # Llama 3.1
    (32, 5e5, layers.RopeScaling(32.0, 1.0, 4.0, 8192)),  # Llama 3.2
    (8, 100.0, layers.RopeScaling(8.0, 1.0, 4.0, 40)),
    (16, 1e4, layers.RopeScaling(4.0, 2.0, 3.0, 500)),
  ],
)
def test_scaled_frequencies_are_those_of_transformers(half, theta, scaling):
  plain = 1.0 / theta ** (np.arange(0, 2 * half, 2, dtype=np.float64) / (2 * half))
  np.testing.assert_allclose(layers.rotary_frequencies(half, theta), plain, rtol=2e-6)
  expected = transformers_llama3(
    plain, scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_length
  )
  share = expected / plain
  assert share[0] == 1.0
  assert share[-1] == pytest.approx(1 / scaling.factor)
  assert ((share > 1.001 / scaling.factor) & (share < 0.999)).any(), "no frequency is in the smooth part"
  np.testing.assert_allclose(layers.rotary_frequencies(half, theta, scaling), expected, rtol=1e-5)


def test_keys_are_folded_token_by_token():
  keys = jax.random.split(jax.random.key(0), (2, 3))
  folded = layers.fold_tokens(keys, 5)
  for b in range(2):
    for i in range(3):
      expected = jax.random.key_data(jax.random.fold_in(keys[b, i], 5))
      np.testing.assert_array_equal(jax.random.key_data(folded[b, i]), expected)
  assert layers.fold_tokens(None, 5) is None


def test_a_product_with_an_array_is_in_the_compute_type_and_drops_nothing():
  x, w = random(2, 3, 4), random(4, 5, seed=1)
  keys = jax.random.split(jax.random.key(0), (2, 3))
  found = layers.project(jnp.asarray(w), jnp.asarray(x), jnp.float32, keys)
  np.testing.assert_allclose(found, x @ w, rtol=1e-6, atol=1e-6)
  assert layers.project(jnp.asarray(w), jnp.asarray(x, jnp.bfloat16), jnp.bfloat16).dtype == jnp.bfloat16


def test_gated_mlp():
  mlp = layers.GatedMlp(6, 10, dtype=jnp.float32, rngs=nnx.Rngs(0))
  x = random(2, 3, 6)
  gate, up, down = (np.asarray(w[...], np.float64) for w in (mlp.gate, mlp.up, mlp.down))
  gated = x @ gate
  expected = (gated / (1 + np.exp(-gated)) * (x @ up)) @ down
  np.testing.assert_allclose(mlp(jnp.asarray(x)), expected, rtol=1e-5, atol=1e-5)


def test_weights_are_float32_whatever_the_compute_type():
  block = layers.Block(dataclasses.replace(SIZE, qkv_bias=True), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
  assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(block))} == {jnp.dtype("float32")}
  x = jnp.asarray(random(1, 3, 8), jnp.bfloat16)
  out, _ = jax.eval_shape(lambda x: block(x, jnp.arange(3), attending(jnp.ones((1, 3), bool))), x)
  assert (out.shape, out.dtype) == (x.shape, jnp.bfloat16)


def test_no_constraint_is_the_identity():
  x = jnp.ones(3)
  assert layers.no_constraint(x, ("batch",)) is x


ROWS = 4096
COTANGENTS = {"N(1, 1)": (1.0, 1.0), "ones": (1.0, 0.0), "N(0, 1)": (0.0, 1.0)}
"""Mean and deviation of the gradients of a look-up; summed in bfloat16 they come to 0.26, 0.06 and 0.9 of the sum."""


@pytest.mark.parametrize("kind", COTANGENTS)
def test_the_gradient_of_a_row_that_thousands_look_up_is_the_float32_sum(kind):
  """The mask stands at half of all positions; every tenth position here holds another token."""
  mean, deviation = COTANGENTS[kind]
  rng = np.random.default_rng(0)
  table = jnp.asarray(rng.normal(size=(50, 16)), jnp.float32)
  tokens = jnp.asarray(np.where(rng.random((64, ROWS // 64)) < 0.1, rng.integers(0, 50, (64, ROWS // 64)), 7))
  gradient = jnp.asarray(rng.normal(mean, deviation, (*tokens.shape, 16)), jnp.bfloat16)
  x, back = jax.vjp(lambda w: layers.look_up(w, tokens, jnp.bfloat16, layers.no_constraint), table)
  assert np.asarray(x).tobytes() == np.asarray(table.astype(jnp.bfloat16)[tokens]).tobytes()
  (found,) = back(gradient)
  expected = np.zeros((50, 16))
  np.add.at(expected, np.asarray(tokens), np.asarray(gradient, np.float64))
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-3)
  naive = jax.vjp(lambda w: w.astype(jnp.bfloat16)[tokens], table)[1](gradient)[0]
  error = lambda w: np.linalg.norm(w[7] - expected[7]) / np.linalg.norm(expected[7])
  assert error(np.asarray(found)) < 1e-6 < 0.05 < error(np.asarray(naive)), "the sum of the naive look-up stops growing"


def test_the_gradient_of_a_look_up_on_a_mesh_is_that_of_one_device():
  """And each device sums into its own part of the table: whole tables are neither gathered nor added up."""
  mesh = meshes.make_mesh(dict(data=2, fsdp=2, tensor=2))
  rng = np.random.default_rng(0)
  table = jnp.asarray(rng.normal(size=(512, 16)), jnp.float32)
  tokens = jnp.asarray(rng.integers(0, 512, (8, 6)))
  gradient = jnp.asarray(rng.normal(size=(8, 6, 16)), jnp.bfloat16)

  def back(constrain, table, tokens, gradient):
    return jax.vjp(lambda w: layers.look_up(w, tokens, jnp.bfloat16, constrain), table)[1](gradient)[0]

  place = functools.partial(meshes.sharding, mesh, meshes.RULES)
  placements = (place("vocab", "embed"), place("batch", None), place("batch", None, None))
  function = functools.partial(back, meshes.constrainer(mesh, meshes.RULES))
  compiled = (
    jax.jit(function, in_shardings=placements, out_shardings=placements[0]).lower(table, tokens, gradient).compile()
  )
  found = compiled(*map(jax.device_put, (table, tokens, gradient), placements))
  np.testing.assert_allclose(found, back(layers.no_constraint, table, tokens, gradient), rtol=1e-6, atol=1e-6)
  moved = {each.kind: each.shapes for each in collectives.find(hlo.parse(compiled.as_text()), 8)}
  assert {shape.dims for shape in moved["all-reduce"]} == {(512 // 2, 16 // 2)}, "a part of the table, over data alone"
  assert not any(512 in shape.dims for shapes in moved.values() for shape in shapes), "a table goes between devices"
