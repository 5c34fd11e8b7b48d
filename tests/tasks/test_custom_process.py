"""What a user's file may be, and what its task may answer; on the functions, in this process."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from d1jax.tasks import Grade, TaskError, build, checked, custom_process
from d1jax.tasks.custom_process import Settings

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


def built(tmp_path, text):
  (tmp_path / "my_task.py").write_text(text)
  keywords = {"seed": 0, "root": None, "sizes": {}}
  return custom_process.build(Settings(str(tmp_path / "my_task.py"), keywords))


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("x = 1\n\ny = 1 / 0\n", "my_task.py line 3: ZeroDivisionError: division by zero"),
    ("def f():\n  return (\n", "my_task.py line 2: SyntaxError: '.' was never closed"),
    ("import nowhere_at_all", "my_task.py line 1: ModuleNotFoundError: No module named 'nowhere_at_all'"),
    ("raise ValueError('two\\nlines')", "my_task.py line 1: ValueError: two lines"),
    ("import sys; sys.exit(0)", "my_task.py line 1: SystemExit: 0; run it"),
    (
      f"{WHOLE}  name = property(lambda _: 1 / 0)\nbuild = lambda **_: Whole()",
      "line 10: the task .* fails: ZeroDivisionE",
    ),
    ("x = 1", r"my_task.py: defines no build\(\*, seed, root, sizes\)"),
    ("build = 3", "my_task.py: defines no build"),
    ("def build(seed):\n  pass", "my_task.py: build.* failed: TypeError: .*unexpected keyword argument 'root'"),
    ("def build(**_):\n  raise ValueError('no clues')", "my_task.py line 2: build.* failed: ValueError: no clues"),
    ("def build(**_): raise SystemExit", "my_task.py line 1: build.* failed: SystemExit$"),
    (
      "def build(**_):\n  return 5",
      r"my_task.py: build\(\) made a int without baseline, cluster, demonstration, grade,",
    ),
    (f"{WHOLE}  del splits\ndef build(**_):\n  return Whole()", "made a Whole without splits; a task has"),
    (f"{WHOLE}  name = 5\ndef build(**_):\n  return Whole()", "my_task.py: the task's name is 5, expected a text"),
    (
      f"{WHOLE}  name = '../x'\ndef build(**_):\n  return Whole()",
      r"the task's name is '\.\./x', expected a text without",
    ),
    (
      f"{WHOLE}  splits = 'train'\ndef build(**_):\n  return Whole()",
      "the task's splits are 'train', expected a tuple",
    ),
  ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path, text, message):
  with pytest.raises(TaskError, match=message) as caught:
    built(tmp_path, text)
  assert str(caught.value).startswith(str(tmp_path))
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["absent.py", "folder.py", "notes.txt"])
def test_what_is_no_python_file_is_an_error(tmp_path, name):
  (tmp_path / "folder.py").mkdir()
  (tmp_path / "notes.txt").write_text("hello")
  with pytest.raises(TaskError, match=f"{name}: no such Python file under "):
    custom_process.load(str(tmp_path / name))


def test_every_member_of_a_task_is_asked_for(tmp_path):
  """Each one is missed on its own, and no other."""
  whole = type(built(tmp_path, f"{WHOLE}build = lambda **_: Whole()"))
  members = [name for name in vars(whole) if not name.startswith("_")]
  assert len(members) == 8
  for member in members:
    with pytest.raises(TaskError, match=f"made a Whole without {member}; a task has"):
      built(tmp_path, f"{WHOLE}\ndel Whole.{member}\nbuild = lambda **_: Whole()")


class Unreadable(Mapping):
  def __getitem__(self, *_):
    raise RuntimeError("no value")

  __iter__ = __len__ = __getitem__

  def __repr__(self):
    raise RuntimeError("no text")


class Answering:
  """Returns what it was made with, or raises it, whatever it is asked."""

  def __init__(self, found):
    self.found = found

  def grade(self, *_):
    if isinstance(self.found, BaseException):
      raise self.found
    return self.found() if callable(self.found) else self.found

  records = prompt = demonstration = baseline = cluster = grade


def overflow():
  return overflow()


ARGUMENTS = {"grade": ("a text", {"n": 1}, "strict"), "records": ("train",), "cluster": ({"n": 1},)}
SOLVED = {"solved": (1, 1)}
A_GRADE = "expected a Grade"
FINITE = "gave the reward component 'a' the value {}, expected a finite number"
PAIR = r"gave the metric 'solved' the value {}, expected \(numerator, denominator\)"
LIST = "returned {}, expected a list of dictionaries"

BAD = [
  # Whatever is raised.
  *[
    ("grade", e, f"failed: {type(e).__name__}: no")
    for e in (ValueError("no"), KeyboardInterrupt("no"), SystemExit("no"))
  ],
  ("grade", SystemExit(0), "failed: SystemExit: 0"),
  ("grade", MemoryError(), "failed: MemoryError$"),
  ("grade", StopIteration(), "failed: StopIteration$"),
  ("grade", GeneratorExit(), "failed: GeneratorExit$"),
  ("grade", overflow, "failed: RecursionError: maximum recursion depth"),
  *[(name, ValueError("no"), "failed: ValueError: no") for name in ("records", "prompt", "baseline", "cluster")],
  # No grades.
  ("grade", None, f"returned None, {A_GRADE}"),
  ("grade", 1.0, f"returned 1.0, {A_GRADE}"),
  ("grade", {"reward": 1}, rf"returned \{{'reward': 1\}}, {A_GRADE}"),
  ("grade", Unreadable(), f"returned <Unreadable, whose repr fails: RuntimeError>, {A_GRADE}"),
  ("grade", Grade([1.0], SOLVED), r"gave the components \[1.0\], expected a dictionary of names"),
  ("grade", Grade({1: 1.0}, SOLVED), r"gave the components \{1: 1.0\}, expected a dictionary of names"),
  ("grade", Grade({"a": 1.0}, None), "gave the metrics None, expected a dictionary of names"),
  ("grade", Grade(Unreadable(), SOLVED), "returned what cannot be read: RuntimeError: no value"),
  *[
    ("grade", Grade({"fine": 1.0, "a": value}, SOLVED), FINITE.format(shown))
    for value, shown in (
      *((math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf"), (1e300, r"1e\+300"), (10**400, r"10+\.\.\.")),
      *(("1", "'1'"), (None, "None"), (1j, "1j"), (np.ones(3), r"array\(\[1., 1., 1.\]\)")),
      *((np.float32("nan"), r"np.float32\(nan\)"), ([1.0], r"\[1.0\]")),
    )
  ],
  *[
    ("grade", Grade(*given), rf"returned among the {part} the name 'a\\ud800' with '\\ud800', a half of a character")
    for part, given in (("components", ({"a\ud800": 1.0}, SOLVED)), ("metrics", ({}, SOLVED | {"a\ud800": (1, 1)})))
  ],
  # Metrics.
  ("grade", Grade({"a": 1.0}, {}), r"gave the metrics \[\] without 'solved', which validation reads"),
  ("grade", Grade({"a": 1.0}, {"right": (1, 1)}), r"gave the metrics \['right'\] without 'solved', which validation"),
  ("grade", Grade({"a": 1.0}, {"solved": (0, 0)}), r"gave the pair \(0, 0\) for 'solved', which validation reads"),
  *[
    ("grade", Grade({"a": 1.0}, {"solved": value}), PAIR.format(shown))
    for value, shown in (
      *((1, "1"), (True, "True"), ((2, 1), r"\(2, 1\)"), ((-1, 1), r"\(-1, 1\)"), ((math.nan, 1), r"\(nan, 1\)")),
      *(
        ((1, math.nan), r"\(1, nan\)"),
        (("a", "b"), r"\('a', 'b'\)"),
        ((1,), r"\(1,\)"),
        ((0, math.inf), r"\(0, inf\)"),
      ),
    )
  ],
  ("grade", Grade({"a": 1.0}, SOLVED, object()), "gave the answer <object .*, expected a text or None"),
  ("grade", Grade({"a": 1.0}, SOLVED, 5), "gave the answer 5, expected a text or None"),
  # Records.
  ("records", None, LIST.format("None")),
  ("records", lambda: (n for n in ()), LIST.format("<generator.*")),
  ("records", "text", LIST.format("'text'")),
  ("records", {"n": 1}, LIST.format(r"\{'n': 1\}")),
  ("records", [{"n": 1}, 2], "returned 2 as record 1, expected a dictionary"),
  ("records", [{"n": [object()]}], "returned <object .*> in record 0, expected what JSON can hold"),
  ("records", [{"n": b"1"}], "returned b'1' in record 0, expected what JSON can hold"),
  ("records", [{"n": np.ones(2)}], r"returned array\(\[1., 1.\]\) in record 0, expected what JSON can hold"),
  ("records", [{"n": {1: 2}}], "returned the key 1 in record 0, expected texts as keys"),
  # Prompts and other texts.
  ("prompt", None, r"returned None, expected \(\[\{'role': 'user', 'content': ...\}\], prefill\)"),
  ("prompt", ["one", "two"], r"returned \['one', 'two'\], expected \(\["),
  ("prompt", (["one"], ""), "returned the message 'one', expected {'role': 'user'"),
  (
    "prompt",
    ([{"role": "user"}], ""),
    r"returned the message \{'role': 'user'\}, expected \{'role': 'user', 'content'",
  ),
  ("prompt", ([{"role": "user", "content": None}], ""), "returned the message's content None, expected a text"),
  ("prompt", ([{"role": "user", "content": 5}], ""), "returned the message's content 5, expected a text"),
  ("prompt", ([], None), "returned the prefill None, expected a text"),
  ("prompt", ([{"role": "user", "content": "\ud800"}], ""), r"content '\\ud800' with '\\ud800', a half of a character"),
  (
    "prompt",
    ([{"role": "user", "content": "1" * 10**6}], ""),
    r"content '1{80}\.\.\.' of 1000000 characters, expected 5",
  ),
  ("demonstration", None, "returned None, expected a text"),
  ("baseline", 5, "returned 5, expected a text"),
  ("cluster", [], r"returned \[\], expected a text"),
]


@pytest.mark.parametrize(
  ("method", "found", "message"), BAD, ids=[f"{i} {m[0]} {m[2][:40]}" for i, m in enumerate(BAD)]
)
def test_a_bad_answer_names_file_call_and_value(method, found, message):
  arguments = ARGUMENTS.get(method, ({"n": 1}, "terse"))
  with pytest.raises(TaskError, match=message) as caught:
    custom_process.answer(Answering(found), "mine.py", method, arguments)
  said = str(caught.value)
  assert said.startswith(f"mine.py: {checked.called(method, arguments)} ")
  assert "\n" not in said
  assert len(said) < 500


def test_the_line_that_raised_is_named(tmp_path):
  task = built(tmp_path, f"{WHOLE}build = lambda **_: Whole()")
  path = str(tmp_path / "my_task.py")
  with pytest.raises(TaskError, match=rf"my_task.py line 9: grade\(text='{'x' * 80}\.\.\.', record=\{{'n': 1\}}, "):
    custom_process.answer(task, path, "grade", ("x" * 10**6, {"n": 1}, "strict"))


def test_numbers_of_array_libraries_become_numbers():
  grade = Grade({"a": np.float32(0.5), "b": True}, {"solved": (np.int64(1), np.array(1)), "rest": [0, 0]}, "x")
  found = custom_process.answer(Answering(grade), "mine.py", "grade", ARGUMENTS["grade"])
  assert found == Grade({"a": 0.5, "b": 1}, {"solved": (1, 1), "rest": (0, 0)}, "x")
  assert {type(n) for n in (*found.components.values(), *found.metrics["solved"])} == {int, float}
  records = [{"n": np.int32(3), "rows": (1, [2.5, None, True]), "in": {"t": "x"}}]
  (record,) = custom_process.answer(Answering(records), "mine.py", "records", ("train",))
  assert record == {"n": 3, "rows": (1, [2.5, None, True]), "in": {"t": "x"}}
  assert type(record["n"]) is int
  assert custom_process.answer(Answering(7), "mine.py", "cluster", ({},)) == "7"


def test_only_strict_must_have_what_validation_reads():
  grade = Grade({"a": 1.0}, {})
  assert custom_process.answer(Answering(grade), "mine.py", "grade", ("", {}, "d1")) == grade


@pytest.mark.parametrize("name", ["sudoku", "countdown"])
def test_grades_of_built_in_tasks_pass_as_they_are(name):
  task = build(name, sizes={"test": 4})
  for record in task.records("test"):
    for protocol in ("strict", "d1"):
      for text in ("", task.demonstration(record, "d1"), task.baseline(record, "d1")):
        assert checked.grade(task, text, record, protocol) == task.grade(text, record, protocol)
