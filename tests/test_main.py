"""How the command ends: one line, the exit code, and a standard output that nobody may read."""

import io
import os
import sys

import pytest
from absl import app

from d1jax import errors, main


def ends(monkeypatch, error: BaseException) -> int | str | None:
  """The exit code of the command where running it raises an error."""

  def run(*_, **__):
    raise error

  monkeypatch.setattr(app, "run", run)
  with pytest.raises(SystemExit) as caught:
    main.main()
  return caught.value.code


@pytest.mark.parametrize(
  ("error", "code", "line"),
  [
    (errors.RunError("no such thing"), 2, "d1jax: no such thing\n"),
    (errors.LeftError("grpo: left"), 1, "d1jax: grpo: left\n"),
    (errors.PreemptedError("saved"), 75, "d1jax: saved\n"),
    (errors.LostError("the processes did not meet"), 75, "d1jax: the processes did not meet\n"),
    (errors.RunError("\x1b]0;owned\x07\x1b[2Jx is missing"), 2, "d1jax: \ufffd]0;owned\ufffd\ufffd[2Jx is missing\n"),
    (KeyboardInterrupt(), 130, "d1jax: stopped at once by Ctrl-C; what was saved before is intact\n"),
  ],
  ids=["input", "left", "preempted", "lost", "escapes", "Ctrl-C twice"],
)
def test_an_error_is_a_line_and_a_code(monkeypatch, capsys, error, code, line):
  assert ends(monkeypatch, error) == code
  assert capsys.readouterr() == ("", line)


def test_a_defect_keeps_its_traceback(monkeypatch, capsys):
  assert ends(monkeypatch, KeyError("\x1b[2J")) == 1
  said = capsys.readouterr().err
  assert said.startswith("Traceback (most recent call last):")
  assert "KeyError" in said
  assert "\x1b" not in said


def test_a_reader_that_leaves_ends_nothing():
  end, start = os.pipe()
  stream = io.TextIOWrapper(os.fdopen(start, "wb"), encoding="utf-8")
  output = main.Output(stream)
  os.close(end)
  for _ in range(3):
    print("a line", file=output, flush=True)
  stream.close()  # as Python does at its end: nothing is left that would fail


@pytest.mark.parametrize("stream", [None, io.StringIO()], ids=["none", "closed"])
def test_a_stream_that_is_closed_ends_nothing(stream):
  output = main.Output(stream)
  if stream is not None:
    stream.close()
  print("a line", file=output, flush=True)
  output.close()
  print("another", file=output, flush=True)
  assert not output.isatty()


def test_what_is_read_is_written_as_far_as_the_encoding_goes(capsys):
  content = io.BytesIO()
  narrow = io.TextIOWrapper(content, encoding="latin-1")
  print("ÿ →", file=main.Output(narrow), flush=True)
  assert content.getvalue() == b"\xff \\u2192\n"
  output = main.Output(sys.stdout)
  print("as it is", file=output)
  assert capsys.readouterr().out == "as it is\n"


def test_log_lines_cannot_steer_the_terminal():
  record = main.logging.LogRecord("d1jax", main.logging.WARNING, "", 0, "bad \x1b[2J", (), None)
  assert main.Formatter("%(levelname)s: %(message)s").format(record) == "WARNING: bad \ufffd[2J"


def test_printed_paths_cannot_steer_the_terminal():
  stream = io.StringIO()
  print("runs/\x1b[2J\ud800 is finished\tnow", file=main.Output(stream, errors.harmless))
  assert stream.getvalue() == "runs/\ufffd[2J\ufffd is finished\tnow\n"
