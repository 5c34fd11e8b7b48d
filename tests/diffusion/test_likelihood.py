import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d1jax.diffusion.corruption import corrupt, mask_prompt
from d1jax.diffusion.likelihood import denoising_loss, one_step, token_logps
from tests import toy
from tests.jaxprs import shapes

KEY = jax.random.key(11)
PARAMS = toy.params()
ROLLOUT = toy.rollout()


def naive_logps(params, canvas, valid, prompt_length, tokens) -> np.ndarray:
  """log p(token) at each completion position, row by row, in float64."""
  found = np.zeros(tokens.shape)
  for row in range(tokens.shape[0]):
    logits = toy.encode(params, canvas[row : row + 1], valid[row : row + 1]) @ toy.head(params)
    logp = toy.log_softmax(toy.allowed(np.asarray(logits))[0])
    for i in range(tokens.shape[1]):
      found[row, i] = logp[prompt_length + i, tokens[row, i]]
  return found


@pytest.mark.parametrize("p_mask_prompt", [0.0, 0.5, 1.0])
def test_one_step_scores_a_fully_masked_completion_after_a_masked_prompt(p_mask_prompt):
  r = ROLLOUT
  scores = one_step(toy.DENOISER, PARAMS, r, toy.SPEC, KEY, p_mask_prompt=p_mask_prompt)
  prompt = np.array(r.prompt)
  for row, identity in enumerate(r.sample_id):
    uniform = np.asarray(jax.random.uniform(jax.random.fold_in(KEY, identity), (prompt.shape[1],)))
    for distance in range(prompt.shape[1]):
      position = prompt.shape[1] - 1 - distance
      if r.prompt_valid[row, position] and uniform[distance] < p_mask_prompt:
        prompt[row, position] = toy.MASK
  changed = (prompt != np.asarray(r.prompt))[np.asarray(r.prompt_valid)].mean()
  assert changed == p_mask_prompt or 0 < changed < 1
  canvas = np.concatenate([prompt, np.full(r.completion.shape, toy.MASK)], axis=1)
  valid = np.concatenate([r.prompt_valid, np.ones(r.completion.shape, bool)], axis=1)
  expected = naive_logps(PARAMS, jnp.asarray(canvas), jnp.asarray(valid), prompt.shape[1], r.completion)
  np.testing.assert_allclose(scores.logp, expected, rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(scores.weight, np.asarray(r.completion_mask, np.float32))
  assert scores.upper is None


def test_the_estimate_ignores_sampler_order_and_padding_width():
  score = functools.partial(one_step, toy.DENOISER, PARAMS, spec=toy.SPEC, key=KEY, p_mask_prompt=0.5)
  base = score(rollout=ROLLOUT).logp
  order = jnp.asarray([2, 0, 3, 1])
  moved = score(rollout=jax.tree.map(lambda x: x[order], ROLLOUT)).logp
  np.testing.assert_allclose(moved, base[order], rtol=1e-6, atol=1e-6)
  wide = ROLLOUT._replace(
    prompt=jnp.pad(ROLLOUT.prompt, ((0, 0), (4, 0)), constant_values=5),
    prompt_valid=jnp.pad(ROLLOUT.prompt_valid, ((0, 0), (4, 0))),
  )
  np.testing.assert_allclose(score(rollout=wide).logp, base, rtol=2e-5, atol=2e-5)


def test_probabilities_of_all_tokens_add_up_to_one():
  """One density: what is forbidden has none of it."""
  every = [i for i in range(toy.VOCAB) if i not in toy.FORBIDDEN]
  score = lambda token: (
    one_step(
      toy.DENOISER,
      PARAMS,
      ROLLOUT._replace(completion=jnp.full_like(ROLLOUT.completion, token)),
      toy.SPEC,
      KEY,
      p_mask_prompt=0.3,
    ).logp
  )
  np.testing.assert_allclose(sum(np.exp(score(t)) for t in every), 1.0, rtol=1e-5)


def tile_case(tile):
  rng = np.random.default_rng(0)
  hidden = jnp.asarray(rng.normal(size=(4, 12, toy.EMBED)), jnp.float32)
  tokens = jnp.asarray(rng.integers(0, toy.MASK, (4, 12)), jnp.int32)
  weights = jnp.asarray(rng.normal(size=(4, 12)), jnp.float32)

  def objective(params, hidden):
    return jnp.sum(weights * token_logps(toy.DENOISER, params, hidden, tokens, tile))

  return objective, (PARAMS, hidden), token_logps(toy.DENOISER, PARAMS, hidden, tokens, tile)


@pytest.mark.few(2, reason="each case compiles programs of its own")
@pytest.mark.parametrize("tile", [1, 3, 13, 100])
def test_tiles_change_neither_values_nor_gradients(tile):
  whole, args, logps = tile_case(None)
  tiled, _, tiled_logps = tile_case(tile)
  np.testing.assert_allclose(tiled_logps, logps, rtol=1e-6, atol=1e-6)
  gradients = (jax.jit(jax.grad(f, argnums=(0, 1)))(*args) for f in (whole, tiled))
  for a, b in zip(*map(jax.tree.leaves, gradients), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_full_logits_exist_in_neither_direction():
  whole, args, _ = tile_case(None)
  tiled, _, _ = tile_case(3)
  largest = lambda f: max(int(np.prod(s)) for s in shapes(f, *args))
  assert largest(whole) == 4 * 12 * toy.VOCAB, "the check must see what it looks for"
  for function in (tiled, jax.grad(tiled, argnums=(0, 1))):
    assert (4 * 12, 1, 3) in shapes(function, *args)
    assert largest(function) == 4 * 12 * toy.EMBED


SFT_IDS = jnp.asarray([31, 5, 12, 8], jnp.int32)


def sft_loss(params, weight, tile=None, key=KEY):
  r = ROLLOUT
  return denoising_loss(toy.DENOISER, params, r.prompt, r.prompt_valid, r.completion, weight, SFT_IDS, key, tile=tile)


WEIGHT = jnp.asarray(np.random.default_rng(5).uniform(0.1, 1, ROLLOUT.completion.shape), jnp.float32)


def test_denoising_loss_is_a_weighted_sum_over_masked_tokens():
  noisy = corrupt(KEY, SFT_IDS, ROLLOUT.completion, toy.MASK)
  masked = np.asarray(noisy.masked)
  assert 0 < masked.sum() < masked.size
  canvas = jnp.concatenate([ROLLOUT.prompt, noisy.tokens], axis=1)
  valid = jnp.concatenate([ROLLOUT.prompt_valid, jnp.ones(masked.shape, bool)], axis=1)
  logp = naive_logps(PARAMS, canvas, valid, ROLLOUT.prompt.shape[1], ROLLOUT.completion)
  loss, cross_entropy = 0.0, []
  for row in range(masked.shape[0]):
    for i in range(masked.shape[1]):
      if masked[row, i]:
        loss += float(WEIGHT[row, i]) * -logp[row, i] / float(noisy.time[row])
        cross_entropy.append(-logp[row, i])
  found, metrics = sft_loss(PARAMS, WEIGHT)
  np.testing.assert_allclose(found, loss, rtol=1e-5)
  np.testing.assert_allclose(metrics["masked_ce"], np.mean(cross_entropy), rtol=1e-5)


@pytest.mark.parametrize("tile", [None, 2])
def test_gradient_of_the_denoising_loss(tile):
  noisy = corrupt(KEY, SFT_IDS, ROLLOUT.completion, toy.MASK)
  length = ROLLOUT.prompt.shape[1]

  def by_hand(params):
    canvas = jnp.concatenate([ROLLOUT.prompt, noisy.tokens], axis=1)
    valid = jnp.concatenate([ROLLOUT.prompt_valid, jnp.ones(noisy.masked.shape, bool)], axis=1)
    logits = toy.encode(params, canvas, valid)[:, length:] @ toy.head(params)
    exponentials = jnp.exp(logits).at[..., jnp.asarray(toy.FORBIDDEN)].set(0.0)
    chosen = jnp.sum(jax.nn.one_hot(ROLLOUT.completion, toy.VOCAB) * logits, axis=-1)
    cross_entropy = jnp.log(jnp.sum(exponentials, axis=-1)) - chosen
    return jnp.sum(WEIGHT * noisy.masked * cross_entropy / noisy.time[:, None])

  expected = jax.jit(jax.grad(by_hand))(PARAMS)
  found, _ = jax.jit(jax.grad(functools.partial(sft_loss, tile=tile), has_aux=True))(PARAMS, WEIGHT)
  scale = max(float(jnp.abs(g).max()) for g in expected.values())
  for name, gradient in expected.items():
    np.testing.assert_allclose(found[name] / scale, gradient / scale, rtol=1e-5, atol=1e-6)


def test_the_loss_is_linear_in_the_weights_and_zero_without_any():
  once, _ = sft_loss(PARAMS, WEIGHT)
  twice, _ = sft_loss(PARAMS, 2 * WEIGHT)
  none, metrics = sft_loss(PARAMS, jnp.zeros_like(WEIGHT))
  np.testing.assert_allclose(twice, 2 * once, rtol=1e-6)
  assert none == 0
  assert metrics["masked_ce"] > 0


def test_the_weight_one_over_t_makes_the_loss_unbiased():
  """The expectation over masks of mask/t is 1: with constant cross-entropy the loss is the weighted sum of it."""
  flat = {**PARAMS, "head": jnp.zeros_like(PARAMS["head"])}
  uniform = np.log(toy.VOCAB - len(toy.FORBIDDEN))
  one = jax.jit(jax.vmap(lambda k: sft_loss(flat, jnp.full(WEIGHT.shape, 1 / WEIGHT.size), key=k)[0]))
  losses = np.asarray(one(jax.random.split(jax.random.key(0), 4000)))
  assert abs(losses.mean() - uniform) < 4 * losses.std() / np.sqrt(losses.size)


def test_prompt_masks_and_corruption_share_no_draws():
  prompt = jnp.zeros((2000, 1), jnp.int32)
  ids = jnp.arange(2000, dtype=jnp.int32)
  a = np.asarray(mask_prompt(KEY, ids, prompt, jnp.ones((2000, 1), bool), 0.5, toy.MASK)[:, 0] == toy.MASK)
  b = np.asarray(corrupt(KEY, ids, prompt, toy.MASK).time < 0.5)
  assert abs((a == b).mean() - 0.5) < 0.05


@pytest.mark.slow(reason="compiles programs of its own")
def test_dropout_keys_belong_to_samples_and_places_not_to_the_padding():
  seen = []

  def encode(params, tokens, valid, dropout=None):
    seen.append(None if dropout is None else np.asarray(jax.random.key_data(dropout)))
    return toy.encode(params, tokens, valid)

  denoiser = dataclasses.replace(toy.DENOISER, encode=encode)
  completion = jnp.full((2, 4), 5, jnp.int32)

  def loss(ids, width, **keys):
    prompt, valid = toy.prompts([2, 2], width)
    denoising_loss(denoiser, PARAMS, prompt, valid, completion, jnp.ones((2, 4)), jnp.asarray(ids), KEY, **keys)
    return seen[-1]

  assert loss([7, 9], 3) is None
  narrow, wide = (loss([7, 9], width, dropout_key=KEY) for width in (3, 5))
  assert narrow.shape[:2] == (2, 7)
  np.testing.assert_array_equal(narrow, wide[:, 2:])
  np.testing.assert_array_equal(loss([9, 7], 3, dropout_key=KEY), narrow[::-1])
