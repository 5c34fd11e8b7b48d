"""Policy losses and their normalisation."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

AGGREGATIONS = ("token", "sequence")


def token_weights(mask: Bool[Array, "B C"], aggregation: str) -> Float[Array, "B C"]:
  """Weights that turn a sum over tokens into a mean; they add up to 1 over the batch.

  Computed once from the whole batch, so that splitting it into micro-batches changes nothing.

  Args:
    mask: the tokens that count.
    aggregation: `token`: every token the same, 1 / tokens in the batch (d1's code); `sequence`: every sequence the
      same, 1 / (B * tokens in the row) (the paper's eq. 4, LLaDA's SFT).
  """
  tokens = mask.astype(jnp.float32)
  if aggregation == "token":
    return tokens / jnp.maximum(jnp.sum(tokens), 1.0)
  if aggregation == "sequence":
    return tokens / (jnp.maximum(jnp.sum(tokens, axis=1, keepdims=True), 1.0) * mask.shape[0])
  raise ValueError(f"aggregation={aggregation!r} is unknown; known: token, sequence")


class PolicyLoss(NamedTuple):
  """Sums over a (micro-)batch of weighted token terms.

  Attributes:
    loss: what is minimised.
    kl: mean k3 estimate of KL(policy || reference).
    clip_fraction: share of tokens whose clipped term is the active one.
    ratio_deviation: mean |ratio - 1| of policy to old policy.
  """

  loss: Float[Array, ""]
  kl: Float[Array, ""]
  clip_fraction: Float[Array, ""]
  ratio_deviation: Float[Array, ""]


def clipped_surrogate(
  logp: Float[Array, "B C"],
  old_logp: Float[Array, "B C"],
  ref_logp: Float[Array, "B C"] | None,
  advantages: Float[Array, "B"],
  weights: Float[Array, "B C"],
  *,
  epsilon: float,
  beta: float,
) -> PolicyLoss:
  """diffu-GRPO's token loss (arXiv 2504.12216, eq. 4): `-min(rho A, clip(rho, 1 - eps, 1 + eps) A) + beta k3`.

  rho = exp(logp - old_logp); k3 = exp(d) - d - 1 with d = ref_logp - logp (Schulman), left out when `ref_logp` is None.

  Args:
    logp: per-token log-probabilities of the policy.
    old_logp: of the policy that made the rollout, under the same masks; a constant.
    ref_logp: of the reference, under the same masks; a constant.
    advantages: one a sequence.
    weights: of each token, see `token_weights`; 0 where masked out.
    epsilon: half width of the clip.
    beta: weight of the KL term.
  """
  used = weights > 0
  # Tokens behind the stop id carry no weight; their ratio is set to 1, so that nothing of them can overflow into the
  # sum.
  log_ratio = jnp.where(used, logp - old_logp, 0.0)
  ratio = jnp.exp(log_ratio)
  advantage = advantages[:, None]
  clipped = jnp.clip(ratio, 1 - epsilon, 1 + epsilon)
  loss = -jnp.minimum(ratio * advantage, clipped * advantage)
  kl = jnp.zeros_like(loss)
  if ref_logp is not None:
    difference = jnp.where(used, ref_logp - logp, 0.0)
    kl = jnp.exp(difference) - difference - 1
  active = clipped * advantage < ratio * advantage
  total = lambda x: jnp.sum(weights * x)
  return PolicyLoss(total(loss + beta * kl), total(kl), total(active), total(jnp.abs(ratio - 1)))
