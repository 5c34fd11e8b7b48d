"""What a whole job compiles and when, what it keeps in memory when it goes on, and how its final evaluation is stopped.

Slow: each test runs the recipe, which compiles a small network's programs.
"""

import json
import logging
import re
import shutil
import signal

import jax
import jax.numpy as jnp
import pytest

from d1jax import recipe
from d1jax.errors import InterruptedRunError, OutOfMemoryError, PreemptedError
from d1jax.evaluation import evaluator
from d1jax.run import experiment as experiments
from d1jax.run.checkpoint import Checkpoints
from d1jax.training import loop
from tests.jobs import small
from tests.session import shared

pytestmark = pytest.mark.slow(reason="each runs the recipe or a part of it")

STEPS = {"sft__steps": 4, "sft__validate_every": 2, "grpo__steps": 4, "grpo__validate_every": 2}


class Compilations(logging.Handler):
  """The names of programs that JAX compiles while `noting`."""

  def __init__(self):
    super().__init__()
    self.noting, self.names, self.all = False, [], []

  def emit(self, record):
    found = re.match(r"Compiling jit\((\w+)\)", record.getMessage())
    if found:
      self.all.append(found[1])
      self.names += [found[1]] if self.noting else []


@pytest.fixture(scope="module")
def finished():
  """A finished job, its results, and the names of what it compiled: within the loops of its stages and behind the last,
  and in all.
  """
  workdir, found = shared("stages", watched_run)
  return workdir, *found


def watched_run(workdir):
  heard = Compilations()
  original = loop.run

  def run(stage, *arguments):
    heard.noting = True
    original(stage, *arguments)
    heard.noting = stage.name == "grpo"  # behind SFT, the programs of diffu-GRPO are compiled

  jax.clear_caches()  # what another test has compiled would not be heard of
  logger = logging.getLogger("jax._src.interpreters.pxla")
  logger.addHandler(heard)
  with pytest.MonkeyPatch.context() as patch, jax.log_compiles(True):
    patch.setattr(loop, "run", run)
    results = recipe.run(small(workdir, grpo__dump_every=1, **STEPS))
  logger.removeHandler(heard)
  return results, heard.names, heard.all


def test_nothing_is_compiled_once_a_stage_has_begun(finished):
  """Validation, saving, dumping and the final evaluation included."""
  _, _, later, every = finished
  assert {"_complete", "_update_program", "_checksums", "all_finite"} <= set(every)
  assert every.count("_complete") >= 2, "validation, and rollouts"
  # Orbax cuts what several devices hold, so that each writes a part of it: no program of the run's own.
  assert set(later) <= {"slice"}


def again(finished, workdir):
  """The configuration of the finished job in another folder, without its results."""
  shutil.copytree(finished[0], workdir)
  (workdir / "results.json").unlink()
  return small(workdir, grpo__dump_every=1, **STEPS)


def test_a_finished_run_reads_its_best_weights_alone(finished, tmp_path, monkeypatch):
  config = again(finished, tmp_path / "run")
  experiment = experiments.build(config, None)
  size = sum(4 * x.size for x in jax.tree.leaves(experiment.model.weights.abstract_trainable))
  before = {id(x) for x in jax.live_arrays()}
  seen = []

  def live():
    found = [x for x in jax.live_arrays() if id(x) not in before and x.dtype == jnp.float32]
    seen.append(sum(x.nbytes for x in found) / size)

  def watched(function):
    def call(*arguments, **named):
      found = function(*arguments, **named)
      live()
      return found

    return call

  for owner, name in ((Checkpoints, "restore"), (Checkpoints, "restore_evaluated"), (evaluator.Evaluator, "complete")):
    monkeypatch.setattr(owner, name, watched(getattr(owner, name)))
  results = recipe.run(config)
  assert results["params_fingerprint"] == finished[1]["params_fingerprint"]
  for arm in ("before", "after"):
    assert results[arm] == finished[1][arm]
  # A TrainState is three times as much; what is published in float32 is what was read.
  assert len(seen) >= 4
  assert max(seen) < 1.1, seen


def test_the_final_evaluation_can_be_stopped(finished, tmp_path, monkeypatch):
  config = again(finished, tmp_path / "run")
  original, calls, numbers = evaluator.Evaluator.complete, [], [signal.SIGTERM, signal.SIGINT]

  def complete(self, *arguments):
    calls.append(0)
    if len(calls) <= len(numbers):
      signal.raise_signal(numbers[len(calls) - 1])
    return original(self, *arguments)

  monkeypatch.setattr(evaluator.Evaluator, "complete", complete)
  for number, kind in zip(numbers, (PreemptedError, InterruptedRunError), strict=True):
    with pytest.raises(kind, match=rf"{number.name}: saved at the end of training, .*run the same command again"):
      recipe.run(config)
    assert len(calls) == 1 + numbers.index(number)
    assert not (tmp_path / "run" / "results.json").exists()
  assert recipe.run(config)["after"] == finished[1]["after"]


def test_memory_of_an_evaluation_has_its_own_remedy_before_anything_is_trained(tmp_path, monkeypatch):
  def program(self, *shape):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm")

  monkeypatch.setattr(evaluator.Completer, "program", program)
  with pytest.raises(OutOfMemoryError, match=r"sft: validation: .*--config\.evaluation\.batch_size=8$"):
    recipe.run(small(tmp_path, **STEPS))
  assert not (tmp_path / "metrics.jsonl").exists()
  assert json.loads((tmp_path / "config.json").read_text())["evaluation"]["batch_size"] == 16
