"""The computation of an iteration: FLOPs and tokens of rollout, score and update.

FLOPs are counted in the traced programs (`d1jax.telemetry.flops`) and multiplied by the steps that rollouts took. The
model's FLOPs are those of the mathematics on the whole canvas, including padding. Work that is repeated to save memory
is counted separately, so that it does not increase the utilisation (PaLM, arXiv 2204.02311, appendix B).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from d1jax.diffusion import layout
from d1jax.diffusion.blocks import NEXT_BLOCK, pass_over, window_of, write_over
from d1jax.diffusion.continuous import Taken
from d1jax.diffusion.denoiser import Denoiser
from d1jax.diffusion.replay import EACH_STEP, passes_of
from d1jax.diffusion.rollout import Rollout, SamplerSpec
from d1jax.diffusion.sampler import batch_sizes
from d1jax.parallel import multihost
from d1jax.rl.method import Method
from d1jax.rl.update import SCORE
from d1jax.telemetry.flops import Counted, Products, total


class Work(NamedTuple):
  """The computation of one part of an iteration, on all devices together.

  Attributes:
    flops: the model's FLOPs.
    tokens: completion tokens, counted each time they are generated, scored or trained on, also after a stop id.
    repeated: further FLOPs, of blocks and logits that the backward pass computes again.
    passes: forward passes of a row, over the canvas or a window of it, without those repeated in the backward pass.
    saved: of a rollout in slots, the passes beyond these that batches of as many rows would have taken.
  """

  flops: int
  tokens: int
  repeated: int = 0
  passes: int = 0
  saved: int | None = None

  @classmethod
  def of(cls, counted: Counted, tokens: int) -> "Work":
    """The work of a traced program."""
    return cls(tokens=tokens, **total(counted.values())._asdict())


class Reach(NamedTuple):
  """The denoising steps that the rollouts of an iteration took.

  Attributes:
    steps: the denoising steps taken at each block.
    rows: the rows for which they were computed; in slots, those that go on.
    turns: of rollouts in slots, the same for each turn of the slots.
    saved: of these, the steps of a row that batches of as many rows as slots would have taken beyond them.
    again: of partial rollouts in blocks, the rows whose keys and values are computed again at the start.
  """

  steps: Int[np.ndarray, "chunks blocks"]
  rows: Int[np.ndarray, "chunks blocks"]
  turns: "Reach | None" = None
  saved: int | None = None
  again: int = 0


def whole(sampler: SamplerSpec, chunks: int, rows: int, block: int | None = None) -> Reach:
  """The reach of rollouts that take every step for every row, with the static schedule and without early exits.

  `chunks` is the number of rollouts, of `rows` each. `block` is that of a block-causal network, whose prompts begin to
  be completed inside of one; None: full attention.
  """
  shape = (chunks, sampler.blocks + (block or 0) // sampler.block_length)
  return Reach(np.full(shape, sampler.steps_per_block), np.full(shape, rows))


def reached(
  sampler: SamplerSpec,
  chunks: Sequence[Rollout],
  rows: int,
  ways: int,
  block: int | None = None,
  slots: int | None = None,
) -> Reach:
  """The reach of finished rollouts. If it depends on the samples, all processes must call this together.

  Args:
    sampler: their sampler; it has `early_exit` only if the denoiser has stop ids.
    chunks: the rows of this process, on the host.
    rows: the rows of one chunk on all processes.
    ways: the number of devices that share a batch.
    block: that of a block-causal network; None: full attention.
    slots: how many rows of a chunk are computed at a time; None: all.
  """
  if sampler.schedule == "static" and not sampler.early_exit and block is None:
    return whole(sampler, len(chunks), rows)
  if slots is not None:
    return _in_slots(sampler, chunks, ways, block, slots)
  found = [_of_batch(*_of_samples(sampler, chunk, block)) for chunk in chunks]
  everyone = multihost.gather(tuple(np.asarray(each).tolist() for each in zip(*found, strict=True)))
  steps_taken = np.max([found for found, _ in everyone], axis=0)
  if not sampler.early_exit:
    return Reach(steps_taken, np.full_like(steps_taken, rows))
  going_on = np.sum([found for _, found in everyone], axis=0)
  return Reach(steps_taken, _computed(going_on, batch_sizes(rows, ways, sampler)))


def _of_samples(
  sampler: SamplerSpec, rollout: Rollout, block: int | None
) -> tuple[Int[np.ndarray, "B blocks"], Bool[np.ndarray, "B blocks"]]:
  """For each row and block, the denoising steps after which it was complete, and whether the row came to it."""
  reveal_step = np.asarray(rollout.reveal_step)
  number, within = np.divmod(reveal_step, sampler.steps_per_block)
  # Blocks that have nothing to complete in a row, since they hold its prompt alone.
  prompts = 0 if block is None else layout.lead(block, np.sum(rollout.prompt_valid, axis=1)) // sampler.block_length
  prompts = np.broadcast_to(prompts, len(reveal_step))
  taken = np.zeros((len(reveal_step), reveal_step.shape[1] // sampler.block_length), int)
  np.maximum.at(taken, (np.arange(len(taken))[:, None], number), within + 1)
  taken[prompts > 0, 0] = 0  # the number 0 of a token that was never revealed is that of the first block's first step
  # A row that goes on completes its block; the number of a step says in which block it was.
  completed = np.zeros(taken.shape, bool)
  np.put_along_axis(completed, number, True, axis=1)
  completed |= np.arange(taken.shape[1]) < np.maximum(prompts[:, None], 1)
  return taken, completed


def _of_batch(
  taken: Int[np.ndarray, "B blocks"], completed: Bool[np.ndarray, "B blocks"]
) -> tuple[Int[np.ndarray, "blocks"], Int[np.ndarray, "blocks"]]:
  """The denoising steps that a batch takes at each block, and the rows that have not ended before it."""
  return taken.max(axis=0), completed.sum(axis=0)


def _computed(going_on: Int[np.ndarray, "*C blocks"], sizes: Sequence[int]) -> Int[np.ndarray, "*C blocks"]:
  """The rows of the smallest batch that holds those that go on."""
  ascending = np.asarray(sorted(sizes))
  return np.where(going_on > 0, ascending[np.searchsorted(ascending, going_on)], 0)


def _in_slots(sampler: SamplerSpec, chunks: Sequence[Rollout], ways: int, block: int | None, slots: int) -> Reach:
  """The reach of rollouts in slots: their turns are taken again, with the steps that each row took."""
  own = [(chunk.sample_id.tolist(), *(x.tolist() for x in _of_samples(sampler, chunk, block))) for chunk in chunks]
  parts, sizes = 1 if block is None else block // sampler.block_length, batch_sizes(slots, ways, sampler)
  batches, turns, static = [], [], 0
  for everyone in zip(*multihost.gather(own), strict=True):
    ids, taken, completed = (np.concatenate([np.asarray(one[i]) for one in everyone]) for i in range(3))
    order = np.argsort(ids)
    taken, completed = taken[order], completed[order]
    batches.append(_of_batch(taken, completed))
    turns.append(_turns(taken, completed, sizes, parts))
    for first in range(0, len(ids), slots):
      steps, going_on = _of_batch(taken[first : first + slots], completed[first : first + slots])
      static += int(np.sum(steps * _computed(going_on, batch_sizes(min(slots, len(ids) - first), ways, sampler))))
  longest = max(steps.size for steps, _ in turns)
  stacked = lambda i: np.stack([np.pad(found[i], (0, longest - found[i].size)) for found in turns])
  made = Reach(stacked(0), stacked(1))
  whole = Reach(np.stack([steps for steps, _ in batches]), np.stack([rows for _, rows in batches]))
  return whole._replace(turns=made, saved=static - int(np.sum(made.steps * made.rows)))


def _turns(
  taken: Int[np.ndarray, "B blocks"], completed: Bool[np.ndarray, "B blocks"], sizes: Sequence[int], parts: int
) -> tuple[Int[np.ndarray, "T"], Int[np.ndarray, "T"]]:
  """The steps of each block of each turn (`d1jax.diffusion.continuous`), and the rows for which they were computed."""
  last, taken = -(-completed.sum(axis=1) // parts), np.where(completed, taken, 0)
  waiting, turn = list(range(len(taken))), np.zeros(len(taken), int)
  running: list[int] = []
  steps, rows = [], []
  for size, smaller in zip(sizes, [*sizes[1:], 0], strict=True):
    while True:
      free = size - len(running)
      running, waiting = running + waiting[:free], waiting[free:]
      if len(running) <= smaller:
        break
      blocks = turn[running][:, None] * parts + np.arange(parts)
      steps.append(np.take_along_axis(taken[running], blocks, axis=1).max(axis=0))
      rows.append(np.full(parts, size))
      turn[running] += 1
      running = [row for row in running if turn[row] < last[row]]
  return np.concatenate(steps), np.concatenate(rows)


class _Pass(NamedTuple):
  """Forward passes of a rollout with the same scopes."""

  scopes: tuple[str, ...]
  rows: int
  number: int = 1


def _passes(sampler: SamplerSpec, denoiser: Denoiser, canvas: int, reach: Reach) -> Iterator[_Pass]:
  """The passes of a network with full attention: one over the canvas per refresh period, and windows in between."""
  start, reach = canvas - sampler.completion_length, reach.turns or reach
  for taken, rows_of in zip(reach.steps.tolist(), reach.rows.tolist(), strict=True):
    for block, (steps, rows) in enumerate(zip(taken, rows_of, strict=True)):
      refreshes = -(-steps // sampler.refresh_period)
      yield _Pass((pass_over(canvas),), rows, refreshes)
      if steps > refreshes:
        window = window_of(sampler, start + block * sampler.block_length, canvas, denoiser.shift).width
        yield _Pass((pass_over(window),), rows, steps - refreshes)


def _causal_passes(sampler: SamplerSpec, denoiser: Denoiser, canvas: int, reach: Reach) -> Iterator[_Pass]:
  """The passes of a block-causal network: the prompt once, then the active block, and the one before it once."""
  size, length = denoiser.block or 1, sampler.block_length
  parts = size // length
  yield _Pass((write_over(canvas - sampler.completion_length - size),), int(reach.rows[:, 0].sum()))
  if reach.again:
    yield _Pass((write_over(canvas),), reach.again)
  reach = reach.turns or reach
  for taken, rows_of in zip(reach.steps.tolist(), reach.rows.tolist(), strict=True):
    for block, (steps, rows) in enumerate(zip(taken, rows_of, strict=True)):
      if 0 < rows < rows_of[max(block - 1, 0)]:  # the smaller batch has a cache of its own
        yield _Pass((write_over(canvas),), rows)
      if not steps:
        continue
      if parts == 1 and not denoiser.shift:
        yield _Pass((pass_over(2 * size),), rows)
        yield _Pass((pass_over(size),), rows, steps - 1)
        continue
      first = block % parts == 0
      if first:
        yield _Pass((write_over(size), NEXT_BLOCK) if denoiser.shift else (write_over(size),), rows)
      # A block of one token is complete when the token before has predicted it.
      yield _Pass((pass_over(size),), rows, 0 if first and denoiser.shift and length == 1 else steps)


def rollout(counted: Counted, sampler: SamplerSpec, denoiser: Denoiser, width: int, reach: Reach) -> Work:
  """The work of a rollout of all chunks.

  `counted` has the products of the rollout program of one chunk, and `width` is that of the prompts.
  """
  times, flops, made = 2 if sampler.cfg_scale else 1, 0, 0
  canvas = layout.prompt_width(denoiser, width) + sampler.completion_length
  passes = _passes if denoiser.block is None else _causal_passes
  for each in passes(sampler, denoiser, canvas, reach):
    if each.rows and each.number:
      found = [counted[frozenset({scope})] for scope in each.scopes]
      flops += times * each.number * sum(each.rows * one.flops // one.passes for one in found)
      made += times * each.number * each.rows
  saved = None if reach.saved is None else times * reach.saved
  return Work(flops, int(reach.rows[:, 0].sum()) * sampler.completion_length, passes=made, saved=saved)


def update(
  counted: Counted,
  sampler: SamplerSpec,
  method: Method,
  reach: Reach,
  *,
  block: int | None = None,
  oversample: int = 1,
) -> tuple[Work, Work]:
  """The work of an update: of the score (old and reference log-probabilities), and of the optimiser steps.

  Args:
    counted: the products of the update program.
    sampler: the sampler of the rollout.
    method: the method of the update.
    reach: the steps of the rollout.
    block: that of a block-causal network, all blocks of which are scored at once; None: full attention.
    oversample: groups drawn for each one trained on.
  """
  at_once = sampler.blocks if block is None else block // sampler.block_length
  most = reach.steps.reshape(-1, at_once).max(axis=0)
  visited = (np.arange(sampler.steps_per_block)[None, :] < most[:, None]).ravel()
  passes, together = passes_of(block, visited.size)
  taken = len(set((np.flatnonzero(visited) // together).tolist())) if passes > 1 else 1
  parts: dict[bool, list[Products]] = {True: [], False: []}
  for scopes, found in counted.items():
    made = Products(*(number * taken // passes for number in found)) if EACH_STEP in scopes else found
    parts[SCORE in scopes].append(made)
  mu = method.num_iterations
  old, reference = (mu - 1) * method.scores_old, mu * method.scores_reference
  if not method.estimator.redraws:  # each optimiser step scores the same states
    old, reference = min(old, 1), min(reference, 1)
  old += method.scores_proximal
  tokens = int(reach.rows[:, 0].sum()) // oversample * sampler.completion_length
  score, update = (total(parts[scored])._asdict() for scored in (True, False))
  return Work(tokens=(old + reference) * tokens, **score), Work(tokens=mu * tokens, **update)


def iteration(
  counted: Mapping[str, Counted],
  found: Rollout,
  *,
  sampler: SamplerSpec,
  denoiser: Denoiser,
  method: Method,
  oversample: int,
  chunks: int,
  rows: int,
  ways: int,
  slots: int | None = None,
  taken: Taken | None = None,
  width: int | None = None,
) -> dict[str, Work]:
  """The work of one iteration of diffu-GRPO: `rollout`, `score` and `update`; for processes see `reached`.

  `counted` has the products of the programs `rollout` and `update`, and `found` this process's rows of the rollout on
  the host, in `chunks` parts. The sampler is the one that was used, with or without its cache. For the others see
  `reached` and `update`. Of a partial rollout, `taken` says on the host what its turns took, not only for these rows,
  and `width` is that of its prompts.
  """
  parts = [Rollout(*part) for part in zip(*(np.split(x, chunks) for x in found), strict=True)]
  reach = reached(sampler, parts, rows, ways, denoiser.block, None if taken else slots)
  if taken:
    turns = int(taken.turns)
    computed = np.repeat(np.asarray(taken.rows[:turns]), taken.steps.shape[1])
    made = Reach(np.asarray(taken.steps[:turns]).reshape(1, -1), computed[None])
    reach = reach._replace(turns=made, again=slots if denoiser.block and slots else 0)
  drawn = rollout(counted["rollout"], sampler, denoiser, width or found.prompt.shape[1], reach)
  score, steps = update(counted["update"], sampler, method, reach, block=denoiser.block, oversample=oversample)
  return {"rollout": drawn, "score": score, "update": steps}
