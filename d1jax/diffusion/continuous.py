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
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from d1jax.diffusion.blocks import NO_CACHES, Caches, init_caches
from d1jax.diffusion.denoiser import Denoiser, Params
from d1jax.diffusion.rollout import Rollout, SamplerSpec
from d1jax.diffusion.sampler import Canvas, Loop, State, batch_sizes, prepared, recorded
from d1jax.diffusion.slots import batch_axes

Placed = Callable[[Any], Any]
"""The same arrays, inside a compiled program, at a certain placement."""


class Unfinished(NamedTuple):
  """Rows of a rollout that was cut between two turns. Shapes: N rows, A active columns of the canvas.

  Attributes:
    tokens: of the active columns; nothing is meant by those of a row that had no turn.
    reveal_step: of these tokens.
    reveal_logp: of these tokens, under the weights that drew each of them.
    turn: how many turns each row has had; it is not read of a row that has ended.
    began: the number of the call in which a row had its first turn; -1: in none so far.
    ended: whether a row has nothing left to do.
  """

  tokens: Int[Array, "N A"]
  reveal_step: Int[Array, "N A"]
  reveal_logp: Float[Array, "N A"]
  turn: Int[Array, "N"]
  began: Int[Array, "N"]
  ended: Bool[Array, "N"]


class Taken(NamedTuple):
  """What the turns of a call took. Shapes: T turns at most, K the sampler's blocks in a turn.

  Attributes:
    steps: the denoising steps of each block of each turn; 0 behind the last turn.
    rows: the rows that each turn computed.
    turns: how many turns there were.
  """

  steps: Int[Array, "T K"]
  rows: Int[Array, "T"]
  turns: Int[Array, ""]


class _Cut(NamedTuple):
  """Where a rollout ends before all its rows have: of the rows in their order, `open` have not ended, and the turns end
  when the first `needed` ones have.
  """

  open: Int[Array, ""]
  needed: Int[Array, ""]


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
    spent: what the turns took, of a rollout that may be cut.
  """

  canvas: Canvas
  turn: Int[Array, "N"]
  row: Int[Array, "R"]
  alive: Bool[Array, "R"]
  taken: Int[Array, ""]
  number: Int[Array, ""]
  caches: Caches
  spent: Taken | None = None


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
  queue = turns.run(everywhere(canvas), jnp.zeros(len(prompt), jnp.int32), batch_sizes(slots, row_multiple, spec))
  return recorded(loop, queue.canvas, prompt, prompt_valid, sample_id, group_id)


def continue_in_slots(
  denoiser: Denoiser,
  params: Params,
  prompt: Int[Array, "N P"],
  prompt_valid: Bool[Array, "N P"],
  sample_id: Int[Array, "N"],
  group_id: Int[Array, "N"],
  key: Key[Array, "N"],
  carried: Unfinished,
  number: Int[Array, ""],
  *,
  spec: SamplerSpec,
  slots: int,
  row_multiple: int = 1,
  by_row: Placed = lambda x: x,
  everywhere: Placed = lambda x: x,
) -> tuple[Rollout, Unfinished, Taken]:
  """Completes the first rows of a queue, and no more: the others may begin in slots that are free, and go on later.

  With two slots, rows of 3, 1, 2 and 1 blocks, and two rows to be completed, the first call takes three turns. Then row
  2 has ended too, and row 3 waits:

    slot 0:  0 0 0
    slot 1:  1 2 2

  The next call gets rows 2 and 3 as its first ones, with two new rows behind them.

  Args:
    denoiser: the mask predictor.
    params: its parameters, which may be others at each call.
    prompt: left-padded ids.
    prompt_valid: false at padding.
    sample_id: part of the key of every draw.
    group_id: recorded in the rollout.
    key: for each row, that of the iteration which the row belongs to; a row has the same one at each call.
    carried: what the call before returned, of the first rows; as many of the others are completed.
    number: of this call, recorded in the rows that begin.
    spec: the sampler.
    slots: how many rows are computed at a time; not fewer than in the call before.
    row_multiple: the devices that share rows.
    by_row: places arrays of slots over these devices.
    everywhere: places a copy on each of them.

  Returns:
    The rollout of the first rows; the other rows; and what the turns took.

  Raises:
    ValueError: see `sample`, `check` and `check_slots`.
  """
  check(spec)
  check_slots(slots, len(prompt), row_multiple)
  loop, canvas = prepared(denoiser, params, prompt, prompt_valid, sample_id, key, spec)
  old, first = len(carried.turn), len(prompt) - len(carried.turn)
  longer = lambda x, fill: jnp.concatenate([x, jnp.full((first, *x.shape[1:]), fill, x.dtype)])
  turn, began, ended = longer(carried.turn, 0), longer(carried.began, -1), longer(carried.ended, False)
  ours = jnp.where(carried.began[:, None] < 0, canvas.tokens[:old, -loop.active :], carried.tokens)
  tokens = canvas.tokens.at[:old, -loop.active :].set(ours)
  canvas = everywhere(Canvas(tokens, longer(carried.reveal_step, 0), longer(carried.reveal_logp, 0)))
  # Rows that have ended go behind the others; of these, the ones that have begun come first, because rows get their
  # slots in the order of the queue.
  order = everywhere(jnp.argsort(ended, stable=True))
  cut = _Cut(jnp.sum(~ended), jnp.sum(~ended[:first]))
  turns = _Turns(loop.of(order).placed(everywhere), row_multiple, by_row, everywhere, cut)
  took = turns.run(jax.tree.map(lambda x: x[order], canvas), turn[order], batch_sizes(slots, row_multiple, spec))
  back = lambda x: jnp.zeros_like(x).at[order].set(x, unique_indices=True)
  canvas, turn = jax.tree.map(back, (took.canvas, took.turn))
  began = jnp.where((began < 0) & (turn > 0), number, began)
  ended = ~loop.unfinished(canvas) | (turn >= turns.most)
  own = jax.tree.map(lambda x: x[:first], (canvas, prompt, prompt_valid, sample_id, group_id))
  tokens = canvas.tokens[:, -loop.active :]
  left = Unfinished(*(x[first:] for x in (tokens, canvas.reveal_step, canvas.reveal_logp, turn, began, ended)))
  assert took.spent is not None
  return recorded(loop, *own), left, took.spent


class _Turns(NamedTuple):
  """The turns of a batch; `loop` is that of all its rows, and `cut` is None if all of them are completed."""

  loop: Loop
  row_multiple: int
  by_row: Placed
  everywhere: Placed
  cut: _Cut | None = None

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

  def goes_on(self, most: int, smaller: int, queue: _Queue) -> Bool[Array, ""]:
    """Whether there is another turn with as many slots: at most `most` of them, while more than `smaller` are used."""
    busy = jnp.sum(queue.alive) > smaller
    return (queue.number < most) & (busy if self.cut is None else busy & self.is_needed(queue))

  def is_needed(self, queue: _Queue) -> Bool[Array, ""]:
    """Whether a row that is to be completed has not ended, of a rollout that may be cut."""
    assert self.cut is not None
    needed = self.cut.needed
    return (queue.taken < needed) | jnp.any(queue.alive & (queue.row < needed))

  def run(self, canvas: Canvas, turn: Int[Array, "N"], sizes: list[int]) -> _Queue:
    """Completes the batch; when no row waits and half of the slots are free, it goes on in fewer."""
    slots, rows = sizes[0], len(canvas.tokens)
    row, number, most = jnp.arange(slots), jnp.int32(0), self.most * (-(-rows // slots) + len(sizes) - 1)
    alive = row >= 0 if self.cut is None else row < self.cut.open
    spent = None
    if self.cut is not None:
      spent = Taken(jnp.zeros((most, self.parts), jnp.int32), jnp.zeros(most, jnp.int32), number)
    queue = _Queue(canvas, turn, row, alive, jnp.int32(slots), number, NO_CACHES, spent)
    for size, smaller in zip(sizes, [*sizes[1:], 0], strict=True):
      # `d1jax aot` reads the bound: the turns of rows none of which ends early.
      most = self.most * (-(-rows // slots) if size == slots else 1)
      goes_on = functools.partial(self.goes_on, most, smaller)
      if size < slots:
        first = jnp.argsort(~queue.alive, stable=True)[:size]
        queue = queue._replace(row=queue.row[first], alive=queue.alive[first], number=jnp.int32(0))
      if self.is_causal:
        empty = init_caches(self.loop.denoiser, self.by_row(self.loop.valid[queue.row]), self.loop.spec)
        if size == slots:
          # Rows that go on have complete blocks behind their prompts.
          width = self.prompts if self.cut is None else self.loop.valid.shape[1]
          caches = self.filled(queue.canvas, queue.row, width, empty)
        else:
          whole = lambda queue, empty: self.filled(queue.canvas, queue.row, self.loop.valid.shape[1], empty)
          caches = jax.lax.cond(goes_on(queue), whole, lambda queue, empty: empty, queue, empty)
        queue = queue._replace(caches=caches)
      queue = jax.lax.while_loop(goes_on, self.next, queue)
    return queue

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
    enters = ended & (following < (len(queue.turn) if self.cut is None else self.cut.open))
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
      spent=None if queue.spent is None else self.spent(queue.spent, loop, turn, queue.alive, state.canvas),
    )
    if not self.is_causal:
      return queue
    enters = enters if self.cut is None else enters & self.is_needed(queue)  # the next call fills all slots anyway
    return queue._replace(caches=self.refilled(queue, enters))

  def spent(self, before: Taken, loop: Loop, turn: Int[Array, "R"], alive: Bool[Array, "R"], canvas: Canvas) -> Taken:
    """What the turns took, with one of these rows more."""
    spec, steps = loop.spec, []
    for block in (turn * self.parts + part for part in range(self.parts)):
      place = block[:, None] * spec.block_length + jnp.arange(spec.block_length)[None, :]
      counts = alive[:, None] if loop.first is None else alive[:, None] & (place >= loop.first[:, None])
      step = jnp.take_along_axis(canvas.reveal_step, place, axis=1) - block[:, None] * spec.steps_per_block
      steps.append(jnp.max(jnp.where(counts, step + 1, 0)))
    taken = jnp.stack(steps) if self.is_causal or spec.by_confidence else jnp.full(1, spec.steps_per_block)
    number = before.turns
    return Taken(before.steps.at[number].set(taken), before.rows.at[number].set(len(turn)), number + 1)

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
