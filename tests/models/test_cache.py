"""Windows of the canvas that attend to a cache, against the whole canvas and against a plain loop over layers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d1jax.models import cache as caches
from d1jax.models import layers, lora
from d1jax.models.families.qwen3 import NormedAttention
from d1jax.models.transformer import TransformerSize, build
from d1jax.models.visibility import BlockCausal
from d1jax.parallel import mesh as meshes

LENGTH, WINDOW = 10, 4
LLADA = TransformerSize(vocab=16, embed=64, heads=4, mlp=128, layers=3, rope_theta=50.0)
SIZES = {
  "llada": LLADA,
  "dream": dataclasses.replace(LLADA, kv_heads=2, head_dim=6, qkv_bias=True),
  "tied": dataclasses.replace(LLADA, tied=True),
  "normed": dataclasses.replace(LLADA, kv_heads=2, head_dim=6, attention_layer=NormedAttention),
  "stretched": dataclasses.replace(LLADA, rope_scaling=layers.RopeScaling(8.0, 1.0, 4.0, 6)),
}
VALID = jnp.asarray(np.arange(LENGTH)[None] >= np.asarray([0, 2, 3, 1])[:, None])
TOKENS = jnp.asarray(np.random.default_rng(1).integers(0, 16, VALID.shape), jnp.int32)
CHANGED = (TOKENS + 5) % 16


def draw(shapes):
  """Weights with no pattern: norm scales far from 1, biases far from 0."""
  rng = np.random.default_rng(0)

  def one(path, leaf):
    noise = rng.normal(size=leaf.shape)
    return jnp.asarray(1 + 0.5 * noise if "norm" in jax.tree_util.keystr(path) else 0.2 * noise, jnp.float32)

  return jax.tree_util.tree_map_with_path(one, shapes)


@functools.cache
def model(name, **options):
  """(network, weights, encode, encode_window), the functions compiled."""
  network = build(SIZES[name], **options)
  params = draw(jax.eval_shape(network.init, jax.random.key(0)))
  return network, params, jax.jit(network.encode), jax.jit(network.encode_window)


def refreshed(name, **options):
  """A cache that has seen all of `TOKENS`."""
  network, params, _, window = model(name, **options)
  return window(params, TOKENS, 0, network.init_cache(VALID))[1]


def naive(params, size, tokens, start, key, value):
  """Hidden states of a window by hand, a layer at a time; writes into `key` and `value`, lists of numpy arrays."""
  width, end = tokens.shape[1], start + tokens.shape[1]
  frequency = layers.rotary_frequencies(size.head_size // 2, size.rope_theta, size.rope_scaling)
  angles = np.arange(start, end)[:, None] * np.asarray(frequency, np.float64)
  cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
  half = size.head_size // 2
  turn = lambda x: np.concatenate(
    [x[..., :half] * cos - x[..., half:] * sin, x[..., half:] * cos + x[..., :half] * sin], -1
  )
  norm = lambda x, scale: x / np.sqrt((x * x).mean(-1, keepdims=True) + size.norm_eps) * scale
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  x = p["embedding"][np.asarray(tokens)]
  for layer in range(size.layers):
    b = jax.tree.map(lambda a, layer=layer: a[layer], p["blocks"])
    h = norm(x, b["attention_norm"]["scale"])
    project = lambda name, h=h, a=b["attention"]: (h @ a[name] + a.get(f"{name}_bias", 0)).reshape(
      *h.shape[:2], -1, size.head_size
    )
    q, k = project("query"), project("key")
    if "query_norm" in b["attention"]:
      q, k = (norm(x, b["attention"][f"{name}_norm"]["scale"]) for name, x in (("query", q), ("key", k)))
    q = turn(q)
    key[layer][:, start:end], value[layer][:, start:end] = turn(k), project("value")
    share = size.heads // size.key_value_heads
    k, v = (np.repeat(stack[layer], share, axis=2) for stack in (key, value))
    scores = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(size.head_size)
    scores = np.where(np.asarray(VALID)[:, None, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), v)
    x = x + mixed.reshape(len(x), width, -1) @ b["attention"]["out"]
    h = norm(x, b["mlp_norm"]["scale"])
    gate = h @ b["mlp"]["gate"]
    x = x + (gate / (1 + np.exp(-gate)) * (h @ b["mlp"]["up"])) @ b["mlp"]["down"]
  return norm(x, p["final_norm"]["scale"])


@pytest.mark.few(1, reason="each case compiles programs of its own")
@pytest.mark.parametrize("name", SIZES)
def test_the_window_that_covers_the_canvas_is_encode(name):
  network, params, encode, window = model(name)
  expected = encode(params, TOKENS, VALID)
  assert np.abs(np.asarray(expected)).mean() > 0.5
  dirty = window(params, CHANGED, 0, network.init_cache(VALID))[1]
  for cache in (network.init_cache(VALID), dirty):
    hidden, _ = window(params, TOKENS, 0, cache)
    np.testing.assert_allclose(hidden, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.few(1, reason="each case compiles programs of its own")
@pytest.mark.parametrize("name", SIZES)
def test_a_window_of_the_same_tokens_is_a_slice_of_encode(name):
  """Wherever it starts; beyond the end, the last one that fits, and before the beginning, the first one."""
  _, params, encode, window = model(name)
  expected, cache = np.asarray(encode(params, TOKENS, VALID)), refreshed(name)
  for asked in range(-2, LENGTH + 2):
    start = min(max(asked, 0), LENGTH - WINDOW)
    hidden, after = window(params, TOKENS[:, start : start + WINDOW], asked, cache)
    keep = np.asarray(VALID)[:, start : start + WINDOW]
    np.testing.assert_allclose(hidden[keep], expected[:, start : start + WINDOW][keep], rtol=1e-5, atol=1e-5)
    for a, b in zip(after[:2], cache[:2], strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SIZES)
def test_windows_of_other_tokens_are_those_of_a_plain_loop(name):
  """Three windows, of which the last sees what the first two have written and not what encode would see."""
  size = SIZES[name]
  _, params, encode, window = model(name)
  shape = (*VALID.shape, size.key_value_heads, size.head_size)
  key, value = ([np.zeros(shape) for _ in range(size.layers)] for _ in range(2))
  naive(params, size, TOKENS, 0, key, value)
  cache = refreshed(name)
  canvas = TOKENS
  for start in (2, 5, 3):
    tokens = (CHANGED + start)[:, start : start + WINDOW] % 16
    canvas = canvas.at[:, start : start + WINDOW].set(tokens)
    found, cache = window(params, tokens, start, cache)
    expected = naive(params, size, tokens, start, key, value)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(cache.key, np.stack(key), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(cache.value, np.stack(value), rtol=1e-4, atol=1e-5)
  fresh = encode(params, canvas, VALID)[:, 3:7]
  assert np.abs(np.asarray(fresh - found)).mean() > 0.01, "the cache is of no account here"


@pytest.mark.few(1, reason="each case compiles programs of its own")
@pytest.mark.parametrize("rule", [BlockCausal(2), None])
def test_a_window_may_begin_elsewhere_in_each_row(rule):
  """Also beyond both ends; what a row gets is what it gets alone."""
  network, params = model("dream")[:2]
  window = jax.jit(functools.partial(network.encode_window, rule=rule))
  starts = np.asarray([3, -1, 6, 9])
  columns = np.clip(starts, 0, LENGTH - WINDOW)[:, None] + np.arange(WINDOW)
  tokens = jnp.take_along_axis(CHANGED, columns, axis=1)
  hidden, cache = window(params, tokens, jnp.asarray(starts), refreshed("dream"))
  for row, start in enumerate(starts.tolist()):
    alone, after = window(params, tokens, jnp.asarray(start), refreshed("dream"))
    np.testing.assert_allclose(hidden[row], alone[row], rtol=1e-5, atol=1e-5)
    for a, b in zip(cache[:2], after[:2], strict=True):
      np.testing.assert_allclose(a[:, row], b[:, row], rtol=1e-5, atol=1e-5)


def test_the_cache_holds_what_the_projections_give():
  """Key-value heads, not repeated; keys of position 0 are not turned; in the compute dtype."""
  params = model("dream", dtype=jnp.bfloat16)[1]
  cache = refreshed("dream", dtype=jnp.bfloat16)
  assert cache.key.shape == cache.value.shape == (3, 4, LENGTH, 2, 6)
  assert cache.key.dtype == cache.value.dtype == jnp.bfloat16
  np.testing.assert_array_equal(cache.valid, VALID)
  x = params["embedding"][TOKENS[:, 0]]
  h = x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * params["blocks"]["attention_norm"]["scale"][:1]
  attention = params["blocks"]["attention"]
  first = h @ attention["key"][0] + attention["key_bias"][:1]
  np.testing.assert_allclose(np.asarray(cache.key[0, :, 0], np.float32).reshape(4, 12), first, rtol=0.03, atol=0.05)


def test_padding_reaches_no_window():
  """Neither garbage tokens in the padding nor what the cache holds there."""
  network, params, _, window = model("llada")
  garbage = jnp.where(VALID, TOKENS, CHANGED)
  _, dirty = window(params, garbage, 0, network.init_cache(VALID))
  hole = ~VALID[None, :, :, None, None]
  dirty = dirty._replace(key=jnp.where(hole, 9.0, dirty.key), value=jnp.where(hole, -7.0, dirty.value))
  found, expected = (window(params, CHANGED[:, 3:7], 3, cache)[0] for cache in (dirty, refreshed("llada")))
  np.testing.assert_array_equal(found, expected)


def test_every_start_is_one_program():
  network, params, _, _ = model("llada")
  cache, traces = refreshed("llada"), []

  @jax.jit
  def window(tokens, start, cache):
    traces.append(start)
    return network.encode_window(params, tokens, start, cache)

  found = [window(TOKENS[:, :WINDOW], start, cache)[0] for start in range(LENGTH - WINDOW)]
  assert len(traces) == 1
  assert len({np.asarray(hidden).tobytes() for hidden in found}) == LENGTH - WINDOW, "a start is of no account"
  static = jax.jit(lambda tokens, cache: network.encode_window(params, tokens, 3, cache))(TOKENS[:, :WINDOW], cache)[0]
  np.testing.assert_allclose(static, found[3], rtol=1e-5, atol=1e-5)


@pytest.mark.few(4, reason="each case compiles programs of its own")
@pytest.mark.parametrize("options", [{}, {"remat": True}, {"unroll": 3}], ids=str)
@pytest.mark.parametrize("in_a_loop", [False, True])
@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_the_cache_is_updated_in_place(options, in_a_loop, mesh):
  """A donated cache becomes the new one, and no second one exists in between."""
  mesh = meshes.make_mesh(dict(zip(meshes.MESH_AXES, mesh, strict=False)), jax.devices()[: int(np.prod(mesh))])
  size = dataclasses.replace(LLADA, embed=16, mlp=16, layers=16)
  network = build(size, constrain=meshes.constrainer(mesh, meshes.RULES), **options)
  place = lambda *axes: meshes.sharding(mesh, meshes.RULES, *axes)
  homes = caches.Cache(place(*caches.AXES), place(*caches.AXES), place("batch", None))

  def step(params, tokens, start, cache):
    if not in_a_loop:
      return network.encode_window(params, tokens, start, cache)
    body = lambda i, carry: network.encode_window(params, (tokens + i) % 16, start, carry[1])
    return jax.lax.fori_loop(0, 3, body, (jnp.zeros((*tokens.shape, 16)), cache))

  rows, scalar = place("batch"), place()
  program = jax.jit(
    step,
    in_shardings=(meshes.shardings(mesh, meshes.RULES, network.axes), rows, scalar, homes),
    out_shardings=(rows, homes),
    donate_argnums=3,
  )
  valid = jax.ShapeDtypeStruct((4, 512), jnp.bool_)
  cache = jax.eval_shape(network.init_cache, valid)
  params = jax.eval_shape(network.init, jax.random.key(0))
  window = jax.ShapeDtypeStruct((4, 8), jnp.int32)
  memory = program.lower(params, window, jax.ShapeDtypeStruct((), jnp.int32), cache).compile().memory_analysis()
  # On the second mesh, batch is cut in four and heads in two.
  held = sum(a.size * a.dtype.itemsize for a in (cache.key, cache.value)) // mesh.size
  assert memory.alias_size_in_bytes >= held
  assert memory.temp_size_in_bytes < held / 2


@pytest.mark.few(1, reason="each case compiles programs of its own")
@pytest.mark.parametrize(
  ("name", "shape"), [("dream", (2, 1, 1)), ("dream", (1, 2, 4)), ("dream", (2, 2, 2)), ("normed", (2, 2, 2))], ids=str
)
def test_a_mesh_changes_nothing(name, shape):
  """Also where it has more devices than key-value heads."""
  _, params, _, window = model(name)
  mesh = meshes.make_mesh(dict(zip(meshes.MESH_AXES, shape, strict=False)), jax.devices()[: int(np.prod(shape))])
  there = build(SIZES[name], constrain=meshes.constrainer(mesh, meshes.RULES))
  rows, scalar = meshes.sharding(mesh, meshes.RULES, "batch"), meshes.sharding(mesh, meshes.RULES)

  def passes(network, params, tokens, valid, changed, start):
    _, cache = network.encode_window(params, tokens, 0, network.init_cache(valid))
    return network.encode_window(params, changed, start, cache)[0]

  placements = meshes.shardings(mesh, meshes.RULES, there.axes)
  sharded = jax.jit(
    functools.partial(passes, there), in_shardings=(placements, rows, rows, rows, scalar), out_shardings=rows
  )
  arguments = (TOKENS, VALID, CHANGED[:, 3:7])
  found = sharded(jax.device_put(params, placements), *jax.device_put(arguments, rows), jnp.asarray(3))
  expected = window(params, arguments[2], 3, refreshed(name))[0]
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def adapters(params):
  """Adapters whose additions are not zero."""
  shapes = jax.eval_shape(lambda: lora.init(jax.random.key(0), lora.LoraSpec(3, 6.0), params))
  rng = np.random.default_rng(4)
  return jax.tree.map(lambda a: jnp.asarray(0.1 * rng.normal(size=a.shape), jnp.float32), shapes)


@pytest.mark.few(1, reason="each case compiles programs of its own")
@pytest.mark.parametrize("base", ["float32", "int8", "nf4"])
def test_adapters_and_few_bits_go_through_windows(base):
  network, params, encode, window = model("llada")
  stored = params if base == "float32" else jax.jit(lora.quantized, static_argnums=1)(params, base)
  overlaid = lora.overlay(stored, adapters(params))
  expected = encode(overlaid, TOKENS, VALID)
  hidden, cache = window(overlaid, TOKENS, 0, network.init_cache(VALID))
  np.testing.assert_allclose(hidden, expected, rtol=1e-6, atol=1e-6)
  found, _ = window(overlaid, TOKENS[:, 3:7], 3, cache)
  np.testing.assert_allclose(found, expected[:, 3:7], rtol=1e-5, atol=1e-5)
  plain = window(params, TOKENS[:, 3:7], 3, refreshed("llada"))[0]
  assert np.abs(np.asarray(found - plain)).mean() > 0.05


def test_one_layer_is_written_at_its_window_and_read_whole():
  rng = np.random.default_rng(5)
  random = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  before = caches.Cache(random(3, 2, 5, 2, 4), random(3, 2, 5, 2, 4), jnp.ones((2, 5), bool))
  k, v = random(2, 2, 2, 4), random(2, 2, 2, 4)
  after, key, value = caches.renewed(before, jnp.asarray(1), 2, k, v, layers.no_constraint)
  for old, new, part, read in ((before.key, after.key, k, key), (before.value, after.value, v, value)):
    expected = np.array(old)
    expected[1, :, 2:4] = part
    np.testing.assert_array_equal(new, expected)
    np.testing.assert_array_equal(read, expected[1])
