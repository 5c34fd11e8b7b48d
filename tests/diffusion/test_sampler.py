import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d1jax import keys
from d1jax.diffusion import sampler
from d1jax.diffusion.rollout import Rollout, SamplerSpec
from d1jax.diffusion.sampler import sample
from tests import toy
from tests.diffusion.naive import generate
from tests.jaxprs import shapes

KEY = jax.random.key(3)
WIDTHS = [5, 1, 3, 4]
PARAMS = toy.params()
IDS = jnp.asarray([40, 7, 19, 3], jnp.int32)
GROUPS = jnp.asarray([4, 4, 9, 9], jnp.int32)

# name: completion_length, diffusion_steps, block_length
SCHEDULES = {
  "one block, remainder": (7, 3, 7),
  "three blocks, remainder": (15, 6, 5),
  "a token a step": (8, 8, 4),
  "more steps than tokens": (6, 10, 3),
}


def spec_of(schedule: str, temperature: float, cfg_scale: float, remasking: str) -> SamplerSpec:
  return SamplerSpec(*SCHEDULES[schedule], temperature, cfg_scale, remasking)


@functools.partial(jax.jit, static_argnames=("spec", "denoiser"))
def run(params, prompt, valid, ids, groups, key, spec, denoiser=toy.DENOISER) -> Rollout:
  return sample(denoiser, params, prompt, valid, ids, groups, key, spec=spec)


def default_run(spec: SamplerSpec, length: int = 5, **changes) -> Rollout:
  prompt, valid = toy.prompts(WIDTHS, length)
  given = {"prompt": prompt, "valid": valid, "ids": IDS, "groups": GROUPS, "key": KEY, "params": PARAMS} | changes
  return jax.device_get(run(spec=spec, **given))


EVERY_WAY = [
  ("three blocks, remainder", temperature, cfg_scale, remasking)
  for temperature in (0.0, 0.9)
  for cfg_scale in (0.0, 1.5)
  for remasking in ("low_confidence", "random")
]
OTHERS = [
  (schedule, 0.9, cfg_scale, remasking)
  for schedule in SCHEDULES
  if schedule != "three blocks, remainder"
  for cfg_scale, remasking in ((0.0, "low_confidence"), (1.5, "random"))
]


@pytest.mark.parametrize(("schedule", "temperature", "cfg_scale", "remasking"), EVERY_WAY + OTHERS)
def test_token_for_token_lladas_loop(schedule, temperature, cfg_scale, remasking):
  spec = spec_of(schedule, temperature, cfg_scale, remasking)
  found = default_run(spec)
  prompt, valid = (np.asarray(x) for x in toy.prompts(WIDTHS, 5))
  for row, identity in enumerate(IDS):
    path = generate(prompt[row], valid[row], int(identity), spec, KEY, PARAMS)
    np.testing.assert_array_equal(np.concatenate([found.prompt[row], found.completion[row]]), path.canvas)
    np.testing.assert_array_equal(found.reveal_step[row], path.reveal_step)
    np.testing.assert_allclose(found.reveal_logp[row], path.reveal_logp, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def drawn() -> Rollout:
  return default_run(spec_of("three blocks, remainder", 0.9, 0.0, "low_confidence"))


SPEC = spec_of("three blocks, remainder", 0.9, 0.0, "low_confidence")


def test_what_came_in_goes_out_unchanged(drawn):
  prompt, valid = toy.prompts(WIDTHS, 5)
  np.testing.assert_array_equal(drawn.prompt, prompt)
  np.testing.assert_array_equal(drawn.prompt_valid, valid)
  np.testing.assert_array_equal(drawn.sample_id, IDS)
  np.testing.assert_array_equal(drawn.group_id, GROUPS)


def test_no_mask_is_left_and_every_step_reveals_its_share(drawn):
  assert not (drawn.completion == toy.MASK).any()
  for row in drawn.reveal_step:
    assert np.bincount(row, minlength=6).tolist() == [3, 2] * 3
    for block in range(3):
      assert set(row[5 * block : 5 * block + 5]) == {2 * block, 2 * block + 1}


def test_rows_differ_although_prompts_are_the_same():
  prompt, valid = toy.prompts([5], 5)
  same = default_run(SPEC, prompt=jnp.tile(prompt, (4, 1)), valid=jnp.tile(valid, (4, 1)))
  assert len({row.tobytes() for row in same.completion}) == 4


def test_another_key_draws_other_tokens(drawn):
  assert (default_run(SPEC, key=jax.random.key(4)).completion != drawn.completion).any(axis=1).all()


def test_the_completion_mask_stops_at_the_first_stop_id():
  spec = dataclasses.replace(SPEC, temperature=10.0)
  ids = jnp.arange(64, dtype=jnp.int32)
  prompt, valid = (jnp.tile(x, (16, 1)) for x in toy.prompts(WIDTHS, 5))
  found = default_run(spec, prompt=prompt, valid=valid, ids=ids, groups=ids)
  stopped = 0
  for tokens, mask in zip(found.completion.tolist(), found.completion_mask, strict=True):
    length = tokens.index(toy.STOP) + 1 if toy.STOP in tokens else len(tokens)
    stopped += toy.STOP in tokens
    assert mask.tolist() == [i < length for i in range(15)]
  assert 0 < stopped < 64, "the fixture should have rows of both kinds"


@pytest.mark.few(2, reason="each case compiles programs of its own")
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("cfg_scale", [0.0, 1.5])
def test_an_early_exit_changes_nothing_up_to_the_stop(schedule, cfg_scale):
  spec = spec_of(schedule, 0.9, cfg_scale, "low_confidence")
  often = dataclasses.replace(toy.DENOISER, stop_ids=(2, 3, 4, 5, 6))
  whole = default_run(spec, denoiser=often)
  early = default_run(dataclasses.replace(spec, early_exit=True), denoiser=often)
  assert not whole.completion_mask.all(), "the fixture should stop somewhere"
  np.testing.assert_array_equal(early.completion_mask, whole.completion_mask)
  kept = whole.completion_mask
  for name in ("completion", "reveal_step", "reveal_logp"):
    np.testing.assert_array_equal(getattr(early, name)[kept], getattr(whole, name)[kept])
  assert not (early.completion == toy.MASK).any()


class Stopping:
  """A toy whose rows stop in a block that the first token of their prompt names: token 3 + n, block n.

  An added hidden feature says yes or no, and the head makes it the stop id's logit. `rows` has the batch of each pass.
  """

  def __init__(self, block_length: int) -> None:
    self.rows: list[int] = []
    self.block_length = block_length

  def encode(self, params, tokens, valid):
    jax.debug.callback(functools.partial(self.rows.append, tokens.shape[0]))
    block = (jnp.arange(tokens.shape[1]) - 5) // self.block_length
    wants = jnp.where(block[None] >= tokens[:, :1] - 3, 40.0, -40.0)
    return jnp.concatenate([toy.encode(params, tokens, valid), wants[..., None]], axis=-1)

  def head(self, params):
    return jnp.concatenate([params["head"], jnp.eye(toy.VOCAB)[None, toy.STOP]])

  def sample(self, spec: SamplerSpec, blocks: list[int], row_multiple: int = 1) -> Rollout:
    """Samples a row for each of the blocks to stop in."""
    self.rows.clear()
    denoiser = dataclasses.replace(toy.DENOISER, encode=self.encode, head=self.head)
    ids = jnp.arange(len(blocks), dtype=jnp.int32)
    prompt, valid = toy.prompts([5] * len(blocks), 5)
    prompt = prompt.at[:, 0].set(3 + jnp.asarray(blocks))
    run = jax.jit(functools.partial(sample, denoiser, spec=spec, row_multiple=row_multiple))
    found = jax.device_get(run(PARAMS, prompt, valid, ids, ids, KEY))
    jax.effects_barrier()
    return found


@pytest.mark.parametrize(("blocks", "taken"), [([0, 0, 0, 0], 1), ([0, 1, 0, 0], 2), ([7, 0, 0, 0], 3)])
def test_an_early_exit_waits_for_the_last_row_and_saves_the_blocks_behind(blocks, taken):
  spec = dataclasses.replace(SPEC, early_exit=True)
  stopping = Stopping(5)
  found = stopping.sample(spec, blocks)
  assert stopping.rows == [4] * (taken * spec.steps_per_block)
  assert len(stopping.rows) == spec.forward_passes(found.reveal_step)
  for tokens, step, logp, block in zip(found.completion, found.reveal_step, found.reveal_logp, blocks, strict=True):
    assert not (tokens[: 5 * block] == toy.STOP).any()
    assert (tokens[5 * block :] == toy.STOP).all()
    # A row that has ended waits: what it gets does not depend on who it waits for.
    assert (step[5 * (block + 1) :] == 0).all()
    assert (logp[5 * (block + 1) :] == 0).all()


LONG = SamplerSpec(completion_length=12, diffusion_steps=8, block_length=3, early_exit=True)
STOPS = [0, 3, 0, 1, 7, 1, 0, 2]


@pytest.fixture(scope="module")
def together() -> Rollout:
  stopping = Stopping(3)
  found = stopping.sample(LONG, STOPS)
  assert stopping.rows == [8] * 8, "completions as short as these stay together"
  return found


@pytest.mark.slow(reason="compiles programs of its own")
@pytest.mark.parametrize(("row_multiple", "batches"), [(1, [8, 8, 4, 2]), (4, [8, 8, 4, 4]), (8, [8, 8, 8, 8])])
def test_finished_rows_of_long_completions_are_left_behind(monkeypatch, together, row_multiple, batches):
  monkeypatch.setattr(sampler, "COMPACT_FROM", 12)
  stopping = Stopping(3)
  found = stopping.sample(LONG, STOPS, row_multiple)
  assert stopping.rows == [rows for rows in batches for _ in range(2)]
  assert len(stopping.rows) == LONG.forward_passes(found.reveal_step)
  for a, b in zip(found[:-1], together[:-1], strict=True):
    np.testing.assert_array_equal(a, b)
  np.testing.assert_allclose(found.reveal_logp, together.reveal_logp, atol=1e-6)


def test_what_is_kept_of_finished_rows_is_what_a_whole_run_draws(together):
  whole = Stopping(3).sample(dataclasses.replace(LONG, early_exit=False), STOPS)
  kept = together.completion_mask
  np.testing.assert_array_equal(kept, whole.completion_mask)
  np.testing.assert_array_equal(together.completion[kept], whole.completion[kept])


@pytest.mark.slow(reason="compiles rollouts that shrink")
def test_a_batch_is_halved_three_times_at_most(monkeypatch):
  monkeypatch.setattr(sampler, "COMPACT_FROM", 12)
  stopping = Stopping(3)
  stopping.sample(LONG, [7] + [0] * 31)
  assert stopping.rows == [32] * 2 + [4] * 6


def test_rows_that_end_early_do_not_depend_on_the_others(together):
  alone = Stopping(3).sample(LONG, STOPS[:3])
  np.testing.assert_array_equal(alone.completion, together.completion[:3])
  np.testing.assert_array_equal(alone.reveal_step, together.reveal_step[:3])


def test_an_early_exit_without_stop_ids_never_comes():
  never = dataclasses.replace(toy.DENOISER, stop_ids=())
  spec = dataclasses.replace(SPEC, early_exit=True)
  np.testing.assert_array_equal(default_run(spec, denoiser=never).completion, default_run(SPEC).completion)


def test_an_absent_stop_id_leaves_the_mask_full():
  never = dataclasses.replace(toy.DENOISER, stop_ids=())
  assert default_run(SPEC, denoiser=never).completion_mask.all()


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("cfg_scale", [0.0, 1.5])
def test_forbidden_ids_never_appear_however_large_their_logits(temperature, cfg_scale):
  def shouting(params):  # of two opposite logits, one is large
    return toy.head(params).at[:, jnp.asarray(toy.FORBIDDEN)].set(jnp.asarray([1e4, -1e4]))

  loud = dataclasses.replace(toy.DENOISER, head=shouting)
  spec = spec_of("three blocks, remainder", temperature, cfg_scale, "low_confidence")
  found = default_run(spec, denoiser=loud)
  assert not np.isin(found.completion, toy.FORBIDDEN).any()
  np.testing.assert_array_equal(found.completion, default_run(spec).completion)
  np.testing.assert_array_equal(found.reveal_logp, default_run(spec).reveal_logp)


def test_permuting_rows_permutes_results(drawn):
  prompt, valid = toy.prompts(WIDTHS, 5)
  order = jnp.asarray([2, 0, 3, 1])
  moved = default_run(SPEC, prompt=prompt[order], valid=valid[order], ids=IDS[order], groups=GROUPS[order])
  for a, b in zip(moved, drawn, strict=True):
    np.testing.assert_array_equal(a, b[np.asarray(order)])


def test_a_row_does_not_depend_on_the_others(drawn):
  prompt, valid = toy.prompts(WIDTHS, 5)
  other, _ = toy.prompts(WIDTHS, 5, seed=9)
  keep = jnp.asarray([False, True, False, False])
  changed = default_run(
    SPEC, prompt=jnp.where(keep[:, None], prompt, other), valid=valid, ids=jnp.where(keep, IDS, IDS + 1000)
  )
  np.testing.assert_array_equal(changed.completion[1], drawn.completion[1])
  np.testing.assert_array_equal(changed.reveal_logp[1], drawn.reveal_logp[1])
  assert (changed.completion[0] != drawn.completion[0]).any()


@pytest.mark.parametrize("cfg_scale", [0.0, 1.5])
@pytest.mark.parametrize("length", [6, 12])
def test_the_width_of_the_padding_changes_nothing(length, cfg_scale):
  spec = dataclasses.replace(SPEC, cfg_scale=cfg_scale)
  narrow, wide = default_run(spec), default_run(spec, length)
  np.testing.assert_array_equal(wide.completion, narrow.completion)
  np.testing.assert_array_equal(wide.reveal_step, narrow.reveal_step)
  np.testing.assert_allclose(wide.reveal_logp, narrow.reveal_logp, atol=1e-5)


def test_a_mask_in_the_prompt_stays_there():
  prompt, valid = toy.prompts(WIDTHS, 5)
  prompt = prompt.at[:, -1].set(toy.MASK)
  found = default_run(SPEC, prompt=prompt, valid=valid)
  np.testing.assert_array_equal(found.prompt, prompt)
  assert not (found.completion == toy.MASK).any()


def test_greedy_does_not_depend_on_the_key():
  spec = dataclasses.replace(SPEC, temperature=0.0)
  a, b = default_run(spec), default_run(spec, key=jax.random.key(99), ids=IDS + 5)
  np.testing.assert_array_equal(a.completion, b.completion)
  np.testing.assert_array_equal(a.reveal_logp, 0.0)


def test_logits_of_the_active_block_alone_exist():
  spec = SamplerSpec(12, 8, 3)
  prompt, valid = toy.prompts(WIDTHS, 5)
  found = shapes(functools.partial(sample, toy.DENOISER, spec=spec), PARAMS, prompt, valid, IDS, GROUPS, KEY)
  widths = {shape[-2] for shape in found if len(shape) == 3 and shape[-1] == toy.VOCAB}
  assert widths == {3}


def test_the_uniforms_are_those_of_the_keys_module():
  """What the naive loop folds by hand is what `d1jax.keys` hands out."""
  per_step = keys.fold(keys.fold(keys.sample_keys(KEY, IDS), 4), 1)
  by_hand = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(KEY, int(IDS[2])), 4), 1)
  np.testing.assert_array_equal(keys.uniforms(per_step, 9)[2], jax.random.uniform(by_hand, (9,)))


def test_new_data_compile_nothing_new():
  traces = []

  def noted(params, tokens, valid):
    traces.append(tokens.shape)
    return toy.encode(params, tokens, valid)

  noting = dataclasses.replace(toy.DENOISER, encode=noted)
  spec = dataclasses.replace(SPEC, early_exit=True)
  first = default_run(spec, denoiser=noting)
  before = list(traces)
  prompt, valid = toy.prompts([2, 5, 1, 1], 5, seed=8)
  second = default_run(
    spec, denoiser=noting, prompt=prompt, valid=valid, ids=IDS + 9, key=jax.random.key(77), params=toy.params(1)
  )
  assert before
  assert traces == before
  assert (first.completion != second.completion).any()


def test_a_shifted_network_needs_a_prompt():
  shifted = dataclasses.replace(toy.DENOISER, shift=1)
  none = jnp.zeros((4, 0), jnp.int32)
  with pytest.raises(ValueError, match="prompt has width 0"):
    default_run(SPEC, denoiser=shifted, prompt=none, valid=none.astype(bool))
  assert default_run(SPEC, prompt=none, valid=none.astype(bool)).completion.shape == (4, 15)
