"""Policy losses and their normalisation.

Each loss is a function `(terms, options) -> PolicyLoss` of a (micro-)batch. What it returns are sums whose weights add
up to 1 over the whole batch, so that those of micro-batches add up to the batch's, whatever their number.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from d1jax.diffusion.likelihood import Scores

AGGREGATIONS = ("token", "sequence", "fixed")
KLS = ("k1", "k2", "k3")
TARGETS = ("reference", "old")

_Value = TypeVar("_Value")

_LEAST_EPSILON = float(np.finfo(np.float32).eps)
"""An epsilon of 0 clips at the neighbours of 1. At 1 itself, which is every ratio of the first inner step, the gradient
flows, as it does in the authors' PyTorch; `jnp.clip` with two equal bounds would pass on a quarter of it."""

_DISTANCES = 10.0 ** np.linspace(-5, 1, 25, dtype=np.float32)
RATIO_EDGES = np.concatenate([-_DISTANCES[::-1], _DISTANCES])
"""Log-ratios at which their distribution function is summed: four a decade from 1e-5 to 10, to both sides of 0."""


def token_weights(mask: Bool[Array, "B C"], aggregation: str) -> Float[Array, "B C"]:
  """Weights that turn a sum over tokens into a mean; `token` and `sequence` add up to 1 over the batch.

  Computed once from the whole batch, so that splitting it into micro-batches changes nothing.

  Args:
    mask: the tokens that count.
    aggregation: `token`: every token the same, 1 / tokens in the batch (d1's code, DAPO); `sequence`: every sequence
      the same, 1 / (B * tokens in the row) (GRPO; d1's eq. 4, LLaDA's SFT); `fixed`: every token 1 / (B C), whatever
      the lengths (Dr. GRPO, arXiv 2503.20783).
  """
  tokens = mask.astype(jnp.float32)
  if aggregation == "token":
    return tokens / jnp.maximum(jnp.sum(tokens), 1.0)
  if aggregation == "sequence":
    return tokens / (jnp.maximum(jnp.sum(tokens, axis=1, keepdims=True), 1.0) * mask.shape[0])
  if aggregation == "fixed":
    return tokens / (mask.shape[0] * mask.shape[1])
  raise ValueError(f"aggregation={aggregation!r} is unknown; known: {', '.join(AGGREGATIONS)}")


class Terms(NamedTuple):
  """What a loss is made of. The log-probabilities are of one estimator under the same draws.

  Attributes:
    scores: of the policy; `weight` scales each token's term, so that an estimator that scores a sample of the tokens
      has the sum of all in the mean.
    old_logp: of the policy that made the rollout; a constant, None where the loss does not ask.
    ref_logp: of the reference; a constant, None where it is not scored.
    advantages: one a sequence.
    weights: of each token in the loss, see `token_weights`; 0 where masked out.
    share: of each token in the figures beside it: 1 / tokens in the batch; 0 where masked out.
  """

  scores: Scores
  old_logp: Float[Array, "B C"] | None
  ref_logp: Float[Array, "B C"] | None
  advantages: Float[Array, "B"]
  weights: Float[Array, "B C"]
  share: Float[Array, "B C"]


@dataclasses.dataclass(frozen=True)
class LossOptions:
  """What a loss can be told; `d1jax.rl.methods.check` says what goes with what.

  Attributes:
    epsilon: half width of the clip; 0: a ratio that has moved the way of its advantage gets no gradient (ESPO on
      Countdown); None where the loss has no ratio.
    beta: weight of the KL term.
    epsilon_high: half width of the clip's upper side (DAPO, arXiv 2503.14476, eq. 10); None: as the lower.
    kl: `k1`, `k2` or `k3`, see `divergence`.
    kl_against: `reference`, or `old`: the policy that made the rollout.
    upper_share: of the upper bound where an advantage is negative, see `sandwich`.
  """

  epsilon: float | None = None
  beta: float = 0.0
  epsilon_high: float | None = None
  kl: str = "k3"
  kl_against: str = "reference"
  upper_share: float | None = None

  def pulls_to(self, target: str) -> bool:
    """Whether there is a KL term to `reference` or `old`."""
    return self.beta > 0 and self.kl_against == target


class PolicyLoss(NamedTuple):
  """Sums over a (micro-)batch. Figures beside the loss are means over tokens; a sequence's counts for all its tokens.

  Attributes:
    loss: what is minimised.
    kl: estimate of KL(policy || reference), nats a token; 0 where no reference is scored.
    clip_fraction: share of tokens whose gradient the clip removes; this and the next are None without a ratio.
    ratio_deviation: mean |ratio - 1| of policy to old policy.
    ratio_sums: of the ratios, of their squares, and of 1.
    ratio_below: share of tokens whose log-ratio is at most each of `RATIO_EDGES`.
  """

  loss: Float[Array, ""]
  kl: Float[Array, ""]
  clip_fraction: Float[Array, ""] | None = None
  ratio_deviation: Float[Array, ""] | None = None
  ratio_sums: Float[Array, "3"] | None = None
  ratio_below: Float[Array, "edges"] | None = None


def divergence(kind: str, difference: Float[Array, "*N"]) -> Float[Array, "*N"]:
  """An estimate of KL(policy || target) from d = log p_target - log p of what the policy drew (Schulman, 2020).

  `k1`: -d, unbiased, with the gradient (1 - d) grad log p, whose mean is the divergence's (that of -d alone has mean
  0); `k2`: d^2 / 2; `k3`: exp(d) - d - 1.

  Args:
    kind: one of `KLS`.
    difference: d; gradients flow through log p.
  """
  if kind == "k1":
    fixed = jax.lax.stop_gradient(difference)
    return -difference - (fixed - difference) * fixed
  if kind == "k2":
    return difference**2 / 2
  return jnp.exp(difference) - difference - 1


def clipped_token(terms: Terms, options: LossOptions) -> PolicyLoss:
  """Clip the ratio of each token (diffu-GRPO, arXiv 2504.12216, eq. 4): `-min(rho A, clip(rho, 1 - e, 1 + e') A)`.

  rho = exp(logp - old_logp) of the token; its KL is `divergence` of target - logp, beside it with the weight beta.
  """
  logp, old = terms.scores.logp, _given(terms.old_logp, "old_logp")
  weights, share = terms.weights * terms.scores.weight, terms.share * terms.scores.weight
  # Tokens behind the stop id carry no weight; their ratio is set to 1, so that nothing of them can overflow into the
  # sum.
  used = weights > 0
  log_ratio = jnp.where(used, logp - old, 0.0)
  loss, figures = _clipped(log_ratio, terms.advantages[:, None], share, options)
  penalty, kl = _divergences(terms, options, lambda target: jnp.where(used, target - logp, 0.0))
  return PolicyLoss(jnp.sum(weights * (loss + options.beta * penalty)), jnp.sum(share * kl), **figures)


def clipped_sequence(terms: Terms, options: LossOptions) -> PolicyLoss:
  """Clip the ratio of each sequence instead (GSPO, arXiv 2507.18071; ESPO, arXiv 2512.03759; GDPO, arXiv 2510.08554).

  rho = exp((L - L_old) / n), with L the estimate of the sequence's log-probability and n its tokens. A sequence weighs
  what its tokens do together. Its KL is `divergence` of L_target - L, over n.
  """
  length = _lengths(terms)
  log_ratio = _sums(terms, terms.scores.logp - _given(terms.old_logp, "old_logp")) / length
  weights, share = jnp.sum(terms.weights, axis=1), jnp.sum(terms.share, axis=1)
  loss, figures = _clipped(log_ratio, terms.advantages, share, options)
  penalty, kl = _divergences(terms, options, lambda target: _sums(terms, target - terms.scores.logp))
  total = jnp.sum(weights * (loss + options.beta * penalty / length))
  return PolicyLoss(total, jnp.sum(share * kl / length), **figures)


def likelihood(terms: Terms, options: LossOptions) -> PolicyLoss:
  """`-A log p` of each token, without a ratio: wd1's weighted likelihood (arXiv 2507.08838) with `softmax` advantages,
  REINFORCE with a group baseline with the others (JustGRPO, arXiv 2601.15165).

  The KL is a sequence's, as in `clipped_sequence`.
  """
  return _weighted(terms, options, _parts(terms, terms.scores.logp, terms.scores.weight))


def sandwich(terms: Terms, options: LossOptions) -> PolicyLoss:
  """SPG's loss (arXiv 2510.09541): `-A lower` where A is not negative, `-A (w upper + (1 - w) lower)` where it is.

  The objective is then bounded from below on either side. w is `upper_share`; both bounds are sums over tokens, each
  with weights of its own. The KL is a sequence's, of the lower bound.
  """
  scores, share = terms.scores, _given(options.upper_share, "upper_share")
  upper = _parts(terms, _given(scores.upper, "upper"), _given(scores.upper_weight, "upper_weight"))
  lower = _parts(terms, scores.logp, scores.weight)
  return _weighted(terms, options, jnp.where(terms.advantages[:, None] < 0, share * upper + (1 - share) * lower, lower))


def sampling_gap(terms: Terms, sample_logp: Float[Array, "B C"], *, of_sequences: bool) -> Float[Array, ""]:
  """Mean |log p - log p_sample| of the policy and of what drew the tokens, nats a token; a sum over a (micro-)batch.

  Args:
    terms: whose scores are the policy's.
    sample_logp: `Rollout.reveal_logp`.
    of_sequences: compares what tokens add up to, over their number.
  """
  if of_sequences:
    drawn = jnp.sum(jnp.where(terms.share > 0, sample_logp, 0.0), axis=1)
    return _mean_over_sequences(terms, _sums(terms, jax.lax.stop_gradient(terms.scores.logp)) - drawn)
  return _mean_over_tokens(terms, sample_logp)


def reference_gap(terms: Terms, *, of_sequences: bool) -> Float[Array, ""] | None:
  """Mean |log p - log p_ref| of the policy and of the reference, nats a token; a sum over a (micro-)batch.

  An estimate of a divergence that is an exponential of the log-ratio, as `k3`, has no mean to speak of where the two
  lie some nats apart; this has.

  Args:
    terms: of both policies.
    of_sequences: compares what tokens add up to, over their number.

  Returns:
    None where no reference is scored.
  """
  if terms.ref_logp is None:
    return None
  if of_sequences:
    return _mean_over_sequences(terms, _sums(terms, jax.lax.stop_gradient(terms.scores.logp) - terms.ref_logp))
  return _mean_over_tokens(terms, terms.ref_logp)


def _mean_over_sequences(terms: Terms, difference: Float[Array, "B"]) -> Float[Array, ""]:
  """Of |difference| a token."""
  return jnp.sum(jnp.sum(terms.share, axis=1) * jnp.abs(difference) / _lengths(terms))


def _mean_over_tokens(terms: Terms, other: Float[Array, "B C"]) -> Float[Array, ""]:
  """Of |log p - other|."""
  weights = terms.share * terms.scores.weight
  return jnp.sum(weights * jnp.abs(jnp.where(weights > 0, jax.lax.stop_gradient(terms.scores.logp) - other, 0.0)))


def _parts(terms: Terms, logp: Float[Array, "B C"], weight: Float[Array, "B C"]) -> Float[Array, "B C"]:
  """What each token adds to its sequence's estimate; 0 where it does not count."""
  counts = (terms.weights > 0) & (weight > 0)
  return weight * jnp.where(counts, logp, 0.0)


def _weighted(terms: Terms, options: LossOptions, parts: Float[Array, "B C"]) -> PolicyLoss:
  """The weighted sum of the tokens' parts, and a sequence's KL."""
  pull = terms.weights * terms.advantages[:, None] * parts
  row, share = (jnp.sum(x, axis=1) / _lengths(terms) for x in (terms.weights, terms.share))
  penalty, kl = _divergences(terms, options, lambda target: _sums(terms, target - terms.scores.logp))
  return PolicyLoss(options.beta * jnp.sum(row * penalty) - jnp.sum(pull), jnp.sum(share * kl))


def _clipped(
  log_ratio: Float[Array, "*N"],
  advantage: Float[Array, "..."],
  share: Float[Array, "*N"],
  options: LossOptions,
) -> tuple[Float[Array, "*N"], dict[str, Float[Array, "..."]]]:
  """PPO's term of each ratio, and the figures that `PolicyLoss` has of them."""
  low = _given(options.epsilon, "epsilon")
  high = low if options.epsilon_high is None else options.epsilon_high
  low, high = max(low, _LEAST_EPSILON), max(high, _LEAST_EPSILON)
  ratio = jnp.exp(log_ratio)
  clipped = jnp.clip(ratio, 1 - low, 1 + high)
  total = lambda x: jnp.sum(share * x)
  below = log_ratio[..., None] <= RATIO_EDGES.reshape(*(1,) * log_ratio.ndim, -1)
  figures = {
    "clip_fraction": total(clipped * advantage < ratio * advantage),
    "ratio_deviation": total(jnp.abs(ratio - 1)),
    "ratio_sums": jnp.stack([total(ratio), total(ratio**2), jnp.sum(share)]),
    "ratio_below": jnp.sum(share[..., None] * below, axis=tuple(range(log_ratio.ndim))),
  }
  return -jnp.minimum(ratio * advantage, clipped * advantage), figures


def _divergences(
  terms: Terms, options: LossOptions, less: Callable[[Float[Array, "B C"]], Float[Array, "*N"]]
) -> tuple[Float[Array, "*N"] | float, Float[Array, "*N"] | float]:
  """The KL that `beta` weighs, and that to the reference; `less` makes a target's log-probabilities a difference."""
  to = lambda target: divergence(options.kl, less(target))
  to_reference = 0.0 if terms.ref_logp is None else to(terms.ref_logp)
  if not options.beta:
    return 0.0, to_reference
  if options.kl_against == "old":
    return to(_given(terms.old_logp, "old_logp")), to_reference
  return to(_given(terms.ref_logp, "ref_logp")), to_reference


def _sums(terms: Terms, values: Float[Array, "B C"]) -> Float[Array, "B"]:
  """What tokens add up to in each sequence, as the estimator weighs them."""
  weights = jnp.where(terms.share > 0, terms.scores.weight, 0.0)
  return jnp.sum(jnp.where(weights > 0, weights * values, 0.0), axis=1)


def _lengths(terms: Terms) -> Float[Array, "B"]:
  """The tokens of each sequence that count."""
  return jnp.maximum(jnp.sum(terms.share > 0, axis=1, dtype=jnp.float32), 1.0)


def _given(value: _Value | None, name: str) -> _Value:
  if value is None:
    raise ValueError(f"{name} is None, but the loss needs it: see d1jax.rl.methods.check")
  return value
