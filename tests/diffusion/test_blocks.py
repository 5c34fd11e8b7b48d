import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d1jax import model
from d1jax.diffusion.rollout import Rollout, SamplerSpec
from d1jax.diffusion.sampler import sample
from d1jax.models import transformer
from tests import toy
from tests.diffusion.naive import generate
from tests.jaxprs import shapes

KEY = jax.random.key(3)
PARAMS = toy.params()
IDS = jnp.asarray([40, 7, 19, 3], jnp.int32)
PROMPT, VALID = toy.prompts([5, 1, 3, 4], 5)
SPEC = SamplerSpec(12, 9, 4, look_behind=2, look_ahead=3, threshold=0.5, max_reveal=3)
MODES = ["prefix", "dual", "window"]
SCHEDULES = ["static", "threshold", "factor"]


def rolled(spec: SamplerSpec, denoiser=toy.DENOISER, params=PARAMS, prompt=PROMPT, valid=VALID) -> Rollout:
  run = jax.jit(functools.partial(sample, denoiser, spec=spec))
  return jax.device_get(run(params, prompt, valid, IDS, IDS, KEY))


def assert_same(found: Rollout, expected: Rollout) -> None:
  np.testing.assert_array_equal(found.completion, expected.completion)
  np.testing.assert_array_equal(found.reveal_step, expected.reveal_step)
  np.testing.assert_allclose(found.reveal_logp, expected.reveal_logp, rtol=1e-5, atol=1e-5)


def counting(passes: list[int]):
  """A toy that notes the widths of its passes."""

  def encode_window(params, tokens, start, cache):
    jax.debug.callback(functools.partial(passes.append, tokens.shape[1]))
    return toy.encode_window(params, tokens, start, cache)

  return dataclasses.replace(toy.DENOISER, encode_window=encode_window)


CASES = [  # every mode with every schedule, and each with and without shift and guidance, refreshed in between or not
  ("prefix", "static", 0, 0.0, None),
  ("prefix", "threshold", 1, 0.0, 2),
  ("prefix", "factor", 0, 1.5, None),
  ("dual", "static", 1, 1.5, 2),
  ("dual", "threshold", 0, 0.0, None),
  ("dual", "factor", 1, 0.0, 2),
  ("window", "static", 0, 0.0, 2),
  ("window", "threshold", 0, 1.5, 3),
  ("window", "factor", 1, 0.0, None),
]


@pytest.mark.few(2, reason="each case compiles programs of its own")
@pytest.mark.parametrize(("cache", "schedule", "shift", "cfg_scale", "refresh_every"), CASES)
def test_token_for_token_a_loop_with_a_stale_cache(cache, schedule, shift, cfg_scale, refresh_every):
  passes: list[int] = []
  denoiser = dataclasses.replace(counting(passes), shift=shift)
  spec = dataclasses.replace(SPEC, cache=cache, schedule=schedule, cfg_scale=cfg_scale, refresh_every=refresh_every)
  found = rolled(spec, denoiser)
  jax.effects_barrier()
  naive_passes = []
  stale = False
  for row, identity in enumerate(IDS):
    path = generate(np.asarray(PROMPT[row]), np.asarray(VALID[row]), int(identity), spec, KEY, PARAMS, shift)
    np.testing.assert_array_equal(found.completion[row], path.canvas[5:])
    np.testing.assert_array_equal(found.reveal_step[row], path.reveal_step)
    np.testing.assert_allclose(found.reveal_logp[row], path.reveal_logp, rtol=2e-5, atol=2e-5)
    naive_passes.append(path.passes)
    stale |= bool(np.abs(path.reveal_logp - path.exact_logp).max() > 1e-2)
  assert stale, "the fixture should feel its cache"
  # The batch takes as many passes as its slowest row, of the same widths.
  assert set(passes) == {width for row in naive_passes for width in row}
  assert len(passes) == spec.forward_passes(found.reveal_step)
  if schedule != "static":
    taken = [np.bincount(row).max() for row in found.reveal_step]
    assert 1 < max(taken) <= spec.max_reveal


@pytest.fixture(scope="module")
def exact():
  return {
    (schedule, shift): rolled(
      dataclasses.replace(SPEC, schedule=schedule, cfg_scale=1.5 * shift),
      dataclasses.replace(toy.DENOISER, shift=shift),
    )
    for schedule in SCHEDULES
    for shift in (0, 1)
  }


@pytest.mark.few(1, reason="each case compiles programs of its own")
@pytest.mark.parametrize("cache", MODES)
@pytest.mark.parametrize(("schedule", "shift"), [("static", 1), ("threshold", 0), ("factor", 1), ("static", 0)])
def test_a_refresh_at_every_step_is_exact(exact, cache, schedule, shift):
  spec = dataclasses.replace(SPEC, cache=cache, schedule=schedule, cfg_scale=1.5 * shift, refresh_every=1)
  assert_same(rolled(spec, dataclasses.replace(toy.DENOISER, shift=shift)), exact[schedule, shift])


@pytest.mark.slow(reason="compiles programs of its own")
def test_the_dual_cache_is_exact_with_one_step_a_block():
  spec = dataclasses.replace(SPEC, diffusion_steps=3)
  assert_same(rolled(dataclasses.replace(spec, cache="dual")), rolled(spec))


def test_a_window_that_covers_the_canvas_is_exact(exact):
  spec = dataclasses.replace(SPEC, cache="window", look_behind=17, look_ahead=17)
  assert_same(rolled(spec), exact["static", 0])


@pytest.mark.slow(reason="compiles programs of its own")
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("cache", MODES)
def test_a_real_network_refreshed_at_every_step_is_exact(cache, shift):
  size = transformer.TransformerSize(vocab=toy.VOCAB, embed=16, heads=2, mlp=32, layers=2, rope_theta=100.0)
  network = transformer.build(size)
  params = jax.tree.map(lambda p: 4 * p, network.init(jax.random.key(1)))
  denoiser = model.build_denoiser(network, mask_id=toy.MASK, stop_ids=(toy.STOP,), known_ids=12, shift=shift)
  with jax.numpy_rank_promotion("allow"):  # networks broadcast their weights
    found = rolled(dataclasses.replace(SPEC, cache=cache, refresh_every=1), denoiser, params)
    assert_same(found, rolled(SPEC, denoiser, params))


@pytest.mark.slow(reason="compiles programs of its own")
@pytest.mark.parametrize("cache", MODES)
def test_early_exits_and_smaller_batches_with_a_cache(monkeypatch, cache):
  monkeypatch.setattr("d1jax.diffusion.sampler.COMPACT_FROM", 12)
  often = dataclasses.replace(toy.DENOISER, stop_ids=(2, 3, 4, 5))
  spec = dataclasses.replace(SPEC, cache=cache, schedule="threshold")
  whole, early = rolled(spec, often), rolled(dataclasses.replace(spec, early_exit=True), often)
  kept = whole.completion_mask
  assert not kept[:, :-4].all(), "the fixture should stop before the last block"
  np.testing.assert_array_equal(early.completion_mask, kept)
  np.testing.assert_array_equal(early.completion[kept], whole.completion[kept])
  np.testing.assert_array_equal(early.reveal_step[kept], whole.reveal_step[kept])
  np.testing.assert_allclose(early.reveal_logp[kept], whole.reveal_logp[kept], atol=1e-5)


@pytest.mark.slow(reason="compiles programs of its own")
@pytest.mark.parametrize("cache", MODES)
def test_the_width_of_the_padding_and_the_order_of_rows_change_nothing(cache):
  spec = dataclasses.replace(SPEC, cache=cache)
  wide = toy.prompts([5, 1, 3, 4], 9)
  expected = rolled(spec)
  assert_same(rolled(spec, prompt=wide[0], valid=wide[1]), expected)
  order = jnp.asarray([2, 0, 3, 1])
  run = jax.jit(functools.partial(sample, toy.DENOISER, spec=spec))
  moved = jax.device_get(run(PARAMS, PROMPT[order], VALID[order], IDS[order], IDS[order], KEY))
  assert_same(moved, jax.tree.map(lambda x: x[np.asarray(order)], expected))


def test_new_data_compile_nothing_new():
  traces = []

  def noted(params, tokens, start, cache):
    traces.append(tokens.shape)
    return toy.encode_window(params, tokens, start, cache)

  spec = dataclasses.replace(SPEC, cache="window", schedule="factor", early_exit=True)
  run = jax.jit(functools.partial(sample, dataclasses.replace(toy.DENOISER, encode_window=noted), spec=spec))
  run(PARAMS, PROMPT, VALID, IDS, IDS, KEY)
  before = list(traces)
  run(toy.params(1), *toy.prompts([2, 5, 1, 1], 5, seed=8), IDS + 9, IDS, jax.random.key(77))
  assert before
  assert traces == before


@pytest.mark.parametrize("cache", MODES)
def test_logits_of_the_active_block_alone_exist(cache):
  spec = dataclasses.replace(SPEC, cache=cache)
  found = shapes(functools.partial(sample, toy.DENOISER, spec=spec), PARAMS, PROMPT, VALID, IDS, IDS, KEY)
  assert {shape[-2] for shape in found if len(shape) == 3 and shape[-1] == toy.VOCAB} == {4}
