"""What rollouts, updates and fine-tuning steps have in their traces, against formulas."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from d1jax.data.sft_batches import SftBatch
from d1jax.diffusion.rollout import Rollout, SamplerSpec
from d1jax.diffusion.sampler import sample
from d1jax.model import build_denoiser
from d1jax.models import lora, transformer
from d1jax.models.lora import LoraSpec
from d1jax.models.transformer import TransformerSize
from d1jax.parallel import multihost
from d1jax.rl.estimators import ESTIMATORS
from d1jax.rl.losses import ClippedSequence, ClippedToken
from d1jax.rl.method import Method
from d1jax.rl.update import update
from d1jax.state import Frozen, create, merge
from d1jax.telemetry import cost, flops
from d1jax.telemetry.cost import Work
from d1jax.training.sft import sft_step
from tests.diffusion.test_sampler import LONG, STOPS, Stopping
from tests.telemetry import formulas

SIZE = TransformerSize(vocab=40, embed=24, heads=6, mlp=50, layers=2, kv_heads=2)
ADAPTERS = LoraSpec(rank=4, alpha=8.0, targets=("q_proj", "up_proj"))
ROWS, PROMPT = 4, 7
OPTIMIZER = optax.sgd(0.1)
KEY = jax.random.key(0)
SAMPLER = SamplerSpec(completion_length=12, diffusion_steps=6, block_length=4)

REACH = cost.Reach(np.asarray([[2, 1, 0], [1, 2, 2]]), np.asarray([[4, 2, 0], [4, 4, 2]]))
"""Of a rollout in two chunks that came to its end early."""

either = pytest.mark.parametrize("adapters", [None, ADAPTERS], ids=["full", "adapters"])


def count(program, *arguments):
  return flops.count(jax.jit(program).trace(*arguments))


def parts(adapters=None, remat=False, shift=0):
  """The formulas' network, the denoiser, what is trained and what is frozen."""
  network = transformer.build(SIZE, remat=remat)
  denoiser = build_denoiser(network, mask_id=3, stop_ids=(2,), known_ids=30, shift=shift)
  base = jax.eval_shape(network.init, KEY)
  model = formulas.Model(SIZE, adapters, remat=remat, shift=shift)
  if adapters is None:
    return model, denoiser, base, Frozen({}, base)
  return model, denoiser, jax.eval_shape(lambda key: lora.init(key, adapters, base), KEY), Frozen(base, {})


def rows(*shape, dtype=jnp.int32):
  return jax.ShapeDtypeStruct((ROWS, *shape), dtype)


def a_rollout(sampler):
  length = sampler.completion_length
  mask, steps, logps = rows(length, dtype=bool), rows(length), rows(length, dtype=jnp.float32)
  return Rollout(rows(), rows(), rows(PROMPT), rows(PROMPT, dtype=bool), rows(length), mask, steps, logps)


@pytest.mark.parametrize(
  "changes",
  [
    {},
    {"cfg_scale": 1.5},
    {"cache": "dual"},
    {"cache": "dual", "diffusion_steps": 12, "refresh_every": 3, "cfg_scale": 0.5},
    {"cache": "window", "look_behind": 2, "look_ahead": 3, "refresh_every": 2},
    {"cache": "prefix", "diffusion_steps": 12},
    {"cache": "dual", "refresh_every": 1},
    {"schedule": "threshold", "threshold": 0.9, "cache": "dual", "refresh_every": 3},
    {"early_exit": True, "cache": "prefix", "diffusion_steps": 12},
  ],
  ids=str,
)
@pytest.mark.few(1, reason="each case traces programs of its own")
@pytest.mark.parametrize("shift", [0, 1])
def test_a_rollout(changes, shift):
  sampler = dataclasses.replace(SAMPLER, **changes)
  model, denoiser, params, _ = parts(shift=shift)
  canvas = PROMPT + sampler.completion_length
  draw = functools.partial(sample, denoiser, spec=sampler)
  counted = count(draw, params, rows(PROMPT), rows(PROMPT, dtype=bool), rows(), rows(), KEY)
  for reach in (cost.whole(sampler, 1, ROWS), cost.whole(sampler, 2, ROWS // 2), REACH):
    found = cost.rollout(counted, sampler, denoiser, PROMPT, reach)
    assert found == formulas.rollout(model, sampler, canvas, reach)
  static = sampler.schedule == "static" and not sampler.early_exit and sampler.cache != "prefix"
  if static:  # the trace says how often each loop runs
    reach = cost.whole(sampler, 1, ROWS)
    assert Work.of(counted, ROWS * 12) == cost.rollout(counted, sampler, denoiser, PROMPT, reach)


@pytest.mark.parametrize("row_multiple", [1, 4])
def test_a_rollout_that_leaves_finished_rows_behind(monkeypatch, row_multiple):
  monkeypatch.setattr("d1jax.diffusion.sampler.COMPACT_FROM", 12)
  sampler = dataclasses.replace(SAMPLER, early_exit=True, cache="dual", cfg_scale=1.0)
  model, denoiser, params, _ = parts()
  draw = functools.partial(sample, denoiser, spec=sampler, row_multiple=row_multiple)
  counted = count(draw, params, rows(PROMPT), rows(PROMPT, dtype=bool), rows(), rows(), KEY)
  assert cost.rollout(counted, sampler, denoiser, PROMPT, REACH) == formulas.rollout(model, sampler, PROMPT + 12, REACH)


def test_a_rollout_with_adapters_beside_a_quantised_base():
  model, denoiser, trainable, frozen = parts(ADAPTERS)
  program = lambda trainable, frozen, *prompts: sample(denoiser, merge(trainable, frozen), *prompts, KEY, spec=SAMPLER)
  counted = count(program, trainable, frozen, rows(PROMPT), rows(PROMPT, dtype=bool), rows(), rows())
  reach = cost.whole(SAMPLER, 1, ROWS)
  found = cost.rollout(counted, SAMPLER, denoiser, PROMPT, reach)
  assert found == formulas.rollout(model, SAMPLER, PROMPT + 12, reach)
  merged = formulas.rollout(dataclasses.replace(model, merges=True), SAMPLER, PROMPT + 12, reach)
  assert merged.flops < found.flops


def method_of(mu, accumulation, beta, estimator="one_step", **options):
  """A method that clips tokens, or sequences where the estimator scores those."""
  options = {"p_mask_prompt": 0.1} | options if estimator == "one_step" else options
  estimator = ESTIMATORS[estimator].bind(**options)
  loss = (ClippedSequence if estimator.per_sequence else ClippedToken)(epsilon=0.2, beta=beta)
  return Method(estimator, loss, num_iterations=mu, accumulation=accumulation)


def check_update(adapters, sampler, method, *, remat=False, tiled=False, reach=None):
  """The count of an update is that of the formulas: the model's and what is repeated, of score and of update."""
  model, denoiser, trainable, frozen = parts(adapters, remat=remat)
  state = jax.eval_shape(lambda: create(lambda _: zeros(trainable), OPTIMIZER, KEY, KEY))
  program = functools.partial(update, method=method, denoiser=denoiser, sampler=sampler, optimizer=OPTIMIZER)
  counted = count(program, state, frozen, a_rollout(sampler), rows(dtype=jnp.float32))
  reach = reach or cost.whole(sampler, 2, ROWS // 2)
  found = cost.update(counted, sampler, method, reach)
  assert found == formulas.update(model, sampler, method, PROMPT + 12, reach, tiled=tiled)
  return found


def zeros(shapes):
  return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


@pytest.mark.few(3, reason="each case traces programs of its own")
@either
@pytest.mark.few(1, reason="each case traces programs of its own")
@pytest.mark.parametrize(("mu", "accumulation", "beta"), [(1, 1, 0.0), (1, 2, 0.1), (3, 1, 0.0), (4, 2, 0.1)])
def test_score_and_update(adapters, mu, accumulation, beta):
  score, steps = check_update(adapters, SAMPLER, method_of(mu, accumulation, beta))
  assert (score.tokens, steps.tokens) == (((mu - 1) + mu * (beta > 0)) * ROWS * 12, mu * ROWS * 12)
  assert score.repeated == steps.repeated == 0
  assert (score.flops == 0) == (mu == 1 and beta == 0)


@pytest.mark.few(1, reason="each case traces programs of its own")
@pytest.mark.parametrize(
  ("adapters", "mu", "beta", "cfg_scale"),
  [
    (None, 1, 0.1, 0.0),
    (ADAPTERS, 1, 0.1, 1.0),
    (ADAPTERS, 3, 0.0, 0.0),
    (None, 3, 0.0, 1.0),
    (ADAPTERS, 3, 0.1, 1.0),
    (None, 3, 0.1, 0.0),
  ],
)
def test_recorded_states_are_scored_once(adapters, mu, beta, cfg_scale):
  sampler = dataclasses.replace(SAMPLER, cfg_scale=cfg_scale)
  score, _ = check_update(adapters, sampler, method_of(mu, 2, beta, "step_merged"))
  assert score.tokens == ((mu > 1) + (beta > 0)) * ROWS * 12


def test_steps_that_no_row_took_are_not_scored():
  early = cost.Reach(np.asarray([[2, 1, 0], [1, 1, 0]]), np.asarray([[2, 2, 0], [2, 2, 0]]))
  method = method_of(2, 2, 0.0, "step_merged")
  score, steps = check_update(None, SAMPLER, method, reach=early)
  assert (score.passes, steps.passes) == (3 * ROWS, 2 * 3 * ROWS)


@pytest.mark.few(1, reason="each case traces programs of its own")
@pytest.mark.parametrize(
  ("name", "options", "remat"),
  [
    ("coupled", {"samples": 1}, True),
    ("elbo", {"samples": 2}, False),
    ("elbo", {"samples": 2, "tile": 8}, True),
    ("quadrature", {"nodes": 3}, True),
    ("sandwich", {"samples": 2, "exponent": 1.5}, False),
    ("step_merged", {"segments": 2}, True),
    ("step_merged", {"segments": 2}, False),
    ("sampled_steps", {"samples": 2}, True),
    ("left_to_right", {}, False),
    ("left_to_right", {"top_entropy": 0.3}, True),
  ],
)
def test_every_estimator(name, options, remat):
  sampler = dataclasses.replace(SAMPLER, cfg_scale=1.0, temperature=0.5)
  check_update(ADAPTERS, sampler, method_of(2, 2, 0.1, name, **options), remat=remat, tiled="tile" in options)


@pytest.mark.parametrize(("adapters", "tile"), [(None, None), (None, 8), (ADAPTERS, None), (ADAPTERS, 8)])
def test_what_saves_memory_is_counted_apart(adapters, tile):
  method, tiled = method_of(2, 1, 0.1, tile=tile), tile is not None
  score, steps = check_update(adapters, SAMPLER, method, remat=True, tiled=tiled)
  kept = formulas.update(parts(adapters)[0], SAMPLER, method, PROMPT + 12, cost.whole(SAMPLER, 1, ROWS), tiled=False)
  assert (score, steps._replace(repeated=0)) == kept


@either
@pytest.mark.parametrize("accumulation", [1, 2])
def test_fine_tuning(adapters, accumulation):
  model, denoiser, trainable, frozen = parts(adapters)
  state = jax.eval_shape(lambda: create(lambda _: zeros(trainable), OPTIMIZER, KEY, KEY))
  step = functools.partial(
    sft_step,
    denoiser=denoiser,
    optimizer=OPTIMIZER,
    accumulation=accumulation,
    p_mask_prompt=0.0,
    logits_tile=None,
  )
  counted = count(step, state, frozen, SftBatch(rows(), rows(PROMPT), rows(PROMPT, dtype=bool), rows(9)))
  assert Work.of(counted, ROWS * 9) == formulas.fine_tuning(model, ROWS, PROMPT + 9, 9, tiled=False)


@pytest.mark.slow(reason="compiles rollouts that shrink")
@pytest.mark.parametrize("row_multiple", [1, 4, 8])
def test_rows_that_end_early_cost_nothing_behind(monkeypatch, row_multiple):
  monkeypatch.setattr("d1jax.diffusion.sampler.COMPACT_FROM", 12)
  stopping = Stopping(3)
  found = stopping.sample(LONG, STOPS, row_multiple)
  reach = cost.reached(LONG, [found], len(STOPS), row_multiple)
  taken = [rows for steps, rows in zip(reach.steps[0], reach.rows[0], strict=True) for _ in range(steps)]
  assert taken == stopping.rows


@pytest.mark.parametrize("early_exit", [False, True])
def test_steps_that_confidence_saves_are_not_counted(early_exit):
  spec = dataclasses.replace(LONG, schedule="threshold", threshold=0.2, max_reveal=3, early_exit=early_exit)
  stopping = Stopping(3)
  found = stopping.sample(spec, [0, 1, 0, 0])
  reach = cost.reached(spec, [found], 4, 1)
  assert [
    rows for steps, rows in zip(reach.steps[0], reach.rows[0], strict=True) for _ in range(steps)
  ] == stopping.rows
  assert len(stopping.rows) < spec.blocks * spec.steps_per_block
  assert reach.rows.shape == reach.steps.shape == (1, spec.blocks)


@pytest.mark.slow(reason="compiles rollouts of four batches")
def test_processes_put_together_what_their_rows_say(monkeypatch):
  monkeypatch.setattr("d1jax.diffusion.sampler.COMPACT_FROM", 12)
  chunks = [Stopping(3).sample(LONG, stops) for stops in (STOPS, STOPS[::-1])]
  alone = cost.reached(LONG, chunks, 8, 1)
  said = []
  monkeypatch.setattr(multihost, "gather", lambda value: said.append(value) or said)
  for half in (slice(0, 4), slice(4, 8)):
    together = cost.reached(LONG, [jax.tree.map(lambda x, half=half: x[half], chunk) for chunk in chunks], 8, 1)
  np.testing.assert_array_equal(together.steps, alone.steps)
  np.testing.assert_array_equal(together.rows, alone.rows)


def test_without_early_exits_every_step_is_taken_and_nobody_is_asked(monkeypatch):
  monkeypatch.setattr(multihost, "gather", None)
  reach = cost.reached(SAMPLER, [a_rollout(SAMPLER)] * 2, 8, 1)
  assert reach.steps.tolist() == [[2, 2, 2]] * 2
  assert reach.rows.tolist() == [[8, 8, 8]] * 2
