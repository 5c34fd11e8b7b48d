"""What a failure means is told by who raised it, never by the words of its message."""

import errno
import sys

import jax
import jax.numpy as jnp
import pytest

from d1jax import errors
from d1jax.errors import LeftError, OutOfMemoryError, RunError, StorageError, explained
from d1jax.rl.grading import Grader
from tests.rl.test_grading import Echo

GLOO = "Gloo all-reduce failed: Connection closed by peer"
WORDS = ("a Gloomy answer", GLOO, "Connection reset by peer", "RESOURCE_EXHAUSTED", "Out of memory", "No space left")


@pytest.fixture
def several(monkeypatch):
  """As if this process were one of several."""
  monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)


def raised_by(package: str, error: Exception) -> Exception:
  """The error as code of a package raises it."""
  names = {"__name__": f"{package}.inner"}
  exec("def fail(error):\n  raise error", names)
  try:
    names["fail"](error)
  except Exception as caught:
    return caught
  raise AssertionError


@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("kind", [ValueError, RuntimeError, OSError])
def test_words_of_other_code_mean_nothing(several, words, kind):
  with pytest.raises(kind) as caught, explained("grpo", "smaller batches"):
    raise kind(words)
  assert type(caught.value) is kind
  assert not errors.is_lost(raised_by("somebodys_grader", kind(words)))


class Gloomy(Echo):
  """A task whose grader says what a lost process would."""

  def grade(self, text, record, protocol="strict"):
    raise ValueError(GLOO)


def test_words_of_a_grader_in_a_process_of_its_own_mean_nothing(several):
  with Grader(Gloomy(), 1) as grader, pytest.raises(ValueError, match="Gloo") as caught:
    grader.submit(["a"], [{}], "strict")()
  assert not errors.is_lost(caught.value)


@pytest.mark.parametrize(
  "error",
  [
    jax.errors.JaxRuntimeError(f"INTERNAL: {GLOO}"),
    raised_by("jax", ValueError(f"UNKNOWN: {GLOO}")),
    raised_by("orbax", RuntimeError("the coordination service stopped")),
  ],
  ids=["runtime", "value", "checkpoint"],
)
def test_a_lost_process_is_what_jax_says_in_a_run_of_several(monkeypatch, error):
  outer = RuntimeError("while saving")
  outer.__cause__ = error
  assert not errors.is_lost(error)  # this process is alone
  monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
  assert errors.is_lost(error)
  assert errors.is_lost(outer)
  with (
    pytest.raises(errors.LostError, match=r"grpo: another process .*run the same command again"),
    explained("grpo", ""),
  ):
    raise error


def test_device_memory_that_runs_out_names_the_remedy():
  said = pytest.raises(OutOfMemoryError, match=r"grpo: device memory ran out.*--config\.grpo\.accumulation=4")
  with said, explained("grpo", "smaller micro-batches: --config.grpo.accumulation=4"):
    jax.jit(lambda: jnp.zeros((1 << 46,), jnp.int8))().block_until_ready()


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENAMETOOLONG])
def test_a_path_that_cannot_be_reached_is_wrong_input(number):
  with pytest.raises(RunError, match=r"^some/file: said; .*name another path") as caught, explained("grpo", ""):
    raise OSError(number, "said", "some/file")
  assert caught.value.exit_code == 2


def test_batches_are_halved_as_long_as_they_can_be():
  assert errors.smaller_batches("batch_size", 15) == "smaller batches: --config.batch_size=7"
  assert errors.smaller_batches("batch_size", 1) == "more devices"


def test_other_failures_pass_unchanged():
  with pytest.raises(ZeroDivisionError), explained("grpo", ""):
    _ = 1 / 0
  with pytest.raises(RunError, match=r"^mine$"), explained("grpo", ""):
    raise RunError("mine")
  with pytest.raises(MemoryError), explained("grpo", ""):
    raise MemoryError


def test_a_storage_failure_is_found_behind_other_exceptions():
  full = OSError(errno.ENOSPC, "No space left on device")
  assert errors.is_storage_failure(full)
  wrapped = ValueError("write failed")
  wrapped.__cause__ = full
  assert errors.is_storage_failure(wrapped)
  assert not errors.is_storage_failure(ValueError("write failed"))
  assert errors.is_storage_failure(raised_by("tensorstore", ValueError("RESOURCE_EXHAUSTED: Error writing x")))
  with pytest.raises(StorageError), explained("sft", ""):
    raise wrapped


class Leaving(Echo):
  """A task whose grader ends the process."""

  def grade(self, text, record, protocol="strict"):
    sys.exit(0)


@pytest.mark.parametrize("workers", [0, 1])
def test_code_that_exits_never_ends_a_run_as_finished(workers):
  message = r"^grpo: code of the run called sys\.exit\(0\), at .*test_errors\.py:\d+; the run is not finished"
  with pytest.raises(LeftError, match=message) as caught, explained("grpo", ""), Grader(Leaving(), workers) as grader:
    grader.submit(["a"], [{}], "strict")()
  assert caught.value.exit_code == 1


@pytest.mark.parametrize("text", ["", "\n", "one\ntwo"])
def test_an_exception_is_one_line_whatever_it_says(text):
  assert errors.line_of(KeyError()) == "KeyError"
  assert "\n" not in errors.line_of(ValueError(text))


def test_text_cannot_steer_the_terminal():
  assert errors.harmless("a\x1b[2Jb\tc\nd\u202e\x9b") == "a\ufffd[2Jb\tc\nd\ufffd\ufffd"


def test_a_missing_package_is_installed_by_its_extra_in_a_clone_too():
  """requirements.txt does not hold the packages of all extras."""
  remedy = r'wandb is not installed: pip install "d1jax\[wandb\]" .* clone .* pip install "\.\[wandb\]"$'
  with pytest.raises(errors.RunError, match=remedy), errors.extra("wandb"):
    raise ModuleNotFoundError(name="wandb")
