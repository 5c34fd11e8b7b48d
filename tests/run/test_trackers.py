"""Where figures go beside metrics.jsonl: what each tracker is told, and that none can end or take over a run."""

import json
import re
import sys
import types

import pytest

from d1jax.errors import RunError
from d1jax.parallel import multihost
from d1jax.run import trackers
from d1jax.run.metrics import MetricsWriter
from d1jax.run.trackers import Run, Trackers
from d1jax.run.workdir import run_identity
from tests import jobs
from tests.training import test_loop

OWN = """
import dataclasses, json
from d1jax.run.trackers import Run

@dataclasses.dataclass
class Mine:
  run: "Run"

  def log(self, step, values):
    with (self.run.workdir / "mine.jsonl").open("a") as file:
      file.write(json.dumps([self.run.stage, step, values["loss"]]) + "\\n")

  def close(self):
    (self.run.workdir / "mine.closed").touch()

build = Mine
"""
"""A tracker of a user, as docs/tracking.md shows one: this file, and no other edit."""


def run_of(folder, start=0) -> Run:
  return Run(folder, "run", "0123abcd", "grpo", start, {"seed": 0})


class Recorded:
  """Stands for a run of Weights & Biases, or of trackio."""

  def __init__(self, **begun):
    self.begun, self.logged, self.finished = begun, [], False

  def log(self, values, step):
    self.logged.append((step, values))

  def finish(self):
    self.finished = True


@pytest.fixture
def service(monkeypatch):
  """A package that trackers import, by its name; what was begun with it is in the list."""

  def make(name):
    begun = []
    package = types.ModuleType(name)
    package.init = lambda **arguments: begun.append(Recorded(**arguments)) or begun[-1]
    monkeypatch.setitem(sys.modules, name, package)
    monkeypatch.delitem(sys.modules, f"d1jax.run.trackers.{name}", raising=False)
    return begun

  yield make
  for name in ("wandb", "trackio"):
    sys.modules.pop(f"d1jax.run.trackers.{name}", None)


@pytest.mark.parametrize(
  ("name", "expected"),
  [
    ("wandb", {"id": "0123abcd-grpo", "name": "run-grpo", "group": "run-0123abcd", "resume": "allow"}),
    ("trackio", {"name": "run-grpo-0123abcd", "group": "run-0123abcd", "resume": "allow", "embed": False}),
  ],
)
def test_a_service_is_told_the_numbers_of_each_iteration_and_knows_the_run_again(tmp_path, service, name, expected):
  begun = service(name)
  for start in (0, 1):
    all_of_them = Trackers(trackers.entries(f" {name},"), run_of(tmp_path, start))
    all_of_them.log(start + 1, {"loss": 0.5, "steps": 3, "alarms": ["kl"]})
    all_of_them.close()
  assert [one.logged for one in begun] == [[(1, {"loss": 0.5, "steps": 3.0})], [(2, {"loss": 0.5, "steps": 3.0})]]
  assert all(one.finished for one in begun)
  first, second = (one.begun for one in begun)
  assert first == second
  assert first.items() >= (expected | {"project": "d1jax", "config": {"seed": 0}}).items()


def test_numbers_go_to_tensorboard(tmp_path):
  tensorboard = Trackers(["tensorboard"], run_of(tmp_path))
  tensorboard.log(1, {"a_tag": 3, "a_word": "text"})
  events = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard" / "grpo").iterdir())
  assert b"a_tag" in events, "a kill loses nothing"
  assert b"a_word" not in events
  tensorboard.close()


@pytest.mark.parametrize(
  ("entry", "content", "message"),
  [
    ("wandbb", None, "trackers: unknown tracker 'wandbb'; known: tensorboard, trackio, wandb, or a file of your own"),
    ("wandb", None, "trackers: wandb needs the package wandb: pip install wandb$"),
    ("own.py", None, r"trackers: .*own\.py is no file"),
    (
      "own.py",
      "import no_such_package.of_mine",
      r"own\.py needs the package no_such_package: pip install no_such_pack",
    ),
    ("own.py", "1 / 0", r"own\.py cannot be loaded \(ZeroDivisionError: division by zero\)"),
    ("own.py", "x = 1", r"own\.py defines no function build\(run\)"),
  ],
)
def test_what_cannot_be_loaded_is_one_line_before_anything_is_trained(tmp_path, monkeypatch, entry, content, message):
  monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
  if content:
    (tmp_path / entry).write_text(content)
  with pytest.raises(RunError, match=message) as caught:
    trackers.check(f"tensorboard,{tmp_path / entry if entry.endswith('.py') else entry}")
  assert "\n" not in str(caught.value)


def test_a_tracker_that_cannot_begin_is_one_line_and_the_others_are_closed(tmp_path):
  (tmp_path / "own.py").write_text(OWN)
  (tmp_path / "bad.py").write_text("def build(run):\n  raise ValueError('nobody is logged in\\nmore')")
  with pytest.raises(RunError, match=r"bad\.py cannot begin \(ValueError: nobody is logged in\)$"):
    Trackers([str(tmp_path / "own.py"), str(tmp_path / "bad.py")], run_of(tmp_path))
  assert (tmp_path / "mine.closed").exists()


@pytest.mark.parametrize("method", ["log", "close"])
def test_a_tracker_that_fails_is_left_out_and_the_others_go_on(tmp_path, method, caplog):
  (tmp_path / "own.py").write_text(OWN)
  (tmp_path / "bad.py").write_text(OWN + f"\nMine.{method} = lambda *_: 1 / 0\n")
  both = Trackers([str(tmp_path / "bad.py"), str(tmp_path / "own.py")], run_of(tmp_path))
  for step in (1, 2):
    both.log(step, {"loss": 1.0})
  both.close()
  assert (tmp_path / "mine.closed").exists()
  (record,) = caplog.records
  assert record.message.endswith("bad.py failed and is left out (ZeroDivisionError: division by zero)")


def test_a_tracker_of_a_user_is_one_file(tmp_path):
  (tmp_path / "own.py").write_text(OWN)
  test_loop.run(tmp_path / "run", trackers=[str(tmp_path / "own.py")])
  found = [json.loads(line) for line in (tmp_path / "run" / "mine.jsonl").open()]
  assert found == [["sft", step, 1.0] for step in range(1, test_loop.STEPS + 1)]
  assert (tmp_path / "run" / "mine.closed").exists()


def test_the_tracker_of_the_documentation_works(tmp_path):
  page = (jobs.ROOT / "docs" / "tracking.md").read_text(encoding="utf-8")
  (tmp_path / "mine.py").write_text(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1])
  test_loop.run(tmp_path / "run", trackers=[str(tmp_path / "mine.py")])
  assert len((tmp_path / "run" / "sft.csv").read_text().splitlines()) == test_loop.STEPS


def test_process_0_alone_has_trackers(tmp_path, monkeypatch):
  monkeypatch.setattr(multihost, "is_main", lambda: False)
  (tmp_path / "own.py").write_text(OWN)
  test_loop.run(tmp_path / "run", trackers=[str(tmp_path / "own.py")])
  assert not (tmp_path / "run" / "mine.jsonl").exists()


def test_the_records_of_a_run_are_a_tracker_too(tmp_path):
  records: trackers.Tracker = MetricsWriter(tmp_path, "sft", 0)
  records.log(1, {"loss": 1.0})
  records.close()
  assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"stage": "sft", "iteration": 1, "loss": 1.0}


def test_a_run_keeps_its_identity(tmp_path):
  first = run_identity(tmp_path)
  assert run_identity(tmp_path) == first
  (tmp_path / "run_id").write_text("../../elsewhere")
  assert run_identity(tmp_path) not in (first, "../../elsewhere")
