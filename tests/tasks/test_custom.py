"""What belongs to the process of a custom task. What its file and its answers may be is in test_custom_process."""

import os
import pickle
import re
import signal
import time
from pathlib import Path

import pytest

from d1jax.errors import RunError
from d1jax.tasks import SPLITS, Custom, DataError, Grade, Task, TaskError, build, custom

PARITY = str(Path(__file__).with_name("parity_task.py"))

TASK = """
import multiprocessing, os, re, sys, time
from d1jax.tasks import SPLITS, Grade

def hang(): re.match("(a+)+$", "a" * 50 + "b")  # never lets another thread of Python run
def grow(): bytearray(1 << 30)
def die(): os._exit(7)
def close(): os.closerange(3, 65536)
def kill(): os.kill(os.getpid(), 9)
def interrupt(): raise KeyboardInterrupt
def mute(): sys.stdout.close()
def read(): input()
def fork(): return os.fork() and None
def start():
  process = multiprocessing.Process(target=time.sleep, args=(60,))
  process.start(), process.terminate(), process.join()
def say(): print("hello from the grader")

class Mine:
  name, splits = "mine", SPLITS
  def __init__(self, seed, root, sizes, **options): self.options = options
  def records(self, split):
    if split == self.options.get("asked"): return self.options["answers"]
    return [{"n": (SPLITS.index(split), n)} for n in range(3)]
  def prompt(self, record, style):
    if style == self.options.get("style"): raise KeyError("style")
    return [{"role": "user", "content": f"{style} {record['n']}"}], ""
  def demonstration(self, record, style): return self.options.get("demonstration", "right")
  def baseline(self, record, style): return self.options.get("baseline", "wrong")
  def cluster(self, record): return self.options.get("cluster", "one")
  def grade(self, text, record, protocol="strict"):
    n, record["n"] = record["n"], None
    if text in globals(): globals()[text]()
    if text == self.options.get("text"): return self.options.get("grade")
    return Grade({"right": float(text == "right")}, {"solved": (int(text == "right"), 1)}, f"{n} {os.getpid()}")

build = Mine
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory):
  file = tmp_path_factory.mktemp("task") / "mine.py"
  file.write_text(TASK)
  return str(file)


@pytest.fixture(scope="module")
def task(path):
  return build("x", module=path)


RECORD = {"n": (1, 2)}


def test_the_task_of_a_file_gets_what_every_task_gets_and_is_one():
  task = build("sudoku", seed=3, root="somewhere", sizes={"train": 50}, module=PARITY, share=0.5)
  assert isinstance(task, Task)
  assert (task.name, task.splits) == ("parity", SPLITS)
  assert len(task.records("train")) == 32
  assert task.records("train") != build("parity", module=PARITY, share=0.5).records("train")


def test_the_worked_example_is_a_good_task():
  task = build("parity", module=PARITY)
  task.try_out("terse", "strict")
  splits = [{record["digits"] for record in task.records(split)} for split in SPLITS]
  assert [len(split) for split in splits] == [64] * 4
  assert len(set.union(*splits)) == 256
  for record in task.records("test")[:8]:
    assert task.grade(task.demonstration(record, "terse"), record).reward == 1.0
    assert task.grade("neither", record).reward == 0.0
  assert task.demonstration({"digits": "01100000"}, "terse") == "even"
  assert task.grade(" odd\n", {"digits": "01100000"}).reward == 0.1
  with pytest.raises(
    TaskError, match=r"parity_task.py line \d+: grade.*protocol='d1'\) failed: .*choose one of: strict"
  ):
    task.try_out("terse", "d1")


def test_a_built_in_task_with_another_reward_is_eight_lines(tmp_path):
  """The example of docs/tasks.md."""
  docs = (Path(__file__).parents[2] / "docs/tasks.md").read_text(encoding="utf-8")
  (example,) = (block for block in re.findall("```python\n(.*?)```", docs, re.DOTALL) if "Mine(Sudoku)" in block)
  (tmp_path / "mine.py").write_text(example)
  task, plain = build("x", module=str(tmp_path / "mine.py"), clues=(14, 15)), build("sudoku", clues=(14, 15))
  assert task.records("test") == plain.records("test")
  record = task.records("test")[0]
  right = plain.demonstration(record, "terse")
  long = task.grade(right + "\n" * 100, record)
  assert dict(long.components) == {**plain.grade(right + "\n" * 100, record).components, "short": -0.1}
  assert task.grade(right, record).components["short"] == 0.0


def test_answers_cross_as_they_are(task):
  assert task.records("train")[0] == {"n": (1, 0)}, "a tuple stays a tuple"
  assert task.prompt(RECORD, "d1") == ([{"role": "user", "content": "d1 (1, 2)"}], "")
  grade = task.grade("right", RECORD)
  assert (grade.components, grade.metrics) == ({"right": 1.0}, {"solved": (1, 1)})
  assert grade.answer.startswith("(1, 2) ")
  assert RECORD == {"n": (1, 2)}, "what a grader does to its record has no effect"


def test_a_grader_that_hangs_is_ended_and_the_next_text_is_graded(task, monkeypatch):
  before = task.grade("", RECORD).answer
  with monkeypatch.context() as patch:
    patch.setattr(custom, "CALL_SECONDS", 0.2)
    with pytest.raises(
      TaskError, match=r"mine.py: grade\(text='hang', record=\{'n': \(1, 2\)\}, .* took more than 0.2 s"
    ):
      task.grade("hang", RECORD)
  assert task.grade("", RECORD).answer != before


def test_a_grader_that_takes_too_much_memory_is_an_error_of_one_line_and_the_next_text_is_graded(path, monkeypatch):
  assert custom.most_bytes() > 1 << 30, "graders may be large"
  monkeypatch.setattr(custom, "most_bytes", lambda: 1 << 28)
  task = build("x", module=path)
  message = (
    r"mine.py line \d+: grade\(text='grow', .*\) failed: MemoryError: \(the process of a task may take 0.3 GiB\)$"
  )
  with pytest.raises(TaskError, match=message):
    task.grade("grow", RECORD)
  assert task.grade("right", RECORD).reward == 1.0


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("die", r"mine.py: grade\(text='die', .*\) ended its process twice \(exit code 7; .*\); it must return"),
    ("kill", r"grade\(text='kill', .*\) ended its process twice \(exit code -9; -6 or -9: memory ran out, of which "),
    ("close", r"grade\(text='close', .*\) ended its process twice \(exit code 0; "),
    ("interrupt", r"mine.py line \d+: grade\(text='interrupt', .*\) failed: KeyboardInterrupt$"),
    ("read", r"mine.py line \d+: grade\(text='read', .*\) failed: EOFError: EOF when reading a line$"),
  ],
)
def test_a_grader_that_ends_its_process_is_an_error_of_one_line(task, text, message):
  with pytest.raises(RunError, match=message) as caught:
    task.grade(text, RECORD)
  assert isinstance(caught.value, DataError), "so that it is wrong input at the start of a run as well"
  assert "\n" not in str(caught.value)
  assert caught.value.exit_code == 2
  assert pickle.loads(pickle.dumps(caught.value)).args == caught.value.args, "a worker sends it"
  assert task.grade("right", RECORD).reward == 1.0


def test_a_grader_may_print_start_processes_and_close_its_standard_output(path, capfd):
  task = build("x", module=path)
  for text in ("say", "fork", "start", "mute"):
    assert len({task.grade(t, RECORD).answer for t in (text, "", "right")}) == 1, "one process has answered in turn"
  assert capfd.readouterr().out == "hello from the grader\n"


def test_stop_signals_are_for_the_run_to_answer(task):
  answer = task.grade("", RECORD).answer
  for number in (signal.SIGINT, signal.SIGTERM):
    os.kill(int(answer.split()[-1]), number)
  assert task.grade("", RECORD).answer == answer


def test_the_process_ends_with_the_task(path):
  task = build("x", module=path)
  pid = int(task.grade("", RECORD).answer.split()[-1])
  os.kill(pid, 0)
  del task
  with pytest.raises(ProcessLookupError):
    os.kill(pid, 0)


def test_a_process_without_anybody_to_answer_ends_itself(path):
  """Twice the time of its call, however busy it is: the run that would have ended it was killed."""
  settings = custom.Settings(path, {"seed": 0, "root": None, "sizes": {}})
  process = custom._Process(settings)
  process._connection.send((0.1, ("grade", ("hang", RECORD, "strict"))))
  end = time.monotonic() + 20
  while process._program.poll() is None and time.monotonic() < end:
    time.sleep(0.02)
  assert process._program.returncode == -signal.SIGALRM


def test_a_task_is_sent_to_another_process_as_its_settings(task):
  other = pickle.loads(pickle.dumps(task))
  assert (other.name, other.splits, other.records("test")) == (task.name, task.splits, task.records("test"))
  assert other.grade("", RECORD).answer != task.grade("", RECORD).answer


NAN = Grade({"a": float("nan")}, {"solved": (1, 1)})


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"style": "terse"}, r"line \d+: prompt\(record=\{'n': \(0, 0\)\}, style='terse'\) failed: KeyError: 'style'$"),
    (
      {"demonstration": None},
      r"demonstration\(record=\{'n': \(0, 0\)\}, style='terse'\) returned None, expected a text$",
    ),
    ({"baseline": None}, r"baseline\(record=\{'n': \(2, 0\)\}, style='terse'\) returned None, expected a text$"),
    ({"cluster": []}, r"cluster\(record=\{'n': \(2, 0\)\}\) returned \[\], expected a text$"),
    (
      {"text": "", "grade": NAN},
      r"grade\(text='', .*\) gave the reward component 'a' the value nan, expected a finite",
    ),
    ({"text": "right"}, r"grade\(text='right', .*\) returned None, expected a Grade"),
    ({"text": "wrong"}, r"grade\(text='wrong', .*\) returned None, expected a Grade"),
    ({"text": custom.GARBAGE}, r"grade\(text='.x00 \?\? .* returned None, expected a Grade"),
    ({"asked": "train", "answers": []}, r"records\(split='train'\) returned no record: .* task\.sizes\.train=0$"),
    (
      {"asked": "test", "answers": [{"n": (9, 9)}, {"n": (1, 2)}]},
      r"the question 'terse \(1, 2\)' is in the splits train and test: .* test or validation to no other split",
    ),
    ({"asked": "validation", "answers": [{"n": (0, 2)}]}, "is in the splits demonstrations and validation: "),
  ],
)
def test_mistakes_show_when_a_task_is_tried_out(path, options, message):
  task = build("x", module=path, **options)
  with pytest.raises(TaskError, match=re.escape(path) + ".*" + message):
    task.try_out("terse", "strict")


def test_what_is_no_mistake_passes(path):
  shared = build("x", module=path, asked="train", answers=[{"n": (0, 0)}])
  shared.try_out("terse", "strict")  # demonstrations and training may ask the same
  build("x", module=path, sizes={"train": 0}, asked="train", answers=[]).try_out("terse", "strict")


def test_records_are_asked_for_twice(tmp_path):
  (tmp_path / "drawn.py").write_text(TASK.replace("range(3)", "__import__('random').sample(range(10**6), 3)"))
  with pytest.raises(
    TaskError, match=r"records\(split='train'\) returned other records the second time: draw them with"
  ):
    build("x", module=str(tmp_path / "drawn.py")).records("train")


def test_a_file_that_cannot_start_is_an_error(tmp_path, monkeypatch):
  with pytest.raises(TaskError, match=r"absent.py: no such Python file under "):
    build("x", module=str(tmp_path / "absent.py"))
  (tmp_path / "exits.py").write_text("import os; os._exit(0)")
  with pytest.raises(TaskError, match=r"exits.py: build\(\) ended its process twice \(exit code 0"):
    build("x", module=str(tmp_path / "exits.py"))
  monkeypatch.setattr(custom, "START_SECONDS", 0.2)
  (tmp_path / "hangs.py").write_text("while True: pass")
  with pytest.raises(TaskError, match=r"hangs.py: build\(\) took more than 0.2 seconds and was ended: bound its time$"):
    build("x", module=str(tmp_path / "hangs.py"))


def test_a_task_of_a_file_does_not_enter_the_table():
  assert isinstance(build("parity", module=PARITY), Custom)
  with pytest.raises(ValueError, match="unknown task 'parity'; choose one of: sudoku, countdown"):
    build("parity")
