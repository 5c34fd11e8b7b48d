import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from d1jax.diffusion.draw import TILE, inverse_cdf, log_prob, propose
from d1jax.parallel.mesh import RULES, make_mesh, sharding
from tests.jaxprs import shapes

BELOW_ONE = np.nextafter(np.float32(1), np.float32(0))


def random_logits(*shape: int, seed: int = 0, scale: float = 2.0) -> jax.Array:
  return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape), jnp.float32)


def uniforms(*shape: int, seed: int = 0) -> jax.Array:
  return jax.random.uniform(jax.random.key(seed), shape)


def test_inverse_cdf_is_a_search_in_the_cumulative_sum():
  logits, uniform = random_logits(50, 20, 9), uniforms(50, 20)
  drawn = np.asarray(inverse_cdf(logits, uniform))
  assert drawn.dtype == np.int32
  probabilities = scipy.special.softmax(np.asarray(logits, np.float64), axis=-1)
  for row in np.ndindex(50, 20):
    assert drawn[row] == np.searchsorted(np.cumsum(probabilities[row]), float(uniform[row]), side="right")


@pytest.mark.parametrize("temperature", [0.3, 0.9, 1.0, 2.5])
def test_frequencies_are_the_tempered_softmax(temperature):
  logits, n = random_logits(8, scale=1.0), 40_000
  drawn, _ = propose(jnp.broadcast_to(logits[None], (n, 8)), uniforms(n, seed=1), temperature)
  expected = n * scipy.special.softmax(np.asarray(logits, np.float64) / temperature)
  assert scipy.stats.chisquare(np.bincount(drawn, minlength=8), expected).pvalue > 0.01


def test_log_probabilities_are_exact():
  logits, uniform = random_logits(7, 30, scale=5.0), uniforms(7)
  tokens, logp = propose(logits, uniform, 0.7)
  exact = scipy.special.log_softmax(np.asarray(logits, np.float64) / 0.7, axis=-1)
  np.testing.assert_allclose(logp, exact[np.arange(7), tokens], rtol=2e-6, atol=2e-6)
  np.testing.assert_allclose(
    log_prob(logits, tokens),
    scipy.special.log_softmax(np.asarray(logits, np.float64), axis=-1)[np.arange(7), tokens],
    rtol=2e-6,
    atol=2e-6,
  )


def test_log_prob_is_computed_in_float32():
  logits = random_logits(4, 1000).astype(jnp.bfloat16)
  tokens = jnp.arange(4, dtype=jnp.int32)
  found = log_prob(logits, tokens)
  assert found.dtype == jnp.float32
  exact = scipy.special.log_softmax(np.asarray(logits, np.float64), axis=-1)[np.arange(4), tokens]
  np.testing.assert_allclose(found, exact, rtol=1e-6)


def test_log_prob_of_an_impossible_token_is_minus_infinity():
  assert log_prob(jnp.asarray([[0.0, -jnp.inf]]), jnp.asarray([1]))[0] == -np.inf


def test_temperature_zero_takes_the_first_argmax():
  logits = random_logits(6, 9).at[2].set(1.0)
  tokens, logp = propose(logits, uniforms(6), 0)
  np.testing.assert_array_equal(tokens, np.argmax(np.asarray(logits), axis=-1))
  assert tokens[2] == 0
  assert tokens.dtype == jnp.int32
  np.testing.assert_array_equal(logp, 0.0)
  assert logp.dtype == jnp.float32


@pytest.mark.parametrize("uniform", [0.0, float(BELOW_ONE), 0.5, 1e-30])
@pytest.mark.parametrize("scale", [1.0, 1e4, 1e30, 3e38])
def test_impossible_tokens_are_never_drawn(uniform, scale):
  logits = scale * jnp.asarray([-np.inf, 0.1, -np.inf, 0.2, -1.0, -np.inf], jnp.float32)
  drawn = int(inverse_cdf(logits, jnp.float32(uniform)))
  assert drawn in (1, 3, 4)
  mass = np.exp(np.asarray(logits, np.float64) - float(logits.max()))
  assert mass[drawn] > 0


def test_u_zero_draws_the_first_and_u_below_one_the_last_possible_token():
  logits = jnp.asarray([[-np.inf, 0.0, 0.0, 0.0, -np.inf]] * 2, jnp.float32)
  assert inverse_cdf(logits, jnp.asarray([0.0, BELOW_ONE])).tolist() == [1, 3]


def test_a_uniform_on_a_boundary_belongs_to_the_next_token():
  logits, uniform = jnp.zeros((4, 4)), jnp.asarray([0.0, 0.25, 0.5, 0.75])
  assert inverse_cdf(logits, uniform).tolist() == [0, 1, 2, 3]


def test_a_sum_that_does_not_ascend_draws_no_impossible_token(monkeypatch):
  """An accelerator adds in parallel, and its sums may stick out by a rounding error where nothing was added."""
  exact = jnp.cumsum
  bumps = jnp.asarray([0.0, 0.0, 1e-6, 0.0, 1e-6])
  monkeypatch.setattr(jnp, "cumsum", lambda x, axis: exact(x, axis=axis) + bumps)
  logits = jnp.asarray([-np.inf, 0.0, -np.inf, 0.0, -np.inf])
  for uniform in (0.5, 0.5 + 1e-7, float(BELOW_ONE)):
    assert int(inverse_cdf(logits, jnp.float32(uniform))) in (1, 3)


@pytest.mark.slow(reason="compiles programs of its own")
def test_rounding_of_a_long_sum_draws_no_impossible_token():
  """Every other token is impossible; the uniforms fall on, just below and just above each of the sums."""
  size = 1000
  logits = random_logits(size, seed=3, scale=4.0).at[1::2].set(-jnp.inf)
  mass = jnp.exp(logits - logits.max())
  cumulative = np.asarray(jnp.cumsum(mass))
  uniform = np.clip(cumulative / cumulative[-1], 0, BELOW_ONE).astype(np.float32)
  for near in (
    np.nextafter(uniform, np.float32(0)),
    uniform,
    np.minimum(np.nextafter(uniform, np.float32(2)), BELOW_ONE),
  ):
    drawn = jax.lax.map(lambda u: inverse_cdf(logits, u), jnp.asarray(near), batch_size=256)
    assert not (np.asarray(drawn) % 2).any()


def test_a_single_possible_token_is_always_drawn():
  logits = jnp.full((100, 5), -jnp.inf).at[:, 3].set(-2e38)
  assert (np.asarray(inverse_cdf(logits, uniforms(100))) == 3).all()


@pytest.mark.slow(reason="compiles programs of its own")
@pytest.mark.parametrize("size", [TILE + 1, 4 * TILE, 5 * TILE - 3])
def test_a_draw_through_tiles_is_a_search_in_the_cumulative_sum(size):
  logits, uniform = random_logits(10, 100, size).at[:, :, 7:90:3].set(-jnp.inf), uniforms(10, 100)
  drawn = np.asarray(inverse_cdf(logits, uniform))
  assert drawn.dtype == np.int32
  probabilities = scipy.special.softmax(np.asarray(logits, np.float64), axis=-1)
  exact = [
    np.searchsorted(np.cumsum(probabilities[row]), float(uniform[row]), side="right") for row in np.ndindex(10, 100)
  ]
  # A uniform may fall between two roundings of a bound: about one draw in a million does.
  np.testing.assert_array_equal(drawn.ravel(), exact)


@pytest.mark.few(1, reason="each case compiles programs of its own")
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_frequencies_through_tiles_are_the_tempered_softmax(temperature):
  size, n = 2 * TILE + 9, 100_000
  logits = random_logits(size, scale=1.0).at[TILE - 1 : TILE + 2].set(-jnp.inf)
  drawn = jax.lax.map(lambda u: propose(logits, u, temperature)[0], uniforms(n, seed=2), batch_size=10_000)
  expected = n * scipy.special.softmax(np.asarray(logits, np.float64) / temperature)
  counts = np.bincount(drawn, minlength=size)
  possible = expected > 0
  assert not counts[~possible].any()
  assert scipy.stats.chisquare(counts[possible], expected[possible]).pvalue > 0.01


@pytest.mark.few(1, reason="each case compiles programs of its own")
@pytest.mark.parametrize("only", [0, TILE - 1, TILE, 3 * TILE, 4 * TILE + 4])
def test_a_single_possible_token_is_drawn_from_any_tile(only):
  logits = jnp.full((100, 4 * TILE + 5), -jnp.inf).at[:, only].set(-2e38)
  assert (np.asarray(inverse_cdf(logits, uniforms(100).at[0].set(BELOW_ONE))) == only).all()


@pytest.mark.slow(reason="compiles programs of its own")
def test_u_zero_and_u_below_one_draw_the_ends_of_the_possible_tiles():
  logits = jnp.full((2, 6 * TILE), -jnp.inf).at[:, TILE + 3 : 4 * TILE - 5].set(1.0)
  assert inverse_cdf(logits, jnp.asarray([0.0, BELOW_ONE])).tolist() == [TILE + 3, 4 * TILE - 6]


@pytest.mark.slow(reason="compiles programs of its own")
def test_roundings_of_tiles_that_disagree_draw_no_impossible_token(monkeypatch):
  """Sums stick out by a rounding error where nothing was added, and a tile's mass is more than its tokens' sum."""
  exact = jnp.cumsum

  def bumped(x, axis):
    wave = jnp.where(jnp.arange(x.shape[-1]) % 2 == 0, 1 + 1e-6, 1 - 1e-6)
    return exact(x, axis=axis) * wave[None]

  monkeypatch.setattr(jnp, "cumsum", bumped)
  logits = jnp.where(jnp.arange(4 * TILE) % 3 == 0, 0.0, -jnp.inf).at[TILE : 2 * TILE].set(-jnp.inf)
  uniform = jnp.concatenate([jnp.linspace(0, BELOW_ONE, 400), 1 / 3 + 1e-7 * jnp.arange(-5, 5)])
  drawn = np.asarray(inverse_cdf(jnp.broadcast_to(logits[None], (410, 4 * TILE)), uniform))
  assert (drawn % 3 == 0).all()
  assert not ((drawn >= TILE) & (drawn < 2 * TILE)).any()


@pytest.mark.parametrize("shards", [2, 4, 8])
@pytest.mark.parametrize("vocab", [126464, 152064])
def test_the_vocabularies_of_llada_and_dream_are_cut_between_tiles(vocab, shards):
  assert vocab % (shards * TILE) == 0


@pytest.mark.few(1, reason="each case compiles programs of its own")
@pytest.mark.parametrize("shards", [2, 8])
def test_a_sharded_vocabulary_draws_the_same_tokens(shards):
  logits, uniform = random_logits(2, 100, 16 * TILE, scale=3.0), uniforms(2, 100)
  mesh = make_mesh({"data": 1, "fsdp": 8 // shards, "tensor": shards})
  cut, whole = sharding(mesh, RULES, None, None, "vocab"), sharding(mesh, RULES)
  run = jax.jit(inverse_cdf, in_shardings=(cut, whole), out_shardings=whole)
  np.testing.assert_array_equal(run(logits, uniform), jax.jit(inverse_cdf)(logits, uniform))


def test_no_noise_is_drawn_for_each_entry_of_the_vocabulary():
  """Beside the logits and their masses, what a draw computes is small; random bits come as one uniform a position."""
  logits, uniform = random_logits(2, 3, 10 * TILE), uniforms(2, 3)
  program = str(jax.make_jaxpr(functools.partial(propose, temperature=0.9))(logits, uniform))
  assert "random" not in program
  assert "threefry" not in program
  assert (2, 3, 10) in shapes(functools.partial(propose, temperature=0.9), logits, uniform)


@pytest.mark.parametrize("size", [9, 3 * TILE + 2])
def test_greedy_ties_go_to_the_first(size):
  logits = jnp.zeros((3, size)).at[1, 4:].set(2.0).at[2, size - 1].set(1.0)
  assert propose(logits, uniforms(3), 0)[0].tolist() == [0, 4, size - 1]


@pytest.mark.parametrize("size", [9, 3 * TILE + 2])
@pytest.mark.parametrize("temperature", [0, 0.9])
def test_logits_that_are_not_numbers_draw_ids_of_the_vocabulary(size, temperature):
  """A run that diverges gets as far as the check that says so."""
  tokens, _ = propose(jnp.full((4, size), jnp.nan), uniforms(4), temperature)
  assert ((np.asarray(tokens) >= 0) & (np.asarray(tokens) < size)).all()
