"""The reverse process: LLaDA's semi-autoregressive, block-wise denoising loop, compiled.

Semantics are those of LLaDA's generate.py (arXiv 2502.09992) with the arithmetic in float32. Blocks are completed from
left to right. Each step proposes a token for every masked position of the block and ranks the proposals by their
untempered probability (or at random). The best ones replace their masks and never change again. Forbidden ids, the mask
among them, are never proposed.

One loop serves all modes: a block is a number of periods, and a period is a pass over the whole canvas followed by
passes over a window of it that reuse the keys and values of the first. In exact mode a period is one step. A
block-causal network computes the prompt once, then the active block alone (SDAR, arXiv 2510.06303, section 3).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, Key

from d1jax import keys
from d1jax.diffusion import layout
from d1jax.diffusion.blocks import (
  NEXT_BLOCK,
  Caches,
  Place,
  Window,
  block_logits,
  check,
  columns,
  init_caches,
  window_of,
  with_columns,
  write_over,
)
from d1jax.diffusion.denoiser import FORWARD_PASS, Denoiser, Params
from d1jax.diffusion.draw import log_prob, propose
from d1jax.diffusion.rollout import Rollout, SamplerSpec, up_to_stop
from d1jax.diffusion.schedule import confident_count, rank_descending, reveal_counts

COMPACT_FROM = 512
"""Batches of completions at least this long shrink when rows have finished; shorter ones would gain less than the
copies cost."""

_HALVINGS = 3
TOKEN_STREAM, ORDER_STREAM = 0, 1
"""The draws of a step are folded with these: for tokens, and for the order of random remasking."""


class Canvas(NamedTuple):
  """The arrays that the loops write. Shapes: B batch, L canvas, C the columns that the blocks cover."""

  tokens: Int[Array, "B L"]
  reveal_step: Int[Array, "B C"]
  reveal_logp: Float[Array, "B C"]


class State(NamedTuple):
  """The loops' carry."""

  canvas: Canvas
  caches: Caches


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
  row_multiple: int = 1,
) -> Rollout:
  """Completes prompts by denoising `spec.completion_length` masks, block by block.

  Compile time does not grow with the number of blocks, except with `cache="prefix"`, whose window has another width at
  each block: there it does, and finished rows stay in their batch.

  Args:
    denoiser: the mask predictor.
    params: its parameters.
    prompt: left-padded ids.
    prompt_valid: false at padding.
    sample_id: part of the key of every draw, beside `key`, the denoising step and the position in the completion.
    group_id: recorded in the rollout.
    key: of this iteration.
    spec: the sampler.
    row_multiple: the devices that share a batch; a batch that shrinks stays a multiple of it.

  Raises:
    ValueError: the denoiser has no cached form or other blocks, or the prompt has no token to predict the first
      completion token from.
  """
  loop, canvas = prepared(denoiser, params, prompt, prompt_valid, sample_id, key, spec)
  sizes = batch_sizes(len(prompt), row_multiple, spec)
  canvas = loop.run(canvas, jnp.int32(0), sizes, loop.valid.shape[1] - loop.active)
  return recorded(loop, canvas, prompt, prompt_valid, sample_id, group_id)


def prepared(
  denoiser: Denoiser,
  params: Params,
  prompt: Int[Array, "B P"],
  prompt_valid: Bool[Array, "B P"],
  sample_id: Int[Array, "B"],
  key: Key[Array, ""] | Key[Array, "B"],
  spec: SamplerSpec,
) -> "tuple[Loop, Canvas]":
  """The loop that completes prompts, and their canvas of masks; see `sample`. Each sample may have a key of its own."""
  check(denoiser, spec)
  if prompt.shape[1] < denoiser.shift:
    raise ValueError(
      "prompt has width 0, but this network predicts each token from the one before: give a prompt of one token or more"
    )
  shape = (len(prompt), spec.completion_length + layout.extra(denoiser))
  tokens, valid = layout.lay_out(denoiser, prompt, prompt_valid, jnp.full(shape, denoiser.mask_id, prompt.dtype))
  first = None if denoiser.block is None else layout.places(denoiser, prompt_valid, shape[1])[:, 0]
  loop = Loop(denoiser, params, spec, keys.sample_keys(key, sample_id), valid, first)
  return loop, Canvas(tokens, jnp.zeros(shape, jnp.int32), jnp.zeros(shape))


def recorded(
  loop: "Loop",
  canvas: "Canvas",
  prompt: Int[Array, "B P"],
  prompt_valid: Bool[Array, "B P"],
  sample_id: Int[Array, "B"],
  group_id: Int[Array, "B"],
) -> Rollout:
  """The rollout of a canvas whose rows have all ended."""
  denoiser, width = loop.denoiser, loop.active
  canvas = canvas._replace(tokens=canvas.tokens[:, -width:])
  completion, steps, logps = (layout.taken_out(denoiser, prompt_valid, x) for x in canvas)
  if loop.ends_early:
    completion = jnp.where(completion == denoiser.mask_id, denoiser.stop_ids[0], completion)
  mask = up_to_stop(completion, denoiser.stop_ids)
  if denoiser.block is not None:
    mask &= jnp.arange(width)[None, :] < loop.spec.completion_length
  return Rollout(sample_id, group_id, prompt, prompt_valid, completion, mask, steps, logps)


def batch_sizes(batch: int, row_multiple: int, spec: SamplerSpec) -> list[int]:
  """The size of the whole batch, and the halves that it may shrink to.

  A batch of 24 rows over 4 devices may shrink to 12, but not to 6, which 4 devices cannot share: [24, 12]. `prefix`
  has no halves, because it compiles one program a block already.
  """
  sizes = [batch]
  if spec.early_exit and spec.completion_length >= COMPACT_FROM and spec.cache != "prefix":
    while len(sizes) <= _HALVINGS and sizes[-1] % (2 * row_multiple) == 0:
      sizes.append(sizes[-1] // 2)
  return sizes


@dataclasses.dataclass(frozen=True)
class Loop:
  """The loops over blocks, periods and steps, of a batch of samples with these keys and valid positions.

  `first` is the place of each row's first completion token among the active columns of a block-causal network. The
  number of a block is that of all rows, or an array that has one for each of them (`d1jax.diffusion.continuous`).
  """

  denoiser: Denoiser
  params: Params
  spec: SamplerSpec
  keys: Key[Array, "B"]
  valid: Bool[Array, "B L"]
  first: Int[Array, "B"] | None

  @property
  def active(self) -> int:
    """The columns at the end of the canvas that the blocks cover."""
    return self.spec.completion_length + layout.extra(self.denoiser)

  @property
  def blocks(self) -> int:
    """The blocks of the active columns."""
    return self.active // self.spec.block_length

  @property
  def ends_early(self) -> bool:
    """Whether a row ends with its first stop id."""
    return self.spec.early_exit and bool(self.denoiser.stop_ids)

  def start_of(self, block: Place) -> Place:
    """The first column of a block."""
    return self.valid.shape[1] - self.active + block * self.spec.block_length

  def run(self, canvas: Canvas, block: Int[Array, ""], sizes: list[int], done: int) -> Canvas:
    """Denoises the blocks from `block` on; where rows end early, until none goes on, in ever smaller batches.

    The first `done` columns may be put into the cache of a block-causal network; what is not complete among them is not
    seen before it is written again.
    """
    state = State(canvas, init_caches(self.denoiser, self.valid, self.spec))
    denoise, smaller = self.denoise, sizes[1] if len(sizes) > 1 else 0

    def too_many(carry: tuple[Int[Array, ""], State]) -> Bool[Array, ""]:
      return (carry[0] < self.blocks) & (jnp.sum(self.unfinished(carry[1].canvas)) > smaller)

    if self.denoiser.block is not None:
      denoise, fill = self.denoise_causal, lambda state: self.encoded(0, done, state)[1]
      if done < self.valid.shape[1]:
        state = fill(state)
      else:  # a smaller batch, which has nothing left to do where the larger one came to the end
        state = jax.lax.cond(too_many((block, state)), fill, lambda state: state, state)
    if not self.ends_early:
      return jax.lax.fori_loop(0, self.blocks, denoise, state).canvas

    advance = lambda carry: (carry[0] + 1, denoise(*carry))
    block, (canvas, _) = jax.lax.while_loop(too_many, advance, (block, state))
    if not smaller:
      return canvas
    # At most `smaller` rows are unfinished now. A stable sort puts them first, in their order, and finished rows fill
    # the smaller batch: of 4 rows of which 1 and 3 are unfinished, a batch of 2 takes rows [1, 3]; if only 3 is, it
    # takes [3, 0], and row 0, which is complete, does not change. Keys go with their rows, so that draws do not either.
    rows = jnp.argsort(~self.unfinished(canvas), stable=True)[:smaller]
    first = None if self.first is None else self.first[rows]
    few = dataclasses.replace(self, keys=self.keys[rows], valid=self.valid[rows], first=first)
    completed = few.run(jax.tree.map(lambda x: x[rows], canvas), block, sizes[1:], self.valid.shape[1])
    return jax.tree.map(lambda everyone, part: everyone.at[rows].set(part), canvas, completed)

  def of(self, rows: Int[Array, "R"]) -> "Loop":
    """The loops of some of the samples."""
    first = None if self.first is None else self.first[rows]
    return dataclasses.replace(self, keys=self.keys[rows], valid=self.valid[rows], first=first)

  def placed(self, place: Callable[[Any], Any]) -> "Loop":
    """The same loops, with what they know of the samples at another placement."""
    return dataclasses.replace(self, keys=place(self.keys), valid=place(self.valid), first=place(self.first))

  def unfinished(self, canvas: Canvas) -> Bool[Array, "B"]:
    """The rows that have no stop id yet; all, where rows do not end early."""
    if not self.ends_early:
      return jnp.ones(canvas.tokens.shape[0], bool)
    stops = jnp.asarray(self.denoiser.stop_ids, canvas.tokens.dtype)
    found = jnp.isin(canvas.tokens[:, -self.active :], stops)
    if self.first is not None:  # the end of the prompt stands in the first active block
      found &= jnp.arange(self.active)[None, :] >= self.first[:, None]
    return ~jnp.any(found, axis=1)

  def denoise(self, block: Place, state: State) -> State:
    """Denoises one block, period by period."""
    # A period begins with a refresh, a pass over the whole canvas that renews the cache; the other steps of the period
    # compute a window only. With 8 steps a block and `refresh_every` 3, F a refresh and w a window, the steps are
    # F w w | F w w | F w: two whole periods in a loop, and a rest of two steps that is compiled apart, since the
    # length of a period is static. In exact mode all steps are F: eight periods of one step.
    spec, steps = self.spec, self.spec.steps_per_block
    static = not spec.by_confidence
    every = spec.refresh_period
    length = self.valid.shape[1]
    alive = self.unfinished(state.canvas)
    repeat = lambda count, body, state: self.repeat(block, count, body, state, None if static else alive)

    def period(first: Int[Array, ""] | int, count: int, state: State) -> State:
      state = self.step(block, first, alive, state, None)
      if count == 1:
        return state

      def windowed(block: Place, state: State) -> State:
        window = window_of(spec, self.start_of(block), length, self.denoiser.shift)
        return repeat(count - 1, lambda i, state: self.step(block, first + 1 + i, alive, state, window), state)

      if spec.cache != "prefix":
        return windowed(block, state)
      return jax.lax.switch(block, [functools.partial(windowed, b) for b in range(spec.blocks)], state)

    # With a confidence schedule a block ends when it has no mask left, which `repeat` checks; a last period that is
    # too long then costs nothing, and there is no rest.
    whole, rest = divmod(steps, every) if static else (-(-steps // every), 0)
    state = repeat(whole, lambda p, state: period(p * every, every, state), state)
    return period(whole * every, rest, state) if rest else state

  def repeat(
    self,
    block: Place,
    count: int,
    body: Callable[[Any, State], State],
    state: State,
    alive: Bool[Array, "B"] | None,
  ) -> State:
    """`count` times `body(i, state)`; with `alive` rows, only while one of them has a mask in the block."""
    if alive is None:
      return jax.lax.fori_loop(0, count, body, state)
    goes_on = lambda carry: (carry[0] < count) & self.has_masks(block, carry[1], alive)
    return jax.lax.while_loop(goes_on, lambda carry: (carry[0] + 1, body(*carry)), (jnp.int32(0), state))[1]

  def has_masks(self, block: Place, state: State, alive: Bool[Array, "B"]) -> Bool[Array, ""]:
    """Whether a row that goes on has a mask in the block."""
    tokens = columns(state.canvas.tokens, self.start_of(block), self.spec.block_length)
    return jnp.any((tokens == self.denoiser.mask_id) & alive[:, None])

  def denoise_causal(self, block: Place, state: State) -> State:
    """Denoises one block of a block-causal network."""
    # The network's block before the active one is complete, but the cache has the keys and values of its last step,
    # when it still had masks. They are written again from the clean tokens: in the same pass as the first step of the
    # active block, whose window is then two blocks wide. A network that predicts the next token makes a pass of its
    # own, which also gives the first token of the block, so that the first step can see it (Fast-dLLM v2,
    # arXiv 2509.26328). The sampler's blocks may be parts of the network's; only the first part makes this pass.
    spec, size = self.spec, self.denoiser.block or 1
    alive, parts = self.unfinished(state.canvas), size // spec.block_length
    own = self.start_of(block // parts * parts)
    window, fused = Window(own, size), parts == 1 and not self.denoiser.shift

    def take(first: int, count: int, window: Window, state: State) -> State:
      body = lambda i, state: self.step(block, first + i, alive, state, window)
      return self.repeat(block, count, body, state, alive)

    if fused:
      state = take(0, 1, Window(own - size, 2 * size), state)
      return take(1, spec.steps_per_block - 1, window, state)
    begins = jnp.any(block % parts == 0) & self.has_masks(block, state, alive)
    state = jax.lax.cond(begins, lambda state: self.begin(block, alive, state), lambda state: state, state)
    return take(0, spec.steps_per_block, window, state)

  def encoded(self, first: Place, width: int, state: State) -> tuple[Float[Array, "B W D"], State]:
    """The hidden states of some columns, whose keys and values are written into the cache."""
    tokens = columns(state.canvas.tokens, first, width)
    encode: Any = self.denoiser.encode_window
    with jax.named_scope(write_over(width)):
      # The pass is counted by its tokens: nobody may use its hidden states.
      hidden, cache = encode(self.params, checkpoint_name(tokens, FORWARD_PASS), first, state.caches[0])
    return hidden, state._replace(caches=(cache, None))

  def begin(self, block: Place, alive: Bool[Array, "B"], state: State) -> State:
    """Writes the network's block before the active one; with a shift, it also unmasks the first token of this one."""
    size, start = self.denoiser.block or 1, self.start_of(block)
    hidden, state = self.encoded(start - size, size, state)
    if not self.denoiser.shift:
      return state
    with jax.named_scope(NEXT_BLOCK):
      logits = self.denoiser.logits(self.params, self.denoiser.hidden_predicting(hidden, jnp.asarray([size])))
    index = block * self.spec.steps_per_block
    uniform = keys.uniforms(keys.fold(keys.fold(self.keys, index), TOKEN_STREAM), self.active)
    offset = block * self.spec.block_length
    proposal, logp = propose(logits, columns(uniform, offset, 1), self.spec.temperature)
    old = columns(state.canvas.tokens, start, 1)
    chosen = (old == self.denoiser.mask_id) & alive[:, None]
    return state._replace(canvas=self.revealed(state.canvas, chosen, proposal, logp, index, offset))

  def revealed(
    self,
    canvas: Canvas,
    chosen: Bool[Array, "B W"],
    tokens: Int[Array, "B W"],
    logp: Float[Array, "B W"],
    step: Place,
    offset: Place,
  ) -> Canvas:
    """The canvas with the chosen tokens in place of masks, from column `offset` of the active ones on."""

    def write(x: jax.Array, new: jax.Array, first: Place) -> jax.Array:
      old = columns(x, first, chosen.shape[1])
      return with_columns(x, jnp.where(chosen, new, old), first)

    number = jnp.full_like(tokens, step if jnp.ndim(step) == 0 else jnp.reshape(step, (-1, 1)))
    return Canvas(
      write(canvas.tokens, tokens, self.valid.shape[1] - self.active + offset),
      write(canvas.reveal_step, number, offset),
      write(canvas.reveal_logp, logp, offset),
    )

  def step(
    self,
    block: Place,
    within: Int[Array, ""] | int,
    alive: Bool[Array, "B"],
    state: State,
    window: Window | None,
  ) -> State:
    """One denoising step of a block: proposes a token for each of its masks and unmasks the best proposals."""
    spec, canvas = self.spec, state.canvas
    offset, index = block * spec.block_length, block * spec.steps_per_block + within
    start = self.start_of(block)
    cut = lambda x, first: columns(x, first, spec.block_length)
    per_step = keys.fold(self.keys, index)
    draw = lambda stream: cut(keys.uniforms(keys.fold(per_step, stream), self.active), offset)

    logits, caches = block_logits(
      self.denoiser, self.params, canvas.tokens, self.valid, state.caches, start, spec=spec, window=window
    )
    proposal, logp = propose(logits, draw(TOKEN_STREAM), spec.temperature)
    if spec.schedule == "sequential":
      confidence = jnp.broadcast_to(-jnp.arange(spec.block_length, dtype=jnp.float32), logp.shape)
    else:
      confidence = draw(ORDER_STREAM) if spec.remasking == "random" else log_prob(logits, proposal)
    masked = cut(canvas.tokens, start) == self.denoiser.mask_id
    rank = rank_descending(jnp.where(masked, confidence, -jnp.inf))
    if not spec.by_confidence:
      count = jnp.asarray(reveal_counts(spec.block_length, spec.steps_per_block))[within]
    else:
      count = confident_count(spec, confidence, rank, masked)[:, None]
    chosen = masked & (rank < count) & alive[:, None]
    return State(self.revealed(canvas, chosen, proposal, logp, index, offset), caches)
