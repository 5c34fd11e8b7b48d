import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d1jax.diffusion.draw import log_prob
from d1jax.diffusion.vocabulary import tiled_log_prob
from d1jax.parallel.mesh import MESH_AXES, RULES, make_mesh, sharding
from tests import toy

FORBIDDEN = (1, 7)
EMBED = 16


def plain(hidden, head, tokens, forbidden_ids=FORBIDDEN):
  forbidden = np.isin(np.arange(head.shape[1]), forbidden_ids)
  logits = jnp.matmul(hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)
  return log_prob(jnp.where(forbidden, -jnp.inf, logits), tokens)


def case(vocab: int, rows: tuple[int, ...] = (3, 5), scale: float = 1.0):
  """(hidden, head, tokens, cotangent), and no token is forbidden."""
  rng = np.random.default_rng(vocab)
  hidden = jnp.asarray(scale * rng.normal(size=(*rows, EMBED)), jnp.float32)
  head = jnp.asarray(rng.normal(size=(EMBED, vocab)), jnp.float32)
  tokens = jnp.asarray(rng.choice([i for i in range(vocab) if i not in FORBIDDEN], rows), jnp.int32)
  return hidden, head, tokens, jnp.asarray(rng.normal(size=rows), jnp.float32)


def with_gradients(function, hidden, head, tokens, cotangent):
  """Log-probabilities, and the gradients of their weighted sum by hidden states and head."""
  logps, pull = jax.vjp(lambda hidden, head: function(hidden, head, tokens), hidden, head)
  return logps, *pull(cotangent)


def tiled(tile, forbidden_ids=FORBIDDEN, shards=1):
  return lambda hidden, head, tokens: tiled_log_prob(hidden, head, tokens, forbidden_ids, tile, shards)


# Tiles that divide a share of the vocabulary and tiles that do not, one tile for all.
SIZES = [(96, 24, 1), (96, 24, 8), (96, 1000, 4), (104, 40, 8), (104, 8, 8), (13, 1, 1), (13, 5, 1), (4096, 500, 2)]


@pytest.mark.few(4, reason="each case compiles programs of its own")
@pytest.mark.parametrize(("vocab", "tile", "shards"), SIZES)
def test_tiles_change_neither_values_nor_gradients(vocab, tile, shards):
  given = case(vocab)
  for found, expected in zip(
    with_gradients(tiled(tile, shards=shards), *given), with_gradients(plain, *given), strict=True
  ):
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("vocab", "tile", "shards"), [(104, 24, 8), (13, 5, 1)])
def test_every_token_is_found_in_its_tile(vocab, tile, shards):
  hidden, head, *_ = case(vocab, (1,))
  every = jnp.arange(vocab, dtype=jnp.int32)
  logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64)
  logits[:, list(FORBIDDEN)] = -np.inf
  found = tiled(tile, shards=shards)(jnp.tile(hidden, (vocab, 1)), head, every)
  np.testing.assert_allclose(found, toy.log_softmax(logits)[0], rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(np.exp(found).sum(), 1, rtol=1e-5)


def test_extreme_logits():
  """Differences of float32 numbers of size 1e4 are exact to 1e-3 alone, unless the peak is subtracted first."""
  rng = np.random.default_rng(0)
  logits = rng.choice([-1e4, 0.0, 1e4], (EMBED, 96)) + rng.normal(size=(EMBED, 96))
  logits[0] = -1e4
  logits[1] += 1e4
  head = jnp.asarray(logits, jnp.float32)
  tokens = jnp.asarray(rng.integers(8, 96, EMBED), jnp.int32)
  hidden, cotangent = jnp.eye(EMBED), jnp.asarray(rng.normal(size=EMBED), jnp.float32)
  exact = np.asarray(head, np.float64)
  exact[:, list(FORBIDDEN)] = -np.inf
  logps = toy.log_softmax(exact)
  by_logits = np.asarray(cotangent, np.float64)[:, None] * (np.eye(96)[tokens] - np.exp(logps))
  found, by_hidden, by_head = with_gradients(tiled(24), hidden, head, tokens, cotangent)
  np.testing.assert_allclose(found, logps[np.arange(EMBED), tokens], rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(by_head, by_logits, rtol=1e-5, atol=1e-5)  # row i of the head is row i of the logits
  by_hidden_exact = by_logits @ np.asarray(head, np.float64).T
  np.testing.assert_allclose(by_hidden / 1e4, by_hidden_exact / 1e4, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stored", [jnp.bfloat16, jnp.float32])
def test_bfloat16_products_accumulate_in_float32(stored):
  """Against float32 from the same bfloat16 factors: values to 1e-5, gradients to the rounding of a factor."""
  hidden, head, tokens, cotangent = case(104)
  hidden, head = hidden.astype(jnp.bfloat16), head.astype(jnp.bfloat16)
  wide = hidden.astype(jnp.float32), head.astype(jnp.float32)
  found, by_hidden, by_head = with_gradients(tiled(24), hidden, head.astype(stored), tokens, cotangent)
  expected, *gradients = with_gradients(plain, *wide, tokens, cotangent)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
  assert (by_hidden.dtype, by_head.dtype) == (jnp.bfloat16, stored)
  logits = jnp.where(np.isin(np.arange(104), FORBIDDEN), -jnp.inf, wide[0] @ wide[1])
  by_logits = np.abs(cotangent[..., None] * (jax.nn.one_hot(tokens, 104) - jax.nn.softmax(logits)))
  # d = (onehot - softmax) * g is rounded to bfloat16 once, and so are gradients of that dtype.
  rounding = float(jnp.finfo(jnp.bfloat16).eps) / 2
  size_by_hidden = by_logits @ np.abs(wide[1]).T
  size_by_head = np.abs(wide[0]).reshape(-1, EMBED).T @ by_logits.reshape(-1, 104)
  for got, want, size in zip((by_hidden, by_head), gradients, (size_by_hidden, size_by_head), strict=True):
    assert (np.abs(got.astype(jnp.float32) - want) <= rounding * (size + np.abs(want)) * 1.01 + 1e-6).all()


def test_a_forbidden_token_has_no_probability_and_finite_gradients():
  hidden, head, _, cotangent = case(96)
  tokens = jnp.full(cotangent.shape, FORBIDDEN[1])
  found, *gradients = with_gradients(tiled(24), hidden, head, tokens, cotangent)
  expected, *plain_gradients = with_gradients(plain, hidden, head, tokens, cotangent)
  assert (found == -np.inf).all()
  assert (expected == -np.inf).all()
  for a, b in zip(gradients, plain_gradients, strict=True):
    assert np.isfinite(a).all()
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
  assert (gradients[1][:, list(FORBIDDEN)] == 0).all()


@pytest.mark.parametrize(
  "forbidden", [range(24), range(0, 96, 4), range(1, 96)], ids=["stretch", "comb", "all but one"]
)
def test_tiles_that_are_forbidden_as_a_whole(forbidden):
  hidden, head, tokens, cotangent = case(96)
  tokens = jnp.where(np.isin(tokens, forbidden), min(set(range(96)) - set(forbidden)), tokens)
  ids = tuple(forbidden)
  got = with_gradients(tiled(16, ids, shards=2), hidden, head, tokens, cotangent)
  want = with_gradients(functools.partial(plain, forbidden_ids=ids), hidden, head, tokens, cotangent)
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_hidden_states_that_are_not_finite_are_not_hidden():
  hidden, head, tokens, _ = case(96)
  found = tiled(24)(hidden.at[1, 2].set(jnp.nan), head, tokens)
  assert np.isnan(found[1, 2])
  assert np.isfinite(found).sum() == found.size - 1


@pytest.mark.parametrize(("tile", "shards"), [(7, 8), (24, 5), (0, 1)])
def test_tiles_that_do_not_fit_the_shares_are_refused(tile, shards):
  with pytest.raises(
    ValueError, match=f"tiles of {tile} ids do not fit a vocabulary of 96 that is sharded over {shards} devices"
  ):
    tiled(tile, shards=shards)(*case(96)[:3])


def micro_batches(function):
  """Gradients by hidden states alone, accumulated over micro-batches as updates do, the head being frozen."""

  def program(hidden, head, tokens):
    def part(total, xs):
      adapter, (hidden, tokens) = jnp.ones(EMBED), xs
      value, gradient = jax.value_and_grad(lambda a: jnp.sum(function(a[None] * hidden, head, tokens)))(adapter)
      return total + gradient, value

    parts = jax.tree.map(lambda x: x.reshape(2, -1, *x.shape[1:]), (hidden, tokens))
    return jax.lax.scan(part, jnp.zeros(EMBED), parts)

  return program


PROGRAMS = {
  "forward": lambda f: f,
  "frozen head": lambda f: jax.grad(lambda *args: jnp.sum(f(*args))),
  "frozen head, micro-batches": micro_batches,
  "trained head": lambda f: jax.grad(lambda *args: jnp.sum(f(*args)), argnums=(0, 1)),
}


def memory(function, vocab: int, dtype=jnp.float32):
  shapes = ((64, EMBED), dtype), ((EMBED, vocab), jnp.float32), ((64,), jnp.int32)
  return jax.jit(function).lower(*(jax.ShapeDtypeStruct(*s) for s in shapes)).compile().memory_analysis()


# Where hidden states are bfloat16, no copy of the float32 head in that dtype may exist.
PASSES = [(name, jnp.float32) for name in PROGRAMS] + [("trained head", jnp.bfloat16)]


@pytest.mark.few(2, reason="each case compiles programs of its own")
@pytest.mark.parametrize(("name", "dtype"), PASSES)
def test_memory_does_not_depend_on_the_vocabulary(name, dtype):
  program = PROGRAMS[name](tiled(512))
  small, large = (memory(program, vocab, dtype) for vocab in (4096, 65536))
  assert small.temp_size_in_bytes >= 32 * 512 * 4, "a tile's logits"
  assert large.temp_size_in_bytes <= 1.02 * small.temp_size_in_bytes
  gradient = EMBED * (65536 - 4096) * 4 if name == "trained head" else 0
  assert large.output_size_in_bytes - small.output_size_in_bytes == gradient
  whole = memory(PROGRAMS[name](plain), 65536, dtype)
  assert whole.temp_size_in_bytes >= 32 * 65536 * 4, "the check must see what it looks for"


MESHES = [(1, 1, 8), (2, 1, 4), (1, 2, 4), (2, 2, 2), (1, 8, 1)]
VOCAB, TILE = 1024, 128


def placed(sizes: tuple[int, int, int], shards: int):
  """A program of log-probabilities and both gradients on 8 devices, its arguments, and its text."""
  mesh = make_mesh(dict(zip(MESH_AXES, sizes, strict=False)))
  rows, head = sharding(mesh, RULES, "batch"), sharding(mesh, RULES, "embed", "vocab")
  program = jax.jit(
    functools.partial(with_gradients, tiled(TILE, shards=shards)),
    in_shardings=(rows, head, rows, rows),
    out_shardings=(rows, rows, head),
  )
  given = jax.device_put(case(VOCAB, (8, 6)), (rows, head, rows, rows))
  return program, given, program.lower(*given).compile().as_text()


def largest_exchange(text: str) -> int:
  """The numbers in the largest array that devices exchange."""
  found = re.findall(
    r"= \(?\w+\[([\d,]*)\]\S* (?:all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)", text
  )
  return max(math.prod(int(n) for n in shape.split(",") if n) for shape in found)


@pytest.mark.few(2, reason="each case compiles programs of its own")
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_a_sharded_head_gives_the_same_and_is_never_gathered(sizes):
  program, given, text = placed(sizes, sizes[-1])
  (logps, *gradients), (expected, *expected_gradients) = (
    program(*given),
    with_gradients(tiled(TILE), *case(VOCAB, (8, 6))),
  )
  np.testing.assert_allclose(logps, expected, rtol=1e-6, atol=1e-6)
  for found, wanted in zip(gradients, expected_gradients, strict=True):
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
  assert 0 < largest_exchange(text) <= EMBED * TILE


def test_tiles_that_know_nothing_of_the_shares_would_gather_them():
  assert largest_exchange(placed((1, 1, 8), 1)[2]) >= EMBED * VOCAB
