"""What block-causal networks compute, as their programs run, against what is counted."""

import dataclasses
import functools
import math
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from d1jax.diffusion import replay
from d1jax.diffusion.continuous import sample_in_slots
from d1jax.diffusion.denoiser import Denoiser
from d1jax.diffusion.rollout import Rollout, SamplerSpec
from d1jax.diffusion.sampler import sample
from d1jax.parallel import multihost
from d1jax.rl.estimators import ESTIMATORS
from d1jax.rl.losses import ClippedToken
from d1jax.rl.method import Method
from d1jax.rl.update import update
from d1jax.state import Frozen, create
from d1jax.telemetry import cost, flops
from tests.diffusion import causal
from tests.telemetry import formulas

KEY = jax.random.key(5)
WIDTH = 9
SPEC = SamplerSpec(completion_length=8, diffusion_steps=8, block_length=4)
SHAPES = jax.eval_shape(causal.NETWORK.init, KEY)
OPTIMIZER = optax.sgd(0.1)

ENCODED, PREDICTED = "encoded", "predicted"


@dataclasses.dataclass(frozen=True)
class Noted(Denoiser):
  """Notes what is computed while a program runs: rows and positions of each pass, and of each product with the head."""

  made: Counter = dataclasses.field(default_factory=Counter, hash=False, compare=False)

  def note(self, kind, shape):
    jax.debug.callback(lambda: self.made.update([(kind, *shape)]))

  def logits(self, params, hidden):
    self.note(PREDICTED, hidden.shape[:2])
    return super().logits(params, hidden)


def noted(block, shift):
  base = causal.denoiser(block, shift)
  fields = {field.name: getattr(base, field.name) for field in dataclasses.fields(base)}
  made = Noted(**fields)

  def encode_window(params, tokens, start, cache):
    made.note(ENCODED, tokens.shape)
    return base.encode_window(params, tokens, start, cache)

  return dataclasses.replace(made, encode_window=encode_window)


CASES = {
  "parts of a block": (4, 0, dict(block_length=2, early_exit=True), (5, 8, 8, 7)),
  "prompts that end inside of a block": (4, 0, dict(diffusion_steps=4), (5, 6, 7, 1)),
  "prompts of whole blocks": (4, 0, dict(early_exit=True), (8, 4, 8, 4)),
  "one token a block": (1, 0, dict(block_length=1, early_exit=True), (5, 6, 7, 1)),
  "next token": (4, 1, dict(schedule="threshold", threshold=0.5), (5, 6, 7, 1)),
  "next token, parts of one token": (4, 1, dict(block_length=1), (5, 6, 8, 7)),
  "a batch that shrinks": (4, 0, dict(completion_length=16, diffusion_steps=16, early_exit=True), (5, 6, 7, 8)),
  "in slots": (4, 1, dict(completion_length=16, diffusion_steps=8, block_length=2, early_exit=True), (5, 8, 7, 4)),
}


@pytest.mark.few(2, reason="each case compiles a rollout of its own")
@pytest.mark.parametrize("name", CASES)
def test_what_a_rollout_computes_is_what_is_counted(monkeypatch, name):
  monkeypatch.setattr("d1jax.diffusion.sampler.COMPACT_FROM", 16)
  block, shift, changes, lengths = CASES[name]
  spec, denoiser = dataclasses.replace(SPEC, **changes), noted(block, shift)
  valid = np.arange(WIDTH)[None, :] >= WIDTH - np.asarray(lengths)[:, None]
  prompt = np.where(valid, np.random.default_rng(0).integers(4, 17, valid.shape), 0).astype(np.int32)
  ids = np.arange(16, 20, dtype=np.int32)
  slots = 2 if name == "in slots" else None
  way = functools.partial(sample_in_slots, slots=slots) if slots else sample
  program = jax.jit(functools.partial(way, denoiser, spec=spec))
  arguments = (causal.params(), prompt, valid, ids, ids, KEY)
  found = jax.device_get(program(*arguments))
  jax.effects_barrier()
  reach = cost.reached(spec, [found], len(ids), 1, block, slots)
  work = cost.rollout(flops.count(program.trace(*arguments)), spec, denoiser, WIDTH, reach)
  canvas = -(-WIDTH // block) * block + spec.completion_length
  computed = 0
  for (kind, rows, positions), times in denoiser.made.items():
    of = formulas.products(causal.SIZE, rows, positions, canvas, 0) if kind == ENCODED else ()
    computed += times * (sum(of) or 2 * rows * positions * causal.SIZE.embed * causal.SIZE.vocab)
  assert work.flops == computed
  assert work.passes == sum(times * rows for (kind, rows, _), times in denoiser.made.items() if kind == ENCODED)
  assert work.tokens == len(ids) * spec.completion_length
  if name == "a batch that shrinks":
    assert {rows for _, rows, _ in denoiser.made} > {4}, "it should shrink"
  if slots:
    assert {rows for _, rows, _ in denoiser.made} == {2, 1}, "two slots, which become one"


@pytest.mark.parametrize("of_process", [[[3, 1, 2, 1]], [[3, 2], [1, 1]]], ids=["alone", "two processes"])
def test_slots_save_what_batches_of_as_many_rows_wait_for(monkeypatch, of_process):
  """Rows that end in their third, first, second and first block take four turns of two slots, in place of five."""
  spec = SamplerSpec(completion_length=6, diffusion_steps=6, block_length=2, early_exit=True)
  said: list = []
  monkeypatch.setattr(multihost, "gather", lambda value: said.append(value) or said)
  for first, blocks in enumerate(of_process):
    steps = np.asarray([[i if i < 2 * number else 0 for i in range(6)] for number in blocks])
    ids = first + len(of_process) * np.arange(len(blocks))
    nothing = np.zeros_like(steps)
    part = Rollout(ids, ids, nothing, nothing == 0, nothing, nothing == 0, steps, nothing)
    reach = cost.reached(spec, [part], 4, 1, None, slots=2)
  assert (reach.steps.tolist(), reach.rows.tolist()) == ([[2, 2, 2]], [[4, 2, 1]])
  assert (reach.turns.steps.tolist(), reach.turns.rows.tolist()) == ([[2] * 4], [[2] * 4])
  assert reach.saved == 2 * 2 * (5 - 4)


def test_processes_put_together_what_their_rows_say(monkeypatch):
  """The first block is that of the process whose prompts end inside of it."""
  spec = dataclasses.replace(SPEC, early_exit=True)
  said = []
  monkeypatch.setattr(multihost, "gather", lambda value: said.append(value) or said)
  steps = np.asarray([[0, 4, 5, 6, 7, 8, 8, 8, 9, 10, 11, 11]])
  for valid in (np.ones((1, 8), bool), np.arange(8)[None, :] > 0):
    zeros = np.zeros_like(steps)
    part = Rollout(zeros[:, 0], zeros[:, 0], valid.astype(int), valid, zeros, zeros > 0, steps, zeros)
    reach = cost.reached(spec, [part], 2, 1, 4)
    assert reach.steps.tolist() == [[int(not valid.all()), 4, 4]]
  assert reach.rows.tolist() == [[2, 2, 2]]


@pytest.mark.parametrize(
  ("states", "shift", "changes", "name", "steps"),
  [
    (4, 0, {}, "step_merged", [[3, 4, 4]]),
    (2, 0, {}, "step_merged", [[1, 2, 2]]),
    (3, 1, dict(schedule="threshold", max_reveal=3), "step_merged", [[1, 2, 3], [0, 1, 1]]),
    (4, 0, dict(block_length=2), "step_merged", [[0, 1, 2, 1, 1, 1]]),
    (4, 0, {}, "one_step", [[3, 4, 4]]),
  ],
)
def test_an_update_makes_a_pass_for_some_steps_of_a_block(states, shift, changes, name, steps, monkeypatch):
  monkeypatch.setattr(replay, "STATES", states)
  block = 4
  spec, denoiser = dataclasses.replace(SPEC, **changes), causal.denoiser(block, shift)
  options = {"p_mask_prompt": 0.1} if name == "one_step" else {}
  method = Method(
    ESTIMATORS[name].bind(**options), ClippedToken(epsilon=0.2, beta=0.1), num_iterations=2, accumulation=1
  )
  rows = lambda *shape, dtype=jnp.int32: jax.ShapeDtypeStruct((4, *shape), dtype)
  width = spec.completion_length + block
  mask, logps = rows(width, dtype=bool), rows(width, dtype=jnp.float32)
  found = Rollout(rows(), rows(), rows(WIDTH), rows(WIDTH, dtype=bool), rows(width), mask, rows(width), logps)
  zeros = lambda _: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), SHAPES)
  state = jax.eval_shape(lambda: create(zeros, OPTIMIZER, KEY, KEY))
  program = functools.partial(update, method=method, denoiser=denoiser, sampler=spec, optimizer=OPTIMIZER)
  counted = flops.count(jax.jit(program).trace(state, Frozen({}, SHAPES), found, rows(dtype=jnp.float32)))
  steps = np.asarray(steps)
  reach = cost.Reach(steps, np.full_like(steps, 4 // len(steps)))
  model = formulas.Model(causal.SIZE, shift=shift, block=block)
  canvas = math.ceil(WIDTH / block) * block + spec.completion_length
  assert cost.update(counted, spec, method, reach, block=block) == formulas.update(
    model, spec, method, canvas, reach, tiled=False
  )
