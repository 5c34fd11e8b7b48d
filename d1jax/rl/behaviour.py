"""Rollouts of an older policy than the one that is updated: the log p of what drew them, and the weights from it.

An update of the policy v may take a rollout that an older policy u drew. Its objective is that of decoupled PPO
(Hilton et al., arXiv 2110.00641, eq. 7; AReaL, arXiv 2505.24298, eq. 5): the clip is around the *proximal* policy v,
the policy before the update, and each term is weighted back from the *behaviour* policy u,

  J = E_u[ w min(rho A, clip(rho, 1 - epsilon, 1 + epsilon) A) ],   rho = p / p_v,   w = min(cap, p_v / p_u).

One estimator gives p, p_v and p_u, because a weight of two different estimates would not be 1 where u = v. So p_u is
scored when the rollout is drawn, by the weights that drew it, with the masks of the update's first inner step; p_v of w
has the same masks. An estimator that scores tokens in the states where they were drawn needs no pass for it: p_u is
what the sampler recorded, `Rollout.reveal_logp`.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from d1jax.diffusion.denoiser import Denoiser
from d1jax.diffusion.likelihood import Scores
from d1jax.diffusion.rollout import Rollout, SamplerSpec
from d1jax.rl.importance import truncated_importance
from d1jax.rl.method import Method
from d1jax.state import Params


def in_unit(method: Method, scores: Scores, mask: Bool[Array, "B C"]) -> Float[Array, "B C"]:
  """Log p as the ratio of the loss takes it: of each token, or of the sequence divided by its tokens, for each token.

  `mask` has the tokens up to the stop id.
  """
  if not method.weighs_sequences:
    return scores.logp
  counts = mask & (scores.weight > 0)
  total = jnp.sum(jnp.where(counts, scores.weight * scores.logp, 0.0), axis=1, keepdims=True)
  return jnp.broadcast_to(total / jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1), mask.shape)


def behaviour_logp(
  denoiser: Denoiser, params: Params, rollout: Rollout, key: Key[Array, ""], *, method: Method, sampler: SamplerSpec
) -> Float[Array, "B C"]:
  """Log p of a rollout under the weights that drew it, see `in_unit`.

  `key` is that of the first inner step of the update that takes the rollout, and `method` that of this update.
  """
  return in_unit(method, method.estimator(denoiser, params, rollout, sampler, key), rollout.completion_mask)


def behaviour_weights(
  method: Method,
  proximal: Scores,
  rollout: Rollout,
  behaviour: Float[Array, "B C"] | None,
) -> tuple[Float[Array, "B C"], Bool[Array, "B C"], Float[Array, "B C"]]:
  """The weight w of each token, which tokens have one, and |log p_v - log p_u|; constants, 0 for all other tokens.

  `proximal` are the scores of the policy before the update; `behaviour` is of `behaviour_logp`, or None if the
  estimator needs none.
  """
  mask = rollout.completion_mask
  counted = mask if method.weighs_sequences else mask & (proximal.weight > 0)
  drawn = in_unit(method, proximal._replace(logp=rollout.reveal_logp), mask) if behaviour is None else behaviour
  before = in_unit(method, proximal, mask)
  cap = jnp.inf if method.behaviour_cap is None else method.behaviour_cap
  distance = jnp.abs(jnp.where(counted, before - drawn, 0.0))
  return truncated_importance(before, drawn, counted, cap), counted, distance
