"""The reverse process: LLaDA's semi-autoregressive, block-wise denoising loop, compiled.

Semantics are those of LLaDA's generate.py (arXiv 2502.09992) with the arithmetic in float32. Blocks are completed from
left to right. Each step proposes a token for every masked position of the block and ranks the proposals by their
untempered probability (or at random). The best ones replace their masks and never change again. Forbidden ids, the mask
among them, are never proposed.

One loop serves all modes: a block is a number of periods, and a period is a pass over the whole canvas followed by
passes over a window of it that reuse the keys and values of the first. In exact mode a period is one step.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from d1jax import keys
from d1jax.diffusion.blocks import Caches, Window, block_logits, check, init_caches, window_of
from d1jax.diffusion.denoiser import Denoiser, Params
from d1jax.diffusion.draw import log_prob, propose
from d1jax.diffusion.rollout import Rollout, SamplerSpec, up_to_stop
from d1jax.diffusion.schedule import confident_count, rank_descending, reveal_counts

COMPACT_FROM = 512
"""Batches of completions at least this long shrink when rows have finished; shorter ones would gain less than the
copies cost."""

_HALVINGS = 3
_TOKEN_STREAM, _ORDER_STREAM = 0, 1


class _Canvas(NamedTuple):
  """The arrays that the loops write."""

  tokens: Int[Array, "B L"]
  reveal_step: Int[Array, "B C"]
  reveal_logp: Float[Array, "B C"]


class _State(NamedTuple):
  """The loops' carry."""

  canvas: _Canvas
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
  check(denoiser, spec)
  batch, prompt_length = prompt.shape
  if prompt_length < denoiser.shift:
    raise ValueError(
      "prompt has width 0, but this network predicts each token from the one before: give a prompt of one token or more"
    )
  shape = (batch, spec.completion_length)
  masks = jnp.full(shape, denoiser.mask_id, prompt.dtype)
  canvas = _Canvas(jnp.concatenate([prompt, masks], axis=1), jnp.zeros(shape, jnp.int32), jnp.zeros(shape))
  valid = jnp.concatenate([prompt_valid, jnp.ones(shape, bool)], axis=1)
  loop = _Loop(denoiser, params, spec, keys.sample_keys(key, sample_id), valid)
  canvas = loop.run(canvas, jnp.int32(0), batch_sizes(batch, row_multiple, spec))
  completion = canvas.tokens[:, prompt_length:]
  if loop.ends_early:
    completion = jnp.where(completion == denoiser.mask_id, denoiser.stop_ids[0], completion)
  mask = up_to_stop(completion, denoiser.stop_ids)
  steps, logps = canvas.reveal_step, canvas.reveal_logp
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
class _Loop:
  """The loops over blocks, periods and steps, of a batch of samples with these keys and valid positions."""

  denoiser: Denoiser
  params: Params
  spec: SamplerSpec
  keys: Key[Array, "B"]
  valid: Bool[Array, "B L"]

  @property
  def ends_early(self) -> bool:
    return self.spec.early_exit and bool(self.denoiser.stop_ids)

  def run(self, canvas: _Canvas, block: Int[Array, ""], sizes: list[int]) -> _Canvas:
    """Denoises the blocks from `block` on; where rows end early, until none goes on, in ever smaller batches."""
    state = _State(canvas, init_caches(self.denoiser, self.valid, self.spec))
    if not self.ends_early:
      return jax.lax.fori_loop(0, self.spec.blocks, self.denoise, state).canvas
    smaller = sizes[1] if len(sizes) > 1 else 0

    def too_many(carry: tuple[Int[Array, ""], _State]) -> Bool[Array, ""]:
      return (carry[0] < self.spec.blocks) & (jnp.sum(self.unfinished(carry[1].canvas)) > smaller)

    advance = lambda carry: (carry[0] + 1, self.denoise(*carry))
    block, (canvas, _) = jax.lax.while_loop(too_many, advance, (block, state))
    if not smaller:
      return canvas
    # At most `smaller` rows are unfinished now. A stable sort puts them first, in their order, and finished rows fill
    # the smaller batch: of 4 rows of which 1 and 3 are unfinished, a batch of 2 takes rows [1, 3]; if only 3 is, it
    # takes [3, 0], and row 0, which is complete, does not change. Keys go with their rows, so that draws do not either.
    rows = jnp.argsort(~self.unfinished(canvas), stable=True)[:smaller]
    few = dataclasses.replace(self, keys=self.keys[rows], valid=self.valid[rows])
    completed = few.run(jax.tree.map(lambda x: x[rows], canvas), block, sizes[1:])
    return jax.tree.map(lambda everyone, part: everyone.at[rows].set(part), canvas, completed)

  def unfinished(self, canvas: _Canvas) -> Bool[Array, "B"]:
    """The rows that have no stop id yet; all, where rows do not end early."""
    if not self.ends_early:
      return jnp.ones(canvas.tokens.shape[0], bool)
    stops = jnp.asarray(self.denoiser.stop_ids, canvas.tokens.dtype)
    return ~jnp.any(jnp.isin(canvas.tokens[:, -self.spec.completion_length :], stops), axis=1)

  def denoise(self, block: Int[Array, ""], state: _State) -> _State:
    """Denoises one block, period by period."""
    # A period begins with a refresh, a pass over the whole canvas that renews the cache; the other steps of the period
    # compute a window only. With 8 steps a block and `refresh_every` 3, F a refresh and w a window, the steps are
    # F w w | F w w | F w: two whole periods in a loop, and a rest of two steps that is compiled apart, since the
    # length of a period is static. In exact mode all steps are F: eight periods of one step.
    spec, steps = self.spec, self.spec.steps_per_block
    static = spec.schedule == "static"
    every = spec.refresh_period
    length = self.valid.shape[1]
    start_of = lambda block: length - spec.completion_length + block * spec.block_length
    alive = self.unfinished(state.canvas)

    def repeat(count: int, body: Callable[[Any, _State], _State], state: _State) -> _State:
      if static:
        return jax.lax.fori_loop(0, count, body, state)

      def goes_on(carry: tuple[Int[Array, ""], _State]) -> Bool[Array, ""]:
        tokens = jax.lax.dynamic_slice_in_dim(carry[1].canvas.tokens, start_of(block), spec.block_length, axis=1)
        return (carry[0] < count) & jnp.any((tokens == self.denoiser.mask_id) & alive[:, None])

      return jax.lax.while_loop(goes_on, lambda carry: (carry[0] + 1, body(*carry)), (jnp.int32(0), state))[1]

    def period(first: Int[Array, ""] | int, count: int, state: _State) -> _State:
      state = self.step(block, first, alive, state, None)
      if count == 1:
        return state

      def windowed(block: Int[Array, ""] | int, state: _State) -> _State:
        window = window_of(spec, start_of(block), length, self.denoiser.shift)
        return repeat(count - 1, lambda i, state: self.step(block, first + 1 + i, alive, state, window), state)

      if spec.cache != "prefix":
        return windowed(block, state)
      return jax.lax.switch(block, [functools.partial(windowed, b) for b in range(spec.blocks)], state)

    # With a confidence schedule a block ends when it has no mask left, which `repeat` checks; a last period that is
    # too long then costs nothing, and there is no rest.
    whole, rest = divmod(steps, every) if static else (-(-steps // every), 0)
    state = repeat(whole, lambda p, state: period(p * every, every, state), state)
    return period(whole * every, rest, state) if rest else state

  def step(
    self,
    block: Int[Array, ""] | int,
    within: Int[Array, ""] | int,
    alive: Bool[Array, "B"],
    state: _State,
    window: Window | None,
  ) -> _State:
    """One denoising step of a block: proposes a token for each of its masks and unmasks the best proposals."""
    spec, canvas = self.spec, state.canvas
    offset, index = block * spec.block_length, block * spec.steps_per_block + within
    start = self.valid.shape[1] - spec.completion_length + offset
    cut = lambda x, first: jax.lax.dynamic_slice_in_dim(x, first, spec.block_length, axis=1)
    per_step = keys.fold(self.keys, index)
    draw = lambda stream: cut(keys.uniforms(keys.fold(per_step, stream), spec.completion_length), offset)

    logits, caches = block_logits(
      self.denoiser, self.params, canvas.tokens, self.valid, state.caches, start, spec=spec, window=window
    )
    proposal, logp = propose(logits, draw(_TOKEN_STREAM), spec.temperature)
    confidence = draw(_ORDER_STREAM) if spec.remasking == "random" else log_prob(logits, proposal)
    masked = cut(canvas.tokens, start) == self.denoiser.mask_id
    rank = rank_descending(jnp.where(masked, confidence, -jnp.inf))
    if spec.schedule == "static":
      count = jnp.asarray(reveal_counts(spec.block_length, spec.steps_per_block))[within]
    else:
      count = confident_count(spec, confidence, rank, masked)[:, None]
    chosen = masked & (rank < count) & alive[:, None]

    def write(x: jax.Array, new: jax.Array, first: Int[Array, ""] | int) -> jax.Array:
      return jax.lax.dynamic_update_slice_in_dim(x, jnp.where(chosen, new, cut(x, first)), first, axis=1)

    canvas = _Canvas(
      write(canvas.tokens, proposal, start),
      write(canvas.reveal_step, jnp.full_like(proposal, index), offset),
      write(canvas.reveal_logp, logp, offset),
    )
    return _State(canvas, caches)
