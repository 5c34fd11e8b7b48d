"""Compiled programs are kept beside a run: who finds them, who does not, and what a run that goes on compiles."""

import collections
import dataclasses
import signal
import stat

import jax
import jax.numpy as jnp
import pytest
from jax._src import compilation_cache

from d1jax import recipe
from d1jax.errors import PreemptedError
from d1jax.run import compiled
from d1jax.training import loop
from tests import jobs

LEAST = "jax_persistent_cache_min_compile_time_secs"


@pytest.fixture
def heard(monkeypatch):
  """Counts JAX's visits to its cache, where the user names no folder; nothing is compiled yet."""
  events = collections.Counter()
  listen = lambda event, **_: events.update([event.rpartition("/")[2]])
  before = jax.config.jax_compilation_cache_dir, getattr(jax.config, LEAST)
  monkeypatch.delenv(LEAST.upper())
  jax.config.update("jax_compilation_cache_dir", None)
  compilation_cache.reset_cache()
  jax.clear_caches()
  jax.monitoring.register_event_listener(listen)
  yield events
  jax.monitoring.unregister_event_listener(listen)
  jax.config.update("jax_compilation_cache_dir", before[0])
  assert getattr(jax.config, LEAST) == before[1]
  compilation_cache.reset_cache()


def compute(workdir):
  jax.clear_caches()  # as in a new process
  with compiled.kept(workdir):
    return float(jax.jit(lambda x: x * 3 + 1)(jnp.float32(2)))


def test_what_one_attempt_compiled_the_next_one_loads(tmp_path, heard):
  folder = tmp_path / compiled.NAME
  assert compute(tmp_path / "run") == 7
  assert heard["cache_misses"] == len(list(folder.iterdir())) > 0
  assert stat.S_IMODE(folder.stat().st_mode) == 0o700
  assert not (tmp_path / "run").exists(), "a run folder holds no code"
  heard.clear()
  assert compute(tmp_path / "run") == 7
  assert heard["cache_hits"] == heard["compile_requests_use_cache"] > 0
  compute(tmp_path / "elsewhere" / "run")
  assert heard["cache_misses"] > 0, "a run of another place finds nothing"


@pytest.mark.parametrize("content", [b"", b"half", b"x" * 1000])
def test_a_damaged_program_is_compiled_and_written_anew(tmp_path, heard, content):
  compute(tmp_path / "run")
  for path in (tmp_path / compiled.NAME).iterdir():
    path.write_bytes(content)
  for misses in (True, False):
    heard.clear()
    assert compute(tmp_path / "run") == 7
    assert (heard["cache_misses"] > 0) == misses


def test_the_folder_that_the_user_names_for_jax_is_used(tmp_path, heard):
  jax.config.update("jax_compilation_cache_dir", str(tmp_path / "named"))
  jax.config.update(LEAST, 0.0)
  compute(tmp_path / "run")
  jax.config.update(LEAST, 0.2)
  assert any((tmp_path / "named").iterdir())
  assert not (tmp_path / compiled.NAME).exists()


def others_may_write(folder):
  folder.mkdir()
  folder.chmod(0o777)


@pytest.mark.parametrize(
  "make", [others_may_write, lambda folder: folder.symlink_to(folder.parent), lambda folder: folder.touch()]
)
def test_code_is_taken_from_no_folder_that_others_may_write(tmp_path, heard, make, caplog):
  make(tmp_path / compiled.NAME)
  assert compute(tmp_path / "run") == 7
  assert heard["cache_hits"] == heard["cache_misses"] == 0
  (message,) = [record.message for record in caplog.records]
  assert "not kept" in message
  assert "set JAX_COMPILATION_CACHE_DIR to a folder of your own" in message


def test_a_disk_that_takes_nothing_is_said_once(tmp_path, caplog):
  programs = compiled.Programs(tmp_path / "gone")
  for key in "ab":
    programs.put(key, b"a program")
    assert programs.get(key) is None
  assert [record.message for record in caplog.records] == [
    f"{tmp_path}/gone takes no compiled program (No such file or directory); the run goes on without"
  ]


def test_a_bucket_keeps_programs_too(bucket, heard, monkeypatch):
  monkeypatch.setattr(compiled, "LEAST_SECONDS", 0.0)
  compute(bucket / "run")
  assert heard["cache_misses"] == len(list((bucket / compiled.NAME).iterdir())) > 0
  heard.clear()
  compute(bucket / "run")
  assert heard["cache_hits"] == heard["compile_requests_use_cache"] > 0


@pytest.mark.slow(reason="runs the recipe, from nothing compiled")
def test_a_restarted_run_compiles_nothing(tmp_path, heard, monkeypatch):
  original, stop = loop.run, True

  def run(stage, *arguments):
    def advance(state, iteration):
      if stop and (stage.name, iteration) == ("grpo", 1):
        signal.raise_signal(signal.SIGTERM)
      return stage.advance(state, iteration)

    return original(dataclasses.replace(stage, advance=advance), *arguments)

  monkeypatch.setattr(loop, "run", run)
  config = jobs.started(tmp_path / "run")
  with pytest.raises(PreemptedError):
    recipe.run(config)
  heard.clear()
  jax.clear_caches()
  stop = False
  recipe.run(config)
  assert heard["cache_hits"] == heard["compile_requests_use_cache"] > 0
