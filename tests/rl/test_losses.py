import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d1jax.rl.losses import clipped_surrogate, token_weights

RNG = np.random.default_rng(0)
SHAPE = (5, 7)
MASK = jnp.asarray(np.arange(7)[None] < np.asarray([7, 1, 3, 4, 6])[:, None])
LOGP, OLD, REF = (jnp.asarray(RNG.normal(-2, 0.5, SHAPE), jnp.float32) for _ in range(3))
ADVANTAGES = jnp.asarray([1.0, -0.7, 0.3, 0.0, -1.5])
WEIGHTS = token_weights(MASK, "token")


def test_token_weights_are_one_over_all_tokens():
  np.testing.assert_allclose(WEIGHTS, np.asarray(MASK) / 21, rtol=1e-6)


def test_sequence_weights_are_a_mean_of_means():
  weights = token_weights(MASK, "sequence")
  x = RNG.normal(size=SHAPE)
  expected = np.mean([row[keep].mean() for row, keep in zip(x, np.asarray(MASK), strict=True)])
  np.testing.assert_allclose((np.asarray(weights) * x).sum(), expected, rtol=1e-5)
  assert weights.dtype == jnp.float32


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_weights_add_up_to_one_and_are_zero_where_masked(aggregation):
  weights = np.asarray(token_weights(MASK, aggregation))
  np.testing.assert_allclose(weights.sum(), 1, rtol=1e-6)
  assert (weights[~np.asarray(MASK)] == 0).all()
  assert (weights[np.asarray(MASK)] > 0).all()


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_no_tokens_at_all_weigh_nothing(aggregation):
  np.testing.assert_array_equal(token_weights(jnp.zeros((2, 3), bool), aggregation), 0)


def test_an_unknown_aggregation_is_refused():
  with pytest.raises(ValueError, match="aggregation='mean' is unknown; known: token, sequence"):
    token_weights(MASK, "mean")


def naive(logp, old, ref, advantages, weights, epsilon, beta):
  """Loops over tokens, in float64."""
  loss = kl = clipped = deviation = 0.0
  for b, i in np.ndindex(*SHAPE):
    w, a = float(weights[b, i]), float(advantages[b])
    if w == 0:
      continue
    ratio = np.exp(float(logp[b, i]) - float(old[b, i]))
    bounded = min(max(ratio, 1 - epsilon), 1 + epsilon)
    surrogate = min(ratio * a, bounded * a)
    divergence = 0.0
    if ref is not None:
      d = float(ref[b, i]) - float(logp[b, i])
      divergence = np.exp(d) - d - 1
    loss += w * (-surrogate + beta * divergence)
    kl += w * divergence
    clipped += w * (bounded * a < ratio * a)
    deviation += w * abs(ratio - 1)
  return loss, kl, clipped, deviation


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
@pytest.mark.parametrize(("epsilon", "beta"), [(0.5, 0.04), (0.2, 0.0), (0.05, 1.0)])
def test_the_loss_is_a_loop_over_tokens(epsilon, beta, aggregation):
  weights = token_weights(MASK, aggregation)
  ref = REF if beta else None
  found = clipped_surrogate(LOGP, OLD, ref, ADVANTAGES, weights, epsilon=epsilon, beta=beta)
  expected = naive(LOGP, OLD, ref, ADVANTAGES, weights, epsilon, beta)
  assert 0 < expected[2] < 1
  np.testing.assert_allclose(list(found), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  ("ratio", "advantage", "surrogate", "active"),
  [
    (1.5, 2.0, 2.4, 1),  # good and already likelier: capped
    (1.5, -2.0, -3.0, 0),  # bad and likelier: the full push down
    (0.5, 2.0, 1.0, 0),  # good and less likely: the full push up
    (0.5, -2.0, -1.6, 1),  # bad and already less likely: capped
    (1.1, 2.0, 2.2, 0),  # inside
    (0.9, -2.0, -1.8, 0),
    (3.0, 0.0, 0.0, 0),  # no advantage, nothing to clip
  ],
)
def test_the_clip_binds_on_one_side_only(ratio, advantage, surrogate, active):
  logp = jnp.log(jnp.asarray([[ratio]]))
  advantages, weights = jnp.asarray([advantage]), jnp.ones((1, 1))

  def loss(logp):
    return clipped_surrogate(logp, jnp.zeros((1, 1)), None, advantages, weights, epsilon=0.2, beta=0.0)

  found = loss(logp)
  np.testing.assert_allclose(found.loss, -surrogate, rtol=1e-6)
  assert found.clip_fraction == active
  gradient = jax.grad(lambda x: loss(x).loss)(logp)[0, 0]
  np.testing.assert_allclose(gradient, 0.0 if active else -ratio * advantage, rtol=1e-6)


def test_k3_is_never_negative_and_zero_at_the_reference():
  terms = lambda ref: clipped_surrogate(LOGP, LOGP, ref, ADVANTAGES, WEIGHTS, epsilon=0.2, beta=1.0)
  assert terms(LOGP).kl == 0
  d = np.asarray(REF - LOGP, np.float64)
  np.testing.assert_allclose(terms(REF).kl, (np.asarray(WEIGHTS) * (np.exp(d) - d - 1)).sum(), rtol=1e-5)
  assert terms(REF).kl > 0


def test_k3_estimates_the_divergence_to_the_reference():
  rng = np.random.default_rng(3)
  p, q = rng.dirichlet(np.ones(6)), rng.dirichlet(np.ones(6))
  tokens = rng.choice(6, 40_000, p=p)
  logp, ref = (jnp.asarray(np.log(x)[tokens][None], jnp.float32) for x in (p, q))
  weights = jnp.full(logp.shape, 1 / logp.size)
  found = clipped_surrogate(logp, logp, ref, jnp.zeros(1), weights, epsilon=0.2, beta=1.0)
  np.testing.assert_allclose(found.kl, (p * np.log(p / q)).sum(), rtol=0.03)


@pytest.mark.parametrize("rubbish", [np.inf, -np.inf, np.nan, 1e30, -1e30])
def test_tokens_without_weight_reach_neither_value_nor_gradient(rubbish):
  def terms(logp, old, ref):
    return clipped_surrogate(logp, old, ref, ADVANTAGES, WEIGHTS, epsilon=0.2, beta=0.5)

  spoil = lambda x: jnp.where(MASK, x, rubbish)
  for spoilt in ((spoil(LOGP), OLD, REF), (LOGP, spoil(OLD), REF), (LOGP, OLD, spoil(REF)), (spoil(LOGP),) * 3):
    clean = [jnp.where(MASK, x, -1.0) for x in spoilt]
    np.testing.assert_array_equal(list(terms(*spoilt)), list(terms(*clean)))
    gradients = [jax.grad(lambda *xs: terms(*xs).loss)(*xs) for xs in (spoilt, clean)]
    np.testing.assert_array_equal(*gradients)
    assert (np.asarray(gradients[0])[~np.asarray(MASK)] == 0).all()


def test_no_advantage_and_no_kl_give_no_gradient():
  gradient = jax.grad(
    lambda logp: clipped_surrogate(logp, OLD, REF, jnp.zeros(5), WEIGHTS, epsilon=0.2, beta=0.0).loss
  )(LOGP)
  np.testing.assert_array_equal(gradient, 0)


def test_beta_alone_pulls_towards_the_reference():
  gradient = jax.grad(
    lambda logp: clipped_surrogate(logp, LOGP, REF, jnp.zeros(5), WEIGHTS, epsilon=0.2, beta=0.3).loss
  )(LOGP)
  expected = np.asarray(WEIGHTS) * 0.3 * (1 - np.exp(np.asarray(REF - LOGP)))
  np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-7)


def test_at_ratio_one_the_gradient_is_the_policy_gradient():
  gradient = jax.grad(
    lambda logp: clipped_surrogate(logp, LOGP, None, ADVANTAGES, WEIGHTS, epsilon=0.2, beta=0.0).loss
  )(LOGP)
  np.testing.assert_allclose(gradient, -np.asarray(WEIGHTS) * np.asarray(ADVANTAGES)[:, None], rtol=1e-6)
