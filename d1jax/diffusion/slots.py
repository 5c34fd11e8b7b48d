"""Rows that denoise together although each is at its own block and step, with its own sampler: continuous batching.

`d1jax.diffusion.sampler` completes a batch of prompts from the first block to the last. Here a row may begin while
others are half done, and leaves when it is finished. What a row needs is in arrays, `Rows`, and nothing of its
`SamplerSpec` is compiled in. The rows are small and may live on the host, which changes them between two calls of
`advance`. The cache of a block-causal network stays on the device.

A row's draws are those of `sample`: they depend on its key, its steps and the places of its tokens, and not on the
other rows.

With full attention, a row's completion ends at the last column of the canvas, behind a left-padded prompt. A row of a
block-causal network begins at column 0, so that its own blocks are the canvas's, and a pass computes one block of each
row. A pass at the beginning of a block (`within` is -1) writes the block before it again, from its final tokens; if
hidden states predict the next token, it also reveals the first token of the block. `sample` writes in the first step of
a block, whose window is then two blocks wide. Here rows are at different steps, and nearly every pass would have to be
that wide. With blocks of 4 and two rows, a pass computes these columns, of which row 0 writes (W) and row 1 takes a
step (S):

    row 0:  . . . . W W W W . . . . . . . .
    row 1:  . . . . . . . . . . . . S S S S
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped, UInt32

from d1jax import keys
from d1jax.diffusion.blocks import check, pass_over, write_over
from d1jax.diffusion.denoiser import Denoiser, Params
from d1jax.diffusion.draw import log_prob, propose_each
from d1jax.diffusion.rollout import SamplerSpec
from d1jax.diffusion.sampler import ORDER_STREAM, TOKEN_STREAM
from d1jax.diffusion.schedule import at_least, in_a_row, rank_descending

SCHEDULES = ("static", "sequential", "threshold", "factor")
"""A row has the number of its schedule."""

CHUNK = 256
"""About so many positions of a prompt are computed at a time."""


class Rows(NamedTuple):
  """Rows of a batch, each with its progress and its sampler: arrays of NumPy on the host. Shapes: B rows, L canvas.

  Attributes:
    tokens: the canvas.
    valid: false at padding.
    reveal_step: the step that revealed the token of each column; -1 where none did.
    reveal_logp: its log-probability under the distribution that it was drawn from.
    key: data of the sample's key.
    alive: false for a row that only fills the batch.
    start: the first column of the active block.
    block: its number among the row's blocks.
    within: the number of its next step; -1: the block before is written first.
    block_length: this and the following ones are of the row's `SamplerSpec`.
    steps: `steps_per_block`.
    temperature: of the draws.
    schedule: its number among `SCHEDULES`.
    random: whether `remasking` is random.
    threshold: of that schedule.
    factor: of that schedule.
    max_reveal: of both.
  """

  tokens: Int[Array, "B L"]
  valid: Bool[Array, "B L"]
  reveal_step: Int[Array, "B L"]
  reveal_logp: Float[Array, "B L"]
  key: UInt32[Array, "B 2"]
  alive: Bool[Array, "B"]
  start: Int[Array, "B"]
  block: Int[Array, "B"]
  within: Int[Array, "B"]
  block_length: Int[Array, "B"]
  steps: Int[Array, "B"]
  temperature: Float[Array, "B"]
  schedule: Int[Array, "B"]
  random: Bool[Array, "B"]
  threshold: Float[Array, "B"]
  factor: Float[Array, "B"]
  max_reveal: Int[Array, "B"]


def check_row(denoiser: Denoiser, spec: SamplerSpec, width: int) -> None:
  """Raises a ValueError if rows cannot be sampled so.

  Args:
    denoiser: the mask predictor.
    spec: the sampler of a row.
    width: the longest block.
  """
  check(denoiser, spec)
  if spec.cfg_scale:
    raise ValueError(
      f"cfg_scale={spec.cfg_scale} takes two passes a step, and rows that run together take one: use cfg_scale=0"
    )
  if spec.cache != "none":
    raise ValueError(
      f"cache={spec.cache!r} refreshes at steps that rows do not share: use cache='none', which is exact"
    )
  if spec.block_length > width:
    raise ValueError(f"block_length={spec.block_length} is beyond {width}, the longest block: use {width} or less")


def row_of(
  denoiser: Denoiser, spec: SamplerSpec, prompt: Int[np.ndarray, "p"], key: UInt32[np.ndarray, "2"], length: int
) -> Rows:
  """A row at its beginning, as a batch of one on the host; `completion_start` is where its completion begins.

  Args:
    denoiser: the mask predictor.
    spec: the sampler of the row, see `check_row`.
    prompt: ids, one at least.
    key: data of the sample's key.
    length: the canvas, which holds prompt and completion.
  """
  first, block = completion_start(denoiser, spec, len(prompt), length), denoiser.block
  tokens = np.full((1, length), denoiser.mask_id, np.int32)
  tokens[0, first - len(prompt) : first] = prompt
  columns = np.arange(length)[None]
  start, number, within = first, 0, 0
  if block is not None:
    # Blocks are counted from the one before the first that is behind the whole prompt (`d1jax.diffusion.layout`). The
    # first one with a mask is the first to be denoised. For the prompt `a b c d | e` it is the block of `e`, number 0;
    # for `a b c d` it is the block behind it, which has the number of the second block.
    before = (-(-first // block) - 1) * block
    start = first // spec.block_length * spec.block_length
    number = (start - before) // spec.block_length
    within = -1 if denoiser.shift and start % block == 0 else 0
  one = lambda value, dtype: np.asarray([value], dtype)
  arrays: dict[str, Any] = dict(
    tokens=tokens,
    valid=columns >= first - len(prompt),
    reveal_step=np.full((1, length), -1, np.int32),
    reveal_logp=np.zeros((1, length), np.float32),
    key=key[None],
    alive=one(True, bool),
    start=one(start, np.int32),
    block=one(number, np.int32),
    within=one(within, np.int32),
    block_length=one(spec.block_length, np.int32),
    steps=one(spec.steps_per_block, np.int32),
    temperature=one(spec.temperature, np.float32),
    schedule=one(SCHEDULES.index(spec.schedule), np.int32),
    random=one(spec.remasking == "random", bool),
    threshold=one(spec.threshold, np.float32),
    factor=one(spec.factor, np.float32),
    max_reveal=one(min(spec.max_reveal, spec.block_length), np.int32),
  )
  return Rows(**arrays)


def completion_start(denoiser: Denoiser, spec: SamplerSpec, prompt: int, length: int) -> int:
  """The column of a row's first completion token, for a prompt of so many tokens on a canvas of `length`."""
  return length - spec.completion_length if denoiser.block is None else prompt


def columns_needed(denoiser: Denoiser, spec: SamplerSpec, prompt: int) -> int:
  """The shortest canvas of a row: prompt and completion, and for a block-causal network all of their last block."""
  block = denoiser.block or 1
  return -(-(prompt + spec.completion_length) // block) * block


def next_block(denoiser: Denoiser, rows: Rows, finished: Bool[np.ndarray, "B"]) -> Rows:
  """The rows on the host, those that have finished a block at the beginning of the next one."""
  start: Any = rows.start + np.where(finished, rows.block_length, 0)
  begins = 0 if denoiser.block is None else -(start % denoiser.block == 0).astype(np.int32)
  within: Any = np.where(finished, begins, rows.within).astype(np.int32)
  return rows._replace(start=start, block=rows.block + finished, within=within)


def advance(
  denoiser: Denoiser, params: Params, rows: Rows, cache: PyTree, most: Int[Array, ""], *, width: int
) -> tuple[Rows, PyTree, Bool[Array, "B"], Int[Array, ""]]:
  """Denoises all rows, until one has finished its block.

  Args:
    denoiser: the mask predictor.
    params: its parameters.
    rows: which are alive must have a mask in their active block.
    cache: of a block-causal network, which has the columns before each row's active block (`fill`); None with full
      attention.
    most: the most forward passes.
    width: the longest block of a row.

  Returns:
    The rows, the cache, which rows have finished their block, and the forward passes.
  """

  def goes_on(carry: tuple[Rows, PyTree, jax.Array, jax.Array]) -> jax.Array:
    return (carry[3] < most) & ~jnp.any(carry[2])

  def body(carry: tuple[Rows, PyTree, jax.Array, jax.Array]) -> tuple[Rows, PyTree, jax.Array, jax.Array]:
    rows, cache = _step(denoiser, params, carry[0], carry[1], width)
    full = ~jnp.any(_masks(denoiser, rows, width), axis=1)
    return rows, cache, rows.alive & (full | (rows.within >= rows.steps)), carry[3] + 1

  return jax.lax.while_loop(goes_on, body, (rows, cache, jnp.zeros_like(rows.alive), jnp.int32(0)))


def _of_block(x: Shaped[Array, "B L"], rows: Rows, width: int) -> Shaped[Array, "B W"]:
  """The values of the active blocks; behind the end of the canvas, that of its last column."""
  columns = jnp.minimum(rows.start[:, None] + jnp.arange(width)[None, :], x.shape[1] - 1)
  return jnp.take_along_axis(x, columns, axis=1)


def _masks(denoiser: Denoiser, rows: Rows, width: int) -> Bool[Array, "B W"]:
  """Where the active blocks have masks."""
  inside = jnp.arange(width)[None, :] < rows.block_length[:, None]
  return inside & (_of_block(rows.tokens, rows, width) == denoiser.mask_id)


def _step(denoiser: Denoiser, params: Params, rows: Rows, cache: PyTree, width: int) -> tuple[Rows, PyTree]:
  """One forward pass, and what it reveals."""
  begins, place = rows.within < 0, jnp.arange(width)[None, :]
  index = rows.block * rows.steps + jnp.maximum(rows.within, 0)
  of_sample = jax.random.wrap_key_data(rows.key, impl="threefry2x32")
  per_step = keys.fold(of_sample, index)
  offset = jnp.minimum((rows.block * rows.block_length)[:, None] + place, rows.tokens.shape[1] - 1)

  def draw(stream: int) -> Float[Array, "B W"]:
    uniform = keys.uniforms(keys.fold(per_step, stream), rows.tokens.shape[1])
    return jnp.take_along_axis(uniform, offset, axis=1)

  logits, cache = _block_logits(denoiser, params, rows, cache, width)
  proposal, logp = propose_each(logits, draw(TOKEN_STREAM), jnp.broadcast_to(rows.temperature[:, None], offset.shape))
  confidence = log_prob(logits, proposal)
  masked = _masks(denoiser, rows, width) & rows.alive[:, None]
  if denoiser.block is not None:
    masked &= ~begins[:, None] | ((place == 0) & bool(denoiser.shift))
  by_order = jnp.where(rows.random[:, None], draw(ORDER_STREAM), confidence)
  sequential = (rows.schedule == SCHEDULES.index("sequential"))[:, None]
  score = jnp.where(sequential, -place.astype(jnp.float32), by_order)
  rank = rank_descending(jnp.where(masked, score, -jnp.inf))
  chosen = masked & (rank < _counts(rows, confidence, rank, masked)[:, None])
  return _revealed(rows, chosen, proposal, logp, index), cache


def _counts(
  rows: Rows, log_confidence: Float[Array, "B W"], rank: Int[Array, "B W"], masked: Bool[Array, "B W"]
) -> Int[Array, "B"]:
  """How many tokens each row reveals: see `reveal_counts` and `confident_count` of `d1jax.diffusion.schedule`."""
  confidence = jnp.exp(log_confidence)
  static = rows.block_length // rows.steps + (rows.within < rows.block_length % rows.steps)
  threshold = at_least(rows.threshold[:, None], confidence, masked)
  factor = in_a_row(rows.factor[:, None], confidence, rank, masked)
  confident = jnp.where(rows.schedule == SCHEDULES.index("threshold"), threshold, factor)
  by_confidence = rows.schedule >= SCHEDULES.index("threshold")
  return jnp.where(by_confidence, jnp.clip(confident, 1, rows.max_reveal), static)


def _block_logits(
  denoiser: Denoiser, params: Params, rows: Rows, cache: PyTree, width: int
) -> tuple[Float[Array, "B W V"], PyTree]:
  """The logits of each row's active block."""
  place, length = jnp.arange(width)[None, :], rows.tokens.shape[1]
  if denoiser.block is None:
    with jax.named_scope(pass_over(length)):
      hidden = denoiser.encode(params, rows.tokens, rows.valid)
      predicted = jnp.minimum(rows.start[:, None] + place, length - 1)
      return denoiser.logits(params, denoiser.hidden_predicting(hidden, predicted)), cache
  size, begins, encode = denoiser.block, (rows.within < 0)[:, None], denoiser.encode_window
  assert encode is not None
  own = rows.start // size * size
  first = jnp.where(begins[:, 0], own - size, own)
  columns = first[:, None] + jnp.arange(size)[None, :]
  with jax.named_scope(pass_over(size)):
    hidden, cache = encode(params, jnp.take_along_axis(rows.tokens, columns, axis=1), first, cache)
    # The first token of a window is never masked if the one before it predicts it.
    inside = jnp.clip((rows.start - own)[:, None] + place, denoiser.shift, size - 1)
    predicted = jnp.where(begins, size - 1 + denoiser.shift, inside)
    return denoiser.logits(params, denoiser.hidden_predicting(hidden, predicted)), cache


def _revealed(
  rows: Rows, chosen: Bool[Array, "B W"], tokens: Int[Array, "B W"], logp: Float[Array, "B W"], step: Int[Array, "B"]
) -> Rows:
  """The rows after a pass, with the chosen tokens in place of masks."""
  columns = rows.start[:, None] + jnp.arange(chosen.shape[1])[None, :]
  columns = jnp.where(chosen, columns, rows.tokens.shape[1])  # what is not chosen falls off the canvas

  @jax.vmap
  def write(x: jax.Array, columns: jax.Array, new: jax.Array) -> jax.Array:
    return x.at[columns].set(new.astype(x.dtype), mode="drop")

  return rows._replace(
    tokens=write(rows.tokens, columns, tokens),
    reveal_step=write(rows.reveal_step, columns, jnp.broadcast_to(step[:, None], tokens.shape)),
    reveal_logp=write(rows.reveal_logp, columns, logp),
    within=rows.within + rows.alive,
  )


def chunk_width(block: int, length: int) -> int:
  """How many positions of a prompt `fill` computes at a time: whole blocks."""
  return min(max(CHUNK // block, 1) * block, length)


def fill(denoiser: Denoiser, params: Params, tokens: Int[Array, "B L"], stop: Int[Array, ""]) -> PyTree:
  """The cache of new rows of a block-causal network, filled up to column `stop`, and a little further.

  What is not complete behind that column is not seen before it is written again.

  Args:
    denoiser: the mask predictor.
    params: its parameters.
    tokens: the canvases.
    stop: the first column of the first active block of the row with the longest prompt.
  """
  assert denoiser.block is not None
  assert denoiser.init_cache is not None
  encode: Any = denoiser.encode_window
  width = chunk_width(denoiser.block, tokens.shape[1])

  def body(carry: tuple[jax.Array, PyTree]) -> tuple[jax.Array, PyTree]:
    first, cache = carry
    with jax.named_scope(write_over(width)):
      part = jax.lax.dynamic_slice_in_dim(tokens, first, width, axis=1)
      return first + width, encode(params, part, first, cache)[1]

  cache = denoiser.init_cache(jnp.ones(tokens.shape, bool))
  return jax.lax.while_loop(lambda carry: carry[0] < stop, body, (jnp.int32(0), cache))[1]


def batch_axes(denoiser: Denoiser, length: int) -> PyTree:
  """The axis of the batch of each array of a cache."""
  assert denoiser.init_cache is not None
  one, two = (jax.eval_shape(denoiser.init_cache, jax.ShapeDtypeStruct((n, length), bool)) for n in (1, 2))
  return jax.tree.map(lambda a, b: [x == y for x, y in zip(a.shape, b.shape, strict=True)].index(False), one, two)


def taken(cache: PyTree, axes: PyTree, places: Int[Array, "B"]) -> PyTree:
  """Some rows of a cache; a place behind its end takes any."""
  return jax.tree.map(lambda x, axis: jnp.take(x, places, axis=axis, mode="clip"), cache, axes)


def put_back(cache: PyTree, axes: PyTree, places: Int[Array, "B"], rows: PyTree) -> PyTree:
  """A cache with some rows replaced; a row whose place lies behind the end is left out."""

  def put(x: jax.Array, axis: int, new: jax.Array) -> jax.Array:
    return x.at[(slice(None),) * axis + (places,)].set(new, mode="drop")

  return jax.tree.map(put, cache, axes, rows)
