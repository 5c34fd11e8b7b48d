"""Goldens by hand from the papers' equations and their authors' code: two or three rows, three or four tokens.

The arithmetic stands beside each number, so that none of it is ours. Log-probabilities are chosen to be round.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.methods import METHODS
from d1jax.diffusion.elbo import Hidden, Sums, quadrature
from d1jax.diffusion.likelihood import Scores
from d1jax.diffusion.sandwich import bounds, mask_sums, mask_weight
from d1jax.rl.advantage import leave_one_out, softmax
from d1jax.rl.losses import ClippedSequence, ClippedToken, Likelihood, Sandwich, Terms, token_weights
from d1jax.run import parts
from tests import jobs, toy


def terms(logp, advantages, aggregation, *, old=None, ref=None, weight=None, mask=None, **upper):
  """Rows of tokens; what is None is not scored, and every token counts once where nothing else is said."""
  logp = jnp.asarray(logp, jnp.float32)
  mask = jnp.ones(logp.shape, bool) if mask is None else jnp.asarray(mask, bool)
  weight = mask.astype(jnp.float32) if weight is None else jnp.asarray(weight, jnp.float32)
  old, ref = (None if x is None else jnp.asarray(x, jnp.float32) for x in (old, ref))
  scores = Scores(logp, weight, **upper)
  weights, share = (token_weights(mask, each) for each in (aggregation, "token"))
  return Terms(scores, old, ref, jnp.asarray(advantages, jnp.float32), weights, share)


def test_leave_one_out():
  """DiffuCoder's and ESPO's: r less the mean of the others, ((sum - r) / (G - 1)); no deviation."""
  # Group (1, 0, 0.5): 1 - (0 + 0.5) / 2 = 0.75; 0 - (1 + 0.5) / 2 = -0.75; 0.5 - (1 + 0) / 2 = 0.
  # Group (2, 2, 5): 2 - (2 + 5) / 2 = -1.5, twice; 5 - (2 + 2) / 2 = 3.
  found = leave_one_out(jnp.asarray([1.0, 0.0, 0.5, 2.0, 2.0, 5.0]), 3)
  np.testing.assert_allclose(found, [0.75, -0.75, 0.0, -1.5, -1.5, 3.0], rtol=1e-6, atol=1e-7)
  # The same as G / (G - 1) (r - mean): 3 / 2 (1 - 0.5) = 0.75.


def test_wd1_weighs_likelihoods_by_two_softmaxes():
  """-sum_i w+_i log p_i + sum_i w-_i log p_i, w of exp(r) and exp(-r) within the group."""
  # r = (ln 3, 0): w+ = 3/4, 1/4; w- = (1/3) / (4/3), 1 / (4/3) = 1/4, 3/4; A = w+ - w- = (1/2, -1/2).
  advantages = softmax(jnp.asarray([math.log(3), 0.0]), 2)
  np.testing.assert_allclose(advantages, [0.5, -0.5], rtol=1e-6)
  # Sums of log p: -1 - 2 - 3 = -6, and -1 - 1 = -2 up to the stop. -(1/2 (-6) - 1/2 (-2)) = 2; here over B C = 6.
  logp, mask = [[-1, -2, -3], [-1, -1, -9]], [[1, 1, 1], [1, 1, 0]]
  given = terms(logp, advantages, "fixed", mask=mask)
  np.testing.assert_allclose(Likelihood()(given)[0], 2 / 6, rtol=1e-6)


def test_espo_clips_the_mean_ratio_and_pulls_by_k2():
  """exp((L - L_old) / n), clipped; beta (L - L_ref)^2 / 2, over n; both means over rows (espo_trainer.py:191-201)."""
  # Row 1, n = 3: L - L_old = 0.3, rho = e^0.1 = 1.10517, A = 2: inside 1 +- 0.2: 2.21034. L - L_ref = 0.6:
  # 0.36 / 2 / 3 = 0.06. Row 2, n = 3: L - L_old = 0.9, rho = e^0.3 = 1.34986, A = 1: clipped to 1.2.
  # L - L_ref = -1.2: 1.44 / 2 / 3 = 0.24. Loss: -(2.21034 + 1.2) / 2 + 0.5 (0.06 + 0.24) / 2 = -1.63017.
  logp = [[-1.0, -2.0, -3.0], [-1.0, -1.0, -1.0]]
  old, ref = [[-1.1, -2.1, -3.1], [-1.9, -1.0, -1.0]], [[-1.6, -2.0, -3.0], [-1.0, -1.0, 0.2]]
  loss, figures = ClippedSequence(epsilon=0.2, beta=0.5, kl="k2")(terms(logp, [2.0, 1.0], "sequence", old=old, ref=ref))
  np.testing.assert_allclose(loss, -1.63017, rtol=1e-5)
  np.testing.assert_allclose(figures["clip_fraction"], 0.5)


def test_espo_on_countdown_has_no_room_to_move():
  """Epsilon 0: -(min(1.10517 x 2, 1 x 2) + min(0.9 x -1, 1 x -1)) / 2 = -(2 - 1) / 2."""
  old = [[-1.1] * 3, [-1.0 - math.log(0.9)] * 3]
  given = terms([[-1.0] * 3] * 2, [2.0, -1.0], "sequence", old=old)
  np.testing.assert_allclose(ClippedSequence(epsilon=0.0)(given)[0], -0.5, rtol=1e-6)


def spg_scores(logps, masks, exponent):
  """SPG's estimate of one row of three tokens from two masks."""
  scored, parts = jnp.ones((1, 3), bool), []
  for logp, mask in zip(logps, masks, strict=True):
    masked = jnp.asarray([mask], bool)
    drawn = Hidden(masked, mask_weight(masked, scored, 2), jax.random.key(0))
    parts.append(mask_sums(drawn, jnp.log(jnp.asarray([logp], jnp.float32)), exponent))
  sums = Sums(*(a + b for a, b in zip(parts[0][0], parts[1][0], strict=True)))
  return bounds(sums, parts[0][1] + parts[1][1], scored, exponent)


# p of each token under two masks: the first hides tokens 0 and 1, the second 1 alone. Token 2 is never hidden.
SPG = ([0.5, 0.25, 0.9], [0.9, 0.5, 0.9]), ([1, 1, 0], [0, 1, 0])


def test_spg_lower_is_n_times_the_mean_of_means():
  """spg_trainer.py:532, 544, 118: the mean over what is masked, averaged over samples, times n."""
  # Sample 1: (ln 1/2 + ln 1/4) / 2 = -1.5 ln 2. Sample 2: ln 1/2 = -ln 2. Mean -1.25 ln 2, times 3: -3.75 ln 2.
  # Weights: token 0 has 3 / 2 / 2 = 0.75, token 1 0.75 + 3 / 1 / 2 = 2.25, together n = 3.
  scores = spg_scores(*SPG, exponent=1.0)
  np.testing.assert_allclose(scores.weight, [[0.75, 2.25, 0.0]], rtol=1e-6)
  np.testing.assert_allclose(jnp.sum(scores.weight * scores.logp), -3.75 * math.log(2), rtol=1e-6)


@pytest.mark.parametrize(
  ("exponent", "upper"),
  [
    # Token 1: (0.75 x 1/4 + 1.5 x 1/2) / 2.25 = 5/12. Tokens seen: 2, each weighs 3/2.
    (1.0, 1.5 * (math.log(1 / 2) + math.log(5 / 12))),
    # Token 1: (0.75 x 1/16 + 1.5 x 1/4) / 2.25 = 3/16, its root; token 0: 1/2.
    (2.0, 1.5 * (math.log(1 / 2) + math.log(3 / 16) / 2)),
  ],
)
def test_spg_upper_weighs_each_token_seen_by_n_over_seen(exponent, upper):
  """spg_trainer.py:534-548, less ln(sum of weights) / b of each token: its gradient is 0."""
  scores = spg_scores(*SPG, exponent=exponent)
  np.testing.assert_allclose(scores.upper_weight, [[1.5, 1.5, 0.0]], rtol=1e-6)
  np.testing.assert_allclose(jnp.sum(scores.upper_weight * scores.upper), upper, rtol=1e-6)


def test_spg_mixes_the_bounds_of_a_bad_row():
  """Line 118: -A n log p of rows, over all tokens; A > 0 takes lower, else w upper + (1 - w) lower, w 1/2."""
  # Rows of 3 tokens, both as above at b = 1: lower -3.75 ln 2 = -2.59930, upper 1.5 (ln 1/2 + ln 5/12) = -2.35292.
  # A = (1, -1): -(1 x -2.59930) / 6 + (-2.35292 - 2.59930) / 2 / 6 = 0.433217 - 0.412685 = 0.020532.
  scores = spg_scores(*SPG, exponent=1.0)
  both = Scores(*(jnp.concatenate([x, x]) for x in scores))
  plain = terms(jnp.zeros((2, 3)), [1.0, -1.0], "token")
  loss, _ = Sandwich(upper_share=0.5)(plain._replace(scores=both))
  np.testing.assert_allclose(loss, 0.020532, rtol=1e-4)


def test_tracerl_sums_its_kl_over_the_tokens_of_a_state():
  """rl_llada.py:586-603: mean over states of (-mean over tokens of the surrogate + beta sum over tokens of k3)."""
  # Two states of 8 tokens. k3 of d = log p_old - log p: e^d - d - 1. State 1, d = ln 2: 2 - ln 2 - 1 = 0.306853 each,
  # ratio 1/2, A = 1: min(1/2, 0.8) = 1/2. State 2, d = 0: k3 = 0, ratio 1, A = -1: -1.
  # -(1/2 - 1) / 2 + 0.01 x (8 x 0.306853 + 0) / 2 = 0.25 + 0.0122741 = 0.2622741.
  config = jobs.load("grpo", "llada_8b,sudoku,tracerl")
  assert config.grpo.loss.beta == pytest.approx(0.08)
  assert config.rollout.completion_length / config.grpo.estimator.segments == 8
  logp = [[-1.0] * 8, [-1.0] * 8]
  old = [[-1.0 + math.log(2)] * 8, [-1.0] * 8]
  loss = parts.build("loss", config.grpo.loss)
  found, _ = loss(terms(logp, [1.0, -1.0], config.grpo.aggregation, old=old))
  np.testing.assert_allclose(found, 0.2622741, rtol=1e-6)


def test_agrpo_weighs_rows_alike_whatever_their_lengths():
  """agrpo_trainer.py:282-342: the sum over a step's tokens, mean over a row's sampled steps; sum over rows / rows."""
  # One token a step, 2 samples. Row 1 of 4 tokens, steps of tokens 0 and 2: ratios 1.1 and 0.9, A = 1: (1.1 + 0.9) / 2.
  # Row 2 of 2 tokens, both steps: ratios 1.5 and 1, A = -2: (-3 - 2) / 2. Loss -(1 - 2.5) / 2 = 0.75.
  # The estimator weighs by T / samples: 4 / 2 = 2 and 2 / 2 = 1.
  ratios = np.asarray([[1.1, 9.0, 0.9, 9.0], [1.5, 1.0, 9.0, 9.0]])
  mask, weight = [[1, 1, 1, 1], [1, 1, 0, 0]], [[2, 0, 2, 0], [1, 1, 0, 0]]
  preset = METHODS["agrpo"].method
  given = terms(np.log(ratios), [1.0, -2.0], preset["aggregation"], old=np.zeros((2, 4)), weight=weight, mask=mask)
  np.testing.assert_allclose(ClippedToken(epsilon=preset["loss"]["epsilon"])(given)[0], 0.75, rtol=1e-6)


def test_stepmerge_sums_over_segments_and_divides_by_tokens():
  """diffu_grpo_trainer.py:726-735 of d2: N times each segment's sum over all tokens, mean over the N segments."""
  # 4 tokens and 1 token, A = (1, -1), epsilon 0.5, beta 0.04. Ratios 2, 1, 1, 1: min(2, 1.5) + 3 = 4.5; and 0.4:
  # max(0.4, 0.5) = 0.5, so -0.5. KL k3 of d = log p_ref - log p: token 0 of row 1 has d = ln 2: 0.306853.
  # Loss: (-4.5 + 0.5 + 0.04 x 0.306853) / 5 = -0.797545.
  mask = [[1, 1, 1, 1], [1, 0, 0, 0]]
  old = np.log([[1 / 2, 1, 1, 1], [1 / 0.4, 1, 1, 1]])
  ref = np.log([[2.0, 1, 1, 1], [1, 1, 1, 1]])
  config = jobs.load("grpo", "llada_8b,sudoku,stepmerge").grpo
  given = terms(np.zeros((2, 4)), [1.0, -1.0], config.aggregation, old=old, ref=ref, mask=mask)
  found, _ = parts.build("loss", config.loss)(given)
  np.testing.assert_allclose(found, -0.797545, rtol=1e-5)


def test_gdpo_integrates_at_three_nodes():
  """Gauss-Legendre on (0, 1): t = 1/2 -+ sqrt(3/5) / 2 = 0.112702, 0.5, 0.887298 with 5/18, 8/18, 5/18, each over t."""
  # A token that the first, second, third node hides gets 0.277778 / 0.112702 = 2.464720, 0.444444 / 0.5 = 0.888889,
  # 0.277778 / 0.887298 = 0.313061. The weights of all tokens are sums of some of these.
  nodes = 2.464720, 0.888889, 0.313061
  rollout = toy.rollout(64)
  score = jax.jit(lambda r: quadrature(toy.DENOISER, toy.params(), r, toy.SPEC, jax.random.key(0), nodes=3))
  scores = score(rollout)
  weight = np.asarray(scores.weight)[np.asarray(rollout.completion_mask)]
  sums = [sum(x for x, on in zip(nodes, bits, strict=True) if on) for bits in np.ndindex(2, 2, 2)]
  distance = np.abs(weight[:, None] - np.asarray(sums)[None, :])
  assert distance.min(axis=1).max() < 1e-5
  hidden = distance.argmin(axis=1)  # in binary, the first node first
  shares = [(hidden & bit > 0).mean() for bit in (4, 2, 1)]
  np.testing.assert_allclose(shares, [0.112702, 0.5, 0.887298], atol=0.08)


def test_coupled_takes_the_mean_of_the_whole_mask_and_of_a_pair():
  """coupled_grpo.py:113-122: (log p fully masked + log p / m) / 2, m the share of the half that hides the token."""
  # The ratio is of that value: old (-2 + -1 / 0.5) / 2 = -2, new (-1.8 + -0.9 / 0.5) / 2 = -1.8: e^0.2 = 1.221403.
  # A = 0.75 of leave-one-out: -0.75 x 1.221403 = -0.916052; token 2 has not moved: -0.75. Mean -0.833026.
  new, old = [[(-1.8 - 0.9 / 0.5) / 2, -3.0]], [[(-2.0 - 1.0 / 0.5) / 2, -3.0]]
  given = terms(new, [0.75], "token", old=old)
  np.testing.assert_allclose(ClippedToken(epsilon=0.5)(given)[0], -0.833026, rtol=1e-5)
