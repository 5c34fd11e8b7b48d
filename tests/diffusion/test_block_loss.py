"""Supervised fine-tuning of block-causal networks, against a loop over blocks, each one alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d1jax.diffusion.corruption import LLADA, NoiseSpec, noise
from d1jax.diffusion.likelihood import denoising_loss, targets
from tests.diffusion import causal
from tests.toy import log_softmax

KEY = jax.random.key(11)
PARAMS = causal.params()
IDS = np.asarray([40, 7, 19, 3, 28], np.int32)
STOP, FILL = causal.STOPS[1], causal.STOPS[0]
RNG = np.random.default_rng(1)
CONTENT = [i for i in range(causal.MASK) if i not in causal.STOPS]
PROMPTS = [RNG.choice(CONTENT, n).tolist() for n in (8, 5, 6, 7, 1)]
ANSWERS = [[*RNG.choice(CONTENT, n).tolist(), STOP] for n in (2, 6, 0, 3)] + [RNG.choice(CONTENT, 7).tolist()]
"""The last one was cut: it has no stop id."""
COMPLEMENT = np.asarray([False, True, False, True, True])


def batch(width, length, rows=range(5)):
  prompt, valid = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), bool)
  completion = np.full((len(rows), length), FILL, np.int32)
  for row, i in enumerate(rows):
    prompt[row, width - len(PROMPTS[i]) :], valid[row, width - len(PROMPTS[i]) :] = PROMPTS[i], True
    completion[row, : len(ANSWERS[i])] = ANSWERS[i]
  return prompt, valid, completion, IDS[list(rows)]


@functools.partial(jax.jit, static_argnames=("denoiser", "spec"))
def loss(prompt, valid, completion, ids, denoiser, spec=LLADA, complement=None):
  tokens, weight = targets(denoiser, valid, completion, fill=FILL, rows=len(ids))
  return denoising_loss(denoiser, PARAMS, prompt, valid, tokens, weight, ids, KEY, noise=spec, complement=complement)[0]


@functools.cache
def alone(denoiser):
  encode = lambda x, valid: denoiser.logits(PARAMS, denoiser.encode(PARAMS, x, valid))[0]
  return jax.jit(encode)


def naive(denoiser, i, length, spec, complement):
  """The loss of one row: the clean tokens before a block, and the block with its masks; nothing behind it."""
  prompt, answer, size = PROMPTS[i], ANSWERS[i], denoiser.block
  p, encode = len(prompt), alone(denoiser)
  count = -(-(p + len(answer)) // size) * size - p if answer[-1] == STOP else length
  total = -(-(p + length) // size) * size
  clean = np.asarray([*prompt, *answer, *[FILL] * (total - p - len(answer))])
  time, uniform = (np.asarray(x)[0] for x in noise(KEY, jnp.asarray(IDS[i : i + 1]), total))
  time = np.float32(spec.mask_ratio[0]) + np.float32(spec.mask_ratio[1] - spec.mask_ratio[0]) * time
  masked = uniform[:count] < time
  masked[np.argmin(uniform[:count])] = True
  if complement:
    masked, time = ~masked, 1 - time
  noisy = np.concatenate([prompt, np.where(masked, causal.MASK, clean[p : p + count]), [causal.MASK] * total])[:total]
  found = 0.0
  for start in range(p // size * size, p + count, size):
    end = start + size
    x = np.where(np.arange(total) < start, clean, noisy)
    if denoiser.shift and start >= p:
      x[start] = clean[start]
    logits = encode(jnp.asarray(x[None], jnp.int32), jnp.arange(total)[None] < end)
    for at in range(max(start, p), min(end, p + count)):
      if masked[at - p]:
        found -= log_softmax(logits[at - denoiser.shift])[clean[at]]
  return found / (count * time if spec.weighting == "inverse" else max(masked.sum(), 1))


FLAT = NoiseSpec((0.3, 0.8), "flat", complementary=True)
CASES = {
  "blocks of 4": (4, 0, LLADA, False),
  "next token": (4, 1, LLADA, False),
  "one token a block": (1, 0, LLADA, False),
  "one token a block, next token": (1, 1, LLADA, False),
  "complements": (4, 0, NoiseSpec((0.001, 0.999), complementary=True), True),
  "flat": (4, 0, FLAT, False),
  "flat, complements": (4, 0, FLAT, True),
}


@pytest.mark.few(3, reason="each case compiles programs of its own")
@pytest.mark.parametrize("name", CASES)
def test_the_loss_is_that_of_a_loop_over_blocks(name):
  block, shift, spec, complementary = CASES[name]
  denoiser, length = causal.denoiser(block, shift), 7
  found = loss(*batch(8, length), denoiser, spec, COMPLEMENT if complementary else None)
  rows = [naive(denoiser, i, length, spec, complementary and COMPLEMENT[i]) for i in range(5)]
  np.testing.assert_allclose(found, np.mean(rows), rtol=1e-5)


def test_a_row_learns_the_same_in_any_bucket():
  """Up to the end of the block with the first stop id, even if the bucket ends before."""
  denoiser, rows = causal.denoiser(4), range(4)
  base = loss(*batch(8, 7, rows), denoiser)
  np.testing.assert_allclose(loss(*batch(13, 16, rows), denoiser), base, rtol=1e-6)
  prompt, valid, completion, ids = batch(8, 7, rows)
  _, weight = targets(denoiser, *map(jnp.asarray, (valid, completion)), fill=FILL, rows=1)
  assert [(w > 0).sum() for w in np.asarray(weight)] == [4, 7, 2, 5]
  np.testing.assert_allclose(weight.sum(axis=1), 1, rtol=1e-6)
  completion[0, 4:] = CONTENT[0]
  np.testing.assert_array_equal(loss(prompt, valid, completion, ids, denoiser), base)
  completion[0, 3] = CONTENT[0]  # behind the stop id, but in its block, which the sampler fills too
  assert loss(prompt, valid, completion, ids, denoiser) != base


def test_one_block_over_the_canvas_is_full_attention():
  whole, full = causal.denoiser(16), causal.denoiser(None)
  prompt, valid, completion, _ = (np.repeat(x[:1], 6, axis=0) for x in batch(8, 8))
  given, often = (prompt, valid, completion, np.arange(6, dtype=np.int32)), NoiseSpec((0.5, 1.0))
  np.testing.assert_allclose(loss(*given, whole, often), loss(*given, full, often), rtol=1e-5)


def test_at_least_one_token_is_masked():
  never = NoiseSpec((1e-6, 1e-6), "flat")
  assert loss(*batch(8, 7), causal.denoiser(4), never) > 0
