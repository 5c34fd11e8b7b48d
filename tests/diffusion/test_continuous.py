"""Rows that take the places of ended rows, against the same batch computed at once."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d1jax.diffusion.continuous import sample_in_slots
from d1jax.diffusion.denoiser import Denoiser
from d1jax.diffusion.rollout import Rollout, SamplerSpec
from d1jax.diffusion.sampler import sample
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
