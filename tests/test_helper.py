import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from d1jax import helper
from d1jax.helper import EndedError, Helper

STUB = """
import os, signal, socket, sys, time
connection = socket.socket(fileno=int(sys.argv[1]))
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])  # the TPU's compiler blocks it in who starts this
print("noise")
connection.sendall(b"ready\\n")
for line in connection.makefile("rb"):
  word = line.strip().decode()
  if word == "hang":
    time.sleep(600)
  if word == "leave":
    sys.exit(3)
  if word.isdecimal():
    os.kill(os.getpid(), int(word))
  connection.sendall({"pid": b"%d" % os.getpid(), "much": b"x" * 5000}.get(word, line.strip()) + b"\\n")
"""


def is_alive(pid: int) -> bool:
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as file:
    return file.read().rpartition(")")[2].split()[0] != "Z"  # whoever adopts it may be late to reap it
  return True


@pytest.fixture
def program(tmp_path):
  path = tmp_path / "stub.py"
  path.write_text(STUB)
  return path


@pytest.fixture
def stub(program):
  made = Helper(program)
  yield made
  made.close()


def test_one_process_answers_until_it_is_closed(stub):
  pids = {stub.ask(b"pid") for _ in range(3)}
  assert len(pids) == 1
  assert stub.ask("é \u2028".encode()) == "é \u2028".encode()
  assert stub.start() == 1
  stub.close()
  stub.close()
  assert not is_alive(int(pids.pop()))
  assert stub.start() == 2


@pytest.mark.parametrize(
  ("question", "reason"),
  [
    (signal.SIGPROF, "used up its CPU time"),
    (signal.SIGABRT, "used up its memory, or crashed"),
    (signal.SIGKILL, "was ended by SIGKILL"),
    ("leave", "ended with the exit code 3"),
    ("hang", "gave no answer in 0 s"),
    ("much", "wrote more than 0 MiB"),
  ],
)
def test_how_it_ended_is_said_and_the_next_question_starts_it_anew(stub, monkeypatch, question, reason):
  pid = int(stub.ask(b"pid"))
  monkeypatch.setattr(helper, "ANSWER_SECONDS", 0.3 if question == "hang" else 60)
  monkeypatch.setattr(helper, "MOST_BYTES", 1000)
  with pytest.raises(EndedError, match=reason):
    stub.ask(str(int(question) if isinstance(question, int) else question).encode())
  monkeypatch.undo()
  assert not is_alive(pid)
  assert int(stub.ask(b"pid")) != pid
  assert stub.start() == 2


def test_what_dies_between_questions_is_replaced(stub):
  pid = int(stub.ask(b"pid"))
  os.kill(pid, signal.SIGKILL)
  os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
  assert int(stub.ask(b"pid")) != pid


def test_what_does_not_start_is_said(tmp_path):
  (tmp_path / "broken.py").write_text("import no_such_module")
  with pytest.raises(EndedError, match="does not start: it ended with the exit code 1"):
    Helper(tmp_path / "broken.py").ask(b"a")


def test_a_machine_that_starts_no_process_is_said(stub, monkeypatch):
  def refuse(*arguments, **options):
    raise BlockingIOError(11, "Resource temporarily unavailable")

  monkeypatch.setattr(helper.subprocess, "Popen", refuse)
  with pytest.raises(EndedError, match=r"does not start \(.*Resource temporarily unavailable\)"):
    stub.ask(b"a")


def test_threads_take_turns(stub):
  wrong = []

  def ask(word: bytes) -> None:
    wrong.extend(word for _ in range(100) if stub.ask(word) != word)

  threads = [threading.Thread(target=ask, args=[b"%d" % number * 9 + b"x"]) for number in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert not wrong


def test_it_ends_with_whoever_started_it_and_a_fork_starts_its_own(program):
  """Also where that one had no time to end it."""
  code = f"""
import os, pathlib
from d1jax.helper import Helper
helper = Helper(pathlib.Path({str(program)!r}))
print(helper.ask(b"pid").decode(), flush=True)
child = os.fork()
print(helper.ask(b"pid").decode(), flush=True)
if child: os.waitpid(child, 0)
os._exit(0)
"""
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=120)
  pids = {int(line) for line in done.stdout.split()}
  assert len(pids) == 2
  for _ in range(600):
    if not any(map(is_alive, pids)):
      return
    time.sleep(0.05)
  raise AssertionError("a process is left behind")
