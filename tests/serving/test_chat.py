"""The chat on a terminal: what it remembers, commands, what it shows and what it refuses; the engine is a stand-in."""

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

import d1jax
from d1jax.data import tokenizer as tokenizers
from d1jax.diffusion.rollout import SamplerSpec
from d1jax.errors import RunError
from d1jax.generation.canvas import HIDDEN, SCALE
from d1jax.generation.terminal import Screen
from d1jax.serving import chat as chats
from d1jax.serving.chat import COMMANDS, Chat
from d1jax.serving.engine import Engine
from d1jax.serving.request import Update
from d1jax.serving.view import View, follow
from tests import QUICK_TO_COMPILE, hub, jobs
from tests.data.folders import small_files
from tests.generation.test_canvas import IDS
from tests.serving.engines import StandInTicket

SPEC = SamplerSpec(completion_length=16, diffusion_steps=8, block_length=8, temperature=0.0)


class StandIn(Engine):
  """An engine that says the tokens of `answer`, from right to left in each block; "wait" stops in the second block."""

  made: tuple[int, ...] = ()
  answer = "Hi, all well"
  asked: tuple = ()
  drawn: threading.Event | None = None  # which it waits for after its first token

  def __init__(self, model, params, *, slots, lengths, block_length):
    assert slots == 1
    self._model, self._lengths = model, lengths

  def check(self, request):
    if request.spec.cfg_scale:
      raise ValueError("cfg_scale=1.0 is not for this: use cfg_scale=0")

  def prepare(self, report):
    StandIn.made += self._lengths

  def close(self, drain=None):
    pass

  def submit(self, request, listen):
    StandIn.asked += (request,)
    ticket = StandInTicket()
    threading.Thread(target=self._play, args=(request, listen, ticket.cancelled), daemon=True).start()
    return ticket

  def _play(self, request, listen, cancelled):
    spec, tokenizer = request.spec, self._model.tokenizer
    ids = np.full(spec.completion_length, tokenizer.stop_ids[0])
    said = tokenizer.completion(self.answer)[: spec.completion_length]
    ids[: len(said)] = said
    tokens, steps = np.full_like(ids, tokenizer.mask_id), np.full(ids.size, -1)
    update = lambda known, reason=None: listen(
      Update(tokens.copy(), steps.copy(), np.zeros(ids.size, np.float32), known, reason, "no memory is left")
    )
    if self.answer == "fail":
      update(0, "error")
      return
    for step in range(spec.completion_length):
      block, within = divmod(step, spec.block_length)
      place = (block + 1) * spec.block_length - 1 - within
      tokens[place], steps[place] = ids[place], step
      if request.every_step:
        update(block * spec.block_length)
      if step == 0 and self.drawn:
        assert self.drawn.wait(10)
      if self.answer == "wait for it" and block == 1:
        cancelled.wait(10)
        update(spec.block_length, "cancelled")
        return
    stops = np.isin(ids, tokenizer.stop_ids)
    update(int(stops.argmax()) + 1 if stops.any() else ids.size, "stop" if stops.any() else "length")


class Terminal(io.StringIO):
  """Standard output that is a terminal."""

  def isatty(self):
    return True


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  return d1jax.from_pretrained(hub.write(tmp_path_factory.mktemp("hub") / "llada", dtype="float32"))


@pytest.fixture
def begin(model, monkeypatch):
  """Begins chats with the stand-in, which says `answer`."""
  monkeypatch.setattr(chats, "Engine", StandIn)
  monkeypatch.setattr(StandIn, "made", ())
  monkeypatch.setattr(StandIn, "asked", ())

  def begin(answer="Hi, all well", spec=SPEC, buckets=(64, 128), prefill="") -> Chat:
    monkeypatch.setattr(StandIn, "answer", answer)
    return Chat(model, spec, params=model.params, seed=0, prefill=prefill, prompt_buckets=buckets)

  return begin


def test_answers_are_printed_and_remembered(begin, capsys, model):
  chat = begin()
  assert chat.has_turns
  for line in ("Hello", "  ", "//etc is a folder"):
    assert chat.take(line)
  assert capsys.readouterr().out == "Hi, all well\n" * 2
  assert [turn["content"] for turn in chat.messages] == ["Hello", "Hi, all well", "/etc is a folder", "Hi, all well"]
  assert [turn["role"] for turn in chat.messages] == ["user", "assistant"] * 2
  first, second = StandIn.asked
  assert first.prompt.tolist() == model.tokenizer.prompt(chat.messages[:1], "")
  assert second.prompt.tolist() == model.tokenizer.prompt(chat.messages[:3], "")
  chat.take("/clear")
  assert chat.messages == []


def test_a_canvas_is_compiled_for_each_bucket_that_is_needed(begin):
  chat = begin()
  chat.take("a")
  chat.take("/clear")
  chat.take("b")
  assert StandIn.made == (64 + 16,)
  chat.take("c" * 50)
  assert StandIn.made == (64 + 16, 128 + 16)


def test_the_oldest_turns_are_left_out_where_all_are_too_long(begin, capsys):
  chat = begin()
  for text in ("first", "second", "third"):
    chat.take(text.ljust(30, "."))
  assert "the conversation has more than the 128 tokens of prompt_buckets: its 2 oldest messages are left out" in (
    capsys.readouterr().err
  )
  assert [turn["content"].rstrip(".") for turn in chat.messages][::2] == ["second", "third"]
  assert max(request.prompt.size for request in StandIn.asked) <= 128
  chat.take("x" * 200)
  assert re.search(r"the message has 2\d\d tokens, prompt_buckets hold 128: shorten it", capsys.readouterr().err)
  assert len(chat.messages) == 4


def test_a_model_without_a_chat_template_is_asked_message_by_message(begin, capsys):
  chat = begin()
  chat._tokenizer = tokenizers.from_files(small_files(None) | {"config.json": IDS})
  assert not chat.has_turns
  chat.greet()
  assert "no chat template, which tells turns apart" in capsys.readouterr().err
  chat.take("a")
  assert chat.messages == []


@pytest.mark.parametrize(
  ("line", "said"),
  [
    ("/seed 7", "seed 7"),
    ("/seed", "seed 0"),
    ("/temperature 0.5", "temperature 0.5"),
    ("/steps 16", "steps 16"),
    ("/length 32", "length 32"),
    ("/length 4", "length 4"),
    ("/help", r"/clear +forgets the conversation\n/temperature T +of the draws"),
    ("/seed -1", r"/seed -1: the value must be a whole number of at least 0 and at most 4294967295$"),
    ("/seed 1.5", r"/seed 1\.5: the value must be a whole number"),
    ("/temperature hot", "/temperature hot: the value must be a finite number of at least 0$"),
    ("/temperature nan", "/temperature nan: the value must be a finite number"),
    ("/steps 3", r"diffusion_steps=3 is not a multiple of the 2 blocks of a completion"),
    ("/steps 0", "/steps 0: the value must be a whole number of at least 1"),
    ("/length 20", "completion_length=20 is not a multiple of block_length=8"),
    ("/length 9999999999", "/length 9999999999: the value must be a whole number"),
    ("/film", "/film: there is no answer yet"),
    ("/sed 7", r"unknown command /sed; known: /clear, /temperature, .*/quit\. A message that begins with /"),
    ("/", "unknown command /; known"),
    ("/seed \x1b[2J", "/seed \ufffd\\[2J: the value must be"),
  ],
)
def test_commands_say_one_line_and_harm_nothing(begin, capsys, line, said):
  chat = begin()
  before = (chat.spec, chat.seed)
  assert chat.take(line)
  out, err = capsys.readouterr()
  assert out == ""
  assert re.match(said, err.rstrip("\n"))
  assert len(err.splitlines()) == (len(COMMANDS) if line == "/help" else 1)
  if "must be" in said or "multiple" in said:
    assert (chat.spec, chat.seed) == before
  assert chat.take("Hello")
  assert capsys.readouterr().out == ("Hi, \n" if line == "/length 4" else "Hi, all well\n")


def test_a_changed_length_keeps_the_tokens_a_step(begin):
  chat = begin()
  for line, length, block, steps in (("/length 32", 32, 8, 16), ("/length 4", 4, 4, 2), ("/length 16", 16, 8, 8)):
    chat.take(line)
    assert (chat.spec.completion_length, chat.spec.block_length, chat.spec.diffusion_steps) == (length, block, steps)


def test_quit_ends_it(begin):
  assert not begin().take(" /quit ")


def test_the_last_answer_is_saved_as_a_film(begin, tmp_path, capsys):
  chat = begin()
  chat.take("Hello")
  for path, said in (
    (tmp_path / "a.gif", r".*a\.gif: \d+ KiB"),
    (tmp_path / "a.mp4", r".*does not end in \.gif"),
    (tmp_path / "nowhere" / "a.gif", ".*cannot be written"),
    ("", r"/film PATH: name a file that ends in \.gif"),
  ):
    assert chat.take(f"/film {path}")
    assert re.fullmatch(said + ".*\n", capsys.readouterr().err)
  with Image.open(tmp_path / "a.gif") as image:
    assert image.n_frames == 16 + 2


def test_a_failure_is_a_line_and_the_message_is_forgotten(begin, capsys):
  chat = begin("fail")
  assert chat.take("Hello")
  assert capsys.readouterr().err == "there is no answer: no memory is left\n"
  assert chat.messages == []


def test_settings_that_the_engine_lacks_are_refused_at_the_start(begin):
  with pytest.raises(ValueError, match="use cfg_scale=0"):
    begin(spec=SamplerSpec(16, 8, 8, cfg_scale=1.0))


def at_terminal(monkeypatch) -> Terminal:
  """A terminal of 80 columns in place of standard output."""
  monkeypatch.setenv("TERM", "xterm-256color")
  monkeypatch.setenv("COLUMNS", "80")
  monkeypatch.delenv("NO_COLOR", raising=False)
  found = Terminal()
  monkeypatch.setattr(sys, "stdout", found)
  return found


def test_an_answer_is_drawn_and_then_stands_there(begin, monkeypatch, capsys):
  screen = at_terminal(monkeypatch)
  monkeypatch.setattr(StandIn, "drawn", threading.Event())
  shown = View.show
  monkeypatch.setattr(View, "show", lambda self, update: (shown(self, update), StandIn.drawn.set()))
  begin("\x1b[2Jall").take("Hello")
  seen = screen.getvalue()
  assert set(re.findall(r"\x1b\[(?:\d+A|[A-LN-Z])", seen)) <= {"\x1b[2A", "\x1b[J"}  # nothing else moves the cursor
  assert "step 1, 1 of 16 tokens; Ctrl-C stops\n" in seen
  assert HIDDEN in seen
  assert seen.endswith("\x1b[2A\r\x1b[J\ufffd[2Jall\n")
  assert re.fullmatch(r"\(16 steps, [\d.e-]+ s, [\d.e+]+ tokens a second\)\n\n", capsys.readouterr().err)
  monkeypatch.setenv("TERM", "dumb")
  screen.seek(0)
  screen.truncate()
  begin().take("Hello")
  assert screen.getvalue() == "Hi, all well\n"


def test_one_prompt_is_completed_as_slowly_as_a_person_can_follow(begin, monkeypatch, model, capsys):
  screen = at_terminal(monkeypatch)
  begin("well")
  monkeypatch.setattr(chats, "PACE", 0.01)
  config = jobs.load("generate")
  began = time.monotonic()
  one = chats.live(model, "Hello", SPEC, params=model.params, config=config, prefill="")
  assert time.monotonic() - began >= 16 * 0.01
  assert (one.text, one.prompt) == ("well", "Hello")
  assert len(re.findall(r"step \d+, ", screen.getvalue())) > 4
  assert screen.getvalue().endswith("\x1b[2A\r\x1b[J"), "the drawing is gone"


def test_a_drawing_has_the_active_block_its_masks_and_its_newest_token(model, monkeypatch):
  screen = at_terminal(monkeypatch)
  tokenizer = model.tokenizer
  view = View(tokenizer, SPEC, "so ")
  ids = np.full(16, tokenizer.mask_id)
  nothing = Update(ids, np.full(16, -1), np.zeros(16, np.float32), 0, None)
  view.show(nothing)
  assert screen.getvalue() == ""
  ids[:4] = tokenizer.completion("ab\n!")[:4]
  ids[8] = tokenizer.stop_ids[0]  # in a block that is not drawn yet
  steps = np.asarray([3, 3, 0, 5] + [-1] * 12)
  view.show(nothing._replace(tokens=ids, reveal_step=steps))
  early, middle, late = (f"\x1b[38;5;{SCALE[i]}" for i in (0, 4, 9))
  assert screen.getvalue() == (
    f"\r\x1b[Jso {middle}mab\x1b[0m{early}m↵\x1b[0m\n{late};1m!\x1b[0m\x1b[2m{HIDDEN * 4}\x1b[0m\n"
    "step 3, 4 of 16 tokens; Ctrl-C stops\n"
  )
  view.clear()
  assert screen.getvalue().endswith("\x1b[3A\r\x1b[J")


def test_only_the_last_lines_of_a_long_answer_are_drawn():
  written: list[str] = []
  screen = Screen(written.append, rows=2)
  for lines in (["a", "b", "c"], ["d"], []):
    screen.show(lines)
  assert written == ["\r\x1b[Jb\nc\n", "\x1b[2A\r\x1b[Jd\n", "\x1b[1A\r\x1b[J"]


def test_ctrl_c_stops_an_answer_and_keeps_its_finished_blocks(begin, monkeypatch, capsys):
  at_terminal(monkeypatch)
  chat = begin("wait for it")
  shown = View.show

  def interrupted(self, update):
    shown(self, update)
    if update.known:
      signal.raise_signal(signal.SIGINT)

  monkeypatch.setattr(View, "show", interrupted)
  assert chat.take("Hello")
  assert chat.messages[-1]["content"] == "wait for"
  assert "stopped" in capsys.readouterr().err
  assert chat.last.tokens.size == 8
  assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_update_that_arrives_before_the_ticket_is_not_lost():
  update = Update(np.zeros(1, int), np.zeros(1, int), np.zeros(1), 1, "stop")
  assert follow(lambda listen: listen(update), lambda update: None) is update


@pytest.mark.slow(reason="compiles an engine and a sampler")
@pytest.mark.parametrize("family", ["llada", "sdar"])
def test_answers_are_those_of_generate(tmp_path, family, capsys):
  block = {} if family == "llada" else {"block": 4}
  model = d1jax.from_pretrained(hub.write(tmp_path / family, family, dtype="float32"), **block)
  spec = SamplerSpec(completion_length=16, diffusion_steps=8, block_length=4, temperature=1.0, early_exit=True)
  chat = Chat(model, spec, params=model.params, seed=5, prefill="So", prompt_buckets=(64, 128))
  try:
    for text in ("What is it?", "And then?"):
      before = [*chat.messages]
      assert chat.take(text)
      (expected,) = d1jax.generate(
        model, [[*before, {"role": "user", "content": text}]], spec=spec, seed=5, prefill="So"
      )
      assert chat.last.text == expected.text
      assert chat.last.length == expected.length
      np.testing.assert_array_equal(chat.last.tokens[: expected.length], expected.tokens[: expected.length])
      np.testing.assert_array_equal(chat.last.reveal_step[: expected.length], expected.reveal_step[: expected.length])
  finally:
    chat.close()
  assert len(chat.messages) == 4
  assert capsys.readouterr().err == ""


def configured(**changes):
  config = jobs.load("generate")
  config.update({"chat": True} | changes)
  return config


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({}, "nobody to answer"),
    ({"checkpoint": "x", "samples": 2}, r"config\.samples=2 is for completions without config\.chat"),
    ({"checkpoint": "x", "film": "a.gif"}, r"config\.film='a\.gif' is for completions .* /film PATH"),
    ({"checkpoint": "x", "temperature": -1.0}, r"temperature=-1\.0 must be"),
    ({"checkpoint": "nowhere"}, "no checkpoint in nowhere"),
  ],
)
def test_wrong_fields_are_one_line(changes, message):
  with pytest.raises(RunError, match=message):
    chats.run(configured(**changes))


@pytest.mark.slow(reason="reads a model's folder")
def test_a_pipe_is_answered_line_by_line(monkeypatch, capsys):
  monkeypatch.setattr(chats, "Engine", StandIn)
  monkeypatch.setattr(StandIn, "answer", "1234")
  monkeypatch.setattr(StandIn, "asked", ())
  script = b"1003\r\n\xff\n/seed 3\n\n1004"
  monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(script)))
  chats.run(configured(pretrained=str(jobs.START), prompt="1002"))
  out, err = capsys.readouterr()
  assert out.endswith("1234\n" * 3)
  assert "line 2 of standard input is not UTF-8" in err
  assert "seed 3\n" in err
  assert [request.seed for request in StandIn.asked] == [0, 0, 3]


class AtPty:
  """The real command on a terminal of its own."""

  def __init__(self, *fields: str):
    self._ours, theirs = pty.openpty()
    line = [
      "setsid",
      "--ctty",
      sys.executable,
      "-m",
      "d1jax.main",
      "--config=configs/generate.py",
      "--config.chat=True",
      *fields,
    ]
    environment = os.environ | {"XLA_FLAGS": QUICK_TO_COMPILE, "TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
    self.process = subprocess.Popen(line, cwd=jobs.ROOT, env=environment, **streams)
    os.close(theirs)
    self.said = ""

  def until(self, pattern: str, seconds: float = 60) -> str:
    """What it says, with the first match of a pattern."""
    end = time.monotonic() + seconds
    while not (found := re.search(pattern, self.said)):
      assert time.monotonic() < end, self.said
      if select.select([self._ours], [], [], 0.2)[0]:
        self.said += os.read(self._ours, 1 << 16).decode(errors="replace")
    said, self.said = self.said[: found.end()], self.said[found.end() :]
    return said

  def type(self, text: str) -> None:
    os.write(self._ours, text.encode())


@pytest.mark.slow(reason="a process that imports JAX")
def test_the_real_command_on_a_terminal(tmp_path):
  chat = AtPty(f"--config.pretrained={jobs.START}", "--config.length=512", "--config.tokens_per_step=1")
  try:
    chat.until("> ")
    chat.type("/seed 3\n")
    chat.until("seed 3\r\n> ")
    time.sleep(0.5)  # Ctrl-C in the moment before readline waits for a key would be heard with the next key
    chat.type("\x03")
    chat.until("Ctrl-D or /quit ends the chat\r\n> ")
    chat.type("1003\n")
    chat.until(r"step (3[3-9]|[4-9]\d|\d{3}), \d+ of 512 tokens; Ctrl-C stops")  # in the second block or behind it
    chat.type("\x03")
    assert "\x1b[J" in chat.until(r"stopped\)")
    chat.until("> ")
    chat.type(f"/film {tmp_path / 'a.gif'}\n")
    chat.until("KiB\r\n> ")
    chat.type("\x04")
    assert chat.process.wait(60) == 0
  finally:
    chat.process.kill()
    chat.process.wait()
  assert (tmp_path / "a.gif").stat().st_size > 1000
