import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d1jax import keys
from d1jax.diffusion.rollout import Rollout, SamplerSpec
from d1jax.diffusion.sampler import block_logits, rank_descending, sample
from tests import toy
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


@jax.jit
def all_logits(tokens: jax.Array, valid: jax.Array) -> jax.Array:
  return toy.unembed(PARAMS, toy.encode(PARAMS, tokens, valid))


def generate(prompt: np.ndarray, valid: np.ndarray, sample_id: int, spec: SamplerSpec):
  """LLaDA's generate.py for one prompt, with the run's uniforms: a draw inverts the distribution function."""
  before, length, width = len(prompt), spec.completion_length, spec.block_length
  x = np.concatenate([prompt, np.full(length, toy.MASK)])
  attend = np.concatenate([valid, np.ones(length, bool)])
  prompt_index = np.arange(before + length) < before
  reveal_step, reveal_logp = np.full(length, -1), np.full(length, np.nan)
  sample_key = jax.random.fold_in(KEY, sample_id)

  def forward(tokens):
    return toy.allowed(np.asarray(all_logits(jnp.asarray(tokens[None]), jnp.asarray(attend[None])))[0])

  counter = 0
  for block in range(length // width):
    start, end = before + block * width, before + (block + 1) * width
    holes = int((x[start:end] == toy.MASK).sum())
    steps = spec.diffusion_steps // (length // width)
    transfer = [holes // steps + (1 if i < holes % steps else 0) for i in range(steps)]
    for count in transfer:
      if count == 0:
        continue  # LLaDA pays a forward pass that changes nothing
      step_key = jax.random.fold_in(sample_key, counter)
      draw_u = np.asarray(jax.random.uniform(jax.random.fold_in(step_key, 0), (length,)))
      order_u = np.asarray(jax.random.uniform(jax.random.fold_in(step_key, 1), (length,)))
      logits = forward(x)
      if spec.cfg_scale > 0:
        blind = forward(np.where(prompt_index, toy.MASK, x))
        with np.errstate(invalid="ignore"):
          logits = toy.allowed(blind + (spec.cfg_scale + 1) * (logits - blind))
      confidence, proposal, logp = (
        np.full(before + length, -np.inf),
        np.zeros(before + length, int),
        np.zeros(before + length),
      )
      for i in range(before, end):
        if x[i] != toy.MASK:
          continue
        if spec.temperature == 0:
          proposal[i] = np.argmax(logits[i])
        else:
          tempered = toy.log_softmax(logits[i] / spec.temperature)
          proposal[i] = np.searchsorted(np.cumsum(np.exp(tempered)), draw_u[i - before], side="right")
          logp[i] = tempered[proposal[i]]
        probability = np.exp(toy.log_softmax(logits[i]))[proposal[i]]
        confidence[i] = probability if spec.remasking == "low_confidence" else order_u[i - before]
      for i in np.argsort(-confidence, kind="stable")[:count]:
        x[i] = proposal[i]
        reveal_step[i - before], reveal_logp[i - before] = counter, logp[i]
      counter += 1
  return x, reveal_step, reveal_logp


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
    x, step, logp = generate(prompt[row], valid[row], int(identity), spec)
    np.testing.assert_array_equal(np.concatenate([found.prompt[row], found.completion[row]]), x)
    np.testing.assert_array_equal(found.reveal_step[row], step)
    np.testing.assert_allclose(found.reveal_logp[row], logp, rtol=1e-5, atol=1e-5)


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


def test_an_early_exit_waits_for_the_last_row_and_saves_the_blocks_behind():
  calls = []

  def counted(params, tokens, valid):
    jax.debug.callback(lambda: calls.append(1))
    return toy.encode(params, tokens, valid)

  counting = dataclasses.replace(toy.DENOISER, encode=counted)
  lured = dataclasses.replace(counting, unembed=lambda p, h: toy.unembed(p, h).at[..., toy.STOP].add(40.0))
  spec = dataclasses.replace(SPEC, early_exit=True)
  found = default_run(spec, denoiser=lured)
  jax.effects_barrier()
  assert len(calls) == spec.steps_per_block == spec.forward_passes(int(found.reveal_step.max()))
  assert (found.completion == toy.STOP).all()
  calls.clear()
  # One row that never stops keeps the batch going.
  stubborn = dataclasses.replace(
    counting, unembed=lambda p, h: toy.unembed(p, h).at[1:, ..., toy.STOP].add(40.0).at[0, ..., toy.STOP].add(-40.0)
  )
  found = default_run(spec, denoiser=stubborn)
  jax.effects_barrier()
  assert len(calls) == spec.diffusion_steps == spec.forward_passes(int(found.reveal_step.max()))
  assert found.completion_mask.all(axis=1).tolist() == [True, False, False, False]


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
  def shouting(params, hidden):
    return toy.unembed(params, hidden).at[..., jnp.asarray(toy.FORBIDDEN)].set(1e4)

  loud = dataclasses.replace(toy.DENOISER, unembed=shouting)
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
  sampler = functools.partial(sample, toy.DENOISER, spec=spec)
  found = shapes(sampler, PARAMS, prompt, valid, IDS, GROUPS, KEY)
  widths = {shape[-2] for shape in found if len(shape) == 3 and shape[-1] == toy.VOCAB}
  assert widths == {3}


def test_guidance_is_extrapolation_from_the_blind_prompt():
  prompt, valid = toy.prompts(WIDTHS, 5)
  tokens = jnp.concatenate([prompt, jnp.full((4, 6), toy.MASK)], axis=1)
  valid = jnp.concatenate([valid, jnp.ones((4, 6), bool)], axis=1)
  positions = jnp.asarray([6, 7])
  guided = functools.partial(block_logits, toy.DENOISER, PARAMS, positions=positions, prompt_length=5)
  plain = np.asarray(guided(tokens=tokens, valid=valid, cfg_scale=0.0))
  blind = np.asarray(guided(tokens=tokens.at[:, :5].set(toy.MASK), valid=valid, cfg_scale=0.0))
  both = np.asarray(guided(tokens=tokens, valid=valid, cfg_scale=2.0))
  assert np.isneginf(both[..., list(toy.FORBIDDEN)]).all()
  keep = [i for i in range(toy.VOCAB) if i not in toy.FORBIDDEN]
  np.testing.assert_allclose(both[..., keep], 3 * plain[..., keep] - 2 * blind[..., keep], rtol=1e-5, atol=1e-5)
  raw = np.asarray(all_logits(tokens, valid))[:, 6:8]
  np.testing.assert_allclose(plain[..., keep], raw[..., keep], rtol=1e-5, atol=1e-5)


def test_ranks_descend_and_ties_go_left():
  scores = jnp.asarray([[0.5, -jnp.inf, 0.7, 0.5, -jnp.inf], [0.0, 0.0, 0.0, 0.0, 1.0]])
  assert rank_descending(scores).tolist() == [[1, 3, 0, 2, 4], [1, 2, 3, 4, 0]]
  random = np.random.default_rng(0).integers(0, 6, (50, 9)).astype(np.float32)
  expected = np.argsort(np.argsort(-random, axis=1, kind="stable"), axis=1)
  np.testing.assert_array_equal(rank_descending(jnp.asarray(random)), expected)


def test_the_uniforms_are_those_of_the_keys_module():
  """What the naive loop folds by hand is what `d1jax.keys` hands out."""
  per_step = keys.fold(keys.fold(keys.sample_keys(KEY, IDS), 4), 1)
  by_hand = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(KEY, int(IDS[2])), 4), 1)
  np.testing.assert_array_equal(keys.uniforms(per_step, 9)[2], jax.random.uniform(by_hand, (9,)))
