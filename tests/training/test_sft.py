"""Fine-tuning on a file: length buckets, truncation, the held-out loss."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from d1jax import keys, recipe
from d1jax.data.packing import Packer
from d1jax.data.sft_batches import SftBatch
from d1jax.diffusion.corruption import NoiseSpec
from d1jax.diffusion.likelihood import denoising_loss, targets
from d1jax.errors import RunError
from d1jax.models.transformer import shaken
from d1jax.run import experiment as experiments
from d1jax.run.metrics import read_records
from d1jax.state import Frozen, create
from d1jax.tasks import held_out
from d1jax.training import configured, sft
from d1jax.training.held_out_loss import HeldOutLoss
from d1jax.training.sft_data import Options
from tests.diffusion import causal
from tests.jobs import small

ROWS = [
  {"question": f"What is {i} + {i}?", "thinking_trajectories": [f"{i} and {i}. " * (1 + i % 4)], "attempt": f"{2 * i}"}
  for i in range(48)
]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  folder = tmp_path_factory.mktemp("data")
  (folder / "solved.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
  return folder


def job(root, workdir, **changes):
  fields = {
    "sft__data": str(root / "solved.jsonl"),
    "sft__held_out": 0.2,
    "sft__prompt_buckets": (160,),
    "sft__completion_buckets": (72, 112),
    "sft__steps": 8,
    "sft__validate_every": 4,
    "tokenizer__vocab_size": 512,
    "task__style": "d1",
    "evaluation__prompt_buckets": (900,),
  }
  return small(workdir, "sft", **(fields | changes))


@pytest.mark.slow(reason="runs the recipe")
def test_a_file_trains_in_buckets_and_validates_by_its_held_out_loss(root, tmp_path, capsys):
  results = recipe.run(job(root, tmp_path / "run"))
  records = read_records(tmp_path / "run" / "metrics.jsonl")
  validated = [r["validation"] for r in records if "validation" in r]
  assert len(validated) == 2
  assert validated[0] < validated[1] < 0, "minus the loss, which falls"
  assert results["after"]["n"] == 24
  out = capsys.readouterr().out
  assert "tokens in buckets of" in out
  computed = {round(r["tokens_per_second"] * r["seconds"]) for r in records}
  assert computed <= {16 * 72, 16 * 112}
  assert len(computed) == 2, "both buckets came"


def test_demonstrations_of_test_questions_are_left_out(root, tmp_path, capsys, monkeypatch):
  config = job(root, tmp_path, sft__held_out=0.0)
  asked = held_out.fingerprint(held_out.normalize(ROWS[3]["question"].upper()))
  listed, changed = held_out.listed, {"math": frozenset([asked]), "gsm8k": frozenset()}
  monkeypatch.setattr(held_out, "listed", lambda task: changed.get(task, listed(task)))
  found, _ = configured.demonstrations(experiments.build(config, None))
  assert len(found.prompts) == len(ROWS) - 1
  assert "left out 1 of 48 demonstrations, which answer test questions" in capsys.readouterr().out


@pytest.mark.slow(reason="compiles an update for each pair of buckets")
def test_every_pair_of_buckets_is_compiled_before_the_first_step(root, tmp_path):
  config = job(root, tmp_path, sft__prompt_buckets=(140, 160))
  experiment = experiments.build(config, None)
  steps = sft.Steps(experiment.model, configured.fine_tuning(config), experiment.optimizer(config.sft, 8))
  assert set(steps.compiled) == {(140, 72), (140, 112), (160, 72), (160, 112)}


@pytest.mark.slow(reason="compiles programs of its own")
def test_the_held_out_loss_is_a_function_of_the_weights(root, tmp_path):
  config = job(root, tmp_path)
  experiment = experiments.build(config, None)
  _, validating = configured.demonstrations(experiment)
  made = lambda: HeldOutLoss(experiment.model, validating, configured.fine_tuning(config))
  loss = made()
  weights = experiment.model.weights
  start = weights.start()
  first, again = (
    loss(start, weights.frozen),
    made()(start, weights.frozen),
  )
  assert first == again
  # Uniform predictions: the loss a token is log V times the mean of masked / t, which is 1 in expectation.
  flat = {**start, "head": jax.tree.map(np.zeros_like, jax.device_get(start["head"]))}
  known = experiment.model.denoiser.vocab - len(experiment.model.denoiser.forbidden_ids)
  found = loss(flat, weights.frozen)
  assert found.loss == pytest.approx(np.log(known), rel=0.15)
  np.testing.assert_allclose(found.by_level, np.log(known), rtol=1e-5)  # at every level
  assert list(found.figures) == ["held_out_loss", *(f"held_out_ce/t{percent}" for percent in (25, 50, 75, 100))]


def test_long_answers_are_left_out_or_cut(root, tmp_path, capsys):
  for truncate, words in ((False, "left out"), (True, "cut")):
    config = job(root, tmp_path, sft__completion_buckets=(72, 80), sft__truncate=truncate)
    found, _ = configured.demonstrations(experiments.build(config, None))
    long = sum(len(answer) > 80 for answer in found.completions)
    assert 0 < long < len(found.completions)
    assert f"{words} {long} of {len(found.completions)} answers longer than 80 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"sft__data": "nowhere.jsonl"}, "nowhere.jsonl is missing, expected a file; check the path"),
    ({"sft__held_out": 1.5}, "held_out=1.5"),
    ({"sft__prompt_buckets": (20,)}, "none of .* demonstrations fits sft.prompt_buckets"),
    ({"model__block": 4, "sft__completion_buckets": (2, 112)}, "completion_buckets=.2, 112. has a bucket"),
    ({"sft__complementary": True}, r"sft.complementary=True .* use mask_ratio=\(0.001, 0.999\), or weighting='flat'"),
  ],
)
def test_bad_files_and_buckets_are_one_line(root, tmp_path, changes, message):
  with pytest.raises(RunError, match=message) as caught:
    recipe.run(job(root, tmp_path / "run", **changes))
  assert "\n" not in str(caught.value)
  assert not (tmp_path / "run").exists()


def demonstrations(rows=4):
  """Prompts and answers of ids that the small causal networks know."""
  draws = np.random.default_rng(3)
  prompt, completion = draws.integers(9, 12, (rows, 6)), draws.integers(9, 12, (rows, 7))
  completion[:, 5:] = causal.STOPS[0]
  ids, valid = np.arange(20, 20 + rows), jnp.ones((rows, 6), bool)
  ids, prompt, completion = (jnp.asarray(x, jnp.int32) for x in (ids, prompt, completion))
  return SftBatch(ids, prompt, valid, completion)


FLAT = NoiseSpec((0.3, 0.8), "flat", complementary=True)


@pytest.mark.slow(reason="compiles updates of its own")
@pytest.mark.parametrize("block", [None, 4])
def test_a_step_with_complementary_copies_takes_the_mean_of_both(block):
  """And neither micro-batches nor what fills the last block change it."""
  denoiser, batch = causal.denoiser(block), demonstrations()
  optimizer = optax.sgd(1e-3)
  state = create(lambda key: causal.params(), optimizer, keys.seeded(5), keys.seeded(5))
  step = functools.partial(sft.sft_step, denoiser=denoiser, optimizer=optimizer, noise=FLAT)
  found, metrics = jax.jit(step)(state, Frozen({}, {}), batch)
  key = keys.purpose_key(state.key, keys.Purpose.CORRUPTION, 0)
  tokens, weight = targets(denoiser, batch.prompt_valid, batch.completion, fill=causal.STOPS[0], rows=4)

  @jax.jit
  def loss(second):
    given = (batch.prompt, batch.prompt_valid, tokens, weight, batch.sample_id, key)
    return denoising_loss(denoiser, state.trainable, *given, noise=FLAT, complement=jnp.full(4, second))[0]

  np.testing.assert_allclose(metrics["loss"], (loss(False) + loss(True)) / 2, rtol=1e-5)
  parts, again = jax.jit(functools.partial(step, accumulation=4))(state, Frozen({}, {}), batch)
  np.testing.assert_allclose(again["loss"], metrics["loss"], rtol=1e-5)
  for a, b in zip(jax.tree.leaves(parts.trainable), jax.tree.leaves(found.trainable), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.slow(reason="compiles updates of its own")
@pytest.mark.parametrize("block", [None, 4])
def test_a_step_on_packed_rows_is_that_on_rows_of_their_own(block):
  batch = demonstrations()._replace(sample_id=jnp.arange(4))
  packer = Packer(
    *(np.asarray(x).tolist() for x in (batch.prompt, batch.completion)),
    buckets=(16,),
    completion_buckets=(16,),
    block=block,
    pad_id=causal.STOPS[0],
  )
  packed = packer.batch(packer.rows([2, 0, 3, 1]), 4)
  assert (packed.sample_id >= 0).sum(axis=1).tolist() == [2, 2, 0, 0]
  optimizer = optax.sgd(1e-3)
  state = create(lambda key: causal.params(), optimizer, keys.seeded(5), keys.seeded(5))
  options = dict(denoiser=causal.denoiser(block), optimizer=optimizer, noise=FLAT, p_mask_prompt=0.3)
  expected, metrics = jax.jit(functools.partial(sft.sft_step, **options))(state, Frozen({}, {}), batch)
  found, again = jax.jit(functools.partial(sft.sft_step, accumulation=2, **options))(state, Frozen({}, {}), packed)
  np.testing.assert_allclose(again["loss"], metrics["loss"], rtol=1e-5)
  for a, b in zip(jax.tree.leaves(found.trainable), jax.tree.leaves(expected.trainable), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.slow(reason="compiles an update and held-out losses")
def test_packed_rows_train_and_validate(root, tmp_path, capsys):
  config = job(root, tmp_path, sft__packed=True, model__block=2, rollout__block_length=2, rollout__diffusion_steps=9)
  experiment, options = experiments.build(config, None), configured.fine_tuning(config)
  found, validating = configured.demonstrations(experiment)
  assert "tokens in packed rows of" in capsys.readouterr().out
  optimizer, weights = experiment.optimizer(config.sft, 8), experiment.model.weights
  state, start = weights.fresh_state(optimizer), weights.start()
  losses = [
    HeldOutLoss(experiment.model, validating, dataclasses.replace(options, packed=packed))(start, weights.frozen)
    for packed in (True, False)
  ]
  assert losses[0].figures == pytest.approx(losses[1].figures, rel=1e-5)
  advance = sft.advancer(experiment.model, found, options, optimizer, 5, seed=0, iterations=8)
  state, metrics = advance(state, 5)
  assert metrics["tokens"] == 16 * (160 + 112)
  assert metrics["finite"]
  assert 0 < metrics["loss"] < 20


def test_noise_on_the_masks_embedding_leaves_all_other_weights():
  params = causal.params()
  found = shaken(params, causal.MASK, keys.seeded(0), jnp.float32(0.5))
  change = np.asarray(found["embedding"] - params["embedding"])
  size = np.sqrt(np.mean(np.square(params["embedding"])))
  assert 0.25 * size < np.sqrt(np.mean(np.square(change[causal.MASK]))) < 0.9 * size
  assert not np.delete(change, causal.MASK, axis=0).any()
  same = shaken(params, causal.MASK, keys.seeded(0), jnp.float32(0.0))
  for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(params), strict=True):
    np.testing.assert_array_equal(a, b)


def options(**changes):
  return Options(**(dict(batch_size=4, prompt_buckets=(8,), completion_buckets=(8, 18)) | changes))


WRONG = [
  (dict(grow=(1, 4)), None, r"this one has full attention: set model.block, for example to 32, or sft.grow=\(\)"),
  (dict(grow=(1, 3)), 4, r"sft.grow=\(1, 3\) with model.block=4: .* and 3 is none of 4"),
  (dict(grow=(4, 2)), 8, "and 4 is none of 2"),
  (dict(grow=(8,)), 4, "and 8 is none of 4"),
  (dict(grow=(4,)), 4, "and 4 is none of 4"),
  (
    dict(packed=True, truncate=True),
    4,
    "sft.packed=True .* but sft.truncate=True cuts answers: use sft.truncate=False",
  ),
  (dict(completion_buckets=(2, 8)), 4, r"sft.completion_buckets=\(2, 8\) has a bucket .* let all be at least 4"),
]


@pytest.mark.parametrize(("changes", "block", "message"), WRONG)
def test_options_that_do_not_fit_the_blocks_are_refused(changes, block, message):
  with pytest.raises(ValueError, match=message):
    options(**changes).check(block)


@pytest.mark.parametrize(("grow", "block"), [((), None), ((), 8), ((1, 4), 32), ((1, 2, 4), 8)])
def test_options_that_fit(grow, block):
  options(grow=grow, completion_buckets=(32, 45)).check(block)


@pytest.mark.slow(reason="compiles an update for each block length")
def test_blocks_grow_and_a_resumed_stage_goes_on_in_the_same_part(root, tmp_path, monkeypatch):
  changes = {
    "model__block": 4,
    "sft__grow": (1,),
    "sft__mask_noise_steps": 2,
    "sft__completion_buckets": (111,),
    "sft__weighting": "flat",
    "sft__mask_ratio": (0.3, 0.8),
    "sft__complementary": True,
  }
  config, compiled, taken = job(root, tmp_path, **changes), [], []

  class Noted(sft.Steps):
    def __init__(self, model, options, optimizer, block):
      super().__init__(model, options, optimizer, block)
      compiled.append(self._denoiser.block)

    def __call__(self, *arguments):
      taken.append(self._denoiser.block)
      return super().__call__(*arguments)

  monkeypatch.setattr(sft, "Steps", Noted)
  experiment, chosen = experiments.build(config, None), configured.fine_tuning(config)
  assert chosen.noise == FLAT
  found, _ = configured.demonstrations(experiment)
  optimizer, model = experiment.optimizer(config.sft, 4), experiment.model
  began = lambda position: sft.advancer(model, found, chosen, optimizer, position, seed=0, iterations=4)
  state, advance, losses = model.weights.fresh_state(optimizer), began(0), []
  assert compiled == [1, 4], "before the first step"
  for index in range(4):
    if index == 3:
      again = jax.tree.map(jnp.copy, state)
    state, metrics = advance(state, index)
    losses.append(metrics["loss"])
  assert taken == [1, 1, 4, 4]
  _, metrics = began(3)(again, 3)
  assert compiled == [1, 4, 4]
  assert metrics["loss"] == losses[3]
  assert np.isfinite(losses).all()
