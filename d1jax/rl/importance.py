"""Importance weights of tokens that another distribution drew than the one that is trained, and what they cost."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def truncated_importance(
  train_logp: Float[Array, "B C"], sample_logp: Float[Array, "B C"], mask: Bool[Array, "B C"], cap: float
) -> Float[Array, "B C"]:
  """Each token's min(cap, p_train / p_sample), a constant; 0 where masked out.

  A mean over tokens that p_sample drew, so weighted, is the mean under p_train as far as nothing is cut off. The cap
  bounds the variance and lets a bias in (truncated importance sampling, Ionides 2008; for rollouts of another engine
  than the trainer's, Yao et al. 2025).

  Args:
    train_logp: log-probabilities under the policy that is trained, before the update.
    sample_logp: under what drew the tokens.
    mask: the tokens that count.
    cap: the largest weight.
  """
  ratio = jnp.exp(jnp.where(mask, train_logp - sample_logp, 0.0))
  return jax.lax.stop_gradient(jnp.where(mask, jnp.minimum(ratio, cap), 0.0))


def weight_sums(weights: Float[Array, "*N"], mask: Bool[Array, "*N"]) -> Float[Array, "3"]:
  """The sum of weights, of their squares, and how many count; those of micro-batches add up. Weights are 0 where
  masked out.
  """
  return jnp.stack([jnp.sum(weights), jnp.sum(weights**2), jnp.sum(mask, dtype=jnp.float32)])


def effective_sample_size(sums: Float[Array, "3"]) -> Float[Array, ""]:
  """Kish's (sum w)^2 / sum w^2 as a share of the samples that count: 1 if all weights are equal, 0 if all are 0.

  Args:
    sums: see `weight_sums`.
  """
  total, squares, count = sums
  return jnp.where(squares > 0, total**2 / jnp.where(squares > 0, squares * count, 1.0), 0.0)
