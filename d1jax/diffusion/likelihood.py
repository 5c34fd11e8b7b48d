"""Estimators of log p(completion | prompt), and the denoising objective of supervised fine-tuning."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from d1jax import keys
from d1jax.diffusion.corruption import corrupt, mask_prompt
from d1jax.diffusion.denoiser import Denoiser, Params
from d1jax.diffusion.draw import log_prob
from d1jax.diffusion.rollout import Rollout, SamplerSpec


class Scores(NamedTuple):
  """What an estimator says of a batch of completions.

  Attributes:
    logp: estimated log-probability of each token.
    weight: of each token in a sequence's sum; 0 behind the stop id.
    upper: an upper bound of `logp`, from the estimators that have one.
  """

  logp: Float[Array, "B C"]
  weight: Float[Array, "B C"]
  upper: Float[Array, "B C"] | None = None


Estimator = Callable[[Denoiser, Params, Rollout, SamplerSpec, Key[Array, ""]], Scores]


def token_logps(
  denoiser: Denoiser,
  params: Params,
  hidden: Float[Array, "B C D"],
  tokens: Int[Array, "B C"],
  chunk: int | None = None,
) -> Float[Array, "B C"]:
  """Log p of given tokens from the hidden states that predict them, `chunk` positions at a time.

  Logits of [B, chunk, V] exist at a time, in the backward pass too, where they are computed again.

  Args:
    denoiser: unembeds.
    params: its parameters.
    hidden: states that predict `tokens`.
    tokens: ids.
    chunk: positions at a time, a divisor of C; all at once when None.
  """

  def score(hidden: Float[Array, "B W D"], tokens: Int[Array, "B W"]) -> Float[Array, "B W"]:
    return log_prob(denoiser.logits(params, hidden), tokens)

  length = tokens.shape[1]
  if chunk is None or chunk >= length:
    return score(hidden, tokens)
  if length % chunk:
    raise ValueError(f"the logits chunk {chunk} does not divide the {length} positions to score")
  split = lambda x: jnp.moveaxis(x.reshape(x.shape[0], length // chunk, chunk, *x.shape[2:]), 1, 0)
  chunks = jax.lax.map(lambda args: jax.checkpoint(score)(*args), (split(hidden), split(tokens)))
  return jnp.moveaxis(chunks, 0, 1).reshape(tokens.shape)


def one_step(
  denoiser: Denoiser,
  params: Params,
  rollout: Rollout,
  spec: SamplerSpec,
  key: Key[Array, ""],
  *,
  p_mask_prompt: float,
  chunk: int | None = None,
) -> Scores:
  """d1's mean-field estimate (arXiv 2504.12216, section 3.2): one forward pass of [q' | masks].

  Every completion token is masked, each prompt token with probability `p_mask_prompt` (q -> q'); token k scores
  log p(o_k | q', masks) under the untempered, unguided distribution.
  """
  del spec
  prompt = mask_prompt(key, rollout.sample_id, rollout.prompt, rollout.prompt_valid, p_mask_prompt, denoiser.mask_id)
  canvas = jnp.concatenate([prompt, jnp.full_like(rollout.completion, denoiser.mask_id)], axis=1)
  valid = jnp.concatenate([rollout.prompt_valid, jnp.ones_like(rollout.completion_mask)], axis=1)
  hidden = denoiser.encode(params, canvas, valid)
  positions = prompt.shape[1] + jnp.arange(rollout.completion.shape[1])
  hidden = denoiser.hidden_predicting(hidden, positions)
  logp = token_logps(denoiser, params, hidden, rollout.completion, chunk)
  return Scores(logp, rollout.completion_mask.astype(jnp.float32))


def denoising_loss(
  denoiser: Denoiser,
  params: Params,
  prompt: Int[Array, "B P"],
  prompt_valid: Bool[Array, "B P"],
  completion: Int[Array, "B C"],
  weight: Float[Array, "B C"],
  sample_id: Int[Array, "B"],
  key: Key[Array, ""],
  *,
  chunk: int | None = None,
  dropout_key: Key[Array, ""] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  """Masked-diffusion loss of supervised fine-tuning (LLaDA, eq. 5): completion only, weights 1/t.

  `sum_{b,i} weight[b,i] * masked[b,i] * CE[b,i] / t[b]`, with t ~ U(0.001, 1) a row. The completion's end-of-sequence
  padding is part of the response: attended to, masked and learned, so that the model knows where answers end. `weight`
  holds the normalisation. `dropout_key` turns on what the network drops in training; a token's key is a fold of its
  sample id and its distance from the start of the completion.

  Returns:
    The loss, and `masked_ce` (the mean cross-entropy of the masked tokens, unweighted) as a metric.
  """
  noisy = corrupt(key, sample_id, completion, denoiser.mask_id)
  canvas = jnp.concatenate([prompt, noisy.tokens], axis=1)
  valid = jnp.concatenate([prompt_valid, jnp.ones_like(completion, bool)], axis=1)
  dropout = {}
  if dropout_key is not None:
    distance = (jnp.arange(canvas.shape[1]) - prompt.shape[1]).astype(jnp.uint32)
    dropout = {"dropout": keys.token_keys(dropout_key, sample_id, distance)}
  hidden = denoiser.encode(params, canvas, valid, **dropout)
  hidden = denoiser.hidden_predicting(hidden, prompt.shape[1] + jnp.arange(completion.shape[1]))
  cross_entropy = -token_logps(denoiser, params, hidden, completion, chunk)
  cross_entropy = jnp.where(noisy.masked, cross_entropy, 0.0)
  loss = jnp.sum(weight * cross_entropy / noisy.time[:, None])
  return loss, {"masked_ce": jnp.sum(cross_entropy) / jnp.maximum(jnp.sum(noisy.masked), 1)}
