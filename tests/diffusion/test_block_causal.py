import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d1jax.diffusion import replay, sampler
from d1jax.diffusion.likelihood import masked_logps
from d1jax.diffusion.rollout import Rollout, SamplerSpec
from d1jax.diffusion.sampler import sample
from d1jax.diffusion.sandwich import sandwich
from d1jax.diffusion.trajectory import left_to_right, step_merged
from d1jax.model import build_denoiser
from d1jax.models import load
from tests.diffusion import causal
from tests.models import folders
from tests.toy import log_softmax

KEY = jax.random.key(5)
PARAMS = causal.params()
SPEC = SamplerSpec(completion_length=8, diffusion_steps=8, block_length=4, temperature=0.9, early_exit=True)
IDS = np.asarray([40, 7, 19, 3, 28], np.int32)
PROMPTS = [np.random.default_rng(n).integers(4, 17, n).tolist() for n in (8, 5, 6, 7, 1)]
"""Every length modulo a block of 4."""


@functools.partial(jax.jit, static_argnames=("spec", "denoiser"))
def run(params, prompt, valid, ids, key, spec, denoiser) -> Rollout:
  return sample(denoiser, params, prompt, valid, ids, ids, key, spec=spec)


def sampled(spec, denoiser, prompts=PROMPTS, ids=IDS, width=8):
  prompt, valid = np.zeros((len(prompts), width), np.int32), np.zeros((len(prompts), width), bool)
  for row, tokens in enumerate(prompts):
    prompt[row, width - len(tokens) :], valid[row, width - len(tokens) :] = tokens, True
  return jax.device_get(run(PARAMS, prompt, valid, ids, KEY, spec, denoiser))


@functools.partial(jax.jit, static_argnames=("spec", "denoiser", "segments"))
def scored(params, rollout, spec, denoiser, segments=None):
  return step_merged(denoiser, params, rollout, spec, KEY, segments=segments)


CASES = {
  "greedy": (4, 0, dict(temperature=0.0)),
  "drawn": (4, 0, {}),
  "two steps a block": (4, 0, dict(diffusion_steps=4)),
  "random": (4, 0, dict(remasking="random")),
  "sequential": (4, 0, dict(schedule="sequential", diffusion_steps=4)),
  "threshold": (4, 0, dict(schedule="threshold", threshold=0.5)),
  "factor": (4, 0, dict(schedule="factor")),
  "parts of a block": (4, 0, dict(block_length=2)),
  "every row to the end": (4, 0, dict(early_exit=False)),
  "next token, greedy": (4, 1, dict(temperature=0.0)),
  "next token": (4, 1, {}),
  "next token, parts of a block": (4, 1, dict(block_length=2, schedule="threshold", threshold=0.5)),
  "one token a block": (1, 0, dict(block_length=1)),
  "one token a block, next token": (1, 1, dict(block_length=1)),
  "one block": (8, 0, dict(block_length=8)),
}


@pytest.mark.parametrize("name", CASES)
def test_token_for_token_a_loop_that_computes_the_whole_canvas(name):
  """And `step_merged` scores the path as it was drawn: all blocks at once, what the cached sampler recorded."""
  block, shift, changes = CASES[name]
  denoiser, spec = causal.denoiser(block, shift), dataclasses.replace(SPEC, **changes)
  found, encode = sampled(spec, denoiser), jax.jit(denoiser.encode)
  for row, prompt in enumerate(PROMPTS):
    tokens, steps, logp, _ = causal.generate(prompt, int(IDS[row]), spec, KEY, encode, denoiser, PARAMS)
    revealed = steps >= 0
    np.testing.assert_array_equal(found.completion[row, : len(tokens)][revealed], tokens[revealed])
    np.testing.assert_array_equal(found.reveal_step[row, : len(tokens)], np.maximum(steps, 0))
    np.testing.assert_allclose(found.reveal_logp[row, : len(tokens)][revealed], logp[revealed], rtol=1e-5, atol=2e-5)
    stops = np.flatnonzero(np.isin(tokens[: spec.completion_length], causal.STOPS))
    assert found.completion_mask[row].sum() == (stops[0] + 1 if stops.size else spec.completion_length)
  scores, keep = scored(PARAMS, found, spec, denoiser), found.completion_mask
  np.testing.assert_array_equal(scores.weight, keep)
  if spec.temperature:
    np.testing.assert_allclose(scores.logp[keep], found.reveal_logp[keep], rtol=0, atol=1e-5)
  else:  # the draw has no log-probability
    assert (np.asarray(scores.logp)[keep] < 0).all()


PUBLIC = json.loads((Path(__file__).parent / "goldens" / "public.json").read_text(encoding="utf-8"))
"""The tokens behind each prompt, up to the stop id, that the public code generates: `block_diffusion_generate` of
JetAstra/SDAR c2041a8 with the argmax and its untempered probability in place of a draw, and `generate` of Fast-dLLM v2
7B at temperature 0. Both ran in float32, on torch 2.13 and transformers 4.53.3, with the folders, prompts, blocks and
stop ids of the test. The logit of the mask was minus infinity, and the head of SDAR was multiplied by 4.
"""
PUBLIC_CASES = {
  "sdar static": dict(diffusion_steps=12, schedule="static"),
  "sdar dynamic": dict(diffusion_steps=12, schedule="threshold", threshold=0.4),
  "sdar sequential": dict(diffusion_steps=6, schedule="sequential"),
  "fast one at a time": dict(diffusion_steps=16, schedule="static"),
  "fast threshold": dict(diffusion_steps=16, schedule="threshold", threshold=0.1, max_reveal=8),
  "fast small blocks": dict(diffusion_steps=16, schedule="threshold", threshold=0.1, block_length=4),
}


@pytest.mark.slow(reason="reads folders and compiles programs of its own")
@pytest.mark.parametrize("name", PUBLIC_CASES)
def test_token_for_token_the_public_code(name, tmp_path):
  """With prompts of several lengths modulo the block, in one batch."""
  family, block, length, lengths, stop = ("fast_dllm_qwen", 8, 16, (9, 16, 3, 13), 37)
  if name.startswith("sdar"):
    family, block, length, lengths, stop = ("sdar", 4, 12, (5, 8, 3, 6), 17)
  folders.write(tmp_path / family, family)
  network, params, description = load.load(tmp_path / family, jnp.float32)
  if family == "sdar":
    params |= {"head": 4 * params["head"]}
  parts = dict(mask_id=71, stop_ids=(stop,), known_ids=72, shift=description.shift, block=block)
  prompt, valid = np.zeros((4, max(lengths)), np.int32), np.zeros((4, max(lengths)), bool)
  for row, n in enumerate(lengths):
    prompt[row, max(lengths) - n :], valid[row, max(lengths) - n :] = np.random.RandomState(n).randint(0, 71, n), True
  options = dict(block_length=block, completion_length=length, temperature=0.0, early_exit=True) | PUBLIC_CASES[name]
  with jax.numpy_rank_promotion("allow"):
    found = jax.device_get(
      run(params, prompt, valid, IDS[:4], KEY, SamplerSpec(**options), build_denoiser(network, **parts))
    )
  for row, expected in enumerate(PUBLIC[name]):
    assert found.completion[row][found.completion_mask[row]].tolist() == expected


REFUSED = [
  (dict(block_length=8), {}, r"block_length=8 does not divide the network's block of 4 .* use block_length=4"),
  (dict(block_length=3, completion_length=9, diffusion_steps=9), {}, "block_length=3 does not divide"),
  (
    dict(block_length=2, completion_length=6, diffusion_steps=6),
    {},
    "completion_length=6 is not a multiple of the network's block of 4 tokens: use completion_length=8",
  ),
  (dict(cfg_scale=1.0), {}, "cfg_scale=1.0 masks the prompt .* use cfg_scale=0"),
  (dict(cache="dual"), {}, "cache='dual' is an approximation for full attention; .* use cache='none'"),
]


@pytest.mark.parametrize(("changes", "network", "message"), REFUSED)
def test_what_a_block_causal_network_cannot_do_is_refused(changes, network, message):
  with pytest.raises(ValueError, match=message):
    sampled(dataclasses.replace(SPEC, **changes), causal.denoiser(4, **network))


def test_a_row_draws_the_same_bits_in_any_batch_and_bucket():
  denoiser = causal.denoiser(4)
  whole = sampled(SPEC, denoiser)
  for rows, width in (([0, 3], 8), ([4, 1, 2], 13)):
    part = sampled(SPEC, denoiser, [PROMPTS[i] for i in rows], IDS[rows], width)
    for name in ("completion", "completion_mask", "reveal_step"):
      np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[rows])


def test_a_batch_that_shrinks_draws_what_one_that_does_not_does(monkeypatch):
  spec = dataclasses.replace(SPEC, completion_length=16, diffusion_steps=16)
  ids = np.arange(16, 20, dtype=np.int32)
  whole = sampled(spec, causal.denoiser(4), PROMPTS[:4], ids)
  assert len(set(whole.completion_mask.sum(axis=1).tolist())) > 2, "rows end at different blocks"
  monkeypatch.setattr(sampler, "COMPACT_FROM", 1)
  shrunk = jax.jit(lambda *x: sample(causal.denoiser(4), *x[:3], x[3], x[3], KEY, spec=spec))
  found = jax.device_get(shrunk(PARAMS, whole.prompt, whole.prompt_valid, ids))
  for name in ("completion", "completion_mask", "reveal_step"):
    np.testing.assert_array_equal(getattr(found, name), getattr(whole, name))


def test_nothing_but_the_active_block_is_computed():
  """The widths of a program's passes, and the steps that each block takes."""
  denoiser, widths = causal.denoiser(4), []

  def noted(params, tokens, start, cache):
    widths.append(tokens.shape[1])
    return denoiser.encode_window(params, tokens, start, cache)

  found = sampled(dataclasses.replace(SPEC, early_exit=False), dataclasses.replace(denoiser, encode_window=noted))
  assert widths == [4, 8, 4], "the prompt's block; the block before with the active one; the active one"
  assert SPEC.steps_taken(found.reveal_step).tolist() == [3, 4, 4], "the end of a prompt stands in the first block"


def naive_logp(denoiser, prompt, completion, known):
  """Log p of each token of a row, a block at a time: the tokens of later blocks are not there at all."""
  size, encode = denoiser.block, jax.jit(denoiser.encode)
  clean, found = np.concatenate([prompt, completion]), []
  noisy = np.concatenate([prompt, np.where(known, completion, causal.MASK)])
  for i in range(len(prompt), len(clean)):
    start = i // size * size
    x = np.concatenate([clean[:start], noisy[start : start + size]])
    if denoiser.shift:
      x[start] = clean[start] if i > start else x[start]
    logits = denoiser.logits(PARAMS, encode(PARAMS, jnp.asarray(x[None], jnp.int32), jnp.ones((1, len(x)), bool)))
    found.append(log_softmax(logits[0, i - denoiser.shift])[clean[i]])
  return np.asarray(found)


@pytest.mark.parametrize("shift", [0, 1])
def test_a_block_is_scored_under_the_clean_tokens_before_it(shift):
  denoiser, found = causal.denoiser(4, shift), sampled(SPEC, causal.denoiser(4, shift))
  masked = np.random.default_rng(0).random(found.completion.shape) < 0.6
  logp = jax.jit(functools.partial(masked_logps, denoiser, p_mask_prompt=0.0))(PARAMS, found, KEY, masked)
  for row, prompt in enumerate(PROMPTS):
    within = -(-(len(prompt) + 8) // 4) * 4 - len(prompt)
    expected = naive_logp(denoiser, prompt, found.completion[row, :within], ~masked[row, :within])
    np.testing.assert_allclose(logp[row, :8], expected[:8], rtol=1e-5, atol=2e-5)


def test_from_left_to_right_the_places_of_a_block_share_a_pass(monkeypatch):
  denoiser, made = causal.denoiser(4), []
  found = sampled(SPEC, denoiser)

  def noted(params, clean, noisy, *rest):
    made.append((clean.shape[1], noisy.shape[1]))
    return denoiser.encode_streams(params, clean, noisy, *rest)

  score = functools.partial(left_to_right, dataclasses.replace(denoiser, encode_streams=noted))
  logp = jax.jit(functools.partial(score, spec=SPEC))(PARAMS, found, key=KEY).logp
  assert made == [(16, 4 * 12)]  # one pass over the canvas and a copy of its last three blocks for each place
  tempered = causal.denoiser(4)
  for row, prompt in enumerate(PROMPTS[:2]):
    width = -(-(len(prompt) + 8) // 4) * 4 - len(prompt)
    for k in range(found.completion_mask[row].sum()):
      known = np.arange(width) < k
      x = dataclasses.replace(tempered, head=lambda params: denoiser.head(params) / SPEC.temperature)
      expected = naive_logp(x, prompt, found.completion[row, :width], known)[k]
      np.testing.assert_allclose(logp[row, k], expected, rtol=1e-5, atol=2e-5)
  monkeypatch.setattr(replay, "STATES", 3)  # four places are two passes of two
  again = jax.jit(functools.partial(score, spec=SPEC))(PARAMS, found, key=KEY).logp
  assert made[1:] == [(16, 2 * 12)] * len(made[1:])
  np.testing.assert_allclose(again, logp, rtol=0, atol=1e-5)


def test_runs_of_steps_lie_within_blocks():
  denoiser, found = causal.denoiser(4), sampled(SPEC, causal.denoiser(4))
  merged = scored(PARAMS, found, SPEC, denoiser, 4)
  first = np.isin(found.reveal_step % 4, (0, 2)) & found.completion_mask
  np.testing.assert_allclose(np.asarray(merged.logp)[first], found.reveal_logp[first], rtol=0, atol=1e-5)
  with pytest.raises(ValueError, match="segments=1 makes runs of 8 denoising steps, which do not divide the 4 steps"):
    scored(PARAMS, found, SPEC, denoiser, 1)


def test_an_estimator_without_meaning_for_blocks_is_refused():
  found = sampled(SPEC, causal.denoiser(4))
  with pytest.raises(ValueError, match=r"\(block=4\) scores each block .*: use the estimator elbo, or step_merged"):
    sandwich(causal.denoiser(4), PARAMS, found, SPEC, KEY, samples=1, exponent=1.0)
