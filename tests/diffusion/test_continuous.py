"""Rows that take the places of ended rows, against the same batch computed at once."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d1jax.diffusion import layout
from d1jax.diffusion.continuous import Taken, Unfinished, continue_in_slots, sample_in_slots
from d1jax.diffusion.denoiser import Denoiser
from d1jax.diffusion.replay import replay
from d1jax.diffusion.rollout import Rollout, SamplerSpec
from d1jax.diffusion.sampler import sample
from d1jax.telemetry import cost
from tests import toy
from tests.diffusion import causal

SPEC = SamplerSpec(completion_length=16, diffusion_steps=16, block_length=4, temperature=0.9, early_exit=True)
KEY, SLOTS, ROWS, WIDTH = jax.random.key(3), 4, 12, 8
OFTEN = dataclasses.replace(toy.DENOISER, stop_ids=(2, 5, 9))
CASES: dict[str, tuple[Denoiser, dict[str, Any]]] = {
  "full": (OFTEN, {}),
  "blocks": (causal.denoiser(4), {}),
  "blocks, next token, in parts, greedy": (
    causal.denoiser(4, 1),
    dict(block_length=2, diffusion_steps=8, temperature=0.0),
  ),
  "full, greedy": (OFTEN, dict(temperature=0.0)),
  "full, next token, by confidence": (
    dataclasses.replace(OFTEN, shift=1),
    dict(schedule="threshold", threshold=0.4),
  ),
  "full, guided, in random order": (OFTEN, dict(cfg_scale=1.0, remasking="random", diffusion_steps=8)),
  "full, dual": (causal.denoiser(None), dict(cache="dual")),
  "full, window, next token": (causal.denoiser(None, 1), dict(cache="window", look_behind=2, refresh_every=2)),
  "blocks, by confidence": (causal.denoiser(4), dict(schedule="factor", max_reveal=3)),
}


def arguments() -> tuple[jax.Array, ...]:
  """Prompts of one to eight tokens."""
  prompt, valid = np.zeros((ROWS, WIDTH), np.int32), np.zeros((ROWS, WIDTH), bool)
  for row in range(ROWS):
    tokens = np.random.default_rng(row).integers(4, 11, row % WIDTH + 1)
    prompt[row, -len(tokens) :], valid[row, -len(tokens) :] = tokens, True
  ids = jnp.arange(ROWS, dtype=jnp.int32)
  return jnp.asarray(prompt), jnp.asarray(valid), 5 + ids, ids // 2


def weights(denoiser: Denoiser) -> Any:
  return toy.params() if denoiser.vocab == toy.VOCAB else causal.params()


def in_batches(denoiser: Denoiser, spec: SamplerSpec, rows: int) -> Rollout:
  """Batches of so many rows, one after the other."""
  run = jax.jit(functools.partial(sample, denoiser, spec=spec))
  parts = [[x[i : i + rows] for x in arguments()] for i in range(0, ROWS, rows)]
  found = [jax.device_get(run(weights(denoiser), *part, KEY)) for part in parts]
  return jax.tree.map(lambda *x: np.concatenate(x), *found)


def in_slots(denoiser: Denoiser, spec: SamplerSpec, slots: int) -> Rollout:
  run = jax.jit(functools.partial(sample_in_slots, denoiser, spec=spec, slots=slots))
  return jax.device_get(run(weights(denoiser), *arguments(), KEY))


@pytest.mark.few(3, reason="each case compiles programs of its own")
@pytest.mark.parametrize("name", CASES)
def test_slots_give_the_rollouts_of_batches_of_as_many_rows(name):
  denoiser, changes = CASES[name]
  spec = dataclasses.replace(SPEC, **changes)
  expected, found = in_batches(denoiser, spec, SLOTS), in_slots(denoiser, spec, SLOTS)
  for name in Rollout._fields:
    np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)


@pytest.mark.slow(reason="compiles rollouts of several numbers of slots")
def test_tokens_and_steps_do_not_depend_on_the_number_of_slots(monkeypatch):
  """Also where the slots become fewer in the end; log-probabilities differ by rounding."""
  monkeypatch.setattr("d1jax.diffusion.sampler.COMPACT_FROM", 16)
  for name, numbers in (("full", (1, 8)), ("blocks", (8,))):
    expected = in_batches(CASES[name][0], SPEC, ROWS)
    for slots in numbers:
      found = in_slots(CASES[name][0], SPEC, slots)
      for field in Rollout._fields[:-1]:
        np.testing.assert_array_equal(getattr(found, field), getattr(expected, field), err_msg=f"{name}: {field}")
      np.testing.assert_allclose(found.reveal_logp, expected.reveal_logp, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
  ("changes", "slots", "message"),
  [
    ({"early_exit": False}, 4, "early_exit=False lets no row end .* use early_exit=True"),
    ({"cache": "prefix"}, 4, "cache='prefix' .* use cache='dual', 'window' or 'none'"),
    ({}, 3, "slots=3 does not divide over 2 devices: use a multiple of 2"),
    ({}, 12, "slots=12 leaves no row of a batch of 12 to wait: use fewer"),
  ],
)
def test_what_slots_cannot_do_is_refused(changes, slots, message):
  spec = dataclasses.replace(SPEC, **changes)
  with pytest.raises(ValueError, match=message):
    sample_in_slots(OFTEN, weights(OFTEN), *arguments(), KEY, spec=spec, slots=slots, row_multiple=2)


FIRST, CARRIED = 2, 4


@functools.cache
def cutting(name: str) -> Any:
  denoiser, changes = CASES[name]
  spec = dataclasses.replace(SPEC, **changes)
  return jax.jit(functools.partial(continue_in_slots, denoiser, spec=spec, slots=SLOTS))


def rows_of(number: int, count: int) -> list[np.ndarray]:
  """Arguments of so many rows from those of a call on; rows have numbers of their own."""
  ids = np.arange(FIRST * number, FIRST * number + count, dtype=np.int32)
  prompt, valid, _, group = map(np.asarray, arguments())
  return [prompt[ids % ROWS], valid[ids % ROWS], ids, group[ids % ROWS]]


def cut(name: str, params: list[Any]) -> tuple[list[Rollout], list[Unfinished], list[Taken]]:
  """What calls give that complete two rows each, while the next four may begin; each call has weights of its own.

  Returns:
    The rollouts, what each call was given, and what its turns took.
  """
  wide, fresh = (CARRIED, SPEC.completion_length + (CASES[name][0].block or 0)), np.zeros(CARRIED, np.int32)
  left = Unfinished(*np.zeros((2, *wide), np.int32), np.zeros(wide, np.float32), fresh, fresh - 1, fresh > 0)
  rollouts, given, taken = [], [], []
  for number, weights in enumerate(params):
    arrays = rows_of(number, FIRST + CARRIED)
    own = jax.vmap(jax.random.key)(arrays[2] // FIRST)
    given.append(left)
    found, left, spent = jax.device_get(cutting(name)(weights, *arrays, own, left, jnp.int32(number)))
    rollouts.append(found)
    taken.append(spent)
  return rollouts, given, taken


@pytest.mark.few(1, reason="each case compiles programs of its own")
@pytest.mark.parametrize("name", ["blocks", "full", "blocks, next token, in parts, greedy", "full, dual"])
def test_a_rollout_that_is_cut_goes_on_as_if_it_was_not(name, monkeypatch):
  """It was cut behind the first blocks; in all cases but the first, slots become fewer in the end."""
  denoiser, changes = CASES[name]
  run = jax.jit(functools.partial(sample, denoiser, spec=dataclasses.replace(SPEC, **changes)))
  whole = [run(weights(denoiser), *rows_of(number, FIRST), jax.random.key(number)) for number in range(6)]
  if name != "blocks":
    monkeypatch.setattr("d1jax.diffusion.sampler.COMPACT_FROM", 16)
  rollouts, given, _ = cut(name, [weights(denoiser)] * 6)
  assert {1, 2, *((3,) if name in ("blocks", "full") else ())} <= {int(turn) for each in given for turn in each.turn}
  for found, expected in zip(rollouts, whole, strict=True):
    for field in Rollout._fields[:-1]:
      np.testing.assert_array_equal(getattr(found, field), getattr(expected, field), err_msg=field)
    np.testing.assert_allclose(found.reveal_logp, expected.reveal_logp, rtol=0, atol=1e-5)


def test_each_token_keeps_the_log_probability_of_the_weights_that_drew_it():
  denoiser, _ = CASES["blocks"]
  params = [causal.params(seed) for seed in range(6)]
  rollouts, given, _ = cut("blocks", params)
  score, older = jax.jit(functools.partial(replay, denoiser, spec=SPEC)), 0
  for number, found in enumerate(rollouts):
    of_tokens = lambda x, found=found: np.asarray(
      layout.taken_out(denoiser, jnp.asarray(found.prompt_valid), jnp.asarray(x))
    )
    drawn = np.full(found.completion.shape, number)  # the call that drew each token
    for call in range(number, max(number - 2, 0), -1):
      rows = slice(FIRST * (number - call), FIRST * (number - call) + FIRST)
      before = jax.tree.map(lambda x, rows=rows: x[rows], given[call])
      known = of_tokens((before.tokens != denoiser.mask_id) & (before.began[:, None] >= 0))
      drawn[known] = call - 1
      for field, kept in (("completion", before.tokens), ("reveal_step", before.reveal_step)):
        np.testing.assert_array_equal(of_tokens(kept)[known], getattr(found, field)[known])
      np.testing.assert_array_equal(of_tokens(before.reveal_logp)[known], found.reveal_logp[known])
    for call in range(max(number - 2, 0), number + 1):
      own = (drawn == call) & found.completion_mask
      older += np.sum(own) if call < number else 0
      expected = np.asarray(score(params[call], found))
      np.testing.assert_allclose(found.reveal_logp[own], expected[own], rtol=0, atol=1e-5)
  assert older > 20


def test_rows_get_their_slots_in_order_and_a_call_ends_with_the_last_one_it_needs():
  """Against a queue of the same rows on the host. No row begins more than two calls before its own."""
  rollouts, given, taken = cut("blocks", [causal.params(seed) for seed in range(6)])
  whole = jax.tree.map(lambda *x: np.concatenate(x), *rollouts)
  steps, completed = cost._of_samples(SPEC, whole, 4)
  last, turn, began = completed.sum(axis=1), np.zeros(12, int), np.full(12, -1)
  assert len({*last}) > 2
  for call in range(4):
    window = np.arange(FIRST * call, FIRST * call + FIRST + CARRIED)
    carried = window[:CARRIED]
    np.testing.assert_array_equal(given[call].began, began[carried])
    goes_on = ~given[call].ended
    np.testing.assert_array_equal(given[call].turn[goes_on], turn[carried][goes_on])
    np.testing.assert_array_equal(given[call].ended, (began[carried] >= 0) & (turn[carried] == last[carried]))
    expected = []
    while (turn < last)[window[:FIRST]].any():
      running = [row for row in window if turn[row] < last[row]][:SLOTS]
      began[running] = np.where(began[running] < 0, call, began[running])
      expected.append(max(steps[row, turn[row]] for row in running))
      turn[running] += 1
    assert taken[call].turns == len(expected)
    np.testing.assert_array_equal(taken[call].steps[: len(expected), 0], expected)
  assert {*(np.arange(8) // FIRST - began[:8])} == {0, 1, 2}
