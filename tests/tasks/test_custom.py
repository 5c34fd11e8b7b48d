import pickle
import re
from pathlib import Path

import pytest

from d1jax.tasks import SPLITS, DataError, Task, build, custom

PARITY = str(Path(__file__).with_name("parity_task.py"))

WHOLE = """
class Whole:
  name, splits = "whole", ("train",)
  def records(self, split): return ()
  def prompt(self, record, style): return [], ""
  def demonstration(self, record, style): return ""
  def baseline(self, record, style): return ""
  def cluster(self, record): return ""
  def grade(self, text, record, protocol="strict"): raise NotImplementedError
"""


def written(tmp_path, text, name="my_task.py"):
  (tmp_path / name).write_text(text)
  return str(tmp_path / name)


def test_the_task_of_a_file_has_its_own_name_and_gets_what_every_task_gets():
  task = build("sudoku", seed=3, root="somewhere", sizes={"train": 5}, module=PARITY, share=0.5)
  assert isinstance(task, Task)
  assert task.name == "parity"
  assert (task.seed, task.root, task.sizes, task.share) == (3, "somewhere", {"train": 5}, 0.5)
  assert len(task.records("train")) == 5


def test_the_worked_example_is_a_good_task():
  task = build("parity", module=PARITY)
  splits = [{record["digits"] for record in task.records(split)} for split in SPLITS]
  assert [len(split) for split in splits] == [64] * 4
  assert len(set.union(*splits)) == 256
  assert task.records("test") == build("parity", module=PARITY).records("test")
  for record in task.records("test"):
    assert task.grade(task.demonstration(record, "terse"), record).reward == 1.0
    assert task.grade("neither", record).reward == 0.0
  assert task.demonstration({"digits": "01100000"}, "terse") == "even"
  assert task.grade(" odd\n", {"digits": "01100000"}).reward == 0.1


def test_a_file_is_imported_once_and_its_objects_can_be_pickled(tmp_path):
  path = written(tmp_path, f"print('imported'){WHOLE}build = lambda **_: Whole()", "counting.py")
  first, second = build("x", module=path), build("x", module=path)
  assert type(first) is type(second)
  assert type(pickle.loads(pickle.dumps(first))) is type(first)


def test_another_process_needs_the_files_of_what_it_is_sent_and_no_other(tmp_path):
  path, other = (written(tmp_path, f"{WHOLE}build = lambda **_: Whole()", name) for name in ("one.py", "two.py"))
  one, two = build("x", module=path), build("x", module=other)
  assert custom.used(pickle.dumps(one)) == [str(Path(path).resolve())]
  assert custom.used(pickle.dumps([two, one])) == [str(Path(p).resolve()) for p in (path, other)]
  assert custom.used(pickle.dumps(build("sudoku"))) == []


def test_the_name_of_a_module_follows_from_its_path_alone(tmp_path, monkeypatch):
  (tmp_path / "other").mkdir()
  path, other = written(tmp_path, "a = 1"), written(tmp_path / "other", "a = 2")
  monkeypatch.chdir(tmp_path)
  assert custom.load("my_task.py") is custom.load(path)
  assert (custom.load(path).a, custom.load(other).a) == (1, 2)
  assert custom.load(path).__name__ != custom.load(other).__name__


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("x = 1\n\ny = 1 / 0\n", "my_task.py line 3: ZeroDivisionError: division by zero"),
    ("def f():\n  return (\n", "my_task.py line 2: SyntaxError: '.' was never closed"),
    ("import nowhere_at_all", "my_task.py line 1: ModuleNotFoundError: No module named 'nowhere_at_all'"),
    ("raise ValueError('two\\nlines')", "my_task.py line 1: ValueError: two lines"),
    ("x = 1", r"my_task.py: defines no build\(\*, seed, root, sizes\)"),
    ("build = 3", "my_task.py: defines no build"),
    ("def build(seed):\n  pass", "my_task.py: build.* failed: TypeError: .*unexpected keyword argument 'root'"),
    ("def build(**_):\n  raise ValueError('no clues')", "my_task.py line 2: build.* failed: ValueError: no clues"),
    (
      "def build(**_):\n  return 5",
      r"my_task.py: build\(\) made a int without baseline, cluster, demonstration, grade,",
    ),
    (f"{WHOLE}  del cluster\ndef build(**_):\n  return Whole()", "made a Whole without cluster; a task has baseline,"),
    (f"{WHOLE}  del splits\ndef build(**_):\n  return Whole()", "made a Whole without splits; a task has"),
  ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path, text, message):
  path = written(tmp_path, text)
  with pytest.raises(DataError, match=message) as caught:
    build("sudoku", module=path)
  assert str(caught.value).startswith(path)
  assert "\n" not in str(caught.value)


def test_a_file_that_failed_can_be_corrected(tmp_path):
  with pytest.raises(DataError, match="NameError"):
    build("x", module=written(tmp_path, "oops"))
  assert build("x", module=written(tmp_path, f"{WHOLE}build = lambda **_: Whole()")).name == "whole"


@pytest.mark.parametrize("name", ["absent.py", "folder.py", "notes.txt"])
def test_what_is_no_python_file_is_an_error(tmp_path, name):
  (tmp_path / "folder.py").mkdir()
  (tmp_path / "notes.txt").write_text("hello")
  with pytest.raises(DataError, match=f"{name}: no such Python file under {re.escape(str(Path.cwd()))}"):
    build("sudoku", module=str(tmp_path / name))


def test_every_member_of_a_task_is_asked_for(tmp_path):
  """Each one is missed on its own, and no other."""
  whole = custom.load(written(tmp_path, WHOLE, "whole.py")).Whole
  members = [name for name in vars(whole) if not name.startswith("_")]
  assert len(members) == 8
  for member in members:
    partial = type("Partial", (), {name: value for name, value in vars(whole).items() if name != member})
    path = written(tmp_path, "made = {}\ndef build(**_):\n  return made['task']", f"without_{member}.py")
    custom.load(path).made["task"] = partial()
    with pytest.raises(DataError, match=f"made a Partial without {member}; a task has"):
      build("x", module=path)


def test_a_task_of_a_file_does_not_enter_the_table():
  build("parity", module=PARITY)
  with pytest.raises(ValueError, match="unknown task 'parity'; choose one of: sudoku, countdown"):
    build("parity")
