"""What the loop saves, and what a person who follows its messages meets."""

import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from d1jax.errors import NotFiniteError, PreemptedError
from d1jax.run.checkpoint import Checkpoints, Restored
from d1jax.run.interrupts import Interrupts
from d1jax.state import TrainState, all_finite, apply_gradients, create
from d1jax.telemetry import profile
from d1jax.training import loop

STEPS = 8


def fresh(optimizer: optax.GradientTransformation) -> TrainState:
  return create(lambda _: {"w": jnp.ones((3,))}, optimizer, jax.random.key(0), jax.random.key(1))


def run(folder, *, losses=(), scores=(), rate=0.1, validate_every=3, stop_at=None, trackers=(), tick=None, **cadence):
  """Runs, or goes on with, a stage whose iteration i has the loss `losses[i]`, 1 where nothing is said, and a
  validation `scores[i]`, 0 where nothing is said; `tick` is called in each.
  """
  optimizer = optax.adam(rate)
  checkpoints = Checkpoints(folder / "checkpoints" / "sft", writes=True)
  start = checkpoints.restore_latest(jax.eval_shape(lambda: fresh(optimizer))) or Restored(0, fresh(optimizer), {})

  class Stopping(Interrupts):
    def pending(self):
      self._agreed = 3 if asked and asked[-1] == stop_at else 0
      return self._agreed > 0

  asked: list[int] = []

  def advance(state, iteration):
    asked.append(iteration + 1)
    if tick is not None:
      tick()
    loss = dict(losses).get(iteration + 1, 1.0)
    finite = jnp.isfinite(loss)
    state = apply_gradients(state, {"w": jnp.full((3,), loss)}, optimizer, finite)
    return state, {"loss": float(loss), "finite": float(finite), "tokens": 1.0, "seconds": 1.0}

  stage = loop.Stage(
    "sft",
    STEPS,
    advance,
    lambda trainable, iteration: loop.Scored(dict(scores).get(iteration, 0.0)),
    jax.jit(all_finite),
    loop.Cadence(validate_every, **cadence),
    np.asarray([rate * i for i in range(STEPS)]),
    trackers,
    ("loss",),
    {"config": {}, "base": None},
    0.0,
    profile.Profile(range(0), "sft", folder / "profile"),
  )
  try:
    loop.run(stage, start, checkpoints, folder, Stopping())
  finally:
    checkpoints.close()
  return asked


def saved(folder) -> dict[int, np.ndarray]:
  """The weights of each checkpoint."""
  checkpoints = Checkpoints(folder / "checkpoints" / "sft", writes=True)
  abstract = jax.eval_shape(lambda: fresh(optax.adam(0.1)))
  return {step: np.asarray(checkpoints.restore_evaluated(step, abstract)["w"]) for step in checkpoints.steps()}


def refusal(folder, **options) -> str:
  with pytest.raises(NotFiniteError) as caught:
    run(folder, **options)
  assert caught.value.exit_code == 70
  assert "\n" not in str(caught.value)
  return str(caught.value)


def test_a_refused_step_is_left_out_and_the_same_command_goes_on_with_the_next_batch(tmp_path):
  message = refusal(tmp_path, losses={5: np.nan})
  assert message.startswith("sft iteration 5: loss or gradient is not finite (loss nan). The step was left out")
  assert f"saved in {tmp_path}/checkpoints/sft/5: the same command goes on with the next batch" in message
  weights = saved(tmp_path)
  assert sorted(weights) == [3, 5]
  assert np.isfinite(weights[5]).all()
  assert (weights[5] != weights[3]).all()  # the fourth step is in it
  assert run(tmp_path, losses={5: np.nan}) == [6, 7, 8]
  records = [json.loads(line)["iteration"] for line in (tmp_path / "metrics.jsonl").open()]
  assert records == list(range(1, STEPS + 1))


def test_behind_a_refused_last_step_the_same_command_goes_on_with_what_follows(tmp_path):
  message = refusal(tmp_path, losses={STEPS: np.nan})
  folder = tmp_path / "checkpoints" / "sft"
  assert f"saved in {folder}/{STEPS}. It was the last of sft: the same command goes on with what follows sft" in message
  assert "next batch" not in message
  remedy = (
    f"To take it again, delete the newest checkpoints in {folder} to go on from an earlier one, and lower --config"
  )
  assert remedy in message
  checkpoints = Checkpoints(folder)
  assert checkpoints.steps() == [6, STEPS]
  assert checkpoints.best_step() == STEPS, "the weights at the end were validated"
  assert run(tmp_path) == [], "the stage is done"
  shutil.rmtree(folder / str(STEPS))
  assert run(tmp_path, rate=0.01) == [7, 8]


def test_where_every_step_is_refused_a_person_can_go_back(tmp_path):
  for iteration in (5, 6):
    message = refusal(tmp_path, losses=dict.fromkeys((5, 6), np.inf))
    assert f"/sft/{iteration}: the same command goes on with the next batch" in message
  assert f"or delete the newest checkpoints in {tmp_path}/checkpoints/sft to go on from an earlier one" in message
  for step in (5, 6):
    shutil.rmtree(tmp_path / "checkpoints" / "sft" / str(step))
  assert run(tmp_path, rate=0.01)[0] == 4


@pytest.mark.parametrize("validate_every", [1, 3])
@pytest.mark.parametrize("rate", [np.nan, np.inf, 3.4e38])
def test_weights_that_are_not_finite_are_never_saved(tmp_path, rate, validate_every):
  losses = {1: 2.0}
  message = refusal(tmp_path, losses=losses, rate=rate, validate_every=validate_every)
  assert "a step made weights that are not finite. They are not saved" in message
  assert "lower --config.sft.learning_rate or --config.sft.max_grad_norm, which may change here" in message
  assert all(np.isfinite(weights).all() for weights in saved(tmp_path).values())
  assert run(tmp_path, losses=losses)[-1] == STEPS  # a lower rate, in the same folder


def test_a_stop_does_not_save_weights_that_are_not_finite(tmp_path):
  assert "They are not saved" in refusal(tmp_path, rate=np.nan, validate_every=100, stop_at=2)
  assert saved(tmp_path) == {}


def test_a_stop_saves(tmp_path):
  with pytest.raises(PreemptedError, match="SIGTERM: saved at sft iteration 2; run the same command again to go on"):
    run(tmp_path, stop_at=2)
  assert sorted(saved(tmp_path)) == [2]
  assert run(tmp_path)[0] == 3


def records(folder) -> list[dict]:
  return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


@pytest.mark.parametrize(
  ("save_every", "scores", "kept"),
  [
    (None, {}, [6, 8]),  # as often as it validates; of equals the later
    (None, {3: 1.0}, [3, 6, 8]),
    (2, {}, [6, 8]),
    (2, {3: 1.0}, [3, 6, 8]),  # the best is saved although no save was due, and stays
    (100, {3: 1.0, 6: 0.5}, [3, 8]),
    (100, {3: 1.0, 6: 1.0}, [6, 8]),  # Orbax keeps the later of equals, too
  ],
)
def test_checkpoints_are_apart_from_validations(tmp_path, save_every, scores, kept):
  run(tmp_path, scores=scores, save_every=save_every)
  assert sorted(saved(tmp_path)) == kept
  assert [r["iteration"] for r in records(tmp_path) if "validation" in r] == [3, 6, 8]
  assert Checkpoints(tmp_path / "checkpoints" / "sft").best_step() == (
    max(scores, key=lambda i: (scores[i], i)) if scores else 8
  )


@pytest.mark.slow(reason="saves and reads checkpoints")
def test_a_run_goes_on_from_a_checkpoint_without_a_validation(tmp_path, monkeypatch):
  """Killed behind iteration 5, whose last checkpoint is of iteration 4; the best, of iteration 3, stays."""
  run(tmp_path / "whole", scores={3: 1.0}, save_every=2)
  with monkeypatch.context() as patch:
    patch.setattr(loop.Progress, "update", lambda self, iteration, *_: 1 / (iteration != 5))
    with pytest.raises(ZeroDivisionError):
      run(tmp_path / "broken", scores={3: 1.0}, save_every=2)
  assert sorted(saved(tmp_path / "broken")) == [3, 4]
  assert run(tmp_path / "broken", scores={3: 1.0}, save_every=2) == [5, 6, 7, 8]
  whole, broken = saved(tmp_path / "whole"), saved(tmp_path / "broken")
  assert sorted(broken) == sorted(whole) == [3, 6, 8]
  np.testing.assert_array_equal(whole[8], broken[8])


def test_the_learning_rate_of_the_last_step_that_was_taken_is_logged(tmp_path):
  run(tmp_path, rate=0.5)
  assert [r["learning_rate"] for r in records(tmp_path)] == [0.5 * i for i in range(STEPS)]


def test_steps_that_are_not_finite_are_skipped_counted_and_logged(tmp_path, caplog):
  """As often in a row as is allowed; a finite one begins the count anew, and the last iteration validates too."""
  losses = {2: np.nan, 3: np.inf, 5: np.nan, 6: np.nan, 8: np.nan}
  assert run(tmp_path, losses=losses, max_skipped_steps=2) == list(range(1, STEPS + 1))
  found = records(tmp_path)
  assert [r.get("skipped_steps") for r in found] == [None, 1, 2, 2, 3, 4, 4, 5]
  assert [r["iteration"] for r in found if "validation" in r] == [3, 6, 8]
  assert [record.message for record in caplog.records if record.name == loop.__name__] == [
    f"sft iteration {iteration}: loss or gradient is not finite; the step is left out ({n} in a row, of at most 2)"
    for iteration, n in ((2, 1), (3, 2), (5, 1), (6, 2), (8, 1))
  ]
  optimizer = optax.adam(0.1)
  state = fresh(optimizer)
  for _ in range(3):
    state = apply_gradients(state, {"w": jnp.ones((3,))}, optimizer, jnp.bool_(True))
  np.testing.assert_array_equal(saved(tmp_path)[STEPS], state.trainable["w"])


def test_one_skipped_step_more_ends_the_run_and_the_same_command_goes_on(tmp_path):
  losses = dict.fromkeys((3, 4, 5), np.nan)
  assert refusal(tmp_path, losses=losses, max_skipped_steps=2).startswith("sft iteration 5: loss or gradient is not")
  assert run(tmp_path, losses=losses | {6: np.nan}, max_skipped_steps=2) == [6, 7, 8]
  assert records(tmp_path)[-1]["skipped_steps"] == 4


def test_skipped_steps_count_across_a_stop(tmp_path):
  losses = dict.fromkeys((3, 4, 5), np.nan)
  with pytest.raises(PreemptedError):
    run(tmp_path, losses=losses, max_skipped_steps=2, stop_at=4)
  assert refusal(tmp_path, losses=losses, max_skipped_steps=2).startswith("sft iteration 5")


@pytest.mark.parametrize("stop_at", [None, 5])
def test_a_stage_ends_where_validation_no_longer_improves(tmp_path, stop_at, capsys):
  options = {"scores": {2: 1.0, 4: 0.5, 6: np.nan, 8: 2.0}, "validate_every": 2, "patience": 2}
  if stop_at:
    with pytest.raises(PreemptedError):
      run(tmp_path, **options, stop_at=stop_at)
  assert run(tmp_path, **options)[-1] == 6
  assert "sft: ends at iteration 6, 2 validations without a better score" in capsys.readouterr().out
  checkpoints = Checkpoints(tmp_path / "checkpoints" / "sft")
  assert checkpoints.best_step() == 2
  end = checkpoints.metadata(6)
  assert [loop.is_over(6, end, STEPS, patience) for patience in (1, 2, 3, None)] == [True, True, False, False]
  assert run(tmp_path, **options | {"patience": 3})[-1] == 8, "more patience goes on in the same folder"


@pytest.mark.parametrize("stop_at", [None, 2])
def test_a_stage_ends_when_its_time_is_up(tmp_path, stop_at, capsys, monkeypatch):
  clock = [0.0]
  monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: clock[0]))
  options = {"validate_every": 100, "seconds": 3.5, "tick": lambda: clock.append(clock.pop() + 1.0)}
  if stop_at:
    with pytest.raises(PreemptedError):
      run(tmp_path, **options, stop_at=stop_at)
    clock[0] += 100.0
  assert run(tmp_path, **options)[-1] == 4, "the iteration that ends after the time is the last, in all attempts"
  assert "sft: ends at iteration 4, whose 3.5 seconds are up" in capsys.readouterr().out
  assert "validation" in records(tmp_path)[-1], "it is validated"
  end = Checkpoints(tmp_path / "checkpoints" / "sft").metadata(4)
  assert [loop.is_over(4, end, STEPS, None, seconds) for seconds in (3.5, 4.5, None)] == [True, False, False]


@pytest.mark.parametrize("counts", [None, 3, [1], {}, {"stale": "2"}, {"more": 1}])
def test_counts_that_are_none_are_0(counts):
  assert loop.counts_of({"counts": counts}) == loop.Counts()


def test_what_is_trained_is_read_without_the_moments(tmp_path):
  run(tmp_path)
  checkpoints = Checkpoints(tmp_path / "checkpoints" / "sft", writes=True)
  abstract = jax.eval_shape(lambda: fresh(optax.adam(0.1)))
  before = {id(x) for x in jax.live_arrays()}
  step, trainable = checkpoints.best_evaluated(abstract)
  assert step == STEPS
  made = [x for x in jax.live_arrays() if id(x) not in before and x.dtype == jnp.float32]
  assert sum(x.nbytes for x in made) == trainable["w"].nbytes


def test_every_moment_is_looked_at():
  state = fresh(optax.adam(0.1))
  assert bool(all_finite(state))
  for i, leaf in enumerate(leaves := jax.tree.leaves(state.opt_state)):
    if jnp.issubdtype(leaf.dtype, jnp.inexact):
      broken = [x.at[0].set(jnp.inf) if i == j else x for j, x in enumerate(leaves)]
      assert not bool(
        all_finite(state._replace(opt_state=jax.tree.unflatten(jax.tree.structure(state.opt_state), broken)))
      )
