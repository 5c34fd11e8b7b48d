import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from d1jax.rl.grading import Grader, WorkersDiedError, decode, graded_texts
from d1jax.tasks import Grade, TaskError, build, build_mix

ROOT = Path(__file__).parents[2]
PARITY = str(ROOT / "tests/tasks/parity_task.py")


class Letters:
  """Id i is the i-th letter; id 0 is the stop, which shows as a full stop."""

  vocab, mask_id, stop_ids, pad_id, files = 27, 26, (0,), 0, {}

  def prompt(self, messages, prefill):
    raise NotImplementedError

  def completion(self, text):
    raise NotImplementedError

  def decode_raw(self, rows):
    raise NotImplementedError

  def written(self, messages, begin_answer):
    raise NotImplementedError

  def encode(self, text):
    raise NotImplementedError

  def unknown(self, text):
    raise NotImplementedError

  def decode_all(self, rows):
    return ["".join("." if i == 0 else chr(96 + i) for i in row) for row in rows]


class Echo:
  """Says who graded what: the process in the answer, half a point a letter."""

  name, splits = "echo", ("train",)

  def records(self, split):
    raise NotImplementedError

  prompt = demonstration = baseline = cluster = records

  def grade(self, text, record, protocol="strict"):
    answer = f"{os.getpid()} {'jax' in sys.modules} {protocol}"
    return Grade({"length": 0.5 * len(text)}, {"row": (record["row"], 1000)}, answer)


class Dying(Echo):
  """The process that grades the text `die` dies, while `path` is not there, or always."""

  def __init__(self, path=None):
    self.path = path

  def grade(self, text, record, protocol="strict"):
    if text == "die" and (self.path is None or not self.path.exists()):
      if self.path is not None:
        self.path.write_text("died once")
      os._exit(9)
    return super().grade(text, record, protocol)


class Giving(Echo):
  """Gives what its record says for the text `bad`."""

  def grade(self, text, record, protocol="strict"):
    return record["grade"] if text == "bad" else super().grade(text, record, protocol)


class Raising(Echo):
  def grade(self, text, record, protocol="strict"):
    raise ZeroDivisionError(f"in {text}")


COMPLETION = np.asarray([[1, 2, 0, 3], [4, 0, 1, 1], [1, 2, 3, 4]])
KEPT = np.asarray([[True, True, True, False], [True, True, False, False], [True] * 4])


def batch(count, text="abc"):
  return [text[: 1 + i % len(text)] for i in range(count)], [{"row": i} for i in range(count)]


def alive(pid):
  """Whether a process runs; one that has ended and that nobody has asked about yet does not."""
  try:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
  except (FileNotFoundError, ProcessLookupError):  # the latter when it ends between opening and reading
    return False


def wait_for(condition, seconds=20):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end, "it never came"
    time.sleep(0.02)


def processes(grades):
  return {int(grade.answer.split()[0]) for grade in grades}


def test_what_lies_behind_the_stop_is_never_decoded():
  assert decode(Letters(), COMPLETION, KEPT) == ["ab.", "d.", "abcd"]


def test_only_the_protocol_of_d1_sees_what_lies_behind_the_stop():
  prefills = ["", "xa", "x"]
  assert graded_texts(Letters(), prefills, COMPLETION, KEPT, "strict") == ["ab.", "xad.", "xabcd"]
  assert graded_texts(Letters(), prefills, COMPLETION, KEPT, "d1") == ["ab.c", "xad.aa", "xabcd"]


@pytest.mark.parametrize("workers", [0, 2])
def test_grades_come_in_the_order_of_the_texts(workers):
  with Grader(Echo(), workers) as grader:
    for count in (0, 1, 3, 8, 29):
      texts, records = batch(count)
      first, second = grader.submit(texts, records, "strict"), grader.submit(texts[::-1], records[::-1], "d1")
      for wait, rows, protocol in ((first, records, "strict"), (second, records[::-1], "d1")):
        grades = wait()
        assert [g.metrics["row"] for g in grades] == [(r["row"], 1000) for r in rows]
        assert [g.components["length"] for g in grades] == [0.5 * (1 + r["row"] % 3) for r in rows]
        assert all(g.answer.endswith(protocol) for g in grades)


def test_workers_are_other_processes_without_jax():
  assert "jax" in sys.modules, "the test shows nothing"
  with Grader(Echo(), 2) as grader:
    grades = grader.submit(*batch(400), "strict")()
  assert os.getpid() not in processes(grades)
  assert {g.answer.split()[1] for g in grades} == {"False"}
  assert processes(Grader(Echo(), 0).submit(*batch(2), "strict")()) == {os.getpid()}


def test_workers_grade_as_the_process_itself_does():
  task = build_mix({"sudoku": 1, "countdown": 1}, sizes={"validation": 20})
  records = task.records("validation")
  texts = [task.demonstration(r, "d1")[: -i % 9 or None] for i, r in enumerate(records)]
  with Grader(task, 2) as grader:
    for protocol in ("strict", "d1"):
      pooled = grader.submit(texts, records, protocol)()
      assert pooled == [task.grade(text, record, protocol) for text, record in zip(texts, records, strict=True)]
      assert pooled == Grader(task, 0).submit(texts, records, protocol)()
      assert 0 < sum(g.metrics["solved"][0] for g in pooled) < 40


def test_a_task_of_a_users_file_reaches_the_workers():
  task = build("parity", module=PARITY)
  records = task.records("test")
  texts = [task.baseline(r, "terse") for r in records]
  with Grader(task, 1) as grader:
    assert grader.submit(texts, records, "strict")() == [task.grade(t, r) for t, r in zip(texts, records, strict=True)]


def test_a_worker_that_dies_is_replaced_and_every_batch_is_graded(tmp_path, caplog):
  texts, records = batch(24)
  with Grader(Dying(tmp_path / "died"), 2) as grader:
    healthy = grader.submit(texts, records, "strict")()
    pending = [grader.submit(t, records, "strict") for t in (texts, ["die", *texts[1:]], texts)]
    graded = [wait() for wait in pending]
    again = grader.submit(texts, records, "strict")()
  assert (tmp_path / "died").exists()
  assert [[g.metrics["row"][0] for g in grades] for grades in graded] == [list(range(24))] * 3
  assert not processes(healthy) & processes(graded[1])
  assert len(processes(graded[1]) | processes(again)) <= 2, "the new workers stay"
  assert "a process that grades echo died; its batch is graded again" in caplog.text


@pytest.mark.slow(reason="starts workers again and again")
def test_a_batch_that_always_kills_its_worker_is_an_error():
  texts, records = batch(8)
  with Grader(Dying(), 2) as grader:
    with pytest.raises(WorkersDiedError, match=r"grade echo died twice on the same batch .*: use fewer workers"):
      grader.submit([*texts[:5], "die", *texts[6:]], records, "strict")()
    assert len(grader.submit(texts, records, "strict")()) == 8, "the next batch is graded"


@pytest.mark.slow(reason="starts workers again and again")
def test_workers_that_are_terminated_between_batches_are_replaced():
  texts, records = batch(40)
  with Grader(Echo(), 2) as grader:
    before = processes(grader.submit(texts, records, "strict")())
    for pid in before:
      os.kill(pid, signal.SIGTERM)
    wait_for(lambda: not any(map(alive, before)))
    after = processes(grader.submit(texts, records, "strict")())
  assert not before & after


def test_ctrl_c_is_left_to_the_process_that_asked(caplog):
  texts, records = batch(40)
  with Grader(Echo(), 2) as grader:
    before = processes(grader.submit(texts, records, "strict")())
    for pid in before:
      os.kill(pid, signal.SIGINT)
    assert len(grader.submit(texts, records, "strict")()) == 40
    assert all(map(alive, before))
  assert "died" not in caplog.text


@pytest.mark.parametrize("workers", [0, 2])
def test_what_a_grader_raises_is_raised_here(workers):
  with Grader(Raising(), workers) as grader, pytest.raises(ZeroDivisionError, match="in a"):
    grader.submit(*batch(3), "strict")()


@pytest.mark.parametrize(
  ("grade", "message"),
  [
    (Grade({"a": float("nan")}, {}), "gave the reward component 'a' the value nan, expected a finite number"),
    (Grade({"a": -1e300}, {}), r"gave the reward component 'a' the value -1e\+300, expected a finite number"),
    (Grade({"a": "1"}, {}), "gave the reward component 'a' the value '1', expected a finite number"),
    (Grade({}, {"m": (2, 1)}), r"gave the metric 'm' the value \(2, 1\), expected \(numerator, denominator\)"),
    (None, "returned None, expected a Grade"),
  ],
)
def test_a_bad_grade_is_an_error_where_it_arrives(grade, message):
  """Of any task; that of a text in the middle of a batch, when its grades are waited for."""
  texts, records = batch(8)
  records[5]["grade"] = grade
  wait = Grader(Giving(), 0).submit([*texts[:5], "bad", *texts[6:]], records, "strict")
  with pytest.raises(
    TaskError, match=rf"^the task echo: grade\(text='bad', record=\{{'row': 5, .*\) {message}"
  ) as caught:
    wait()
  assert "\n" not in str(caught.value)


def test_a_bad_grade_of_a_worker_is_the_same_error_and_the_next_batch_is_graded(tmp_path):
  texts, records = batch(8)
  records[5]["grade"] = Grade({"a": float("nan")}, {})
  with Grader(Giving(), 1) as grader:
    with pytest.raises(TaskError, match=r"^the task echo: grade\(text='bad', .* 'a' the value nan, expected a finite"):
      grader.submit([*texts[:5], "bad", *texts[6:]], records, "strict")()
    assert len(grader.submit(texts, records, "strict")()) == 8


@pytest.mark.slow(reason="starts workers again and again")
def test_closing_ends_the_workers_and_a_later_batch_starts_new_ones():
  grader = Grader(Echo(), 2)
  with grader:
    first = processes(grader.submit(*batch(40), "strict")())
    assert all(map(alive, first))
  assert not any(map(alive, first))
  with grader:
    assert not first & processes(grader.submit(*batch(40), "strict")())


def test_an_error_ends_the_workers_too():
  seen = set()

  def failing():
    with Grader(Echo(), 2) as grader:
      seen.update(processes(grader.submit(*batch(40), "strict")()))
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    failing()
  assert seen
  assert not any(map(alive, seen))


PROGRAM = """
import os, signal, sys, time
import jax
from d1jax.rl.grading import Grader
from tests.rl.test_grading import Echo, batch, processes
print("started", __name__, flush=True)
grader = Grader(Echo(), 2)
grades = grader.submit(*batch(400), "strict")()
print(*sorted(processes(grades)), *{g.answer.split()[1] for g in grades}, flush=True)
"""


def program(tmp_path, end):
  """Runs a program without a guard for its main part; returns what it wrote."""
  path = tmp_path / "program.py"
  path.write_text(PROGRAM + textwrap.dedent(end))
  environment = os.environ | {"PYTHONPATH": str(ROOT)}
  done = subprocess.run([sys.executable, path], env=environment, capture_output=True, text=True, timeout=120)
  assert done.stdout.startswith("started __main__\n"), done.stderr
  assert done.stdout.count("started") == 1, "a worker ran the program again"
  return done


@pytest.mark.parametrize(
  ("end", "code"),
  [
    ("", 0),
    ("os._exit(4)", 4),
    ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
  ],
)
def test_workers_end_with_their_program_however_it_ends(tmp_path, end, code):
  done = program(tmp_path, end)
  assert done.returncode == code, done.stderr
  *pids, jax_is_there = done.stdout.splitlines()[1].split()
  assert pids
  assert jax_is_there == "False"
  wait_for(lambda: not any(map(alive, pids)))


def test_a_negative_number_of_workers_is_an_error():
  with pytest.raises(ValueError, match="-1 grading workers: give 0"):
    Grader(Echo(), -1)


def test_a_task_that_cannot_be_pickled_is_an_error_before_any_work():
  class Local(Echo):
    pass

  with pytest.raises(ValueError, match=r"the task echo cannot be sent to workers .*Local.*; use 0, or define it"):
    Grader(Local(), 1)
  assert Grader(Local(), 0).submit(*batch(1), "strict")()[0].reward == 0.5


def test_a_task_of_the_program_itself_is_an_error_before_any_work(monkeypatch):
  class Program(Echo):
    __module__ = "__main__"

  Program.__qualname__ = "Program"
  monkeypatch.setattr(sys.modules["__main__"], "Program", Program, raising=False)
  with pytest.raises(ValueError, match=r"cannot be sent to workers .*Program.*; use 0, or define it in a module"):
    Grader(Program(), 1)
