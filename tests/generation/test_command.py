"""`--config=configs/generate.py` on small runs and folders: what it prints, what it refuses, as a person meets it."""

import io
import json
import os
import pty
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from d1jax.diffusion.rollout import SamplerSpec
from d1jax.errors import InterruptedRunError, RunError, StorageError
from d1jax.generation import command, terminal
from d1jax.generation.generate import stream
from tests import QUICK_TO_COMPILE, jobs, runs
from tests.training import test_adapters


@pytest.fixture(scope="module")
def finished():
  """The folder of a run that trained every weight."""
  return runs.finished()[0]


@pytest.fixture(scope="module")
def adapted():
  """The folder of a run that trained adapters on a folder."""
  return test_adapters.adapted()[0]


def asked(workdir) -> tuple[list[str], list[str]]:
  """The prompts of the run's held-out split, and what it answered greedily."""
  lines = [json.loads(line) for line in (workdir / "completions" / "after.jsonl").read_text().splitlines()]
  return [line["record"]["puzzle"] + "abcdefghijklmnop" for line in lines], [line["text"] for line in lines]


def configured(**changes):
  config = jobs.load("generate")
  config.update(changes)
  return config


def given(monkeypatch, content: bytes) -> None:
  """Sends this to standard input."""
  monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


@pytest.mark.parametrize(
  "name", ["finished", pytest.param("adapted", marks=pytest.mark.slow(reason="reads a run that trains adapters"))]
)
def test_answers_are_those_of_the_runs_own_evaluation(request, name, monkeypatch, capsys):
  workdir = request.getfixturevalue(name)
  prompts, answers = asked(workdir)
  capsys.readouterr()  # of the training
  given(monkeypatch, "\n".join(prompts[:5]).encode() + b"\n\n")
  found = command.run(configured(checkpoint=str(workdir)))
  assert [one.text for one in found] == answers[:5]
  out = capsys.readouterr().out
  assert out == "".join(
    f"[prompt {i}] {prompt}\n{answer}\n\n"
    for i, (prompt, answer) in enumerate(zip(prompts, answers[:5], strict=False), 1)
  )


def test_one_answer_is_printed_alone(finished, capsys):
  prompts, answers = asked(finished)
  command.run(configured(checkpoint=str(finished), prompt=prompts[0]))
  out, err = capsys.readouterr()
  assert out == answers[0] + "\n"
  said = ("reading .*", "publishing the weights", r"compiling completions of 18 tokens for \d+ prompts? of \d+")
  assert re.fullmatch("".join(rf"{line} \.\.\. \d+ s\n" for line in said), err), "nothing that takes long is silent"


@pytest.mark.parametrize(
  ("fields", "expected"),
  [
    ({}, (18, 4, 18)),
    ({"length": 36}, (36, 8, 18)),
    ({"length": 9}, (9, 2, 9)),
    ({"tokens_per_step": 1, "block_length": 6}, (18, 18, 6)),
  ],
)
def test_fields_change_the_sampler_and_keep_the_tokens_a_step(fields, expected):
  found = command.sampler_of(configured(**fields), SamplerSpec(18, 4, 18))
  assert (found.completion_length, found.diffusion_steps, found.block_length) == expected


@pytest.mark.slow(reason="compiles a rollout for each change")
def test_answers_are_revealed_as_the_fields_say(finished, capsys):
  prompts, _ = asked(finished)
  steps = lambda **fields: [
    one.reveal_step
    for one in command.run(configured(checkpoint=str(finished), prompt=prompts[0], early_exit=False, **fields))
  ]
  (single,) = steps(tokens_per_step=1, block_length=6)
  assert sorted(single.tolist()) == list(range(18))
  assert [set(block.tolist()) for block in single.reshape(3, 6)] == [set(range(6 * b, 6 * b + 6)) for b in range(3)]
  (sure,) = steps(tokens_per_step=1, schedule="threshold", threshold=1e-6, max_reveal=6)
  assert np.unique(sure, return_counts=True)[1].max() == 6
  several = steps(samples=3, temperature=1.5, remasking="random")
  assert len({tuple(own.tolist()) for own in several}) > 1
  assert "sample 3" in capsys.readouterr().out


@pytest.mark.slow(reason="compiles programs of its own")
def test_a_downloaded_folder_answers(folder, capsys):
  fields = {"length": 8, "block_length": 4, "tokens_per_step": 2, "prefill": "So"}
  (found,) = command.run(configured(pretrained=str(folder), prompt="What?", **fields))
  assert found.text.startswith("So")
  assert found.tokens.size == 8
  out = capsys.readouterr().out
  assert out.replace(os.linesep, "\n") == found.text + "\n"


def test_steps_are_shown_without_escapes_where_nobody_sees_colours(finished, capsys):
  prompts, answers = asked(finished)
  (found,) = command.run(configured(checkpoint=str(finished), prompt=prompts[0], show_steps=True))
  out = capsys.readouterr().out
  assert "\x1b" not in out
  assert re.findall(r"step (\d) of 4, (\d+) of 18 tokens", out) == [
    (str(step + 1), str(int((found.reveal_step <= step).sum()))) for step in range(4)
  ]
  assert out.endswith(f"{terminal.LEGEND}\n\n{answers[0]}\n")


def test_a_question_of_a_task_is_written_as_it_was_trained_and_graded(finished, capsys, tmp_path):
  prompts, answers = asked(finished)
  fields = {"checkpoint": str(finished), "task": "sudoku", "prompt": prompts[0][:16], "film": str(tmp_path / "a.gif")}
  (found,) = command.run(configured(**fields))
  assert (found.prompt, found.text) == (prompts[0], answers[0])
  first, *grid, verdict = capsys.readouterr().out.splitlines()
  assert first == answers[0]
  assert len(grid) in (0, 5)
  assert re.match(r"right$|wrong: ", verdict)


def test_a_single_answer_is_shown_while_it_is_computed_where_somebody_can(finished, capsys):
  prompts, answers = asked(finished)
  seen = []

  def live(model, prompt, spec, *, params, config, prefill, record):
    assert record is None
    seen.append(prompt)
    (one,) = stream(model, [prompt], params=params, spec=spec, prefill=prefill)
    return one

  fields = {"checkpoint": str(finished), "show_steps": True}
  command.run(configured(prompt=prompts[0], **fields), live)
  assert (seen, capsys.readouterr().out) == ([prompts[0]], answers[0] + "\n")


def test_a_film_is_saved(finished, tmp_path, capsys):
  prompts, _ = asked(finished)
  command.run(configured(checkpoint=str(finished), prompt=prompts[0], film=str(tmp_path / "a.gif")))
  with Image.open(tmp_path / "a.gif") as image:
    assert image.n_frames == 6
  assert os.listdir(tmp_path) == ["a.gif"]
  assert re.search(r"a\.gif: \d+ KiB\n$", capsys.readouterr().err)


def test_text_that_the_output_cannot_spell_is_no_failure(finished, monkeypatch, capsys):
  written = io.BytesIO()
  monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
  prompts, answers = asked(finished)
  command.run(configured(checkpoint=str(finished), prompt=prompts[0], show_steps=True))
  assert written.getvalue().decode("ascii").endswith(f"\n{answers[0]}\n")


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"checkpoint": None}, r"nobody to answer: set config\.checkpoint .* or config\.pretrained"),
    ({"checkpoint": None, "pretrained": ""}, "nobody to answer"),
    ({"checkpoint": "nowhere"}, "no checkpoint in nowhere"),
    ({"checkpoint": None, "pretrained": "nowhere"}, "nowhere"),
    ({"prompt": " "}, r"config\.prompt is empty"),
    ({"prompt": "1" * 40, "prompt_buckets": (16, 32)}, "prompt 1 has 41 tokens, prompt_buckets hold 32"),
    ({"prompt": "What is it?"}, "does not know: 'W', 't', ' ', 's', '\\?'"),
    ({"temperature": -1.0}, r"temperature=-1\.0 must be a finite number of at least 0"),
    ({"temperature": float("nan")}, "temperature=nan must be a finite number of at least 0"),
    ({"temperature": float("inf")}, "temperature=inf must be a finite number of at least 0"),
    ({"cfg_scale": float("nan")}, "cfg_scale=nan must be a finite number of at least 0"),
    ({"seed": 2**70}, "seed=1180591620717411303424 must be a whole number of at least 0 and at most 4294967295"),
    ({"prompt_buckets": ("a",)}, r"prompt_buckets=\('a',\) must hold numbers of which each is a whole number"),
    ({"prompt_buckets": ()}, "prompt_buckets is empty"),
    ({"prompt": "10\ud800"}, r"the text '10\\ud800' is not Unicode"),
    ({"cfg_scale": -1.0}, r"cfg_scale=-1\.0 must be a finite number of at least 0"),
    ({"length": 20, "block_length": 6}, "completion_length=20 is not a multiple of block_length=6"),
    ({"length": 0}, "length=0 must be a whole number of at least 1"),
    ({"tokens_per_step": 0}, "tokens_per_step=0 must be a whole number of at least 1"),
    ({"block_length": 0}, "block_length=0 must be a whole number of at least 1"),
    ({"remasking": "best"}, "remasking='best' is unknown; known: low_confidence, random"),
    ({"cache": "all"}, "cache='all' is unknown"),
    ({"schedule": "fast"}, "schedule='fast' is unknown"),
    ({"samples": 0}, "samples=0 must be"),
    ({"samples": 2}, "samples is 2, but at temperature 0 they are all the same"),
    ({"task": "sudoku"}, "prompt='1003' is no Sudoku: write 16 digits"),
    ({"task": "chess"}, "task='chess' is unknown; known: sudoku, countdown"),
    ({"film": "a.mp4"}, r"film='a\.mp4' does not end in \.gif"),
    ({"film": "nowhere/a.gif"}, r"film='nowhere/a\.gif' cannot be written \(No such file or directory\)"),
    ({"film": "a.gif", "samples": 9, "temperature": 1.0}, "a film of 1 prompts with 9 samples is too long"),
  ],
)
def test_wrong_settings_are_one_line(finished, changes, message):
  with pytest.raises(RunError, match=message) as caught:
    command.run(configured(**({"checkpoint": str(finished), "prompt": "1003"} | changes)))
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"", "standard input is empty; send prompts, one a line"),
    (b"\n  \n", "standard input is empty"),
    (b"12\xff3\n", r"standard input is not UTF-8 \(byte 2: .*\)"),
  ],
)
def test_standard_input_that_is_no_prompt_is_one_line(finished, monkeypatch, content, message):
  given(monkeypatch, content)
  with pytest.raises(RunError, match=message):
    command.run(configured(checkpoint=str(finished)))


def test_a_line_ends_at_a_line_feed_alone(monkeypatch):
  inside = [f"a{char}b" for char in "\u2028\u2029\x85\f\v\x1c\x1d\x1e\r"]
  given(monkeypatch, ("\ufeff" + "\n".join([*inside, "", " \r", "c\r", "d"])).encode())
  assert command._prompts(configured()) == [*inside, "c", "d"]


def test_a_film_that_cannot_be_written_is_found_before_the_model_is_read(finished, monkeypatch):
  monkeypatch.setattr(command.subject, "load", lambda config: pytest.fail("the model was read"))
  with pytest.raises(RunError, match="cannot be written"):
    command.run(configured(checkpoint=str(finished), prompt="1003", film="nowhere/a.gif"))


def test_ctrl_c_is_one_line(finished, monkeypatch):
  def interrupted(config):
    raise KeyboardInterrupt

  monkeypatch.setattr(command.subject, "load", interrupted)
  with pytest.raises(InterruptedRunError, match="SIGINT: stopped before everything was answered"):
    command.run(configured(checkpoint=str(finished), prompt="1003"))


class Terminal(io.StringIO):
  """Standard output that a person looks at."""

  encoding = "utf-8"

  def isatty(self) -> bool:
    return True


def test_a_terminal_gets_colours_unless_it_wants_none(finished, monkeypatch):
  prompts, answers = asked(finished)
  seen = {}
  for name, value in (("NO_COLOR", ""), ("NO_COLOR", "1"), ("TERM", "dumb")):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv(name, value)
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    command.run(configured(checkpoint=str(finished), prompt=prompts[0], show_steps=True))
    seen[name, value] = screen.getvalue()
  assert "\x1b[38;5;" in seen["NO_COLOR", ""]
  assert seen["NO_COLOR", ""].endswith(f"\n{answers[0]}\n")
  assert "\x1b" not in seen["NO_COLOR", "1"]
  assert seen["NO_COLOR", "1"] == seen["TERM", "dumb"]


def test_what_a_model_writes_cannot_steer_a_terminal_but_reaches_a_pipe(folder, monkeypatch, capsys):
  fields = {"pretrained": str(folder), "prompt": "What?", "prefill": "\x1b[2J", "length": 2, "tokens_per_step": 2}
  command.run(configured(**fields))
  assert capsys.readouterr().out.startswith("\x1b[2J")
  screen = Terminal()
  monkeypatch.setattr(sys, "stdout", screen)
  command.run(configured(**fields))
  assert screen.getvalue().startswith("\ufffd[2J")


SLOW = pytest.mark.slow(reason="a process that imports JAX")


def start(*arguments: str, **streams) -> subprocess.Popen:
  """Starts the real command."""
  environment = os.environ | {"XLA_FLAGS": QUICK_TO_COMPILE}
  line = [sys.executable, "-m", "d1jax.main", "--config=configs/generate.py", *arguments]
  return subprocess.Popen(line, cwd=jobs.ROOT, env=environment, stderr=subprocess.PIPE, **streams)


@SLOW
def test_the_real_command_reads_a_pipe(finished):
  prompts, answers = asked(finished)
  process = start(f"--config.checkpoint={finished}", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
  out, err = process.communicate("\n".join(prompts[:2]).encode(), timeout=120)
  assert process.returncode == 0
  assert all(re.fullmatch(r".+ \.\.\. \d+ s", line) for line in err.decode().splitlines())
  assert [line for line in out.decode().splitlines() if line and not line.startswith("[")] == answers[:2]


@SLOW
@pytest.mark.parametrize("reader", ["Broken pipe", "No space left on device"])
def test_an_output_that_takes_nothing_is_one_line(finished, reader):
  flags = (f"--config.checkpoint={finished}", "--config.prompt=1003")
  with open("/dev/full", "wb") as full:
    target = subprocess.PIPE if reader == "Broken pipe" else full
    process = start(*flags, stdin=subprocess.DEVNULL, stdout=target)
  if process.stdout:
    process.stdout.close()
  err = process.stderr.read().decode()
  assert process.wait(120) == StorageError.exit_code
  assert (
    err.splitlines(keepends=True)[-1]
    == f"d1jax: standard output took no more text ({reader}); send it to a file that has room\n"
  )


@SLOW
def test_a_terminal_that_is_asked_nothing_is_one_line():
  ours, theirs = pty.openpty()
  process = start("--config.pretrained=nowhere", stdin=theirs, stdout=subprocess.PIPE)
  out, err = process.communicate(timeout=120)
  os.close(ours)
  os.close(theirs)
  assert (process.returncode, out) == (RunError.exit_code, b"")
  assert err.decode() == "d1jax: no prompt: set config.prompt, or send prompts to standard input, one a line\n"
