"""The denoising loss of packed rows, in which several demonstrations stand one behind the other.

A demonstration, here a document, sees itself alone, and its noise depends on its sample id and on the distance of a
token from the start of its answer. So it has the loss that it has in a row of its own, wherever it stands. A
block-causal network counts blocks from the start of a row, and each document begins with a block. With blocks of 4
(bars), a document of the prompt `a b c` and the answer `1 2`, and one of `d` and `3 4 5 6`; `x` fills last blocks:

    a b c 1 | 2 x x x | d 3 4 5 | 6 x x x
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, Key

from d1jax import keys
from d1jax.diffusion.corruption import LLADA, NoiseSpec, corrupt
from d1jax.diffusion.denoiser import FORWARD_PASS, Denoiser, Params
from d1jax.diffusion.layout import NOISY
from d1jax.diffusion.likelihood import by_level, token_logps


def packed_loss(
  denoiser: Denoiser,
  params: Params,
  tokens: Int[Array, "B L"],
  segment: Int[Array, "B L"],
  answer: Bool[Array, "B L"],
  sample_id: Int[Array, "B M"],
  weight: Float[Array, "B"],
  key: Key[Array, ""],
  *,
  noise: NoiseSpec = LLADA,
  complement: Bool[Array, "B"] | None = None,
  tile: int | None = None,
  dropout_key: Key[Array, ""] | None = None,
  prompt_key: Key[Array, ""] | None = None,
  p_mask_prompt: float = 0.0,
  levels: int = 0,
) -> tuple[Float[Array, ""], dict[str, Float[Array, "..."]]]:
  """`d1jax.diffusion.likelihood.denoising_loss` of the documents of packed rows.

  A document with answer tokens i has the loss `mean_i masked[i] * CE[i] / t`. With full attention i are all tokens of
  the answer, and no padding behind it; with blocks the tokens up to the end of the block with its first stop id.

  Args:
    denoiser: the mask predictor.
    params: its parameters.
    tokens: clean ids.
    segment: 1, 2, ... at the documents of a row, 0 at padding.
    answer: true at the tokens of answers. Each document has a prompt, which is never predicted.
    sample_id: of each document of a row, part of the keys of all draws.
    weight: of each document of a row, 1 / (documents of the batch) for their mean.
    key: of the noise.
    noise: see `denoising_loss`.
    complement: rows that mask what the draw does not mask.
    tile: see `token_logps`.
    dropout_key: see `denoising_loss`.
    prompt_key: of the prompt masks; needed if there are any.
    p_mask_prompt: the probability that a prompt token is masked.
    levels: see `denoising_loss`.

  Returns:
    The loss and the metrics of `denoising_loss`.
  """
  batch, length = tokens.shape
  row, column = jnp.arange(batch)[:, None], jnp.arange(length)[None, :]
  document = jnp.maximum(segment - 1, 0)  # padding has no answer, and takes part in no sum
  of_token = lambda values, *index: values[row, document, *index]
  first = lambda flags: jnp.full(sample_id.shape, length).at[row, document].min(jnp.where(flags, column, length))
  by_row = lambda values: values.reshape(batch, sample_id.shape[1], *values.shape[1:])
  identity = sample_id.reshape(-1)
  prompt, begin = (segment > 0) & ~answer, of_token(first(answer))
  distance = column - begin
  if denoiser.block is not None:
    stops = jnp.isin(tokens, jnp.asarray(denoiser.stop_ids, jnp.int32)) & answer
    answer = answer & (column // denoiser.block <= of_token(first(stops)) // denoiser.block)
  count = jnp.zeros(sample_id.shape, jnp.int32).at[row, document].add(answer)
  # The draws of each document are those of a row of its own: uniforms for `length` tokens, of which it has the first.
  inside = jnp.arange(length)[None, None, :] < count[..., None]
  drawn = corrupt(
    key,
    identity,
    jnp.zeros((identity.size, length), jnp.int32),
    denoiser.mask_id,
    noise,
    learned=None if denoiser.block is None else inside.reshape(-1, length),
    complement=None if complement is None else jnp.repeat(complement, sample_id.shape[1]),
  )
  hidden_tokens, share = by_row(drawn.masked) & inside, by_row(drawn.time)
  if noise.weighting == "flat":
    share = jnp.maximum(jnp.sum(hidden_tokens, axis=2), 1) / jnp.maximum(count, 1)
  masked = answer & of_token(hidden_tokens, jnp.clip(distance, 0, length - 1))
  seen = tokens
  if p_mask_prompt and prompt_key is not None:
    uniform = by_row(keys.uniforms(keys.sample_keys(prompt_key, identity), length))
    chosen = of_token(uniform, jnp.clip(-1 - distance, 0, length - 1)) < p_mask_prompt
    seen = jnp.where(prompt & chosen, denoiser.mask_id, tokens)
  dropout = {}
  if dropout_key is not None:
    start = begin if denoiser.block is None else (begin - 1) // denoiser.block * denoiser.block
    dropout["dropout"] = _token_keys(denoiser, dropout_key, of_token(sample_id), column - start)
  known = jnp.where(masked, denoiser.mask_id, seen)
  hidden = _predicting(denoiser, params, known, seen, segment, dropout)
  targets = jnp.where(masked, tokens, denoiser.stop_ids[0])
  cross_entropy = jnp.where(masked, -token_logps(denoiser, params, hidden, targets, tile), 0.0)
  each = weight[:, None] / (jnp.maximum(count, 1) * share)
  loss = jnp.sum(of_token(each) * cross_entropy)
  metrics = {"masked_ce": jnp.sum(cross_entropy) / jnp.maximum(jnp.sum(masked), 1)}
  if levels:
    metrics["by_level"] = by_level(of_token(by_row(drawn.time)), cross_entropy, masked, levels)
  return loss, metrics


def _predicting(
  denoiser: Denoiser,
  params: Params,
  known: Int[Array, "B L"],
  clean: Int[Array, "B L"],
  segment: Int[Array, "B L"],
  dropout: dict[str, Key[Array, "B N"]],
) -> Float[Array, "B L D"]:
  """The hidden states that predict each token of a row; `d1jax.diffusion.layout.predicting` of packed rows."""
  column, block, valid = jnp.arange(known.shape[1]), denoiser.block, segment > 0
  if block is None or denoiser.encode_streams is None:
    hidden = denoiser.encode(params, known, valid, segment=segment, **dropout)
    return denoiser.hidden_predicting(hidden, jnp.maximum(column, denoiser.shift))
  if denoiser.shift:  # the noisy copy has the first token of each block, see `predicting`
    known = jnp.where((column % block == 0)[None, :], clean, known)
  seen, hidden = denoiser.encode_streams(params, clean, known, valid, 0, segment=segment, **dropout)
  hidden = checkpoint_name(hidden, FORWARD_PASS)
  if not denoiser.shift:
    return hidden
  # Each state predicts the next token; the last one of a block, the first of the next block, from clean tokens.
  return jnp.roll(jnp.where((column % block == block - 1)[None, :, None], seen, hidden), 1, axis=1)


def _token_keys(
  denoiser: Denoiser, key: Key[Array, ""], sample_id: Int[Array, "B L"], place: Int[Array, "B L"]
) -> Key[Array, "B N"]:
  """The keys of dropout, which a token also has in a row of its own; with blocks also those of the noisy copies."""
  places = [place.astype(jnp.uint32)]
  if denoiser.block is not None:
    places.append(places[0] + jnp.uint32(NOISY))
  one = lambda i, at: jax.random.fold_in(jax.random.fold_in(key, i), at)
  return jnp.concatenate([jax.vmap(jax.vmap(one))(sample_id, at) for at in places], axis=1)
