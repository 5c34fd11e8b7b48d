"""Policy losses and their normalisation.

A loss is a frozen dataclass with its options as fields, such as `ClippedToken(epsilon=0.5)`. Called with the `Terms` of
a (micro-)batch, it returns the number to minimise and a dictionary of figures. All of them are sums whose weights add
up to 1 over the whole batch, so that the sums over micro-batches add up to that of the batch, whatever their number.
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import ClassVar, NamedTuple, TypeVar

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
"""An epsilon of 0 clips at the float32 numbers next to 1. At 1 itself, the value of every ratio at the first inner
step, the gradient flows, as in the authors' PyTorch; `jnp.clip` with two equal bounds would pass on a quarter of it."""

_DISTANCES = 10.0 ** np.linspace(-5, 1, 25, dtype=np.float32)
RATIO_EDGES = np.concatenate([-_DISTANCES[::-1], _DISTANCES])
"""The edges of the histogram of log-ratios: four a decade from 1e-5 to 10, on both sides of 0."""


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
  """The inputs of a loss. The log-probabilities are of one estimator with the same draws.

  Attributes:
    scores: of the policy; `weight` scales each token's term, so that an estimator that scores a sample of the tokens
      has the sum of all in the mean.
    old_logp: log p of the policy that made the rollout; a constant, None if the loss does not need it.
    ref_logp: log p of the reference; a constant, None if it is not scored.
    advantages: one per sequence.
    weights: the weight of each token in the loss, see `token_weights`; 0 where masked out.
    share: the weight of each token in the figures: 1 / tokens in the batch; 0 where masked out.
  """

  scores: Scores
  old_logp: Float[Array, "B C"] | None
  ref_logp: Float[Array, "B C"] | None
  advantages: Float[Array, "B"]
  weights: Float[Array, "B C"]
  share: Float[Array, "B C"]


class Ratios(NamedTuple):
  """A figure of many ratios to the old policy: a run logs their effective sample size and their quantiles.

  Attributes:
    sums: the sums of the ratios, of their squares, and of 1, each weighted by its share.
    below: share of them whose logarithm is at most each of `RATIO_EDGES`.
  """

  sums: Float[Array, "3"]
  below: Float[Array, "edges"]

  @classmethod
  def of(cls, log_ratio: Float[Array, "*N"], share: Float[Array, "*N"]) -> "Ratios":
    """The figure of some log-ratios, each with its share."""
    ratio, total = jnp.exp(log_ratio), lambda x: jnp.sum(share * x)
    below = log_ratio[..., None] <= RATIO_EDGES.reshape(*(1,) * log_ratio.ndim, -1)
    return cls(
      jnp.stack([total(ratio), total(ratio**2), jnp.sum(share)]),
      jnp.sum(share[..., None] * below, axis=tuple(range(log_ratio.ndim))),
    )


Figures = dict[str, Array | Ratios]
"""Figures by name: numbers, or `Ratios`; sums over a (micro-)batch."""


class Loss(abc.ABC):
  """A number to minimise; a subclass is a frozen dataclass whose fields are its options.

  Attributes:
    per_sequence: whether its ratio and its KL are of whole sequences; if not, the estimator must score single tokens.
    weighs_tokens: whether it can weigh the tokens of a sequence differently.
    corrects: whether weights p_v / p_u correct it for a rollout that another policy drew (`d1jax.rl.behaviour`).
  """

  per_sequence: ClassVar[bool] = False
  weighs_tokens: ClassVar[bool] = True
  corrects: ClassVar[bool] = True

  @property
  def needs(self) -> frozenset[str]:
    """The inputs beside the policy's scores: `old`, `reference` (log-probabilities), `upper` (a bound)."""
    return frozenset()

  @abc.abstractmethod
  def __call__(self, terms: Terms) -> tuple[Float[Array, ""], Figures]:
    """The loss and its figures: sums over a (micro-)batch."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PulledLoss(Loss):
  """A loss with a KL term. Its figure `kl` is the KL to the reference, 0 if no reference is scored.

  Attributes:
    beta: weight of the KL term; 0: no KL term.
    kl: `k1`, `k2` or `k3`, see `divergence`.
    kl_against: `reference`, or `old`: the policy that made the rollout.
  """

  beta: float = 0.0
  kl: str = "k3"
  kl_against: str = "reference"

  def __post_init__(self) -> None:
    for name, known in (("kl", KLS), ("kl_against", TARGETS)):
      if getattr(self, name) not in known:
        raise ValueError(f"{name}={getattr(self, name)!r} is unknown; known: {', '.join(known)}")
    if not self.beta >= 0:
      raise ValueError(f"beta={self.beta} must not be negative; 0 leaves the KL out")

  @property
  def needs(self) -> frozenset[str]:
    """The policy that the KL is to."""
    return frozenset({self.kl_against} if self.beta else ())

  def _divergences(
    self, terms: Terms, less: Callable[[Float[Array, "B C"]], Float[Array, "*N"]]
  ) -> tuple[Float[Array, "*N"] | float, Float[Array, "*N"] | float]:
    """The KL that `beta` weighs, and that to the reference; `less` makes a target's log-probabilities a difference."""
    to = lambda target: divergence(self.kl, less(target))
    to_reference = 0.0 if terms.ref_logp is None else to(terms.ref_logp)
    if not self.beta:
      return 0.0, to_reference
    if self.kl_against == "old":
      return to(_given(terms.old_logp, "old_logp")), to_reference
    return to(_given(terms.ref_logp, "ref_logp")), to_reference

  def _weighted(self, terms: Terms, parts: Float[Array, "B C"]) -> tuple[Float[Array, ""], Figures]:
    """The weighted sum of the tokens' parts, and a sequence's KL."""
    pull = terms.weights * terms.advantages[:, None] * parts
    row, share = (jnp.sum(x, axis=1) / _lengths(terms) for x in (terms.weights, terms.share))
    penalty, kl = self._divergences(terms, lambda target: _sums(terms, target - terms.scores.logp))
    return self.beta * jnp.sum(row * penalty) - jnp.sum(pull), {"kl": jnp.sum(share * kl)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClippedLoss(PulledLoss):
  """PPO's term of ratios to the old policy: `-min(rho A, clip(rho, 1 - epsilon, 1 + epsilon_high) A)`.

  Its figures: `clip_fraction`, the share of tokens whose gradient the clip removes; `ratio_deviation`, the mean
  |ratio - 1|; and `ratio`, their `Ratios`. A sequence counts for all its tokens.

  Attributes:
    epsilon: width of the clip below 1 and above; 0: a ratio that has already moved in the direction of its advantage
      gets no gradient (ESPO on Countdown).
    epsilon_high: width of the clip above 1 (DAPO, arXiv 2503.14476, eq. 10); None: `epsilon`.
  """

  epsilon: float
  epsilon_high: float | None = None

  def __post_init__(self) -> None:
    super().__post_init__()
    for name in ("epsilon", "epsilon_high"):
      value = getattr(self, name)
      if value is not None and not value >= 0:
        raise ValueError(f"{name}={value} must not be negative")

  @property
  def needs(self) -> frozenset[str]:
    """The old policy, and the one that the KL is to."""
    return super().needs | {"old"}

  def _clipped(
    self, log_ratio: Float[Array, "*N"], advantage: Float[Array, "..."], share: Float[Array, "*N"]
  ) -> tuple[Float[Array, "*N"], Figures]:
    """The term of each ratio, and the figures of all."""
    high = self.epsilon if self.epsilon_high is None else self.epsilon_high
    low, high = max(self.epsilon, _LEAST_EPSILON), max(high, _LEAST_EPSILON)
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1 - low, 1 + high)
    figures: Figures = {
      "clip_fraction": jnp.sum(share * (clipped * advantage < ratio * advantage)),
      "ratio_deviation": jnp.sum(share * jnp.abs(ratio - 1)),
      "ratio": Ratios.of(log_ratio, share),
    }
    return -jnp.minimum(ratio * advantage, clipped * advantage), figures


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClippedToken(ClippedLoss):
  """Clip the ratio of each token (diffu-GRPO, arXiv 2504.12216, eq. 4).

  rho = exp(logp - old_logp) of the token; its KL is `divergence` of target - logp.
  """

  def __call__(self, terms: Terms) -> tuple[Float[Array, ""], Figures]:
    """See `Loss`."""
    logp, old = terms.scores.logp, _given(terms.old_logp, "old_logp")
    weights, share = terms.weights * terms.scores.weight, terms.share * terms.scores.weight
    # Tokens after the stop id have weight 0. Their ratio is set to 1: an infinite ratio times 0 would not be a number.
    used = weights > 0
    log_ratio = jnp.where(used, logp - old, 0.0)
    loss, figures = self._clipped(log_ratio, terms.advantages[:, None], share)
    penalty, kl = self._divergences(terms, lambda target: jnp.where(used, target - logp, 0.0))
    return jnp.sum(weights * (loss + self.beta * penalty)), figures | {"kl": jnp.sum(share * kl)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClippedSequence(ClippedLoss):
  """Clip the ratio of each sequence (GSPO, arXiv 2507.18071; ESPO, arXiv 2512.03759; GDPO, arXiv 2510.08554).

  rho = exp((L - L_old) / n), with L the estimate of the sequence's log-probability and n its tokens. The weight of a
  sequence is the sum of its tokens' weights. Its KL is `divergence` of L_target - L, over n.
  """

  per_sequence = True
  weighs_tokens = False

  def __call__(self, terms: Terms) -> tuple[Float[Array, ""], Figures]:
    """See `Loss`."""
    length = _lengths(terms)
    log_ratio = _sums(terms, terms.scores.logp - _given(terms.old_logp, "old_logp")) / length
    weights, share = jnp.sum(terms.weights, axis=1), jnp.sum(terms.share, axis=1)
    loss, figures = self._clipped(log_ratio, terms.advantages, share)
    penalty, kl = self._divergences(terms, lambda target: _sums(terms, target - terms.scores.logp))
    total = jnp.sum(weights * (loss + self.beta * penalty / length))
    return total, figures | {"kl": jnp.sum(share * kl / length)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Likelihood(PulledLoss):
  """`-A log p` of each token, without a ratio: wd1's weighted likelihood (arXiv 2507.08838) with `softmax` advantages,
  REINFORCE with a group baseline with the others (JustGRPO, arXiv 2601.15165).

  The KL is a sequence's, as in `ClippedSequence`.
  """

  per_sequence = True

  def __call__(self, terms: Terms) -> tuple[Float[Array, ""], Figures]:
    """See `Loss`."""
    return self._weighted(terms, _parts(terms, terms.scores.logp, terms.scores.weight))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sandwich(PulledLoss):
  """SPG's loss (arXiv 2510.09541): `-A lower` where A is not negative, `-A (w upper + (1 - w) lower)` where it is.

  So the objective is bounded from below for either sign of A. Both bounds are sums over tokens, but with different
  weights. The KL is that of a sequence, of the lower bound.

  Attributes:
    upper_share: w, the share of the upper bound.
  """

  upper_share: float

  per_sequence = True
  corrects = False

  def __post_init__(self) -> None:
    super().__post_init__()
    if not 0 <= self.upper_share <= 1:
      raise ValueError(f"upper_share={self.upper_share} must be from 0 to 1")

  @property
  def needs(self) -> frozenset[str]:
    """The upper bound, and the policy that the KL is to."""
    return super().needs | {"upper"}

  def __call__(self, terms: Terms) -> tuple[Float[Array, ""], Figures]:
    """See `Loss`."""
    scores, share = terms.scores, self.upper_share
    upper = _parts(terms, _given(scores.upper, "upper"), _given(scores.upper_weight, "upper_weight"))
    lower = _parts(terms, scores.logp, scores.weight)
    mixed = jnp.where(terms.advantages[:, None] < 0, share * upper + (1 - share) * lower, lower)
    return self._weighted(terms, mixed)


LOSSES: Mapping[str, Callable[..., Loss]] = {
  "clipped_token": ClippedToken,
  "clipped_sequence": ClippedSequence,
  "likelihood": Likelihood,
  "sandwich": Sandwich,
}
"""The losses that a configuration names; each is made of its options."""


def sampling_gap(terms: Terms, sample_logp: Float[Array, "B C"], *, of_sequences: bool) -> Float[Array, ""]:
  """Mean |log p - log p_sample| of the policy and of the sampler, nats a token; a sum over a (micro-)batch.

  Args:
    terms: with the policy's scores.
    sample_logp: `Rollout.reveal_logp`.
    of_sequences: compares the sums over each sequence, divided by the number of its tokens.
  """
  if of_sequences:
    drawn = jnp.sum(jnp.where(terms.share > 0, sample_logp, 0.0), axis=1)
    return _mean_over_sequences(terms, _sums(terms, jax.lax.stop_gradient(terms.scores.logp)) - drawn)
  return _mean_over_tokens(terms, sample_logp)


def reference_gap(terms: Terms, *, of_sequences: bool) -> Float[Array, ""] | None:
  """Mean |log p - log p_ref| of the policy and of the reference, nats a token; a sum over a (micro-)batch.

  `k3` is an exponential of the log-ratio: if the two policies are several nats apart at a few tokens, these dominate
  its mean. They do not dominate this one.

  Args:
    terms: of both policies.
    of_sequences: compares the sums over each sequence, divided by the number of its tokens.

  Returns:
    The mean, or None if no reference is scored.
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
  """The term of each token in its sequence's estimate; 0 if the token does not count."""
  counts = (terms.weights > 0) & (weight > 0)
  return weight * jnp.where(counts, logp, 0.0)


def _sums(terms: Terms, values: Float[Array, "B C"]) -> Float[Array, "B"]:
  """The sum over the tokens of each sequence, with the estimator's weights."""
  weights = jnp.where(terms.share > 0, terms.scores.weight, 0.0)
  return jnp.sum(jnp.where(weights > 0, weights * values, 0.0), axis=1)


def _lengths(terms: Terms) -> Float[Array, "B"]:
  """The tokens of each sequence that count."""
  return jnp.maximum(jnp.sum(terms.share > 0, axis=1, dtype=jnp.float32), 1.0)


def _given(value: _Value | None, name: str) -> _Value:
  if value is None:
    raise ValueError(f"{name} is None, but the loss reads it: add it to `needs` of the loss")
  return value
