"""Checkpoints of small arrays: what a reader may do, and what becomes of damaged ones."""

import asyncio
import json
import logging
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d1jax.errors import RunError
from d1jax.run.checkpoint import Checkpoints, _silence_abandoned_reads
from d1jax.state import TrainState
from tests.damages import DAMAGES

METADATA = {"config": {"seed": 0}, "seconds": 1.5, "base": None}
HERE = jax.sharding.SingleDeviceSharding(jax.devices()[0])
SCORES = {1: 0.1, 2: 0.5, 3: 0.2, 4: None}


def state(value: int) -> TrainState:
  weights = {"w": jnp.full((4, 4), float(value))}
  return TrainState(jnp.int32(value), weights, {"m": jnp.zeros(3)}, jax.random.key(0))


def abstract() -> TrainState:
  shapes = jax.eval_shape(lambda: state(0))
  return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=HERE), shapes)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  """A stage whose steps 2 (the best), 3 and 4 (never validated) were kept."""
  home = tmp_path_factory.mktemp("written") / "sft"
  checkpoints = Checkpoints(home, writes=True)
  for step, score in SCORES.items():
    checkpoints.save(step, state(step), METADATA, score)
  checkpoints.wait()
  checkpoints.close()
  return home


@pytest.fixture
def home(written, tmp_path):
  return shutil.copytree(written, tmp_path / "checkpoints" / "sft")


def files(folder):
  return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_last_two_and_the_best_are_kept(home):
  checkpoints = Checkpoints(home)
  assert checkpoints.steps() == [2, 3, 4]
  assert checkpoints.best_step() == 2
  assert checkpoints.metadata(3)["seconds"] == 1.5


def test_a_reader_changes_nothing(home):
  """Also not the checkpoint that a run is writing at this moment."""
  half = home / "7.orbax-checkpoint-tmp"
  half.mkdir()
  (half / "part").write_text("being written")
  (home / "3" / "_CHECKPOINT_METADATA").write_text("{")
  (home / "2" / "state" / "manifest.ocdbt").write_bytes(b"")
  before = files(home.parent)
  checkpoints = Checkpoints(home)
  step, trainable = checkpoints.best_evaluated(abstract())
  assert (step, float(trainable["w"][0, 0])) == (4, 4.0)
  assert checkpoints.restore_latest(abstract()).step == 4
  checkpoints.close()
  assert files(home.parent) == before
  with pytest.raises(ValueError, match="opened to be read"):
    checkpoints.save(9, state(9), METADATA, None)


def test_a_reader_of_nothing_makes_nothing(tmp_path):
  assert Checkpoints(tmp_path / "sft").steps() == []
  assert Checkpoints(tmp_path / "sft").restore_latest(abstract()) is None
  assert not list(tmp_path.iterdir())


def test_the_run_that_writes_deletes_what_a_kill_left(home):
  (home / "7.orbax-checkpoint-tmp").mkdir()
  writer = Checkpoints(home, writes=True)
  writer.save(5, state(5), METADATA, None)  # Orbax deletes beside other work, and waits for it before it saves
  writer.wait()
  writer.close()
  assert not (home / "7.orbax-checkpoint-tmp").exists()


def test_what_is_trained_is_read_alone_and_verified(home):
  trainable = Checkpoints(home).restore_evaluated(3, abstract())
  np.testing.assert_array_equal(trainable["w"], np.full((4, 4), 3.0))
  path = home / "3" / "_CHECKPOINT_METADATA"
  found = json.loads(path.read_text())
  found["custom_metadata"]["trainable"] = "0" * 64
  path.write_text(json.dumps(found))
  with pytest.raises(RunError, match="corrupt"):
    Checkpoints(home).restore_evaluated(3, abstract())
  del found["custom_metadata"]["trainable"]  # as it was before this fingerprint was said
  path.write_text(json.dumps(found))
  assert float(Checkpoints(home).restore_evaluated(3, abstract())["w"][0, 0]) == 3.0


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", ["_CHECKPOINT_METADATA", "metrics/metrics"])
def test_damaged_metadata_and_metrics_are_set_aside_and_an_earlier_checkpoint_serves(home, name, how, caplog):
  DAMAGES[how](home / "3" / name)
  shutil.rmtree(home / "4")
  reader = Checkpoints(home)
  with caplog.at_level(logging.WARNING):
    assert reader.steps() == [2]
    assert reader.best_step() == 2
  assert len([r for r in caplog.records if f"{home}/3" in r.message and "\n" not in r.message]) == 1
  assert (home / "3").is_dir()
  writer = Checkpoints(home, writes=True)
  assert writer.restore_latest(abstract()).step == 2
  assert (home.parent / "corrupt" / "sft-3").is_dir()
  writer.save(5, state(5), METADATA, 0.7)
  writer.wait()
  assert (writer.steps(), writer.best_step()) == ([2, 5], 5)
  writer.close()


@pytest.mark.parametrize("name", ["manifest.ocdbt", "_METADATA", "_sharding", "d", "all"])
def test_damaged_arrays_are_set_aside_and_an_earlier_checkpoint_serves(home, name):
  target = home / "4" / "state" / name
  if name == "all":
    shutil.rmtree(target.parent)
  elif target.is_dir():
    for path in [*target.iterdir(), *(home / "4" / "state" / "ocdbt.process_0" / "d").iterdir()]:
      path.write_bytes(path.read_bytes()[::-1])
  else:
    target.write_bytes(b"")
  writer = Checkpoints(home, writes=True)
  found = writer.restore_latest(abstract())
  writer.close()
  if name == "_sharding":  # the placement is the reader's choice
    assert found.step == 4
  else:
    assert found.step == 3
    assert (home.parent / "corrupt" / "sft-4" / "_CHECKPOINT_METADATA").is_file()


def test_a_step_that_was_damaged_and_is_made_again_serves(home):
  (home / "4" / "_CHECKPOINT_METADATA").unlink()
  writer = Checkpoints(home, writes=True)
  assert writer.restore_latest(abstract()).step == 3
  writer.save(4, state(4), METADATA, 0.9)
  writer.wait()
  assert (writer.steps(), writer.best_step()) == ([3, 4], 4)
  writer.close()


def test_where_no_checkpoint_is_good_it_is_said(home):
  for step in (2, 3, 4):
    (home / str(step) / "_CHECKPOINT_METADATA").write_text("")
  with pytest.raises(RunError, match=r"no checkpoint in .* can be read; delete the folder"):
    Checkpoints(home).restore_latest(abstract())
  with pytest.raises(RunError, match=r"no checkpoint in .* can be read; delete the folder"):
    Checkpoints(home, writes=True).restore_latest(abstract())


def test_a_file_in_the_place_of_the_folder_is_one_line(tmp_path):
  (tmp_path / "sft").write_text("")
  assert Checkpoints(tmp_path / "sft").steps() == []
  with pytest.raises(RunError, match="sft is a file, expected a folder"):
    Checkpoints(tmp_path / "sft", writes=True)


ABANDONED = """
async def read():
  try:
    await asyncio.sleep(0)
  except BaseException as error:
    raise Exception("interrupted") from error
"""


@pytest.mark.parametrize(("file", "printed"), [("/lib/orbax/checkpoint/reading.py", 0), ("/lib/other.py", 1)])
def test_a_failed_read_is_said_once(monkeypatch, file, printed):
  """Orbax leaves reads behind, each of which would print a traceback when it is collected."""
  tracebacks = []
  monkeypatch.setattr(sys, "unraisablehook", tracebacks.append)
  _silence_abandoned_reads.cache_clear()
  _silence_abandoned_reads()
  scope = {"asyncio": asyncio}
  exec(compile(ABANDONED, file, "exec"), scope)
  coroutine = scope["read"]()
  coroutine.send(None)
  del coroutine
  assert len(tracebacks) == printed
  _silence_abandoned_reads.cache_clear()


def test_rollouts_that_wait_are_read_back_and_verified(tmp_path):
  """One that is damaged makes its checkpoint a damaged one; whoever does not ask for them does not read them."""
  rollouts = [{"completion": jnp.arange(6).reshape(2, 3), "version": jnp.int32(4)}]
  abstract_rollouts = [{name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=HERE) for name, x in rollouts[0].items()}]
  writer = Checkpoints(tmp_path / "grpo", writes=True)
  for step in (1, 2):
    writer.save(step, state(step), METADATA, None, rollouts)
  writer.wait()
  found = writer.restore_latest(abstract(), lambda step: abstract_rollouts)
  jax.tree.map(np.testing.assert_array_equal, found.waiting, rollouts)
  assert writer.restore_latest(abstract()).waiting is None
  path = tmp_path / "grpo" / "2" / "_CHECKPOINT_METADATA"
  said = json.loads(path.read_text())
  said["custom_metadata"]["waiting"] = "0" * 64
  path.write_text(json.dumps(said))
  assert writer.restore_latest(abstract(), lambda step: abstract_rollouts).step == 1
  writer.close()
