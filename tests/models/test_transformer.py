import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d1jax.models import layers, transformer
from d1jax.models.families import PRESETS
from d1jax.models.transformer import TransformerSize, build, parameter_count
from d1jax.models.visibility import BlockCausal
from tests.models import forward

SIZE = TransformerSize(vocab=11, embed=16, heads=2, mlp=24, layers=3, rope_theta=50.0)


@pytest.fixture(scope="module")
def network():
  return build(SIZE)


@pytest.fixture(scope="module")
def params(network):
  """Weights with no pattern: norm scales far from 1, logits of order 1."""
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(network.init, jax.random.key(0))

  def draw(path, leaf):
    noise = rng.normal(size=leaf.shape)
    values = 1 + 0.5 * noise if "norm" in jax.tree_util.keystr(path) else 0.4 * noise
    return jnp.asarray(values, jnp.float32)

  return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(scope="module")
def batch():
  rng = np.random.default_rng(1)
  tokens = jnp.asarray(rng.integers(0, 11, (3, 9)), jnp.int32)
  valid = jnp.asarray(np.arange(9)[None] >= np.asarray([0, 2, 4])[:, None])
  return tokens, valid


def logits_of(network):
  return jax.jit(functools.partial(forward.logits, network))


@pytest.fixture(scope="module")
def logits(network):
  return logits_of(network)


def value_and_grad_of(network, params, batch):
  def loss(params, tokens, valid):
    return jnp.mean(forward.logits(network, params, tokens, valid) ** 2)

  return jax.jit(jax.value_and_grad(loss))(params, *batch)


@pytest.fixture(scope="module")
def value_and_grad(network, params, batch):
  return value_and_grad_of(network, params, batch)


def llada(params, tokens, valid, size, frequency=None):
  """LLaDA's forward pass in plain numpy, one row, layer and head at a time."""

  def norm(x, scale):
    return (x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)) * scale

  def turn(x):  # [L, H]: cos and sin are over [angles, angles], the halves swapped with a minus
    half = x.shape[1] // 2
    plain = 1.0 / size.rope_theta ** (np.arange(0, x.shape[1], 2) / x.shape[1])
    angles = np.outer(np.arange(x.shape[0]), plain if frequency is None else frequency)
    angles = np.concatenate([angles, angles], axis=1)
    swapped = np.concatenate([-x[:, half:], x[:, :half]], axis=1)
    return x * np.cos(angles) + swapped * np.sin(angles)

  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  head_size = size.embed // size.heads
  rows = []
  for ids, keep in zip(np.asarray(tokens), np.asarray(valid), strict=True):
    x = p["embedding"][ids]
    for layer in range(size.layers):
      b = jax.tree.map(lambda a, layer=layer: a[layer], p["blocks"])
      h = norm(x, b["attention_norm"]["scale"])
      heads = []
      for n in range(size.heads):
        columns = slice(n * head_size, (n + 1) * head_size)
        q = turn(h @ b["attention"]["query"][:, columns])
        k = turn(h @ b["attention"]["key"][:, columns])
        v = h @ b["attention"]["value"][:, columns]
        scores = q @ k.T / np.sqrt(head_size)
        scores[:, ~keep] = -np.inf
        weights = np.exp(scores - scores.max(1, keepdims=True))
        heads.append(weights / weights.sum(1, keepdims=True) @ v)
      x = x + np.concatenate(heads, axis=1) @ b["attention"]["out"]
      h = norm(x, b["mlp_norm"]["scale"])
      gate = h @ b["mlp"]["gate"]
      x = x + (gate / (1 + np.exp(-gate)) * (h @ b["mlp"]["up"])) @ b["mlp"]["down"]
    rows.append(norm(x, p["final_norm"]["scale"]) @ p["head"])
  return np.stack(rows)


def test_llada_8b_has_its_8015581184_parameters():
  assert parameter_count(build(PRESETS["llada_8b"], dtype=jnp.bfloat16)) == 8_015_581_184


def test_llada_8b_has_its_sizes():
  size = PRESETS["llada_8b"]
  assert (size.rope_theta, size.norm_eps, size.embed // size.heads) == (5e5, 1e-5, 128)


def test_forward_is_lladas(logits, params, batch):
  expected = llada(params, *batch, SIZE)
  assert np.abs(expected).mean() > 0.5
  found = logits(params, *batch)
  assert found.dtype == jnp.float32
  keep = np.asarray(batch[1])
  np.testing.assert_allclose(np.asarray(found)[keep], expected[keep], rtol=1e-5, atol=1e-5)


@pytest.mark.few(1, reason="each case compiles programs of its own")
@pytest.mark.parametrize("options", [{"unroll": 3}, {"remat": True}, {"remat": True, "unroll": 2}])
def test_unrolling_and_recomputing_change_nothing(value_and_grad, params, batch, options):
  value, gradient = value_and_grad
  other, other_gradient = value_and_grad_of(build(SIZE, **options), params, batch)
  np.testing.assert_allclose(other, value, rtol=1e-6)
  for a, b in zip(jax.tree.leaves(other_gradient), jax.tree.leaves(gradient), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("remat", [False, True])
def test_remat_is_what_the_option_says(params, batch, remat):
  network = build(SIZE, remat=remat)
  jaxpr = str(jax.make_jaxpr(network.encode)(params, *batch))
  assert ("remat" in jaxpr or "checkpoint" in jaxpr) == remat


def test_layers_are_one_scan(network, params, batch):
  assert "scan" in str(jax.make_jaxpr(network.encode)(params, *batch))


@pytest.mark.parametrize("padding", [1, 5])
def test_left_padding_is_inert(logits, params, batch, padding):
  tokens, valid = batch
  narrow = np.asarray(logits(params, tokens, valid))
  garbage = jnp.asarray(np.random.default_rng(2).integers(0, 11, (3, padding)), jnp.int32)
  padded = jnp.concatenate([garbage, jnp.where(valid, tokens, 7)], axis=1)
  wide = logits(params, padded, jnp.pad(valid, ((0, 0), (padding, 0))))
  keep = np.asarray(valid)
  np.testing.assert_allclose(np.asarray(wide)[:, padding:][keep], narrow[keep], rtol=2e-5, atol=2e-5)


def test_ids_in_the_padding_do_not_reach_a_bit(logits, params, batch):
  tokens, valid = batch
  keep = np.asarray(valid)
  changed = jnp.where(valid, tokens, (tokens + 3) % 11)
  np.testing.assert_array_equal(
    np.asarray(logits(params, changed, valid))[keep],
    np.asarray(logits(params, tokens, valid))[keep],
  )


def test_every_position_sees_every_other(logits, params):
  tokens = jnp.arange(6, dtype=jnp.int32)[None]
  valid = jnp.ones((1, 6), bool)
  base = np.asarray(logits(params, tokens, valid))
  for position in range(6):
    changed = logits(params, tokens.at[0, position].set(9), valid)
    assert (np.abs(np.asarray(changed) - base).max(-1) > 1e-3).all()


BLOCK = 3
RULE = BlockCausal(BLOCK)


def windows(network, params, tokens, valid):
  """Hidden states of a canvas, a block at a time from left to right on a cache; nothing is refreshed."""
  cache, found = network.init_cache(valid), []
  for start in range(0, tokens.shape[1], BLOCK):
    hidden, cache = network.encode_window(params, tokens[:, start : start + BLOCK], start, cache, RULE)
    found.append(hidden)
  return jnp.concatenate(found, axis=1)


def test_a_later_block_changes_no_bit_of_an_earlier_one(network, params, batch):
  encode = jax.jit(network.encode)
  tokens, valid = batch
  base = np.asarray(encode(params, tokens, valid, rule=RULE))
  for position in range(9):
    changed = np.asarray(encode(params, tokens.at[0, position].set((tokens[0, position] + 1) % 11), valid, rule=RULE))
    moved = np.abs(changed - base).max(-1)[0]
    block = position // BLOCK * BLOCK
    assert not moved[:block].any()
    assert (moved[block:] > 1e-4).all(), "its own block, and all behind it, see it"


def test_blocks_that_are_computed_one_by_one_are_the_canvas(network, params, batch):
  """With a block-causal rule the cache is exact: what is behind a block, zeros here, is not seen."""
  encode, keep = jax.jit(network.encode), np.asarray(batch[1])
  found = jax.jit(functools.partial(windows, network))(params, *batch)
  expected = encode(params, *batch, rule=RULE)
  np.testing.assert_allclose(np.asarray(found)[keep], np.asarray(expected)[keep], rtol=1e-5, atol=1e-5)
  both_ways = encode(params, *batch)
  np.testing.assert_array_equal(encode(params, *batch, rule=BlockCausal(9)), both_ways)
  assert np.abs(np.asarray(both_ways - expected))[keep].mean() > 0.01


def test_rows_do_not_see_each_other(logits, params, batch):
  tokens, valid = batch
  base = logits(params, tokens, valid)
  changed = logits(params, tokens.at[0].set(4), valid)
  np.testing.assert_array_equal(changed[1:], base[1:])


def test_bfloat16_products_are_close_and_not_float32(logits, params, batch):
  keep = np.asarray(batch[1])
  exact = np.asarray(logits(params, *batch))[keep]
  rough = logits_of(build(SIZE, dtype=jnp.bfloat16))(params, *batch)
  assert rough.dtype == jnp.float32
  error = np.abs(np.asarray(rough)[keep] - exact)
  assert 1e-4 < error.mean() < 0.03 * np.abs(exact).mean() + 0.01
  hidden = jax.eval_shape(build(SIZE, dtype=jnp.bfloat16).encode, params, *batch)
  assert hidden.dtype == jnp.bfloat16


@pytest.mark.parametrize("way", ["encode", "encode_window"])
def test_the_gradient_of_the_embedding_is_summed_in_float32(way, batch):
  """See `layers.look_up`: in bfloat16 the row of the mask, thousands of terms, was off by a fifth."""
  rough = build(SIZE, dtype=jnp.bfloat16)
  shapes = jax.eval_shape(rough.init, jax.random.key(0))

  def total(params, tokens, valid):
    if way == "encode":
      hidden = rough.encode(params, tokens, valid)
    else:
      hidden, _ = rough.encode_window(params, tokens, 0, rough.init_cache(valid))
    return jnp.sum(hidden, dtype=jnp.float32)

  program = str(jax.make_jaxpr(jax.grad(total))(shapes, *batch))
  assert re.findall(r"(\w+\[11,16\]) = scatter-add", program) == ["f32[11,16]"]


def test_head_and_embedding_are_not_tied(logits, params, batch):
  assert params["embedding"].shape == params["head"].shape[::-1]
  zero = {**params, "head": jnp.zeros_like(params["head"])}
  np.testing.assert_array_equal(logits(zero, *batch), 0)


def test_axes_match_the_parameters(network, params):
  axes = network.axes
  named = lambda a: isinstance(a, tuple)
  assert jax.tree.structure(axes, is_leaf=named) == jax.tree.structure(params)
  assert jax.tree.map(len, axes, is_leaf=named) == jax.tree.map(jnp.ndim, params)
  sizes = {"vocab": 11, "embed": 16, "heads": 16, "kv_heads": 16, "mlp": 24, "layers": 3, "norm": 16}
  expected = jax.tree.map(lambda a: tuple(sizes[name] for name in a), axes, is_leaf=named)
  assert expected == jax.tree.map(jnp.shape, params)


def test_init_is_a_function_of_the_key_in_float32(network):
  init = jax.jit(network.init)
  first, again, other = (init(jax.random.key(s)) for s in (0, 0, 1))
  assert {leaf.dtype for leaf in jax.tree.leaves(first)} == {jnp.dtype("float32")}
  named = [
    {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    for tree in (first, again, other)
  ]
  for name, leaf in named[0].items():
    np.testing.assert_array_equal(leaf, named[1][name])
    assert ("norm" in name) == bool((leaf == named[2][name]).all())
  for weights in first["blocks"]["attention"].values():
    assert not np.array_equal(weights[0], weights[1]), "layers start alike"


def test_constraints_and_attention_are_injected(params, batch):
  seen = []

  def constrain(x, axes):
    assert x.ndim == len(axes)
    seen.append(axes)
    return x

  def no_attention(q, k, v, valid):
    return jnp.zeros_like(v)

  network = build(SIZE, constrain=constrain, attention=no_attention)
  tokens, valid = batch
  changed = tokens.at[:, 0].set((tokens[:, 0] + 1) % 11)
  encode = jax.jit(network.encode)
  a, b = (encode(params, t, valid) for t in (tokens, changed))
  np.testing.assert_array_equal(a[:, 1:], b[:, 1:])
  assert ("batch", "length", None) in seen
  assert ("vocab", None) in seen


@pytest.mark.parametrize("sizes", [{"heads": 3}, {"embed": 18, "heads": 2}, {"embed": 10, "heads": 2}])
def test_sizes_without_even_heads_are_refused(sizes):
  with pytest.raises(ValueError, match="even head size"):
    dataclasses.replace(SIZE, **sizes)


def test_dream_7b_has_its_7615616512_parameters():
  assert parameter_count(build(PRESETS["dream_7b"], dtype=jnp.bfloat16)) == 7_615_616_512


def test_dream_7b_has_its_sizes():
  size = PRESETS["dream_7b"]
  assert (size.rope_theta, size.norm_eps, size.head_size, size.key_value_heads) == (1e6, 1e-6, 128, 4)
  assert (size.qkv_bias, size.tied, size.rope_scaling) == (True, False, None)
  shapes = jax.eval_shape(build(size).init, jax.random.key(0))["blocks"]["attention"]
  assert (shapes["query"].shape, shapes["key"].shape) == ((28, 3584, 3584), (28, 3584, 512))
  assert (shapes["query_bias"].shape, shapes["value_bias"].shape) == ((28, 3584), (28, 512))
  assert "out_bias" not in shapes


GROUPED = dataclasses.replace(SIZE, heads=4, kv_heads=2, head_dim=6, qkv_bias=True)


def test_grouped_heads_are_a_network_with_repeated_keys_and_values(batch):
  """Of other sizes than embed / heads, with biases: the same network with each key-value head written out."""
  network = build(GROUPED)
  whole = build(dataclasses.replace(GROUPED, kv_heads=4))
  rng = np.random.default_rng(3)
  draw = lambda leaf: jnp.asarray(0.4 * rng.normal(size=leaf.shape), jnp.float32)
  params = jax.tree.map(draw, jax.eval_shape(network.init, jax.random.key(0)))

  def repeat(name, w):
    if not name.startswith(("key", "value")):
      return w
    return jnp.repeat(w.reshape(*w.shape[:-1], 2, 6), 2, axis=-2).reshape(*w.shape[:-1], 24)

  attention = {name: repeat(name, w) for name, w in params["blocks"]["attention"].items()}
  wide = {**params, "blocks": {**params["blocks"], "attention": attention}}
  assert jax.tree.map(jnp.shape, wide) == jax.tree.map(
    jnp.shape, jax.eval_shape(whole.init, jax.random.key(0))
  )  # fmt: skip
  keep = np.asarray(batch[1])
  found, expected = (np.asarray(logits_of(n)(p, *batch))[keep] for n, p in ((network, params), (whole, wide)))
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
  without = {name: w * (0 if "bias" in name else 1) for name, w in params["blocks"]["attention"].items()}
  params = {**params, "blocks": {**params["blocks"], "attention": without}}
  assert np.abs(np.asarray(logits_of(network)(params, *batch))[keep] - found).mean() > 0.01


def test_a_tied_head_is_the_transposed_embedding(logits, params, batch):
  network = build(dataclasses.replace(SIZE, tied=True))
  shapes = jax.eval_shape(network.init, jax.random.key(0))
  assert "head" not in shapes
  assert "head" not in network.axes
  tied = {name: leaf for name, leaf in params.items() if name != "head"}
  assert jax.tree.structure(tied) == jax.tree.structure(shapes)
  found = logits_of(network)(tied, *batch)
  np.testing.assert_allclose(found, logits({**params, "head": params["embedding"].T}, *batch), rtol=1e-6, atol=1e-6)


def test_a_tied_embedding_gets_the_gradient_of_both_uses(params, batch):
  tied = {name: leaf for name, leaf in params.items() if name != "head"}
  _, gradient = value_and_grad_of(build(dataclasses.replace(SIZE, tied=True)), tied, batch)
  _, apart = value_and_grad_of(build(SIZE), {**tied, "head": tied["embedding"].T}, batch)
  expected = np.asarray(apart["embedding"]) + np.asarray(apart["head"]).T
  np.testing.assert_allclose(gradient["embedding"], expected, rtol=1e-4, atol=1e-5)


def test_rotary_scaling_reaches_every_layer(params, batch):
  scaling = layers.RopeScaling(8.0, 1.0, 4.0, 6)
  scaled = build(dataclasses.replace(SIZE, rope_scaling=scaling))
  tokens, valid = batch
  stretched = np.asarray(layers.rotary_frequencies(4, SIZE.rope_theta, scaling))
  assert (stretched < np.asarray(layers.rotary_frequencies(4, SIZE.rope_theta))).any()
  found = logits_of(scaled)(params, tokens, valid)
  expected = llada(params, tokens, valid, SIZE, frequency=stretched)
  keep = np.asarray(valid)
  np.testing.assert_allclose(np.asarray(found)[keep], expected[keep], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("remat", [False, True])
def test_every_product_of_every_layer_and_token_gets_a_key_of_its_own(params, batch, monkeypatch, remat):
  seen = []
  original = layers.project

  def spy(w, x, dtype, dropout=None):
    assert dropout.shape == x.shape[:2]
    jax.debug.callback(lambda words: seen.append(np.asarray(words)), jax.random.key_data(dropout))
    return original(w, x, dtype, dropout)

  monkeypatch.setattr(transformer, "project", spy)
  tokens, valid = batch
  keys = jax.random.split(jax.random.key(0), tokens.shape)
  build(SIZE, remat=remat).encode(params, tokens, valid, keys).block_until_ready()
  jax.effects_barrier()
  assert len(seen) == 7 * SIZE.layers
  words = np.concatenate([found.reshape(-1, found.shape[-1]) for found in seen])
  assert len({tuple(row) for row in words.tolist()}) == 7 * SIZE.layers * tokens.size


def test_keys_drop_nothing_of_plain_weights(network, params, batch):
  keys = jax.random.split(jax.random.key(0), batch[0].shape)
  encode = jax.jit(network.encode)
  np.testing.assert_array_equal(encode(params, *batch, keys), encode(params, *batch))


@pytest.mark.parametrize(
  ("sizes", "named"), [({"kv_heads": 3}, "kv_heads=3 does not divide heads=2"), ({"head_dim": 5}, "head_dim=5 is odd")]
)
def test_heads_that_do_not_fit_are_refused(sizes, named):
  with pytest.raises(ValueError, match=named):
    dataclasses.replace(SIZE, **sizes)
