import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from d1jax import helper
from d1jax.tasks import equivalence, verifier

EQUAL, DIFFERENT = ("2\\sqrt{2}", "\\sqrt{8}"), ("2\\sqrt{2}", "\\sqrt{9}")
# Answers `1` but to these golds.
STUB = """
import json, os, signal, socket, sys, time
connection = socket.socket(fileno=int(sys.argv[1]))
print("noise")
connection.sendall(b"+\\n")
for line in connection.makefile("rb"):
  gold, answer = json.loads(line)
  if gold == "hang":
    time.sleep(600)
  if gold == "die":
    os.kill(os.getpid(), signal.SIGKILL)
  if gold == "exit":
    sys.exit()
  connection.sendall(b"0\\n" if gold == "pid" and answer != str(os.getpid()) else b"1\\n")
"""
ASK = f"from d1jax.tasks import verifier; assert verifier.shared.ask(*{EQUAL!r})"


def is_alive(pid: int) -> bool:
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as file:
    return file.read().rpartition(")")[2].split()[0] != "Z"  # whoever adopts it may be late to reap it
  return True


def wait_until_gone(pid: int) -> None:
  for _ in range(600):
    if not is_alive(pid):
      return
    time.sleep(0.05)
  raise AssertionError(f"the process {pid} is left behind")


def pid_of(asked: verifier.Verifier) -> int:
  assert asked._helper._process is not None
  return asked._helper._process.pid


@pytest.fixture
def stub(tmp_path):
  program = tmp_path / "stub.py"
  program.write_text(STUB)
  made = verifier.Verifier(program)
  yield made
  made.close()


def test_it_asks_math_verify():
  assert verifier.shared.ask(*EQUAL)
  assert not verifier.shared.ask(*DIFFERENT)


def test_one_process_answers_all_questions_until_it_is_closed(stub):
  assert stub.ask("a", "b")
  pid = pid_of(stub)
  assert stub.ask("pid", str(pid))
  stub.close()
  assert not is_alive(pid)
  stub.close()
  assert not stub.ask("pid", str(pid))


@pytest.mark.parametrize("gold", ["hang", "die", "exit"])
def test_what_hangs_or_dies_says_no_and_is_replaced(stub, gold, monkeypatch):
  assert stub.ask("a", "b")
  pid = pid_of(stub)
  monkeypatch.setattr(helper, "ANSWER_SECONDS", 0.5)
  assert not stub.ask(gold, "b")
  assert not is_alive(pid)
  monkeypatch.undo()
  assert stub.ask("a", "b")
  assert pid_of(stub) != pid


def test_a_fresh_process_takes_over_after_many_questions(stub, monkeypatch):
  monkeypatch.setattr(verifier, "MOST_QUESTIONS", 3)
  pids = set()
  for _ in range(7):
    assert stub.ask("a", "b")
    pids.add(pid_of(stub))
  assert len(pids) == 3


def test_an_interrupted_question_leaves_no_answer_for_the_next(stub):
  assert stub.ask("a", "b")
  pid = pid_of(stub)
  # A shell lets what it starts in the background ignore the signal.
  previous = signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    threading.Timer(0.5, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
      stub.ask("hang", "b")
  finally:
    signal.signal(signal.SIGINT, previous)
  assert not is_alive(pid)
  assert stub.ask("a", "b")


@pytest.mark.parametrize("program", ["import no_such_module", "import time; time.sleep(600)"])
def test_what_does_not_start_is_an_error_that_says_what_to_do(tmp_path, program, monkeypatch):
  (tmp_path / "broken.py").write_text(program)
  monkeypatch.setattr(helper, "START_SECONDS", 2.0)
  broken = verifier.Verifier(tmp_path / "broken.py")
  with pytest.raises(RuntimeError, match=r'math-verify does not start: it .*; `pip install "d1jax\[math\]"` or'):
    broken.ask("a", "b")
  assert broken._helper._process is None


def test_it_works_in_the_daemonic_workers_of_a_pool():
  with multiprocessing.get_context("spawn").Pool(2) as pool:
    asked = [("\\sqrt{8}", "2\\sqrt{2}", ""), ("\\sqrt{9}", "2\\sqrt{2}", "")] * 4
    assert pool.starmap(equivalence.is_equivalent, asked, chunksize=1) == [True, False] * 4


def run(script: str) -> str:
  done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=300)
  assert done.stderr == ""
  return done.stdout


def test_the_asking_process_imports_neither_sympy_nor_math_verify_and_leaves_nothing_behind():
  out = run(
    f"import sys; {ASK}; print(verifier.shared._helper._process.pid)\n"
    "assert not {'sympy', 'math_verify', 'latex2sympy2_extended', 'antlr4', 'jax'} & set(sys.modules)"
  )
  assert not is_alive(int(out))


def test_a_killed_parent_leaves_nothing_behind():
  script = f"import time; {ASK}; print(verifier.shared._helper._process.pid, flush=True); time.sleep(600)"
  with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert is_alive(pid)
    parent.kill()
  wait_until_gone(pid)


def test_a_fork_asks_a_process_of_its_own():
  script = f"""if True:
    import os
    {ASK}
    pid = verifier.shared._helper._process.pid
    if os.fork() == 0:
      ok = verifier.shared.ask(*{EQUAL!r}) and not verifier.shared.ask(*{DIFFERENT!r})
      ok = ok and verifier.shared._helper._process.pid != pid
      verifier.shared.close()
      os._exit(0 if ok else 1)
    assert os.wait()[1] == 0
    assert verifier.shared.ask(*{EQUAL!r}) and verifier.shared._helper._process.pid == pid
  """
  assert run(script) == ""
