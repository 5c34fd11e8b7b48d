"""Rows of different progress and different samplers in one batch, against `sample`, one sampler at a time."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d1jax.diffusion import slots
from d1jax.diffusion.rollout import SamplerSpec
from d1jax.diffusion.sampler import sample
from tests import toy
from tests.diffusion import causal

KEY = jax.random.key(3)
BASE = SamplerSpec(completion_length=8, diffusion_steps=8, block_length=4, temperature=0.9, early_exit=True)
SPECS = [
  dataclasses.replace(BASE, **changes)
  for changes in (
    dict(temperature=0.0),
    dict(diffusion_steps=4, temperature=1.3),
    dict(schedule="sequential", completion_length=12, diffusion_steps=9),
    dict(schedule="threshold", threshold=0.4, block_length=2),
    dict(schedule="factor", temperature=0.5, max_reveal=2),
    dict(remasking="random", block_length=2, diffusion_steps=4),
  )
]
PROMPTS = [np.random.default_rng(n).integers(4, 11, n).astype(np.int32) for n in (8, 5, 6, 7, 1)]
"""Every length modulo a block of 4."""

LENGTH, WIDTH = 20, 4
NETWORKS = {
  "full": (toy.DENOISER, toy.params()),
  "full, next token": (dataclasses.replace(toy.DENOISER, shift=1), toy.params()),
  "blocks": (causal.denoiser(4), causal.params()),
  "blocks, next token": (causal.denoiser(4, 1), causal.params()),
}


class Asked:
  """A request: a prompt, its sampler, its sample's number; what it got."""

  def __init__(self, prompt: int, spec: SamplerSpec, number: int):
    self.prompt, self.spec, self.number, self.found = prompt, spec, number, None


ASKED = [(prompt, spec, 10 * i + j) for i, spec in enumerate(SPECS) for j, prompt in enumerate(range(5))]


@functools.cache
def programs(name: str) -> tuple[Any, Any]:
  """`advance`, and what fills the cache of a row."""
  denoiser, _ = NETWORKS[name]

  def fill(params, tokens, stop, cache, place):
    return slots.put_back(cache, slots.batch_axes(denoiser, LENGTH), place, slots.fill(denoiser, params, tokens, stop))

  return jax.jit(functools.partial(slots.advance, denoiser, width=WIDTH)), jax.jit(fill)


class Lane:
  """The host's side of a lane: lets rows in and out of a batch of so many."""

  def __init__(self, name: str, size: int):
    self.denoiser, self.params = NETWORKS[name]
    self.size, self.running = size, [None] * size
    self.advance, self.fill = programs(name)
    self.rows = jax.tree.map(lambda x: np.concatenate([x] * size), self.row(Asked(0, BASE, 0)))
    self.rows = self.rows._replace(alive=np.zeros(size, bool))
    self.cache = None
    if self.denoiser.block:
      self.cache = self.denoiser.init_cache(jnp.ones((size, LENGTH), bool))

  def row(self, asked: Asked) -> slots.Rows:
    key = np.asarray(jax.random.key_data(jax.random.fold_in(KEY, asked.number)))
    return slots.row_of(self.denoiser, asked.spec, PROMPTS[asked.prompt], key, LENGTH)

  def admit(self, place: int, asked: Asked) -> None:
    row, self.running[place] = self.row(asked), asked
    self.rows = jax.tree.map(lambda x, new: np.concatenate([x[:place], new, x[place + 1 :]]), self.rows, row)
    if self.cache is not None:
      self.cache = self.fill(self.params, row.tokens, row.start[0], self.cache, np.asarray([place]))

  def turn(self, most: int) -> None:
    rows, self.cache, finished, _ = self.advance(self.params, self.rows, self.cache, jnp.int32(most))
    rows, finished = jax.device_get((rows, finished))
    self.rows = slots.next_block(self.denoiser, rows, finished)
    for place in np.flatnonzero(finished):
      asked = self.running[place]
      first = slots.completion_start(self.denoiser, asked.spec, len(PROMPTS[asked.prompt]), LENGTH)
      whole = slice(first, first + asked.spec.completion_length)
      known = self.rows.start[place] - first
      stops = np.isin(self.rows.tokens[place, first : first + known], self.denoiser.stop_ids)
      if known >= asked.spec.completion_length or stops.any():
        asked.found = [x[place, whole] for x in self.rows[:1] + self.rows[2:4]]
        self.running[place] = None
        self.rows = self.rows._replace(alive=self.rows.alive & (np.arange(self.size) != place))


def completed(name: str, size: int, order: list[int]) -> dict[int, Any]:
  """What each request got, that came in this order, as soon as there was room."""
  lane, steps = Lane(name, size), np.random.default_rng(size)
  waiting = [Asked(*ASKED[i]) for i in order]
  everyone = list(waiting)
  while waiting or any(lane.running):
    for place in range(size):
      if lane.running[place] is None and waiting:
        lane.admit(place, waiting.pop(0))
    lane.turn(int(steps.integers(1, 6)))
  return {asked.number: asked.found for asked in everyone}


@functools.cache
def together(name: str) -> dict[int, Any]:
  return completed(name, 4, np.random.default_rng(0).permutation(len(ASKED)).tolist())


@pytest.mark.few(6, reason="each case compiles programs of its own")
@pytest.mark.parametrize("spec", SPECS, ids=range(len(SPECS)))
@pytest.mark.parametrize("name", NETWORKS)
def test_token_for_token_what_sample_draws(name, spec):
  denoiser, params = NETWORKS[name]
  numbers = [number for _, other, number in ASKED if other is spec]
  prompt, valid = np.zeros((5, 8), np.int32), np.zeros((5, 8), bool)
  for row, tokens in enumerate(PROMPTS):
    prompt[row, 8 - len(tokens) :], valid[row, 8 - len(tokens) :] = tokens, True
  ids = np.asarray(numbers, np.int32)
  run = jax.jit(functools.partial(sample, denoiser, spec=spec))
  expected = jax.device_get(run(params, prompt, valid, ids, ids, KEY))
  for row, number in enumerate(numbers):
    tokens, steps, logp = together(name)[number]
    keep = expected.completion_mask[row, : spec.completion_length]
    np.testing.assert_array_equal(tokens[keep], expected.completion[row, : spec.completion_length][keep])
    np.testing.assert_array_equal(steps[keep], expected.reveal_step[row, : spec.completion_length][keep])
    np.testing.assert_allclose(
      logp[keep], expected.reveal_logp[row, : spec.completion_length][keep], rtol=1e-5, atol=2e-5
    )


@pytest.mark.parametrize("name", ["full", pytest.param("blocks", marks=pytest.mark.slow(reason="compiles programs"))])
def test_a_row_draws_the_same_bits_alone_and_in_company(name):
  """Tokens, steps and log-probabilities, of one program: an empty place computes as much as a full one."""
  for place in (3, 17):
    number = ASKED[place][2]
    for found, expected in zip(completed(name, 4, [place])[number], together(name)[number], strict=True):
      np.testing.assert_array_equal(found, expected)
