import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from d1jax.diffusion.likelihood import one_step
from d1jax.diffusion.rollout import Rollout, SamplerSpec
from d1jax.diffusion.trajectory import step_merged
from d1jax.rl.estimators import Estimator
from d1jax.rl.losses import ClippedSequence, ClippedToken, Likelihood, Loss
from d1jax.rl.method import Method
from d1jax.rl.update import inner_keys, update
from d1jax.state import Frozen, TrainState, create
from tests import toy

OPTIMIZER = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(3e-2, b1=0.9, b2=0.99, weight_decay=0.1))
P_MASK = 0.3
ROLLOUT = toy.rollout(batch=4)
ADVANTAGES = jnp.asarray([1.0, -1.0, 0.4, -0.4])
FROZEN = Frozen({}, toy.params(seed=1))
ESTIMATOR = Estimator(one_step).bind(p_mask_prompt=P_MASK)
FREE, PULLED = ClippedToken(epsilon=0.2), ClippedToken(epsilon=0.2, beta=0.1)
TIGHT, TIGHT_PULLED = ClippedToken(epsilon=0.05), ClippedToken(epsilon=0.05, beta=0.1)


def method(num_iterations: int, accumulation: int, loss: Loss, aggregation: str, **fields) -> Method:
  """Of d1's estimator."""
  fields |= {"num_iterations": num_iterations, "accumulation": accumulation, "aggregation": aggregation}
  return Method(ESTIMATOR, loss, **fields)


def start(step: int = 5) -> TrainState:
  """A state that is not at step 0, with moments that are not 0."""
  state = create(lambda _: toy.params(), OPTIMIZER, jax.random.key(8), jax.random.key(0))
  gradients = jax.tree.map(lambda x: 0.01 * jnp.cos(x), state.trainable)
  _, opt_state = OPTIMIZER.update(gradients, state.opt_state, state.trainable)
  return state._replace(step=jnp.int32(step), opt_state=opt_state)


@functools.partial(jax.jit, static_argnames="method")
def compiled(state, frozen, rollout, advantages, method):
  return update(
    state,
    frozen,
    rollout,
    advantages,
    method=method,
    denoiser=toy.DENOISER,
    sampler=toy.SPEC,
    optimizer=OPTIMIZER,
  )


def run(spec: Method, *, state=None, advantages=ADVANTAGES, rollout=ROLLOUT):
  return compiled(start() if state is None else state, FROZEN, rollout, advantages, method=spec)


@jax.jit
def completion_logps(params, prompt) -> jax.Array:
  """log p of every completion token after these prompts, all completion tokens masked."""
  r = ROLLOUT
  canvas = jnp.concatenate([prompt, jnp.full(r.completion.shape, toy.MASK)], axis=1)
  valid = jnp.concatenate([r.prompt_valid, jnp.ones(r.completion.shape, bool)], axis=1)
  logits = (toy.encode(params, canvas, valid) @ toy.head(params))[:, prompt.shape[1] :]
  logits = jnp.where(jnp.isin(jnp.arange(toy.VOCAB), jnp.asarray(toy.FORBIDDEN))[None, None], -jnp.inf, logits)
  return jnp.take_along_axis(jax.nn.log_softmax(logits), r.completion[..., None], axis=-1)[..., 0]


def masked_prompts(n: int, step: int) -> jax.Array:
  """q' of inner step n: folds of (run key, purpose 3, step, n, sample id), counted from the prompt's end."""
  key = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(jax.random.key(8), 3), step), n)
  prompt = np.array(ROLLOUT.prompt)
  for row, identity in enumerate(ROLLOUT.sample_id):
    uniform = np.asarray(jax.random.uniform(jax.random.fold_in(key, identity), (prompt.shape[1],)))[::-1]
    prompt[row, np.asarray(ROLLOUT.prompt_valid)[row] & (uniform < P_MASK)] = toy.MASK
  return jnp.asarray(prompt)


def weight_of(b: int, i: int, aggregation: str) -> float:
  mask = np.asarray(ROLLOUT.completion_mask)
  share = 1 / mask.sum() if aggregation == "token" else 1 / (mask.shape[0] * mask[b].sum())
  return float(mask[b, i]) * float(share)


@jax.jit
@functools.partial(jax.value_and_grad, has_aux=True)
def naive_loss(params, prompt, old, ref, weights, epsilon, beta):
  """Token by token; returns the loss and (kl, clip fraction, ratio deviation)."""
  logp, mask = completion_logps(params, prompt), np.asarray(ROLLOUT.completion_mask)
  loss = kl = clipped = deviation = jnp.float32(0)
  for b in range(mask.shape[0]):
    for i in range(mask.shape[1]):
      if mask[b, i]:
        weight, share = weights[b, i], 1 / mask.sum()
        ratio = jnp.exp(logp[b, i] - old[b, i])
        bounded = jnp.clip(ratio, 1 - epsilon, 1 + epsilon)
        d = ref[b, i] - logp[b, i]
        k3 = jnp.where(beta > 0, jnp.exp(d) - d - 1, 0.0)
        loss += weight * (beta * k3 - jnp.minimum(ratio * ADVANTAGES[b], bounded * ADVANTAGES[b]))
        kl += share * k3
        clipped += share * (bounded * ADVANTAGES[b] < ratio * ADVANTAGES[b])
        deviation += share * jnp.abs(ratio - 1)
  return loss, (kl, clipped, deviation)


def naive_update(spec: Method):
  state = start()
  params, opt_state, step = state.trainable, state.opt_state, int(state.step)
  weights = np.asarray([[weight_of(b, i, spec.aggregation) for i in range(6)] for b in range(4)], np.float32)
  records = []
  for n in range(spec.num_iterations):
    prompt = masked_prompts(n, step)
    old = completion_logps(state.trainable, prompt)
    ref = completion_logps(FROZEN.reference, prompt)
    (loss, rest), gradient = naive_loss(params, prompt, old, ref, weights, spec.loss.epsilon, spec.loss.beta)
    updates, opt_state = OPTIMIZER.update(gradient, opt_state, params)
    params = optax.apply_updates(params, updates)
    records.append((loss, *rest, optax.tree.norm(gradient)))
  return params, opt_state, step + spec.num_iterations, np.asarray(records)


def assert_close(a, b, tolerance):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


CASES = [
  method(1, 1, FREE, "token"),
  method(1, 2, PULLED, "sequence"),
  method(3, 1, PULLED, "token"),
  method(3, 2, TIGHT, "sequence"),
  method(3, 2, PULLED, "token"),
  method(3, 1, TIGHT_PULLED, "sequence"),
]


@pytest.mark.few(2, reason="each case compiles programs of its own")
@pytest.mark.parametrize("spec", CASES, ids=lambda m: f"mu {m.num_iterations}, {m.accumulation}, {m.aggregation}")
def test_an_update_is_mu_steps_of_the_naive_loop(spec):
  state, metrics = run(spec)
  params, opt_state, step, records = naive_update(spec)
  assert_close(state.trainable, params, 1e-5)
  assert_close(state.opt_state, opt_state, 1e-5)
  assert int(state.step) == step
  names = ("loss", "kl", "clip_fraction", "ratio_deviation", "grad_norm")
  found = np.stack([metrics[name] for name in names], 1)
  np.testing.assert_allclose(found, records, rtol=2e-5, atol=2e-5)
  assert metrics["finite"].all()
  assert found.shape == (spec.num_iterations, 5)
  if spec.num_iterations > 1:
    assert (found[1:, 2] > 0).any(), "the fixture should clip"
  assert (found[:, 1] > 0).all() == bool(spec.loss.beta)


@pytest.mark.slow(reason="compiles programs of its own")
@pytest.mark.parametrize(("aggregation", "parts"), [("token", 2), ("sequence", 4)])
def test_accumulation_changes_nothing(aggregation, parts):
  whole, metrics = run(method(2, 1, PULLED, aggregation))
  split, split_metrics = run(method(2, parts, PULLED, aggregation))
  assert_close(split.trainable, whole.trainable, 1e-6)
  assert_close(split.opt_state, whole.opt_state, 1e-6)
  assert_close(split_metrics, metrics, 1e-6)


@pytest.mark.slow(reason="compiles programs of its own")
def test_tiles_change_nothing():
  spec = method(2, 2, PULLED, "token")
  tiled = dataclasses.replace(spec, estimator=ESTIMATOR.bind(tile=2))
  (state, metrics), (expected, expected_metrics) = run(tiled), run(spec)
  assert_close(
    (state.trainable, state.opt_state, metrics), (expected.trainable, expected.opt_state, expected_metrics), 1e-6
  )


@pytest.mark.few(1, reason="each case compiles programs of its own")
@pytest.mark.parametrize("parts", [1, 2])
def test_at_the_first_inner_step_the_ratio_is_exactly_one(parts):
  _, metrics = run(method(3, parts, PULLED, "token"))
  assert metrics["ratio_deviation"][0] == 0
  assert metrics["clip_fraction"][0] == 0
  assert (metrics["ratio_deviation"][1:] > 1e-3).all()


def test_precomputed_old_log_probabilities_are_the_current_ones():
  """What would be precomputed for the first inner step differs from what it computes by less than 1e-5."""
  state = start()
  key = inner_keys(state.key, state.step, 1)[0]
  score = lambda params: one_step(toy.DENOISER, params, ROLLOUT, toy.SPEC, key, p_mask_prompt=P_MASK).logp
  precomputed = jax.jit(lambda p: jax.lax.map(lambda _: score(p), jnp.zeros(1))[0])(state.trainable)
  (_, current), _ = jax.jit(jax.value_and_grad(lambda p: (jnp.sum(score(p)), score(p)), has_aux=True))(state.trainable)
  assert np.abs(np.asarray(precomputed) - np.asarray(current)).max() <= 1e-5
  np.testing.assert_allclose(current, completion_logps(state.trainable, masked_prompts(0, 5)), atol=1e-5)


def test_inner_keys_are_of_purpose_step_and_iteration():
  key = jax.random.key(8)
  found = inner_keys(key, jnp.int32(5), 3)
  for n in range(3):
    expected = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, 3), 5), n)
    np.testing.assert_array_equal(jax.random.key_data(found[n]), jax.random.key_data(expected))


def test_no_advantage_and_no_kl_leave_the_gradient_at_zero():
  _, metrics = run(method(3, 2, TIGHT, "sequence"), advantages=jnp.zeros(4))
  np.testing.assert_array_equal(metrics["grad_norm"], 0)
  np.testing.assert_array_equal(metrics["loss"], 0)


def test_what_lies_behind_the_stop_teaches_nothing():
  spec = method(3, 1, PULLED, "token")
  assert not np.asarray(ROLLOUT.completion_mask).all()
  spoilt = ROLLOUT._replace(completion=jnp.where(ROLLOUT.completion_mask, ROLLOUT.completion, toy.MASK))
  (state, metrics), (expected, expected_metrics) = run(spec, rollout=spoilt), run(spec)
  assert_close(state._replace(key=0), expected._replace(key=0), 1e-6)
  assert_close(metrics, expected_metrics, 1e-6)


@pytest.mark.parametrize("rubbish", [jnp.nan, jnp.inf])
def test_a_reward_that_is_not_finite_changes_nothing(rubbish):
  state = start()
  new, metrics = run(method(3, 2, PULLED, "token"), state=state, advantages=ADVANTAGES.at[1].set(rubbish))
  assert not metrics["finite"].any()
  assert int(new.step) == int(state.step)
  for a, b in zip(jax.tree.leaves(new._replace(key=0)), jax.tree.leaves(state._replace(key=0)), strict=True):
    np.testing.assert_array_equal(a, b)


def test_a_batch_that_micro_batches_do_not_divide_is_refused():
  with pytest.raises(ValueError, match="3 micro-batches do not divide a batch of 4 rows"):
    run(method(1, 3, FREE, "token"))


RECORDED = Estimator(step_merged, recorded=True, redraws=False)
WEIGHTED = Method(RECORDED, FREE, importance_cap=1e6)
ONE = SamplerSpec(completion_length=1, diffusion_steps=1, block_length=1, temperature=0.7)
SGD = optax.sgd(1.0)


def enumerated(sample_logp: jax.Array, rewards: jax.Array) -> tuple[Rollout, jax.Array]:
  """All completions of one token, each once, as another distribution drew them; weighed by how often it would."""
  tokens = jnp.arange(toy.VOCAB - len(toy.FORBIDDEN))
  prompt, valid = toy.prompts([3] * tokens.size, 5, seed=6)
  prompt = jnp.broadcast_to(prompt[:1], prompt.shape)
  every, zeros = jnp.ones((tokens.size, 1), bool), jnp.zeros((tokens.size, 1), jnp.int32)
  rollout = Rollout(tokens, zeros[:, 0], prompt, valid, tokens[:, None], every, zeros, sample_logp[:, None])
  return rollout, tokens.size * jnp.exp(sample_logp) * rewards


def one_token_logp(params, rollout) -> jax.Array:
  """log p of each one-token completion under the tempered distribution, from the logits of its mask."""
  canvas = jnp.concatenate([rollout.prompt, jnp.full_like(rollout.completion, toy.MASK)], axis=1)
  valid = jnp.concatenate([rollout.prompt_valid, rollout.completion_mask], axis=1)
  logits = toy.encode(params, canvas, valid)[0, -1] @ params["head"]
  return jax.nn.log_softmax(jnp.where(jnp.arange(toy.VOCAB) < toy.MASK, logits, -jnp.inf) / ONE.temperature)[: toy.MASK]


def weighted_update(spec, rollout, advantages, frozen=FROZEN, **stale):
  state = create(lambda _: toy.params(scale=0.7), SGD, jax.random.key(8), jax.random.key(0))
  fixed = {"denoiser": toy.DENOISER, "sampler": ONE, "optimizer": SGD, "method": spec}
  new, metrics = jax.jit(functools.partial(update, **fixed))(state, frozen, rollout, advantages, **stale)
  step = jax.tree.map(lambda a, b: a - b, new.trainable, state.trainable)
  return state.trainable, step, metrics


@pytest.mark.slow(reason="compiles programs of its own")
@pytest.mark.parametrize(("cap", "parts"), [(1e6, 1), (1.2, 11), (None, 1)])
def test_weights_make_the_gradient_that_of_the_policys_own_draws(cap, parts):
  """By enumeration: the expected step from draws of another distribution q is the gradient of the mean reward under the
  policy p; with a cap, of its part min(p, cap q); without weights it is another.
  """
  rng = np.random.default_rng(1)
  sample_logp = jnp.asarray(np.log(rng.dirichlet(np.ones(11))), jnp.float32)
  rewards = jnp.asarray(rng.normal(size=11), jnp.float32)
  rollout, advantages = enumerated(sample_logp, rewards)
  spec = dataclasses.replace(WEIGHTED, importance_cap=cap, accumulation=parts)
  params, step, metrics = weighted_update(spec, rollout, advantages)
  p, q = np.exp(one_token_logp(params, rollout)), np.exp(sample_logp)
  assert 0.1 < (np.asarray(p) > 1.2 * q).mean() < 0.9, "the cap should cut some"
  kept = q if cap is None else np.minimum(p, cap * q)
  expected = jax.grad(lambda params: jnp.sum(kept * rewards * one_token_logp(params, rollout)))(params)
  assert_close(step, expected, 1e-5)
  of_policy = jax.grad(lambda params: jnp.sum(jnp.exp(one_token_logp(params, rollout)) * rewards))(params)
  gap = max(float(np.abs(a - b).max()) for a, b in zip(jax.tree.leaves(step), jax.tree.leaves(of_policy), strict=True))
  assert gap < 1e-5 if cap == 1e6 else gap > 1e-3
  if cap is None:
    assert "importance/effective_sample_size" not in metrics
  else:
    weights = kept / q
    expected_share = weights.sum() ** 2 / (weights**2).sum() / 11
    np.testing.assert_allclose(metrics["importance/effective_sample_size"], [expected_share], rtol=1e-5)


@pytest.mark.slow(reason="compiles programs of its own")
def test_weights_are_of_the_policy_before_the_update_at_every_inner_step():
  rng = np.random.default_rng(3)
  rewards = jnp.asarray(rng.normal(size=11), jnp.float32)
  rollout, advantages = enumerated(jnp.asarray(np.log(rng.dirichlet(np.ones(11))), jnp.float32), rewards)
  _, _, metrics = weighted_update(dataclasses.replace(WEIGHTED, num_iterations=3), rollout, advantages)
  assert (metrics["ratio_deviation"][1:] > 1e-3).all(), "the policy moves"
  shares = metrics["importance/effective_sample_size"]
  np.testing.assert_allclose(shares, shares[0], rtol=1e-6)


@pytest.mark.parametrize(("recorded", "passes"), [(True, 1 + 1 + 3), (False, 2 + 3 + 3)])
def test_recorded_states_are_scored_once_under_the_old_and_the_reference_policy(recorded, passes):
  calls = []

  def counting(denoiser, params, rollout, spec, key):
    jax.debug.callback(lambda: calls.append(1))
    return step_merged(denoiser, params, rollout, spec, key)

  rollout, advantages = enumerated(jnp.full(11, -1.0), jnp.ones(11))
  spec = Method(Estimator(counting, redraws=not recorded), PULLED, num_iterations=3)
  jax.block_until_ready(weighted_update(spec, rollout, advantages))
  jax.effects_barrier()
  assert len(calls) == passes


@pytest.mark.slow(reason="compiles programs of its own")
@pytest.mark.parametrize("loss", [Likelihood(), ClippedSequence(epsilon=0.1)], ids=str)
@pytest.mark.parametrize("parts", [1, 2])
def test_what_a_loss_does_not_need_is_not_scored(loss, parts):
  """Passes: of mu inner steps, and of the old policy for a ratio at those behind the first."""
  calls = []

  def counting(denoiser, params, rollout, spec, key):
    jax.debug.callback(lambda: calls.append(1))
    return one_step(denoiser, params, rollout, spec, key, p_mask_prompt=P_MASK)

  spec = dataclasses.replace(method(3, parts, loss, "sequence"), estimator=Estimator(counting))
  fixed = {"denoiser": toy.DENOISER, "sampler": toy.SPEC, "optimizer": OPTIMIZER, "method": spec}
  _, metrics = jax.jit(functools.partial(update, **fixed))(start(), FROZEN, ROLLOUT, ADVANTAGES)
  jax.block_until_ready(metrics)
  jax.effects_barrier()
  assert len(calls) == parts * (3 if loss == Likelihood() else 2 + 3)
  assert ("clip_fraction" in metrics) == (loss != Likelihood())
  assert (metrics["kl"] == 0).all()


@pytest.mark.slow(reason="compiles programs of its own")
def test_the_reference_can_be_watched_without_a_penalty():
  plain, watched = (run(method(2, 2, FREE, "token", score_reference=watch)) for watch in (False, True))
  assert_close(watched[0].trainable, plain[0].trainable, 1e-7)
  barely = run(method(2, 2, ClippedToken(epsilon=0.2, beta=1e-6), "token"))[1]
  np.testing.assert_allclose(watched[1]["kl"], barely["kl"], rtol=1e-4)
  assert (watched[1]["reference_gap"] > 0).all()
  assert (plain[1]["kl"] == 0).all()
  assert "reference_gap" not in plain[1]


@pytest.mark.slow(reason="compiles programs of its own")
def test_a_pull_towards_the_old_policy_begins_at_nothing():
  losses = (ClippedToken(epsilon=0.2, beta=beta, kl_against="old") for beta in (0.0, 0.5))
  free, held = (run(method(2, 2, loss, "token"))[1] for loss in losses)
  np.testing.assert_allclose(held["loss"][0], free["loss"][0], rtol=1e-6)
  np.testing.assert_allclose(held["grad_norm"][0], free["grad_norm"][0], rtol=1e-6)
  assert held["loss"][1] > free["loss"][1]
