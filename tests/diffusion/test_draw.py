import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from d1jax.diffusion.draw import inverse_cdf, log_prob, propose

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
