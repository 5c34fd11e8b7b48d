"""The reverse process: LLaDA's semi-autoregressive, block-wise denoising loop, compiled.

Semantics are those of LLaDA's generate.py (arXiv 2502.09992) with the arithmetic in float32: blocks from left to right;
at each step one proposal a masked position of the block, ranked by the untempered probability of the proposed token (or
at random); the most confident are committed and never touched again. Forbidden ids, the mask among them, are never
proposed.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from d1jax import keys
from d1jax.diffusion.denoiser import Denoiser, Params
from d1jax.diffusion.draw import log_prob, propose
from d1jax.diffusion.rollout import Rollout, SamplerSpec, up_to_stop
from d1jax.diffusion.schedule import reveal_counts

_TOKEN_STREAM, _ORDER_STREAM = 0, 1


class _Canvas(NamedTuple):
  """The loop's carry."""

  tokens: Int[Array, "B L"]
  reveal_step: Int[Array, "B C"]
  reveal_logp: Float[Array, "B C"]


def rank_descending(scores: Float[Array, "B W"]) -> Int[Array, "B W"]:
  """Each entry's rank in its row, 0 for the largest; ties go to the left."""
  left = jnp.arange(scores.shape[1])
  higher = scores[:, None, :] > scores[:, :, None]
  tied = (scores[:, None, :] == scores[:, :, None]) & (left[None, None, :] < left[None, :, None])
  return jnp.sum(higher | tied, axis=-1, dtype=jnp.int32)


def block_logits(
  denoiser: Denoiser,
  params: Params,
  tokens: Int[Array, "B L"],
  valid: Bool[Array, "B L"],
  positions: Int[Array, "W"],
  prompt_length: int,
  cfg_scale: float,
) -> Float[Array, "B W V"]:
  """Logits of one block only, guided when `cfg_scale` is positive: l_un + (w + 1)(l_cond - l_un), the prompt masked for
  l_un.
  """
  hidden = denoiser.encode(params, tokens, valid)
  logits = denoiser.logits(params, denoiser.hidden_predicting(hidden, positions))
  if not cfg_scale:
    return logits
  blind = tokens.at[:, :prompt_length].set(denoiser.mask_id)
  hidden = denoiser.encode(params, blind, valid)
  unguided = denoiser.logits(params, denoiser.hidden_predicting(hidden, positions))
  # The forbidden ids are at minus infinity in both, where the difference is not a number.
  return jnp.where(jnp.isneginf(logits), logits, unguided + (cfg_scale + 1) * (logits - unguided))


def sample(
  denoiser: Denoiser,
  params: Params,
  prompt: Int[Array, "B P"],
  prompt_valid: Bool[Array, "B P"],
  sample_id: Int[Array, "B"],
  group_id: Int[Array, "B"],
  key: Key[Array, ""],
  *,
  spec: SamplerSpec,
) -> Rollout:
  """Completes prompts by denoising `spec.completion_length` masks in `spec.diffusion_steps` steps.

  Args:
    denoiser: the mask predictor.
    params: its parameters.
    prompt: left-padded ids.
    prompt_valid: false at padding.
    sample_id: keys every draw, beside `key`, the denoising step and the position in the completion.
    group_id: recorded.
    key: of this iteration.
    spec: the sampler.
  """
  batch, prompt_length = prompt.shape
  width = spec.block_length
  counts = jnp.asarray(reveal_counts(width, spec.steps_per_block))
  per_sample = keys.sample_keys(key, sample_id)
  valid = jnp.concatenate([prompt_valid, jnp.ones((batch, spec.completion_length), bool)], axis=1)

  def step(index: Int[Array, ""], canvas: _Canvas) -> _Canvas:
    block, within = jnp.divmod(index, counts.size)
    start = block * width
    window = lambda x, offset=0: jax.lax.dynamic_slice_in_dim(x, offset + start, width, axis=1)
    per_step = keys.fold(per_sample, index)
    draw = lambda stream: window(keys.uniforms(keys.fold(per_step, stream), spec.completion_length))

    tokens = window(canvas.tokens, prompt_length)
    positions = prompt_length + start + jnp.arange(width)
    logits = block_logits(denoiser, params, canvas.tokens, valid, positions, prompt_length, spec.cfg_scale)
    proposal, logp = propose(logits, draw(_TOKEN_STREAM), spec.temperature)
    confidence = draw(_ORDER_STREAM) if spec.remasking == "random" else log_prob(logits, proposal)
    masked = tokens == denoiser.mask_id
    chosen = masked & (rank_descending(jnp.where(masked, confidence, -jnp.inf)) < counts[within])

    def write(x: jax.Array, new: jax.Array, offset: int = 0) -> jax.Array:
      merged = jnp.where(chosen, new, window(x, offset))
      return jax.lax.dynamic_update_slice_in_dim(x, merged, offset + start, axis=1)

    return _Canvas(
      write(canvas.tokens, proposal, prompt_length),
      write(canvas.reveal_step, jnp.full_like(proposal, index)),
      write(canvas.reveal_logp, logp),
    )

  shape = (batch, spec.completion_length)
  masks = jnp.full(shape, denoiser.mask_id, prompt.dtype)
  canvas = _Canvas(jnp.concatenate([prompt, masks], axis=1), jnp.zeros(shape, jnp.int32), jnp.zeros(shape))
  total = spec.blocks * counts.size
  if spec.early_exit and denoiser.stop_ids:
    stops = jnp.asarray(denoiser.stop_ids, prompt.dtype)

    def goes_on(carry: tuple[Int[Array, ""], _Canvas]) -> Bool[Array, ""]:
      index, canvas = carry
      ended = jnp.all(jnp.any(jnp.isin(canvas.tokens[:, prompt_length:], stops), axis=1))
      return (index < total) & ~((index % counts.size == 0) & ended)

    advance = lambda carry: (carry[0] + 1, step(*carry))
    _, canvas = jax.lax.while_loop(goes_on, advance, (jnp.int32(0), canvas))
    completion = canvas.tokens[:, prompt_length:]
    completion = jnp.where(completion == denoiser.mask_id, denoiser.stop_ids[0], completion)
  else:
    canvas = jax.lax.fori_loop(0, total, step, canvas)
    completion = canvas.tokens[:, prompt_length:]
  mask = up_to_stop(completion, denoiser.stop_ids)
  return Rollout(
    sample_id,
    group_id,
    prompt,
    prompt_valid,
    completion,
    mask,
    canvas.reveal_step,
    canvas.reveal_logp,
  )
