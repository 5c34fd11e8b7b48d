"""A lane: the rows that run on canvases of one length, and the programs that advance them."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key, PyTree, UInt32

from d1jax import keys
from d1jax.diffusion import slots
from d1jax.diffusion.rollout import SamplerSpec
from d1jax.diffusion.slots import Rows
from d1jax.generation.generate import MOST_PROMPTS
from d1jax.model import Model
from d1jax.state import Params

SLICE = 0.1
"""Seconds of a call, about: so long do new requests wait until they are seen."""

EFFICIENT, QUICK = 0.95, 0.75
"""The share of the best rate that a batch must reach: while most slots are taken, and while half of them are free."""

_CHANGED = ("tokens", "reveal_step", "reveal_logp", "within")


def sizes_of(most: int, ways: int) -> list[int]:
  """The sizes of batches: 1, 2, 4, ... rows for each of the `ways` devices that share them, up to `most` rounded up."""
  each = -(-most // ways)
  return [ways * n for n in (*(1 << k for k in range(each.bit_length()) if 1 << k < each), each)]


def how_many(seconds: Mapping[int, float], rows: int) -> int:
  """How many of the running rows to advance.

  On a chip that reads its weights as long as it computes, a pass of many rows takes hardly longer than one of few: all
  rows advance. On one that computes longer, twice the rows take twice the time, and nothing is gained by advancing all
  of them: the first to come is finished sooner, and the last one not later, if they advance one after the other. The
  measured seconds tell which it is. While at least half of the slots are free, the answer to one client is worth more
  than the last quarter of the rate.

  Args:
    seconds: of a pass, for each size of a batch, of which the largest is the number of slots.
    rows: that run.
  """
  rate = lambda n: n / seconds[min(size for size in seconds if size >= n)]
  counts = [*(size for size in seconds if size < rows), rows]
  enough = max(map(rate, counts)) * (QUICK if 2 * rows <= max(seconds) else EFFICIENT)
  return next(n for n in sorted(counts) if rate(n) >= enough)


class Lane:
  """Rows on canvases of one length. The rows are on the host; the cache of a block-causal network is on the device.

  Attributes:
    length: of the canvas.
    slots: the most rows.
    jobs: who has each slot; None: it is free.
    rows: what is in the slots.
    seconds: of a fast pass, for each size of a batch.
    passes: of the network, so far.
  """

  def __init__(self, model: Model, params: Callable[[], Params], length: int, sizes: Sequence[int], width: int):
    """Stores the arguments; nothing is compiled yet.

    `params` gives the weights, `length` is that of the canvas, and `width` is the longest block. `sizes` are those of
    batches, from small to large; the last one is the number of slots.
    """
    self.model, self.denoiser, self._params = model, model.rollout_denoiser, params
    self.length, self.sizes, self.slots, self._width = length, sizes, sizes[-1], width
    self.jobs: list[Any] = [None] * self.slots
    self.seconds: dict[int, float] = {}
    self.passes = self.token_forwards = 0
    spec = SamplerSpec(1, 1, 1)
    row = slots.row_of(self.denoiser, spec, np.zeros(1, np.int32), np.zeros(2, np.uint32), length)
    row = row._replace(valid=row.valid | True, alive=row.alive & False)
    self.rows: Rows = jax.tree.map(lambda x: np.repeat(x, self.slots, axis=0), row)
    self._programs: dict[int, Any] = {}
    self._cache: PyTree = None

  @property
  def free(self) -> int:
    """How many slots are free."""
    return self.jobs.count(None)

  def prepare(self, report: Callable[[str], Any]) -> None:
    """Compiles all programs, and runs each of them up to three times, to know how long it takes."""
    if self.denoiser.block is not None:
      report(f"the cache for {self.slots} rows of {self.length} tokens")
      self._prepare_cache()
    for size in self.sizes:
      report(f"{size} row{'s' * (size > 1)} of {self.length} tokens")
      self._programs[size] = self._compiled(size)
    for size in self.sizes:
      for _ in range(3):
        self._run(size, np.arange(size), np.zeros(size, bool), 1)
        if self.seconds[size] > 1:
          break

  def admit(self, job: Any, spec: SamplerSpec, prompt: Int[np.ndarray, "p"], key: UInt32[np.ndarray, "2"]) -> int:
    """Gives a free slot to a job, and returns its number."""
    slot = self.jobs.index(None)
    row = slots.row_of(self.denoiser, spec, prompt, key, self.length)
    if self._cache is not None:
      self._fill_slot(slot, row)
    for mine, new in zip(self.rows, row, strict=True):
      mine[slot] = new[0]
    self.jobs[slot] = job
    return slot

  def release(self, slot: int) -> None:
    """Frees a slot."""
    self.jobs[slot] = None

  def advance(self, chosen: Sequence[int], most: int | None) -> Bool[np.ndarray, "slots"]:
    """Advances the rows in these slots until one has finished its block, at most for about `SLICE` seconds.

    `chosen` are the slots, and `most` the most passes; None: as many as fit.

    Returns:
      Which slots have finished a block.
    """
    size = min(size for size in self.sizes if size >= len(chosen))
    if size == self.slots:
      places = np.arange(size)
      alive = np.isin(places, chosen)
    else:
      places = np.full(size, self.slots)
      places[: len(chosen)] = chosen
      alive = places < self.slots
    if most is None:
      most = max(1, int(SLICE / self.seconds[size]))
    rows, ended = self._run(size, places, alive, most)
    for name in (*_CHANGED, "start", "block"):
      getattr(self.rows, name)[places[alive]] = getattr(rows, name)[alive]
    finished = np.zeros(self.slots, bool)
    finished[places[alive]] = ended[alive]
    return finished

  def reset(self) -> None:
    """Frees all slots, after an error; a cache that was lost with it is made anew."""
    self.jobs = [None] * self.slots
    if self._cache is not None:
      self._cache = self._empty()

  def _run(
    self, size: int, places: Int[np.ndarray, "B"], alive: Bool[np.ndarray, "B"], most: int
  ) -> tuple[Rows, Bool[np.ndarray, "B"]]:
    """The rows of a batch after a call of its program, and which have finished a block."""
    began = time.perf_counter()
    own = {name: x[np.minimum(places, self.slots - 1)] for name, x in self.rows._asdict().items()}
    rows = Rows(**(own | {"alive": alive}))
    # The program places the arrays itself, in a third of the time that `device_put` takes.
    changed, ended, passes, self._cache = self._programs[size](
      self._params(), rows, self._cache, places.astype(np.int32), np.int32(most)
    )
    changed, ended, passes = jax.device_get((changed, ended, passes))
    seconds = (time.perf_counter() - began) / max(1, int(passes))
    # What else the machine does makes passes longer, never shorter: the fastest one counts, and is forgotten slowly.
    self.seconds[size] = min(seconds, 1.02 * self.seconds.get(size, seconds))
    if alive.any():
      self.passes += int(passes)
      self.token_forwards += int(passes) * size * (self.denoiser.block or self.length)
    rows = rows._replace(**dict(zip(_CHANGED, changed, strict=True)))
    return slots.next_block(self.denoiser, rows, ended), ended

  def _compiled(self, size: int) -> Any:
    """The program of a batch."""
    model, by_row, scalar = self.model, self.model.rollout_by_row, self.model.replicated
    whole, cached = size == self.slots, self._cache is not None

    def program(
      params: Params, rows: Rows, cache: PyTree, places: Int[Array, "B"], most: Int[Array, ""]
    ) -> tuple[Any, ...]:
      part = cache if whole or not cached else slots.taken(cache, self._axes, places)
      rows, part, finished, passes = slots.advance(self.denoiser, params, rows, part, most, width=self._width)
      if cached:
        cache = part if whole else slots.put_back(cache, self._axes, places, part)
      return tuple(getattr(rows, name) for name in _CHANGED), finished, passes, cache

    placement = self._placement if cached else None
    jitted = jax.jit(
      program,
      in_shardings=(model.publisher.placement, by_row, placement, by_row, scalar),
      out_shardings=(by_row, by_row, scalar, placement),
      donate_argnums=2,
    )
    like = lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype, sharding=by_row)
    arguments = (model.publisher.abstract, jax.tree.map(like, self.rows), self._cache)
    places = jax.ShapeDtypeStruct((size,), jnp.int32, sharding=by_row)
    return jitted.lower(*arguments, places, jax.ShapeDtypeStruct((), jnp.int32, sharding=scalar)).compile()

  def _prepare_cache(self) -> None:
    """Compiles what makes the cache and fills it with a prompt."""
    model, scalar, denoiser = self.model, self.model.replicated, self.denoiser
    assert denoiser.init_cache is not None
    init: Any = denoiser.init_cache
    make = lambda: init(jnp.ones((self.slots, self.length), bool))
    empty = jax.jit(make, in_shardings=(), out_shardings=None).lower().compile()  # the network places its cache
    self._empty, self._placement = empty, empty.output_shardings
    self._axes, self._cache = slots.batch_axes(denoiser, self.length), empty()

    def fill(
      params: Params, cache: PyTree, tokens: Int[Array, "K L"], places: Int[Array, "K"], stop: Int[Array, ""]
    ) -> PyTree:
      return slots.put_back(cache, self._axes, places, slots.fill(denoiser, params, tokens, stop))

    ways, by_row = self.sizes[0], model.rollout_by_row
    jitted = jax.jit(
      fill,
      in_shardings=(model.publisher.placement, self._placement, by_row, by_row, scalar),
      out_shardings=self._placement,
      donate_argnums=1,
    )
    row = lambda *shape: jax.ShapeDtypeStruct((ways, *shape), jnp.int32, sharding=by_row)
    stop = jax.ShapeDtypeStruct((), jnp.int32, sharding=scalar)
    self._fill = jitted.lower(model.publisher.abstract, self._cache, row(self.length), row(), stop).compile()

  def _fill_slot(self, slot: int, row: Rows) -> None:
    """Computes a prompt; each device that shares rows gets a copy, of which one counts."""
    ways = self.sizes[0]
    places = np.full(ways, self.slots, np.int32)
    places[0] = slot
    tokens = np.repeat(row.tokens, ways, axis=0)
    self._cache = self._fill(self._params(), self._cache, tokens, places, np.int32(row.start[0]))


def key_program(model: Model) -> Callable[[int, int], UInt32[np.ndarray, "2"]]:
  """Compiles what gives the data of a sample's key, from the seed and the sample's number: that of
  `d1jax.generate` with one prompt.
  """
  scalar = model.replicated

  def data(of_run: Key[Array, ""], sample_id: Int[Array, ""]) -> UInt32[Array, "2"]:
    of_purpose = keys.purpose_key(of_run, keys.Purpose.EVALUATION)
    return jax.random.key_data(jax.random.fold_in(of_purpose, sample_id))

  program = jax.jit(data, in_shardings=(scalar, scalar), out_shardings=scalar)

  def call(seed: int, sample: int) -> UInt32[np.ndarray, "2"]:
    return np.asarray(program(keys.seeded(seed), np.int32(sample * MOST_PROMPTS)))

  for seed in (0, 2**32 - 1):  # compiles, and so do the operations of a seed, which differ for large ones
    call(seed, 0)
  return call
