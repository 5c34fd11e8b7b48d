"""Where prompts and completions stand on a canvas, and the hidden states that predict completions.

For a network with full attention, a canvas is the padded prompt and the completion behind it. A block-causal network
counts its blocks from the first token of a row; this file is the only place that knows what follows from that.

Prompts are padded on the left to a common width P, and P is rounded up to a multiple of the block. A row whose prompt
has p tokens is moved to the left by r = (P - p) mod block, so that its first token starts a block of the canvas. With
blocks of 4 (bars), a prompt `a b c d e` in a bucket of 8 moves by 3, and the completion `1 2 3 4` begins in its block:

    . . . a | b c d e | 1 2 3 4      becomes      a b c d | e 1 2 3 | 4 x x x

So the completion begins after `lead` tokens of the prompt in the first active block, and the last block has room for r
more tokens, `x`. The sampler fills them too, because the network was trained on whole blocks. A rollout of a
block-causal network therefore records `block` tokens more than a completion has; they are outside of its mask.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, Key, Shaped, UInt32

from d1jax import keys
from d1jax.diffusion.denoiser import FORWARD_PASS, Denoiser, Params

NOISY = 2**30
"""The dropout of the noisy copy of a token is not that of the clean one: its place is this much larger."""


def extra(denoiser: Denoiser) -> int:
  """How many tokens more than a completion has are recorded: a block of a block-causal network, else 0."""
  return denoiser.block or 0


def prompt_width(denoiser: Denoiser, width: int) -> int:
  """The width to which prompts of `width` tokens are padded: whole blocks, and no fewer than two, of which the last
  one may get completion tokens.
  """
  block = denoiser.block or 1
  return max(-(-width // block) * block, 2 * extra(denoiser))


def moved(denoiser: Denoiser, prompt_valid: Bool[Array, "B P"]) -> Int[Array, "B"]:
  """By how many columns each row moves to the left, r."""
  length = prompt_width(denoiser, prompt_valid.shape[1])
  return (length - jnp.sum(prompt_valid, axis=1, dtype=jnp.int32)) % (denoiser.block or 1)


def lead(block: int, tokens: Int[np.ndarray, "B"]) -> Int[np.ndarray, "B"]:
  """How many columns of the first active block hold the end of prompts of so many tokens; the host's arithmetic."""
  return block - -tokens % block


def lay_out(
  denoiser: Denoiser,
  prompt: Int[Array, "B P"],
  prompt_valid: Bool[Array, "B P"],
  completion: Int[Array, "B W"],
) -> tuple[Int[Array, "B L"], Bool[Array, "B L"]]:
  """The canvas of prompts and completions, and which of its positions are no padding.

  Args:
    denoiser: whose blocks count.
    prompt: left-padded ids.
    prompt_valid: false at padding.
    completion: ids; for a block-causal network with the `extra` ones at the end, of which the canvas takes what fits.

  Raises:
    ValueError: the completion's length is not a multiple of the network's block.
  """
  if denoiser.block is None:
    valid = jnp.concatenate([prompt_valid, jnp.ones(completion.shape, bool)], axis=1)
    return jnp.concatenate([prompt, completion], axis=1), valid
  if completion.shape[1] % denoiser.block:
    raise ValueError(
      f"{completion.shape[1]} completion tokens are not a multiple of the network's block of {denoiser.block}: give"
      " completions a multiple of it"
    )
  pad = prompt_width(denoiser, prompt.shape[1]) - prompt.shape[1]
  left = lambda x: jnp.pad(x, ((0, 0), (pad, 0)))
  tokens = jnp.concatenate([left(prompt), completion], axis=1)
  valid = jnp.concatenate([left(prompt_valid), jnp.ones(completion.shape, bool)], axis=1)
  columns = jnp.arange(tokens.shape[1] - denoiser.block)[None, :] + moved(denoiser, prompt_valid)[:, None]
  return jnp.take_along_axis(tokens, columns, axis=1), jnp.take_along_axis(valid, columns, axis=1)


def learned(
  denoiser: Denoiser, prompt_valid: Bool[Array, "B P"], completion: Int[Array, "B C"], fill: int
) -> tuple[Int[Array, "B W"], Bool[Array, "B W"]]:
  """Completions as `lay_out` takes them, and which of their tokens supervised fine-tuning learns.

  With full attention these are the completions themselves, and all tokens. The sampler of a block-causal network ends a
  row after the block with its first stop id: a row learns the tokens up to the end of this block, and none behind it.
  An answer without a stop id was cut, and nothing is learned behind its cut. So a row learns the same tokens, however
  far its completion is padded.

  Args:
    denoiser: whose blocks count.
    prompt_valid: false at padding.
    completion: answers of any length, padded with `fill`.
    fill: the end-of-sequence token, which fills the last block.
  """
  length, block = completion.shape[1], denoiser.block
  if block is None:
    return completion, jnp.ones(completion.shape, bool)
  width = -(-length // block) * block + block
  tokens = jnp.pad(completion, ((0, 0), (0, width - length)), constant_values=fill)
  number, column = block_of(denoiser, prompt_valid, width, block), jnp.arange(width)[None, :]
  stops = jnp.isin(tokens, jnp.asarray(denoiser.stop_ids, jnp.int32)) & (column < length)
  last = jnp.min(jnp.where(stops, number, width), axis=1, keepdims=True)
  on_canvas = column < width - block + moved(denoiser, prompt_valid)[:, None]
  return tokens, jnp.where(last < width, (number <= last) & on_canvas, column < length)


def block_of(denoiser: Denoiser, prompt_valid: Bool[Array, "B P"], width: int, size: int) -> Int[Array, "#B W"]:
  """The number of the block of `size` tokens, as the sampler counts them, in which each recorded token stands."""
  if denoiser.block is None:
    return jnp.arange(width)[None, :] // size
  return places(denoiser, prompt_valid, width) // size


def taken_out(
  denoiser: Denoiser, prompt_valid: Bool[Array, "B P"], active: Shaped[Array, "B W"]
) -> Shaped[Array, "B W"]:
  """The values of recorded tokens from those of the last columns of a canvas, in which completions stand."""
  if denoiser.block is None:
    return active
  return jnp.take_along_axis(active, places(denoiser, prompt_valid, active.shape[1]), axis=1)


def places(denoiser: Denoiser, prompt_valid: Bool[Array, "B P"], width: int) -> Int[Array, "B W"]:
  """Where each of `width` recorded tokens stands among the active columns; the ones beyond the canvas get its end."""
  block = denoiser.block or 0
  first = block - moved(denoiser, prompt_valid)[:, None] if block else jnp.zeros((len(prompt_valid), 1), jnp.int32)
  return jnp.minimum(first + jnp.arange(width)[None, :], width - 1)


def predicting(
  denoiser: Denoiser,
  params: Params,
  prompt: Int[Array, "B P"],
  prompt_valid: Bool[Array, "B P"],
  known: Int[Array, "B W"],
  clean: Int[Array, "B W"],
  *,
  sample_id: Int[Array, "B"] | None = None,
  dropout_key: Key[Array, ""] | None = None,
) -> Float[Array, "B W D"]:
  """The hidden states that predict each completion token, by one forward pass.

  A network with full attention sees prompt and `known`. A block-causal one sees, for the tokens of a block, the prompt,
  the clean tokens of earlier blocks, and what is known of the block itself: what its sampler sees. So all blocks are
  scored at once, and the canvas is encoded in two streams, `P + 2 C` positions.

  Args:
    denoiser: the mask predictor.
    params: its parameters.
    prompt: left-padded ids.
    prompt_valid: false at padding.
    known: the completion with masks for the tokens that the network does not see.
    clean: the completion.
    sample_id: part of the keys of dropout.
    dropout_key: turns the network's dropout on; a token's key is made of its sample id and its distance from the start
      of the completion.
  """
  tokens, valid = lay_out(denoiser, prompt, prompt_valid, known)
  width, length = known.shape[1], tokens.shape[1]
  first, block = length - width, denoiser.block
  distance = (jnp.arange(length) - first).astype(jnp.uint32)
  if block is None or denoiser.encode_streams is None:
    hidden = denoiser.encode(params, tokens, valid, **_dropout(dropout_key, sample_id, distance))
    return denoiser.hidden_predicting(hidden, first + jnp.arange(width))
  dropout = _dropout(dropout_key, sample_id, jnp.concatenate([distance, distance[first:] + NOISY]))
  return predicting_states(denoiser, params, prompt, prompt_valid, known[None], clean, **dropout)[0]


def predicting_states(
  denoiser: Denoiser,
  params: Params,
  prompt: Int[Array, "B P"],
  prompt_valid: Bool[Array, "B P"],
  known: Int[Array, "S B W"],
  clean: Int[Array, "B W"],
  dropout: Key[Array, "B N"] | None = None,
) -> Float[Array, "S B W D"]:
  """`predicting` of a block-causal network at S states of the same completions, by one pass over `P + (1 + S) C`
  positions: what is clean is encoded once. `dropout` are keys of the clean and the noisy positions.
  """
  everything, valid = lay_out(denoiser, prompt, prompt_valid, clean)
  states, batch, width = known.shape
  first, block = everything.shape[1] - width, denoiser.block or 1
  noisy = jax.vmap(lambda each: lay_out(denoiser, prompt, prompt_valid, each)[0][:, first:])(known)
  if denoiser.shift:
    # The first token of a block is predicted by the last one of the block before, and is there before the block is
    # denoised: the noisy copy always has it.
    noisy = jnp.where(jnp.arange(width) % block == 0, everything[:, first:], noisy)
  copies = jnp.moveaxis(noisy, 0, 1).reshape(batch, states * width)
  options = {} if dropout is None else {"dropout": dropout}
  assert denoiser.encode_streams is not None
  seen, hidden = denoiser.encode_streams(params, everything, copies, valid, first, **options)
  hidden = checkpoint_name(hidden, FORWARD_PASS)
  at = places(denoiser, prompt_valid, width)
  take = lambda hidden, columns: jnp.take_along_axis(hidden, columns[..., None], axis=1)
  each = jnp.moveaxis(hidden.reshape(batch, states, width, -1), 1, 0)
  if not denoiser.shift:
    return jax.vmap(lambda own: take(own, at))(each)
  before = take(seen, first + at - 1)
  own = jax.vmap(lambda own: take(own, jnp.maximum(at - 1, 0)))(each)
  return jnp.where((at % block == 0)[..., None], before, own)


def _dropout(
  key: Key[Array, ""] | None, sample_id: Int[Array, "B"] | None, place: UInt32[Array, "L"]
) -> dict[str, Key[Array, "B L"]]:
  return {} if key is None or sample_id is None else {"dropout": keys.token_keys(key, sample_id, place)}
