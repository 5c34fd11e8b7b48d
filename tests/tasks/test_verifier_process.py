import json
import socket
import subprocess
import sys

import pytest

from d1jax.tasks import verifier


class Process:
  """The bare process, without the filters and the care of those who ask it."""

  def __init__(self):
    self.socket, theirs = socket.socketpair()
    with theirs:
      arguments = [sys.executable, "-P", str(verifier.PROGRAM), str(theirs.fileno())]
      self.process = subprocess.Popen(
        arguments, pass_fds=[theirs.fileno()], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
      )
    self.socket.settimeout(300)
    self.answers = self.socket.makefile("rb")
    assert self.answers.readline() == b"+\n"

  def ask(self, gold: str, answer: str) -> bytes:
    self.socket.sendall(json.dumps([gold, answer]).encode() + b"\n")
    return self.answers.readline().strip()

  def end(self) -> tuple[int, bytes]:
    self.answers.close()
    self.socket.close()
    out, _ = self.process.communicate(timeout=300)
    return self.process.returncode, out


@pytest.fixture
def process():
  made = Process()
  yield made
  made.process.kill()
  made.end()


def test_it_answers_in_order_prints_nothing_and_ends_with_the_socket(process):
  asked = [
    *(("2\\sqrt{2}", "\\sqrt{8}", b"1"), ("2\\sqrt{2}", "\\sqrt{9}", b"0"), ("x^2-1", "(x-1)(x+1)", b"1")),
    *(("\\frac{\\sqrt{3}}{3}", "\\frac{1}{\\sqrt{3}}", b"1"), ("1+2i", "2i+1", b"1"), ("1+2i", "1-2i", b"0")),
    # Neither an approximation nor what looks like a unit.
    *(("\\sqrt{2}", "1.41421356", b"0"), ("2", "2h", b"0"), ("3t", "3c", b"0"), ("\\frac{\\pi}{2}", "0.5\\pi", b"1")),
    *(("\\frac", "\\frac", b"0"), ("", "", b"0"), ("2", "}{", b"0"), ("2", "\ud800\0", b"0")),
  ]
  for _ in range(2):
    assert [(gold, answer, process.ask(gold, answer)) for gold, answer, _ in asked] == asked
  assert process.end() == (0, b"")


@pytest.mark.parametrize(
  "code",
  [
    *("__import__('os').abort()", "print('seen')", "exec('import this')", "1+1 if print('seen') else 0"),
    *("\\text{print('seen')}", "\\operatorname{print}(1)", "x_{print('seen')}", "\\mathrm{exit}()"),
  ],
)
def test_nothing_that_is_asked_is_run(process, code):
  assert process.ask("2", code) == b"0"
  process.ask(code, code)
  assert process.end() == (0, b"")


@pytest.mark.few(1, reason="each case takes seconds of CPU")
@pytest.mark.parametrize("bomb", ["5!!!", "9^{9^{9^{9}}}", "((((x+1)^9+1)^9+1)^9+1)^9"])
def test_cpu_time_and_memory_are_bounded(process, bomb):
  # The process ends by the timer's signal, wherever it is; or sympy gives up, which is a no.
  try:
    reply = process.ask("\\sqrt{2}+x", bomb)
  except ConnectionResetError:
    reply = b""
  assert reply in (b"", b"0")
  assert process.end()[0] in ((-27,) if not reply else (0,))
