import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d1jax.diffusion.likelihood import Scores
from d1jax.rl.importance import effective_sample_size
from d1jax.rl.losses import (
  KLS,
  LOSSES,
  RATIO_EDGES,
  ClippedLoss,
  ClippedToken,
  Loss,
  Sandwich,
  Terms,
  divergence,
  reference_gap,
  sampling_gap,
  token_weights,
)

RNG = np.random.default_rng(0)
SHAPE = (5, 7)
MASK = jnp.asarray(np.arange(7)[None] < np.asarray([7, 1, 3, 4, 6])[:, None])
LOGP, OLD, REF = (jnp.asarray(RNG.normal(-2, 0.5, SHAPE), jnp.float32) for _ in range(3))
UPPER = LOGP + jnp.asarray(RNG.uniform(0, 1, SHAPE), jnp.float32)
# As an estimator that scores some of the tokens, and weighs them for the others, has it.
SAMPLED = jnp.asarray(RNG.choice([0.0, 1.0, 2.5], SHAPE), jnp.float32)
ADVANTAGES = jnp.asarray([1.0, -0.7, 0.3, 0.0, -1.5])
WEIGHTS = token_weights(MASK, "token")

every_loss = pytest.mark.parametrize("name", list(LOSSES))


def terms(logp=LOGP, old=OLD, ref=REF, advantages=ADVANTAGES, weights=WEIGHTS, scale=None, upper_scale=None) -> Terms:
  """Of the arrays above, where nothing else is given."""
  scale = MASK.astype(jnp.float32) if scale is None else scale
  scores = Scores(logp, scale, UPPER + logp - LOGP, scale if upper_scale is None else upper_scale)
  return Terms(scores, old, ref, advantages, weights, WEIGHTS)


def clips(name: str) -> bool:
  return issubclass(LOSSES[name], ClippedLoss)


def made(name: str, **fields) -> Loss:
  """The loss with what it must be told, and more."""
  needed = {"epsilon": 0.2} if clips(name) else {}
  return LOSSES[name](**needed | ({"upper_share": 0.3} if LOSSES[name] is Sandwich else {}) | fields)


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


def test_fixed_weights_do_not_depend_on_lengths():
  np.testing.assert_allclose(token_weights(MASK, "fixed"), np.asarray(MASK) / 35, rtol=1e-6)


@pytest.mark.parametrize("aggregation", ["token", "sequence", "fixed"])
def test_no_tokens_at_all_weigh_nothing(aggregation):
  np.testing.assert_array_equal(token_weights(jnp.zeros((2, 3), bool), aggregation), 0)


def test_an_unknown_aggregation_is_refused():
  with pytest.raises(ValueError, match="aggregation='mean' is unknown; known: token, sequence, fixed"):
    token_weights(MASK, "mean")


def naive_divergence(kind, d):
  return {"k1": -d, "k2": d * d / 2, "k3": np.exp(d) - d - 1}[kind]


def naive(name, weights, scale, upper_scale, given: Loss, ref=REF):
  """Loops over tokens, or over sequences, in float64: loss, kl, clip fraction, ratio deviation."""
  loss = kl = clipped = deviation = 0.0
  logp, old, upper = (np.asarray(x, np.float64) for x in (LOGP, OLD, UPPER))
  weights, scale, mask = np.asarray(weights, np.float64), np.asarray(scale, np.float64), np.asarray(MASK)
  high = clips(name) and (given.epsilon if given.epsilon_high is None else given.epsilon_high)

  def surrogate(ratio, a):
    bounded = min(max(ratio, 1 - given.epsilon), 1 + high)
    return min(ratio * a, bounded * a), bounded * a < ratio * a

  def penalties(difference):
    to_ref = 0.0 if ref is None else naive_divergence(given.kl, difference(np.asarray(ref, np.float64)))
    return naive_divergence(given.kl, difference(old)) if given.kl_against == "old" else to_ref, to_ref

  for b in range(SHAPE[0]):
    a, chosen = float(ADVANTAGES[b]), [i for i in range(SHAPE[1]) if mask[b, i]]
    n, row = len(chosen), sum(weights[b, i] for i in chosen)
    total = lambda x, b=b, chosen=chosen: sum(scale[b, i] * x[b, i] for i in chosen)
    if name == "clipped_token":
      for i in chosen:
        w, share, ratio = weights[b, i] * scale[b, i], scale[b, i] / mask.sum(), np.exp(logp[b, i] - old[b, i])
        gain, active = surrogate(ratio, a)
        penalty, to_ref = penalties(lambda x, b=b, i=i: x[b, i] - logp[b, i])
        loss += w * (given.beta * penalty - gain)
        kl, clipped, deviation = kl + share * to_ref, clipped + share * active, deviation + share * abs(ratio - 1)
      continue
    share = n / mask.sum()
    penalty, to_ref = penalties(lambda x, total=total: total(x) - total(logp))
    loss, kl = loss + row * given.beta * penalty / n, kl + share * to_ref / n
    if name == "clipped_sequence":
      ratio = np.exp((total(logp) - total(old)) / n)
      gain, active = surrogate(ratio, a)
      loss, clipped, deviation = loss - row * gain, clipped + share * active, deviation + share * abs(ratio - 1)
    else:
      low = scale * logp
      up = given.upper_share * upper_scale * upper + (1 - given.upper_share) * low if name == "sandwich" else low
      loss -= sum(weights[b, i] * a * (low if a >= 0 else up)[b, i] for i in chosen)
  return (loss, kl, clipped, deviation) if clips(name) else (loss, kl)


@pytest.mark.parametrize("aggregation", ["token", "sequence", "fixed"])
@pytest.mark.parametrize(
  "given",
  [{"beta": 0.04}, {}, {"beta": 1.0, "kl": "k2"}, {"beta": 0.3, "kl": "k1", "kl_against": "old"}],
  ids=str,
)
@every_loss
def test_the_loss_is_a_loop(name, given, aggregation):
  weights, scale = token_weights(MASK, aggregation), SAMPLED if given else MASK.astype(jnp.float32)
  clip = {"epsilon": 0.1, "epsilon_high": 0.25} if clips(name) and given else {}
  told, ref = made(name, **given, **clip), REF if given else None
  upper_scale = jnp.where(scale > 0, 0.5 + 2 * scale, 0.0)
  loss, figures = told(terms(ref=ref, weights=weights, scale=scale, upper_scale=upper_scale))
  expected = naive(name, weights, scale, np.asarray(upper_scale), told, ref)
  assert len(expected) == 2 or 0 < expected[2] < 1
  found = [loss, *(figures[name] for name in ("kl", "clip_fraction", "ratio_deviation") if name in figures)]
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("parts", [5])
@every_loss
def test_sums_of_parts_are_those_of_the_whole(name, parts):
  told = made(name, beta=0.3)
  whole = told(terms(scale=SAMPLED))
  rows = [jax.tree.map(lambda x, i=i: x[i : i + 1], terms(scale=SAMPLED)) for i in range(parts)]
  added = jax.tree.map(lambda *x: sum(x), *(told(row) for row in rows))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), added, whole)


@pytest.mark.parametrize(
  ("ratio", "advantage", "surrogate", "active"),
  [
    (1.5, 2.0, 2.6, 1),  # good and already likelier: capped, above where the upper side says
    (1.25, 2.0, 2.5, 0),
    (1.5, -2.0, -3.0, 0),  # bad and likelier: the full push down
    (0.5, 2.0, 1.0, 0),  # good and less likely: the full push up
    (0.5, -2.0, -1.6, 1),  # bad and already less likely: capped
    (0.9, -2.0, -1.8, 0),  # inside
    (3.0, 0.0, 0.0, 0),  # no advantage, nothing to clip
  ],
)
@pytest.mark.parametrize("name", ["clipped_token", "clipped_sequence"])
def test_the_clip_binds_on_one_side_only(name, ratio, advantage, surrogate, active):
  logp, one = jnp.log(jnp.asarray([[ratio]])), jnp.ones((1, 1))

  def loss(logp):
    given = Terms(Scores(logp, one), jnp.zeros((1, 1)), None, jnp.asarray([advantage]), one, one)
    return LOSSES[name](epsilon=0.2, epsilon_high=0.3)(given)

  found, figures = loss(logp)
  np.testing.assert_allclose(found, -surrogate, rtol=1e-6)
  assert figures["clip_fraction"] == active
  gradient = jax.grad(lambda x: loss(x)[0])(logp)[0, 0]
  np.testing.assert_allclose(gradient, 0.0 if active else -ratio * advantage, rtol=1e-6)


@pytest.mark.parametrize("name", ["clipped_token", "clipped_sequence"])
@pytest.mark.parametrize(
  ("ratio", "advantage", "surrogate", "gradient"),
  [
    (1.0, 2.0, 2.0, 2.0),  # the first inner step: a policy gradient
    (1.0, -2.0, -2.0, -2.0),
    (1.01, 2.0, 2.0, 0.0),  # moved the way of its advantage: no more
    (0.99, -2.0, -2.0, 0.0),
    (0.99, 2.0, 1.98, 1.98),  # moved against it: the full push back
    (1.01, -2.0, -2.02, -2.02),
  ],
)
def test_an_epsilon_of_zero_lets_no_ratio_go_further(name, ratio, advantage, surrogate, gradient):
  """As torch.min and torch.clamp have it, which ESPO's trainer is made of."""
  logp, one = jnp.log(jnp.asarray([[ratio]])), jnp.ones((1, 1))

  def loss(logp):
    given = Terms(Scores(logp, one), jnp.zeros((1, 1)), None, jnp.asarray([advantage]), one, one)
    return LOSSES[name](epsilon=0.0)(given)[0]

  value, slope = jax.value_and_grad(loss)(logp)
  np.testing.assert_allclose((value, slope[0, 0]), (-surrogate, -gradient), rtol=1e-5)


@pytest.mark.parametrize("kind", KLS)
def test_each_kl_estimates_the_divergence_and_its_gradient(kind):
  """By enumeration of what the policy p may draw, for p near the target and, where it is unbiased, far from it."""
  rng = np.random.default_rng(3)
  target = jnp.asarray(rng.dirichlet(np.ones(6)), jnp.float32)
  for distance in (0.05, 1.0):
    logits = jnp.log(target) + distance * jnp.asarray(rng.normal(size=6), jnp.float32)
    fixed = jax.nn.softmax(logits)
    estimate = lambda x, fixed=fixed: jnp.sum(fixed * divergence(kind, jnp.log(target) - jax.nn.log_softmax(x)))
    exact = lambda x: jnp.sum(jax.nn.softmax(x) * (jax.nn.log_softmax(x) - jnp.log(target)))
    if distance < 1 or kind != "k2":
      np.testing.assert_allclose(estimate(logits), exact(logits), rtol=0.1 if kind == "k2" else 1e-3)
    if distance < 1 or kind != "k3":
      found, expected = jax.grad(estimate)(logits), jax.grad(exact)(logits)
      scale = np.abs(expected).max()
      np.testing.assert_allclose(found, expected, atol=scale * (0.1 if kind == "k3" else 1e-4))


@every_loss
def test_the_distance_to_the_reference_is_zero_at_it_and_known_without_a_penalty(name):
  told = made(name)
  assert told(terms(ref=LOGP))[1]["kl"] == 0
  assert told(terms())[1]["kl"] > 0
  assert told(terms(ref=None))[1]["kl"] == 0
  without, penalised = (told(terms(ref=ref))[0] for ref in (None, REF))
  assert without == penalised


@pytest.mark.few(7, reason="each case compiles programs of its own")
@pytest.mark.parametrize("rubbish", [np.inf, -np.inf, np.nan, 1e30, -1e30])
@every_loss
def test_tokens_without_weight_reach_neither_value_nor_gradient(name, rubbish):
  function = lambda logp, old, ref: made(name, beta=0.5)(terms(logp, old, ref))
  spoil = lambda x: jnp.where(MASK, x, rubbish)
  for spoilt in ((spoil(LOGP), OLD, REF), (LOGP, spoil(OLD), REF), (LOGP, OLD, spoil(REF)), (spoil(LOGP),) * 3):
    clean = [jnp.where(MASK, x, -1.0) for x in spoilt]
    jax.tree.map(np.testing.assert_array_equal, function(*spoilt), function(*clean))
    gradients = [jax.grad(lambda *xs: function(*xs)[0])(*xs) for xs in (spoilt, clean)]
    np.testing.assert_array_equal(*gradients)
    assert (np.asarray(gradients[0])[~np.asarray(MASK)] == 0).all()


@every_loss
def test_no_advantage_and_no_kl_give_no_gradient(name):
  loss = lambda logp: made(name)(terms(logp, advantages=jnp.zeros(5)))[0]
  np.testing.assert_array_equal(jax.grad(loss)(LOGP), 0)


def test_beta_alone_pulls_towards_the_reference():
  told = ClippedToken(epsilon=0.2, beta=0.3)
  gradient = jax.grad(lambda logp: told(terms(logp, LOGP, advantages=jnp.zeros(5)))[0])(LOGP)
  expected = np.asarray(WEIGHTS) * 0.3 * (1 - np.exp(np.asarray(REF - LOGP)))
  np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("aggregation", ["token", "sequence", "fixed"])
@every_loss
def test_at_ratio_one_the_gradient_is_the_policy_gradient(name, aggregation):
  """Whatever the loss: of a clipped sequence too, whose ratio's exponent is a mean over its tokens."""
  weights = token_weights(MASK, aggregation)
  loss = lambda logp: made(name)(terms(logp, LOGP, None, weights=weights))[0]
  row = np.asarray(weights).sum(axis=1, keepdims=True) / np.asarray(MASK).sum(axis=1, keepdims=True) * np.asarray(MASK)
  expected = -np.asarray(ADVANTAGES)[:, None] * (row if name == "clipped_sequence" else np.asarray(weights))
  np.testing.assert_allclose(jax.grad(loss)(LOGP), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", ["clipped_token", "clipped_sequence"])
def test_where_nothing_has_moved_every_ratio_is_one(name):
  _, found = made(name)(terms(LOGP, LOGP))
  assert (found["clip_fraction"], found["ratio_deviation"]) == (0, 0)
  np.testing.assert_allclose(effective_sample_size(found["ratio"].sums), 1, rtol=1e-6)
  np.testing.assert_allclose(found["ratio"].below, RATIO_EDGES > 0, rtol=1e-6)


def test_the_distribution_of_ratios_is_that_of_the_tokens():
  found = ClippedToken(epsilon=0.2)(terms())[1]["ratio"]
  log_ratios = np.asarray(LOGP - OLD)[np.asarray(MASK)]
  np.testing.assert_allclose(found.below, [(log_ratios <= edge).mean() for edge in RATIO_EDGES], atol=1e-6)
  ratios = np.exp(log_ratios)
  share = ratios.sum() ** 2 / (ratios**2).sum() / ratios.size
  np.testing.assert_allclose(effective_sample_size(found.sums), share, rtol=1e-5)


def test_the_gap_to_what_drew_the_tokens():
  mask, d = np.asarray(MASK), np.asarray(LOGP - OLD, np.float64)
  found = sampling_gap(terms(), jnp.where(MASK, OLD, jnp.nan), of_sequences=False)
  np.testing.assert_allclose(found, np.abs(d[mask]).mean(), rtol=1e-5)
  rows = sum(abs(d[b][mask[b]].sum()) for b in range(5)) / mask.sum()
  np.testing.assert_allclose(sampling_gap(terms(), OLD, of_sequences=True), rows, rtol=1e-4)


@pytest.mark.parametrize("scale", [None, SAMPLED])
def test_the_gap_to_the_reference(scale):
  given = terms(ref=jnp.where(MASK, REF, jnp.nan), scale=scale)
  mask, weights = np.asarray(MASK), np.asarray(given.scores.weight, np.float64)
  d = np.where(mask, weights * np.asarray(LOGP - REF, np.float64), 0.0)
  tokens, sequences = (reference_gap(given, of_sequences=x) for x in (False, True))
  np.testing.assert_allclose(tokens, np.abs(d).sum() / mask.sum(), rtol=1e-5)
  np.testing.assert_allclose(sequences, sum(abs(row.sum()) for row in d) / mask.sum(), rtol=1e-4)
  assert reference_gap(terms(ref=None), of_sequences=False) is None


@pytest.mark.parametrize(
  ("name", "needs"),
  [
    ("clipped_token", {"old"}),
    ("clipped_sequence", {"old"}),
    ("likelihood", set()),
    ("sandwich", {"upper"}),
  ],
)
def test_a_loss_says_what_it_needs(name, needs):
  assert made(name).needs == needs
  assert made(name, beta=0.1).needs == needs | {"reference"}
  assert made(name, beta=0.1, kl_against="old").needs == needs | {"old"}


@pytest.mark.parametrize(
  ("name", "fields", "told", "message"),
  [
    ("clipped_token", {"old": None}, {}, "old_logp is None"),
    ("likelihood", {"ref": None}, {"beta": 0.1}, "ref_logp is None"),
  ],
)
def test_what_a_loss_lacks_is_named(name, fields, told, message):
  with pytest.raises(ValueError, match=message):
    made(name, **told)(terms(**fields))


@pytest.mark.parametrize(
  ("name", "options", "message"),
  [
    ("clipped_token", {"epsilon": -0.2}, "^epsilon=-0.2 must not be negative"),
    ("clipped_token", {"epsilon": float("nan")}, "^epsilon=nan must not be negative"),
    ("clipped_sequence", {"epsilon_high": -0.1}, "^epsilon_high=-0.1 must not be negative"),
    ("likelihood", {"beta": -0.1}, "^beta=-0.1 must not be negative; 0 leaves the KL out"),
    ("likelihood", {"kl": "k4"}, "^kl='k4' is unknown; known: k1, k2, k3"),
    ("likelihood", {"kl_against": "base"}, "^kl_against='base' is unknown; known: reference, old"),
    ("sandwich", {"upper_share": 1.5}, "^upper_share=1.5 must be from 0 to 1"),
  ],
)
def test_options_that_make_no_sense_are_refused(name, options, message):
  with pytest.raises(ValueError, match=message):
    made(name, **options)
