"""Estimators of log p(completion | prompt), and the denoising objective of supervised fine-tuning."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from d1jax.diffusion.corruption import LLADA, NoiseSpec, corrupt, mask_prompt
from d1jax.diffusion.denoiser import Denoiser, Params
from d1jax.diffusion.draw import log_prob
from d1jax.diffusion.layout import learned, predicting
from d1jax.diffusion.rollout import Rollout, SamplerSpec
from d1jax.diffusion.vocabulary import tiled_log_prob


class Scores(NamedTuple):
  """The result of an estimator for a batch of completions.

  Attributes:
    logp: estimated log-probability of each token.
    weight: the weight of each token in a sequence's sum; 0 behind the stop id.
    upper: an upper bound of `logp`, if the estimator has one.
    upper_weight: the weight of each token in the sum of `upper`; 0 where `weight` is 0.
  """

  logp: Float[Array, "B C"]
  weight: Float[Array, "B C"]
  upper: Float[Array, "B C"] | None = None
  upper_weight: Float[Array, "B C"] | None = None


def token_logps(
  denoiser: Denoiser,
  params: Params,
  hidden: Float[Array, "B C D"],
  tokens: Int[Array, "B C"],
  tile: int | None = None,
) -> Float[Array, "B C"]:
  """Log p of given tokens from the hidden states that predict them.

  Args:
    denoiser: whose head gives logits.
    params: its parameters.
    hidden: states that predict `tokens`.
    tokens: ids.
    tile: the number of vocabulary ids whose logits exist at a time, see `tiled_log_prob`; None: all, [B, C, V] numbers.
  """
  if tile is None:
    return log_prob(denoiser.logits(params, hidden), tokens)
  return tiled_log_prob(hidden, denoiser.head(params), tokens, denoiser.forbidden_ids, tile, denoiser.vocab_shards)


def masked_logps(
  denoiser: Denoiser,
  params: Params,
  rollout: Rollout,
  key: Key[Array, ""],
  masked: Bool[Array, "B C"],
  *,
  p_mask_prompt: float,
  tile: int | None = None,
) -> Float[Array, "B C"]:
  """Log p(o_k | q', visible tokens of o) of every completion token, untempered and unguided, by one forward pass.

  For a block-causal network, all tokens of earlier blocks are visible (`d1jax.diffusion.layout.predicting`).

  Args:
    denoiser: the mask predictor.
    params: its parameters.
    rollout: prompts and completions.
    key: of the prompt mask, q -> q'.
    masked: completion tokens that the network does not see.
    p_mask_prompt: probability that a prompt token is masked.
    tile: see `token_logps`.
  """
  prompt = mask_prompt(key, rollout.sample_id, rollout.prompt, rollout.prompt_valid, p_mask_prompt, denoiser.mask_id)
  known = jnp.where(masked, denoiser.mask_id, rollout.completion)
  hidden = predicting(denoiser, params, prompt, rollout.prompt_valid, known, rollout.completion)
  return token_logps(denoiser, params, hidden, rollout.completion, tile)


def one_step(
  denoiser: Denoiser,
  params: Params,
  rollout: Rollout,
  spec: SamplerSpec,
  key: Key[Array, ""],
  *,
  p_mask_prompt: float,
  tile: int | None = None,
) -> Scores:
  """d1's mean-field estimate (arXiv 2504.12216, section 3.2): one forward pass of [q' | masks].

  Every completion token is masked, each prompt token with probability `p_mask_prompt` (q -> q'); token k scores
  log p(o_k | q', masks) under the untempered, unguided distribution.
  """
  del spec
  every = jnp.ones_like(rollout.completion_mask)
  logp = masked_logps(denoiser, params, rollout, key, every, p_mask_prompt=p_mask_prompt, tile=tile)
  return Scores(logp, rollout.completion_mask.astype(jnp.float32))


def targets(
  denoiser: Denoiser,
  prompt_valid: Bool[Array, "B P"],
  completion: Int[Array, "B C"],
  *,
  fill: int,
  rows: int,
) -> tuple[Int[Array, "B W"], Float[Array, "B W"]]:
  """What `denoising_loss` takes: completions with the tokens that fill their last block, and the weight of each token.

  A row counts 1 / `rows`, and so do its tokens together: all of the completion, or those that a block-causal network
  learns (`d1jax.diffusion.layout.learned`).

  Args:
    denoiser: the mask predictor.
    prompt_valid: false at padding.
    completion: answers, padded with `fill`.
    fill: the end-of-sequence token.
    rows: the rows over which the loss is a mean.
  """
  tokens, keep = learned(denoiser, prompt_valid, completion, fill)
  if denoiser.block is None:
    return tokens, jnp.full(tokens.shape, 1 / (rows * tokens.shape[1]))
  return tokens, keep / (rows * jnp.sum(keep, axis=1, keepdims=True))


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
  noise: NoiseSpec = LLADA,
  complement: Bool[Array, "B"] | None = None,
  tile: int | None = None,
  dropout_key: Key[Array, ""] | None = None,
  levels: int = 0,
) -> tuple[Float[Array, ""], dict[str, Float[Array, "..."]]]:
  """Masked-diffusion loss of supervised fine-tuning (LLaDA, eq. 5; SDAR, arXiv 2510.06303): completion only.

  `sum_{b,i} weight[b,i] * masked[b,i] * CE[b,i] / t[b]`, with t ~ U(0.001, 1) a row. With full attention the
  completion's end-of-sequence padding is part of the response: attended to, masked and learned, so that the model knows
  where answers end. A block-causal network sees the clean tokens of earlier blocks, and its own block as far as the
  draw does not mask it; tokens without weight are masked in it, and at least one with weight is.

  Args:
    denoiser: the mask predictor.
    params: its parameters.
    prompt: left-padded ids.
    prompt_valid: false at padding.
    completion: clean tokens; of a block-causal network as `targets` gives them.
    weight: of each token, which holds the normalisation, as `targets` gives it.
    sample_id: part of the keys of all draws.
    key: of the noise.
    noise: another range of t; under the weighting `flat`, 1 / t becomes (tokens with weight) / (those that are masked),
      so that a row's loss is the mean over its masked tokens.
    complement: rows that mask what the draw does not mask.
    tile: see `token_logps`.
    dropout_key: turns the network's dropout on; a token's key is made of its sample id and its distance from the start
      of the completion.
    levels: the number of ranges of t for the metric `by_level`; 0: without it.

  Returns:
    The loss, and as metrics `masked_ce` (the mean cross-entropy of the masked tokens, unweighted) and `by_level`, see
    the function of this name.
  """
  has_weight = weight > 0
  keep = None if denoiser.block is None else has_weight
  noisy = corrupt(key, sample_id, completion, denoiser.mask_id, noise, learned=keep, complement=complement)
  hidden = predicting(
    denoiser,
    params,
    prompt,
    prompt_valid,
    noisy.tokens,
    completion,
    sample_id=sample_id,
    dropout_key=dropout_key,
  )
  cross_entropy = -token_logps(denoiser, params, hidden, completion, tile)
  cross_entropy = jnp.where(noisy.masked, cross_entropy, 0.0)
  share = noisy.time
  if noise.weighting == "flat":
    count = lambda tokens: jnp.sum(tokens, axis=1)
    share = jnp.maximum(count(noisy.masked & has_weight), 1) / jnp.maximum(count(has_weight), 1)
  loss = jnp.sum(weight * cross_entropy / share[:, None])
  metrics = {"masked_ce": jnp.sum(cross_entropy) / jnp.maximum(jnp.sum(noisy.masked), 1)}
  if levels:
    metrics["by_level"] = by_level(noisy.time[:, None], cross_entropy, noisy.masked & has_weight, levels)
  return loss, metrics


def by_level(
  time: Float[Array, "B #L"], cross_entropy: Float[Array, "B L"], masked: Bool[Array, "B L"], levels: int
) -> Float[Array, "levels 2"]:
  """The sum of the cross-entropy of masked tokens, and their number, by the masking probability t of their row.

  Of four levels, the first one has the rows with t below 1/4, the last one those with t from 3/4 on.

  Args:
    time: t, of each row or of each token.
    cross_entropy: of each token.
    masked: the tokens that count.
    levels: the number of ranges, all of the same width.
  """
  level = jnp.minimum((time * levels).astype(jnp.int32), levels - 1)
  chosen = (level[..., None] == jnp.arange(levels)) & masked[..., None]
  sums = jnp.sum(jnp.where(chosen, cross_entropy[..., None], 0.0), axis=(0, 1))
  return jnp.stack([sums, jnp.sum(chosen, axis=(0, 1)).astype(jnp.float32)], axis=1)
