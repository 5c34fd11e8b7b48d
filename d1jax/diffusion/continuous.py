"""Continuous batching of a rollout: rows that wait take the places of rows that have ended, in one compiled program.

`d1jax.diffusion.sampler` computes a batch until its longest row has ended. Here `slots` rows of the batch are computed
at a time. They take turns, and a turn is a block (of a block-causal network: a block of the network). Behind each turn,
rows that have ended leave their slots to the next rows of the batch. With two slots, and rows of 3, 1, 2 and 1 blocks,
a batch of four takes four turns, and two batches of two would take five:

    slot 0:  0 0 0 3
    slot 1:  1 2 2 .

The rows of a turn are at different blocks, but at the same step of their block, so that every pass is one of `sample`:
the same function, with a number of a block for each row. A row's draws depend on its key, its steps and the places of
its tokens. So a rollout has the tokens and the steps that `sample` gives.

The queue is one for all devices: each of them holds the canvases of the whole batch, a few numbers a token, and
computes the rows of its slots. Behind each turn the devices exchange these canvases, and no cache is moved. So the
turns do not depend on the mesh, and no device is idle while rows wait for another one.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key, PyTree

from d1jax.diffusion.blocks import NO_CACHES, Caches, init_caches
from d1jax.diffusion.denoiser import Denoiser, Params
from d1jax.diffusion.rollout import Rollout, SamplerSpec
from d1jax.diffusion.sampler import Canvas, Loop, State, batch_sizes, prepared, recorded
from d1jax.diffusion.slots import batch_axes

Placed = Callable[[Any], Any]
"""The same arrays, inside a compiled program, at a certain placement."""


class _Queue(NamedTuple):
  """The carry of the turns. Shapes: N rows of the batch, R slots.

  Attributes:
    canvas: of the batch.
    turn: how many turns each row has had.
    row: the row in each slot.
    alive: false for a slot whose row has ended, when no row waits.
    taken: how many rows have got a slot so far.
    number: how many turns there were, with this number of slots.
    caches: of the slots, of a block-causal network.
  """

  canvas: Canvas
  turn: Int[Array, "N"]
  row: Int[Array, "R"]
  alive: Bool[Array, "R"]
  taken: Int[Array, ""]
  number: Int[Array, ""]
  caches: Caches


def check(spec: SamplerSpec) -> None:
  """Raises a ValueError if a sampler cannot complete rows in slots."""
  if not spec.early_exit:
    raise ValueError(
      f"early_exit={spec.early_exit} lets no row end before the others, so that no slot is free for another row: use"
      " early_exit=True, or no slots"
    )
  if spec.cache == "prefix":
    raise ValueError(
      "cache='prefix' computes another number of tokens at each block, and rows in slots are at different blocks: use"
      " cache='dual', 'window' or 'none', or no slots"
    )


def check_slots(slots: int, rows: int, row_multiple: int = 1) -> None:
  """Raises a ValueError if `rows` rows cannot be completed in so many slots, over `row_multiple` devices."""
  if slots < 1 or slots % row_multiple:
    raise ValueError(f"slots={slots} does not divide over {row_multiple} devices: use a multiple of {row_multiple}")
  if slots >= rows:
    raise ValueError(f"slots={slots} leaves no row of a batch of {rows} to wait: use fewer, or None")


def sample_in_slots(
  denoiser: Denoiser,
  params: Params,
  prompt: Int[Array, "B P"],
  prompt_valid: Bool[Array, "B P"],
  sample_id: Int[Array, "B"],
  group_id: Int[Array, "B"],
  key: Key[Array, ""],
  *,
  spec: SamplerSpec,
  slots: int,
  row_multiple: int = 1,
  by_row: Placed = lambda x: x,
  everywhere: Placed = lambda x: x,
) -> Rollout:
  """Completes prompts as `d1jax.diffusion.sampler.sample` does, in so many slots.

  Args:
    denoiser: the mask predictor.
    params: its parameters.
    prompt: left-padded ids.
    prompt_valid: false at padding.
    sample_id: part of the key of every draw.
    group_id: recorded in the rollout.
    key: of this iteration.
    spec: the sampler.
    slots: how many rows are computed at a time.
    row_multiple: the devices that share rows.
    by_row: places arrays of slots over these devices.
    everywhere: places a copy on each of them.

  Raises:
    ValueError: see `sample`, `check` and `check_slots`.
  """
  check(spec)
  check_slots(slots, len(prompt), row_multiple)
  loop, canvas = prepared(denoiser, params, prompt, prompt_valid, sample_id, key, spec)
  loop = loop.placed(everywhere)
  turns = _Turns(loop, row_multiple, by_row, everywhere)
  canvas = turns.run(everywhere(canvas), batch_sizes(slots, row_multiple, spec))
  return recorded(loop, canvas, prompt, prompt_valid, sample_id, group_id)


class _Turns(NamedTuple):
  """The turns of a batch; `loop` is that of all its rows."""

  loop: Loop
  row_multiple: int
  by_row: Placed
  everywhere: Placed

  @property
  def is_causal(self) -> bool:
    return self.loop.denoiser.block is not None

  @property
  def parts(self) -> int:
    """The blocks of the sampler in a turn."""
    return (self.loop.denoiser.block or self.loop.spec.block_length) // self.loop.spec.block_length

  @property
  def most(self) -> int:
    """The most turns of a row."""
    return self.loop.blocks // self.parts

  @property
  def prompts(self) -> int:
    """The columns before the first block."""
    return self.loop.valid.shape[1] - self.loop.active

  def run(self, canvas: Canvas, sizes: list[int]) -> Canvas:
    """Completes the batch; when no row waits and half of the slots are free, it goes on in fewer."""
    slots, rows = sizes[0], len(canvas.tokens)
    row = jnp.arange(slots)
    queue = _Queue(canvas, jnp.zeros(rows, jnp.int32), row, row >= 0, jnp.int32(slots), jnp.int32(0), NO_CACHES)
    for size, smaller in zip(sizes, [*sizes[1:], 0], strict=True):
      # `d1jax aot` reads the bound: the turns of rows none of which ends early.
      most = self.most * (-(-rows // slots) if size == slots else 1)
      goes_on = lambda queue, most=most, smaller=smaller: (queue.number < most) & (jnp.sum(queue.alive) > smaller)
      if size < slots:
        first = jnp.argsort(~queue.alive, stable=True)[:size]
        queue = queue._replace(row=queue.row[first], alive=queue.alive[first], number=jnp.int32(0))
      if self.is_causal:
        empty = init_caches(self.loop.denoiser, self.by_row(self.loop.valid[queue.row]), self.loop.spec)
        if size == slots:
          caches = self.filled(queue.canvas, queue.row, self.prompts, empty)
        else:
          whole = lambda queue, empty: self.filled(queue.canvas, queue.row, self.loop.valid.shape[1], empty)
          caches = jax.lax.cond(goes_on(queue), whole, lambda queue, empty: empty, queue, empty)
        queue = queue._replace(caches=caches)
      queue = jax.lax.while_loop(goes_on, self.next, queue)
    return queue.canvas

  def next(self, queue: _Queue) -> _Queue:
    """One turn, and the rows of the next one."""
    loop, row = self.loop.of(queue.row).placed(self.by_row), queue.row
    turn = jnp.minimum(queue.turn[row], self.most - 1)
    caches = queue.caches if self.is_causal else init_caches(loop.denoiser, loop.valid, loop.spec)
    state = State(self.by_row(jax.tree.map(lambda x: x[row], queue.canvas)), caches)
    if self.is_causal:
      step = lambda i, state: loop.denoise_causal(turn * self.parts + i, state)
      state = jax.lax.fori_loop(0, self.parts, step, state)
    else:
      state = loop.denoise(turn, state)
    ended = queue.alive & (~loop.unfinished(state.canvas) | (turn + 1 >= self.most))
    following = queue.taken + jnp.cumsum(ended) - 1
    enters = ended & (following < len(queue.turn))
    put = lambda everyone, part: everyone.at[row].set(part, unique_indices=True)
    canvas = self.everywhere(jax.tree.map(put, queue.canvas, state.canvas))
    queue = _Queue(
      canvas=canvas,
      turn=self.everywhere(put(queue.turn, turn + 1)),
      row=self.everywhere(jnp.where(enters, following, row)),
      alive=self.everywhere(queue.alive & (enters | ~ended)),
      taken=self.everywhere(queue.taken + jnp.sum(enters)),
      number=queue.number + 1,
      caches=state.caches if self.is_causal else NO_CACHES,
    )
    return queue._replace(caches=self.refilled(queue, enters)) if self.is_causal else queue

  def filled(self, canvas: Canvas, row: Int[Array, "R"], width: int, empty: Caches) -> Caches:
    """The caches of some rows, with their first columns."""
    part = self.by_row(jax.tree.map(lambda x: x[row], canvas))
    return self.loop.of(row).placed(self.by_row).encoded(0, width, State(part, empty))[1].caches

  def refilled(self, queue: _Queue, enters: Bool[Array, "R"]) -> Caches:
    """The caches with the prompts of new rows, of which each device computes one at a time."""
    # A device keeps the caches of its own slots, so nothing but the rows is exchanged. With two devices of three slots
    # each, of which slots 1, 2 and 5 got new rows, the first pass computes the prompts of slots 1 and 5, and the second
    # one that of slot 2; what the second device computes then is thrown away.
    ways = self.row_multiple
    axes = batch_axes(self.loop.denoiser, self.loop.valid.shape[1])
    rows, place = queue.row.reshape(ways, -1), jnp.arange(len(enters) // ways)[None, :]

    def put(slot: Int[Array, "D 1"], old: jax.Array, axis: int, new: jax.Array) -> jax.Array:
      apart = old.reshape(*old.shape[:axis], ways, -1, *old.shape[axis + 1 :])
      numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=tuple(n for n in range(new.ndim) if n != axis),
        inserted_window_dims=(axis + 1,),
        scatter_dims_to_operand_dims=(axis + 1,),
        operand_batching_dims=(axis,),
        scatter_indices_batching_dims=(0,),
      )
      return jax.lax.scatter(apart, slot, new, numbers, unique_indices=True, mode="drop").reshape(old.shape)

    def one_each(carry: tuple[Bool[Array, "D S"], PyTree]) -> tuple[Bool[Array, "D S"], PyTree]:
      waiting, cache = carry
      slot, waits = jnp.argmax(waiting, axis=1), jnp.any(waiting, axis=1)
      row = jnp.take_along_axis(rows, slot[:, None], axis=1)[:, 0]
      empty = init_caches(self.loop.denoiser, self.by_row(self.loop.valid[row]), self.loop.spec)
      new = self.filled(queue.canvas, row, self.prompts, empty)[0]
      own = jnp.where(waits, slot, place.size)[:, None]  # a device that has none drops what it computed
      cache = jax.tree.map(functools.partial(put, own), cache, axes, new)
      return waiting & (place != slot[:, None]), cache

    carry = (self.everywhere(enters.reshape(ways, -1)), queue.caches[0])
    return jax.lax.while_loop(lambda carry: jnp.any(carry[0]), one_each, carry)[1], None
