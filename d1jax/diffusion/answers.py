"""The log-probability of a given answer: LLaDA's estimator with stratified mask counts, and the check for greed.

LLaDA (arXiv 2502.09992, eq. 6 and appendix; ML-GSAI/LLaDA, eval_llada.py) masks x of the n tokens of an answer, x from
1 to n, and sums the log-probabilities of the masked tokens times n / x. The mean over x and over the masks is the lower
bound of log p(answer | prompt) under uniformly random order.

Here the tokens of an answer fall into *groups*, each with a count and an order of its own, and the estimate is the sum
over groups. With full attention the whole answer is one group. For a block-causal network each block is one, given all
earlier blocks, so that one two-stream pass scores all blocks: over blocks this is the chain rule, which is exact, and
within a block the bound. If hidden states predict their right neighbour (shift 1), the first token of a block, which is
there before the block is denoised, is a group of its own. A group of one token has one possible mask, so that its
log-probability is exact: with blocks of one token the sum is the exact log p(answer | prompt).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from d1jax import keys
from d1jax.diffusion.blocks import guided
from d1jax.diffusion.denoiser import Denoiser, Params
from d1jax.diffusion.draw import log_prob
from d1jax.diffusion.layout import block_of, places, predicting
from d1jax.diffusion.likelihood import token_logps

CHUNK = 32
"""The tokens of a row whose logits exist at the same time, where all logits are needed."""

TILE = 4096
"""The vocabulary ids whose logits exist at the same time, where one log-probability a token is needed."""


class Answers(NamedTuple):
  """Prompts and answers to score. Shapes: B batch, P prompt length, A answer length.

  Attributes:
    prompt: left-padded ids.
    prompt_valid: false at padding.
    answer: ids; what stands behind an answer's end is not read.
    length: the tokens of each answer, at least one.
    sample_id: the keys of the draws are made of it.
  """

  prompt: Int[Array, "B P"]
  prompt_valid: Bool[Array, "B P"]
  answer: Int[Array, "B A"]
  length: Int[Array, "B"]
  sample_id: Int[Array, "B"]


class _Window(NamedTuple):
  """The columns of a canvas that hold the answers, and how the network predicts them.

  Attributes:
    tokens: their tokens.
    inside: the columns that are an answer's.
    number: of an answer's tokens, from 0, whatever the padding; 0 elsewhere.
    group: of each token; it does not decrease from left to right.
    predict: `(known, blind) -> hidden states`, by one forward pass; `blind` masks the prompt.
  """

  tokens: Int[Array, "B W"]
  inside: Bool[Array, "B W"]
  number: Int[Array, "B W"]
  group: Int[Array, "B W"]
  predict: Callable[[jax.Array, bool], jax.Array]


def _window(denoiser: Denoiser, params: Params, answers: Answers) -> _Window:
  width, block = answers.answer.shape[1], denoiser.block
  if block is None:
    return _right_aligned(denoiser, params, answers)
  # The last block of an answer is filled with masks, as the sampler has it before it draws the answer.
  fill = -(-width // block) * block + block - width
  tokens = jnp.pad(answers.answer, ((0, 0), (0, fill)), constant_values=denoiser.mask_id)
  columns = jnp.broadcast_to(jnp.arange(width + fill)[None, :], tokens.shape)
  inside = columns < answers.length[:, None]
  tokens = jnp.where(inside, tokens, denoiser.mask_id)
  group = jnp.broadcast_to(block_of(denoiser, answers.prompt_valid, tokens.shape[1], block), tokens.shape)
  if denoiser.shift:
    group = 2 * group + (places(denoiser, answers.prompt_valid, tokens.shape[1]) % block > 0)

  def predict(known: Int[Array, "B W"], blind: bool) -> Float[Array, "B W D"]:
    del blind  # `check_guidance` has refused it
    return predicting(denoiser, params, answers.prompt, answers.prompt_valid, known, tokens)

  return _Window(tokens, inside, jnp.where(inside, columns, 0), group, predict)


def _right_aligned(denoiser: Denoiser, params: Params, answers: Answers) -> _Window:
  """With full attention nothing may stand behind an answer's end, not even a mask: the rows are moved to the right."""
  # An answer of 2 tokens in a bucket of 4, behind the prompt `a b`: `. . a b 1 2 . .` becomes `. . . . a b 1 2`. The
  # last 4 columns are the window, in which the prompt's end may stand too.
  width = answers.answer.shape[1]
  spare = (width - answers.length)[:, None]
  canvas = jnp.concatenate([answers.prompt, answers.answer], axis=1)
  length = canvas.shape[1]
  columns = jnp.arange(length)[None, :] - spare
  canvas = jnp.take_along_axis(canvas, jnp.maximum(columns, 0), axis=1)
  is_answer = jnp.arange(length)[None, :] >= length - answers.length[:, None]
  filled = jnp.concatenate([answers.prompt_valid, jnp.ones(answers.answer.shape, bool)], axis=1)
  valid = (columns >= 0) & jnp.take_along_axis(filled, jnp.maximum(columns, 0), axis=1)
  first = length - width

  def predict(known: Int[Array, "B W"], blind: bool) -> Float[Array, "B W D"]:
    tokens = jnp.concatenate([canvas[:, :first], known], axis=1)
    if blind:
      tokens = jnp.where(valid & ~is_answer, denoiser.mask_id, tokens)
    return denoiser.hidden_predicting(denoiser.encode(params, tokens, valid), first + jnp.arange(width))

  inside = is_answer[:, first:]
  number = jnp.where(inside, jnp.arange(width)[None, :] - spare, 0)
  return _Window(canvas[:, first:], inside, number, jnp.zeros(inside.shape, jnp.int32), predict)


def check_guidance(denoiser: Denoiser, cfg_scale: float) -> None:
  """Raises a ValueError if answers cannot be scored with this guidance."""
  if not 0 <= cfg_scale < float("inf"):
    raise ValueError(f"cfg_scale={cfg_scale} must not be negative or infinite: use 0 for no guidance")
  if cfg_scale and denoiser.block is not None:
    raise ValueError(
      f"cfg_scale={cfg_scale} masks the prompt in a second pass, which a block-causal network is not sampled with:"
      " use cfg_scale=0"
    )


def check_samples(samples: int, strata: int) -> None:
  """Raises a ValueError if the masks do not fall into whole strata."""
  if samples < 1 or strata < 1 or samples % strata:
    raise ValueError(
      f"samples={samples} masks do not fall into sets of strata={strata}: use a multiple of it, or strata=1"
    )


def is_exact(denoiser: Denoiser, length: int) -> bool:
  """Whether one pass gives the exact log-probability of an answer of so many tokens: each group has one token."""
  return length == 1 or denoiser.block == 1


def _by_group(window: _Window, values: Array, reduce: Callable[..., Array]) -> Array:
  """For each token, what `reduce` makes of the values of its group."""
  count = 2 * window.tokens.shape[1]
  found = jax.vmap(lambda x, group: reduce(x, group, num_segments=count))(values, window.group)
  return jnp.take_along_axis(found, window.group, axis=1)


def _order_in_group(window: _Window, uniform: Float[Array, "B W"]) -> Int[Array, "B W"]:
  """The rank of each uniform among those of its group, from 0; tokens outside of answers come last."""
  order = jnp.lexsort((jnp.where(window.inside, uniform, 2.0), window.group), axis=1)
  rank = jnp.argsort(order, axis=1)
  columns = jnp.broadcast_to(jnp.arange(uniform.shape[1]), uniform.shape)
  return rank - _by_group(window, columns, jax.ops.segment_min)


def _masks(
  window: _Window, sample_id: Int[Array, "B"], key: Key[Array, ""], index: Int[Array, ""], strata: int
) -> tuple[Bool[Array, "B W"], Float[Array, "B W"]]:
  """The tokens that pass number `index` masks, and the weight of each."""
  own = keys.fold(keys.sample_keys(key, sample_id), index // strata)
  stratum = index % strata
  size = jnp.maximum(_by_group(window, window.inside.astype(jnp.int32), jax.ops.segment_sum), 1)
  width = window.tokens.shape[1]
  drawn = jnp.take_along_axis(keys.uniforms(keys.fold(own, 0), 2 * width), window.group, axis=1)
  first = jnp.minimum(jnp.floor(drawn * size).astype(jnp.int32), size - 1)
  # Counts of a set are spread evenly over 1..n: with n = 8 tokens and 4 strata, a first count of 3 gives 3, 5, 7, 1.
  # Every count alone is uniform on 1..n, so that the estimate is unbiased. Halves are rounded up; LLaDA rounds them to
  # even numbers, which makes some counts more frequent: with n = 3 and 2 strata, 1, 2, 3 have 50%, 33% and 17%.
  step = (2 * stratum * size + strata) // (2 * strata)
  count = (first + step) % size + 1
  order = keys.uniforms(keys.fold(own, 1 + stratum), width)
  rank = _order_in_group(window, jnp.take_along_axis(order, window.number, axis=1))
  return window.inside & (rank < count), size / count


def _in_chunks(function: Callable[..., Array], *arrays: Array) -> Array:
  """A function of some columns [B n ...] -> [B n K], for `CHUNK` columns at a time."""
  rows, width = arrays[0].shape[:2]
  parts = -(-width // CHUNK)
  if parts == 1:
    return function(*arrays)

  def cut(x: Array) -> Array:
    padded = jnp.pad(x, ((0, 0), (0, parts * CHUNK - width), *((0, 0) for _ in x.shape[2:])))
    return jnp.moveaxis(padded.reshape(rows, parts, CHUNK, *x.shape[2:]), 1, 0)

  found = jax.lax.map(lambda part: function(*part), tuple(map(cut, arrays)))
  return jnp.moveaxis(found, 0, 1).reshape(rows, parts * CHUNK, *found.shape[3:])[:, :width]


def _guided_hidden(denoiser: Denoiser, window: _Window, masked: Array, cfg_scale: float) -> tuple[Array, ...]:
  known = jnp.where(masked, denoiser.mask_id, window.tokens)
  return tuple(window.predict(known, blind) for blind in ((False, True) if cfg_scale else (False,)))


def _logits(denoiser: Denoiser, params: Params, cfg_scale: float, *hidden: Array) -> Array:
  logits = denoiser.logits(params, hidden[0])
  return guided(logits, denoiser.logits(params, hidden[1]), cfg_scale) if cfg_scale else logits


def answer_logps(
  denoiser: Denoiser,
  params: Params,
  answers: Answers,
  key: Key[Array, ""],
  *,
  samples: int,
  strata: int = 1,
  cfg_scale: float = 0.0,
) -> Float[Array, "B R"]:
  """Independent estimates of log p(answer | prompt) in nats, each the mean over a set of `strata` masks.

  Costs `samples` forward passes, twice as many with guidance. A draw depends on the key, the row's sample id and the
  token's number in the answer, not on padding or on other rows.

  Args:
    denoiser: the mask predictor.
    params: its parameters.
    answers: what is scored.
    key: of the draws.
    samples: masks a row.
    strata: masks of a set, among which the counts of masked tokens are spread evenly (LLaDA's batch); 1: independent.
    cfg_scale: w of classifier-free guidance, l_un + (w + 1)(l_cond - l_un), as in LLaDA's evaluation.

  Returns:
    R = samples / strata estimates a row, each unbiased for the bound; their mean is LLaDA's estimate, and they say how
    precise it is.
  """
  check_guidance(denoiser, cfg_scale)
  check_samples(samples, strata)
  window = _window(denoiser, params, answers)
  tile = TILE if denoiser.vocab > TILE else None

  def one(index: Int[Array, ""]) -> Float[Array, "B"]:
    masked, weight = _masks(window, answers.sample_id, key, index, strata)
    hidden = _guided_hidden(denoiser, window, masked, cfg_scale)
    if cfg_scale:
      score = lambda tokens, *states: log_prob(_logits(denoiser, params, cfg_scale, *states), tokens)
      logp = _in_chunks(score, window.tokens, *hidden)
    else:
      logp = token_logps(denoiser, params, hidden[0], window.tokens, tile)
    return jnp.sum(jnp.where(masked, weight * logp, 0.0), axis=1)

  found = jax.lax.map(one, jnp.arange(samples))
  return jnp.mean(found.reshape(samples // strata, strata, -1), axis=1).T


def is_greedy(denoiser: Denoiser, params: Params, answers: Answers, *, cfg_scale: float = 0.0) -> Bool[Array, "B"]:
  """Whether the answer is what greedy decoding writes, one token a step, the most probable first (LLaDA's
  `suffix_greedy_prediction`).

  LLaDA starts from n masks and unmasks in each step the token of the highest confidence. A row fails as soon as such a
  token is not the answer's, so that the loop ends when all rows have failed or are complete: at most n passes. The
  blocks of a block-causal network are checked at the same time, because each counts only if all before it are right: at
  most a pass a token of a block.
  """
  check_guidance(denoiser, cfg_scale)
  window = _window(denoiser, params, answers)
  columns = jnp.broadcast_to(jnp.arange(window.tokens.shape[1]), window.tokens.shape)

  def best(tokens: Array, *states: Array) -> Array:
    logits = _logits(denoiser, params, cfg_scale, *states)
    top = jnp.argmax(logits, axis=-1)
    return jnp.stack([log_prob(logits, top), (top == tokens).astype(jnp.float32)], axis=-1)

  def step(state: tuple[Array, Array]) -> tuple[Array, Array]:
    masked, alive = state
    found = _in_chunks(best, window.tokens, *_guided_hidden(denoiser, window, masked, cfg_scale))
    confidence = jnp.where(masked, found[..., 0], -jnp.inf)
    leads = masked & (confidence == _by_group(window, confidence, jax.ops.segment_max))
    first = _by_group(window, jnp.where(leads, columns, columns.shape[1]), jax.ops.segment_min)
    chosen = leads & (columns == first)
    return masked & ~chosen, alive & jnp.all(~chosen | (found[..., 1] > 0), axis=1)

  open_rows = lambda state: jnp.any(state[1] & jnp.any(state[0], axis=1))
  return jax.lax.while_loop(open_rows, step, (window.inside, jnp.ones(len(columns), bool)))[1]
