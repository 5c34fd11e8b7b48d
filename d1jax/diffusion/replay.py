"""The log-probability of a completion along the path on which it was revealed."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from d1jax.diffusion.blocks import NO_CACHES, block_logits
from d1jax.diffusion.denoiser import Denoiser, Params
from d1jax.diffusion.draw import log_prob
from d1jax.diffusion.rollout import Rollout, SamplerSpec


def replay(denoiser: Denoiser, params: Params, rollout: Rollout, spec: SamplerSpec) -> Float[Array, "B C"]:
  """Log p of each completion token, guided and tempered, at the state in which the rollout revealed it.

  The states are those that the rollout recorded, each encoded anew by one exact forward pass, whatever cache drew it:
  what a rollout in exact mode has as `reveal_logp`, to rounding, and for a cached one the exact model's. Gradients
  flow; a step's activations are computed again in the backward pass. A step that no row took costs nothing.

  At temperature 0 the tempered distribution is a point mass (`reveal_logp` is 0): it is the untempered one that scores
  there.

  Returns:
    0 at tokens that were never revealed, behind the block of the stop id in a rollout that exits early; see
    `Rollout.completion_mask` for what counts.
  """
  width, steps = spec.block_length, spec.steps_per_block
  batch, length = rollout.completion.shape
  valid = jnp.concatenate([rollout.prompt_valid, jnp.ones_like(rollout.completion_mask)], axis=1)
  # What was never revealed is recorded at step 0, which is of another block than its own.
  earliest = (jnp.arange(length) // width * steps)[None, :]
  revealed_at = jnp.where(rollout.reveal_step >= earliest, rollout.reveal_step, spec.blocks * steps)

  def score(index: Int[Array, ""]) -> Float[Array, "B W"]:
    start = index // steps * width
    cut = lambda x: jax.lax.dynamic_slice_in_dim(x, start, width, axis=1)
    known = jnp.where(revealed_at < index, rollout.completion, denoiser.mask_id)
    canvas = jnp.concatenate([rollout.prompt, known], axis=1)
    first = rollout.prompt.shape[1] + start
    logits, _ = block_logits(denoiser, params, canvas, valid, NO_CACHES, first, spec=spec)
    logp = log_prob(logits / (spec.temperature or 1), cut(rollout.completion))
    return jnp.where(cut(revealed_at) == index, logp, 0.0)

  def step(_: None, index: Int[Array, ""]) -> tuple[None, Float[Array, "B W"]]:
    taken = jnp.any(revealed_at == index)
    return None, jax.lax.cond(taken, score, lambda _: jnp.zeros((batch, width)), index)

  # Around the branches: inside them, each step would keep the weights for the backward pass.
  _, scores = jax.lax.scan(jax.checkpoint(step, prevent_cse=False), None, jnp.arange(spec.blocks * steps))
  by_block = jnp.sum(scores.reshape(spec.blocks, steps, batch, width), axis=1)
  return jnp.moveaxis(by_block, 0, 1).reshape(batch, length)
