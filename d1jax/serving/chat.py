"""`--config=configs/generate.py --config.chat=True`: a conversation on the terminal, on an engine with one slot.

An answer is shown as it is denoised where standard output is a terminal, and as a whole where it is not. Lines that
begin with `/` are commands.
"""

import contextlib
import dataclasses
import importlib
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from d1jax import files
from d1jax.data.chat import tells_turns
from d1jax.data.pipeline import bucket_for
from d1jax.data.tokenizer import Tokenizer
from d1jax.diffusion.rollout import SamplerSpec
from d1jax.errors import RunError, explained, extra, harmless, input_checked
from d1jax.evaluation import subject
from d1jax.generation import canvas as canvases
from d1jax.generation import command
from d1jax.generation.generate import Generation
from d1jax.model import Model
from d1jax.run.limits import TABLE
from d1jax.serving.engine import Engine
from d1jax.serving.request import Request, Update
from d1jax.serving.view import View, follow
from d1jax.state import Params
from d1jax.tasks.base import Message, Record

COMMANDS: Mapping[str, str] = {
  "/clear": "forgets the conversation",
  "/temperature T": "of the draws; 0 is greedy",
  "/seed N": "of the draws",
  "/steps N": "the denoising steps of an answer",
  "/length N": "the most tokens of an answer",
  "/film PATH": "saves the last answer as an animated picture: a .gif",
  "/help": "lists the commands",
  "/quit": "ends the chat; Ctrl-D does too, and Ctrl-C stops an answer",
}
"""What a line that begins with `/` does. A message that begins so is written with two: `//etc is a folder`."""

PACE = 0.15
"""Seconds of a step that `live` shows, at least."""

_SETTINGS = ("temperature", "seed", "steps", "length")


def run(config: ConfigDict) -> None:
  """Talks with a model until the user has enough, or standard input ends."""
  command.check_fields(config)
  for field, usual in (("samples", 1), ("show_steps", False), ("film", None), ("task", None)):
    if config[field] != usual:
      raise RunError(
        f"config.{field}={config[field]!r} is for completions without config.chat: leave it out; in a chat, /film PATH"
        " saves the last answer"
      )
  with explained("chat", "a shorter length, --config.length"):
    found = subject.load(config)
    with input_checked():
      trained = found.experiment.sampler
      spec = command.sampler_of(config, trained if config.cache else trained.with_cache("none"))
      chat = Chat(
        found.experiment.model,
        spec,
        params=found.params(),
        seed=config.seed,
        prefill=config.prefill,
        prompt_buckets=tuple(config.prompt_buckets),
      )
    try:
      chat.greet()
      if config.prompt is not None:
        chat.take(config.prompt)
      for line in _lines():
        if not chat.take(line):
          break
    finally:
      chat.close()


def live(
  model: Model,
  prompt: str,
  spec: SamplerSpec,
  *,
  params: Params,
  config: ConfigDict,
  prefill: str,
  record: Record | None = None,
) -> Generation:
  """Completes one prompt and shows the answer while it is denoised, as slowly as a person can follow.

  `config` is one of configs/generate.py. The other arguments are those of `Chat` and of `Chat.answer`.

  Raises:
    ValueError: the prompt cannot be used, or the engine has not this sampler.
  """
  buckets = tuple(config.prompt_buckets)
  chat = Chat(model, spec, params=params, seed=config.seed, prefill=prefill, prompt_buckets=buckets)
  try:
    return chat.answer(prompt, PACE, record)[0]
  finally:
    chat.close()


def _lines() -> Iterator[str]:
  """The lines of standard input; on a terminal, with the editing of readline."""
  if sys.stdin is None:
    return
  if not sys.stdin.isatty():
    for number, raw in enumerate(sys.stdin.buffer, start=1):
      try:
        yield files.decode(raw, f"line {number} of standard input").removesuffix("\n").removesuffix("\r")
      except ValueError as error:
        _say(str(error))
    return
  with contextlib.suppress(ImportError):
    importlib.import_module("readline")  # `input` then uses it
  while True:
    try:
      yield input("> " if sys.stdout.isatty() else "")
    except EOFError:
      print()
      return
    except UnicodeDecodeError as error:
      _say(f"the line is not {error.encoding}; write it again")
    except KeyboardInterrupt:
      _say("\nCtrl-D or /quit ends the chat")


def _say(message: str) -> None:
  """Says something that is no answer, on standard error."""
  print(harmless(message), file=sys.stderr, flush=True)


class Chat:
  """A conversation with a model.

  Attributes:
    messages: what was said; what did not fit any more is left out.
    spec: the sampler of the next answer.
    seed: of its draws.
    last: the last answer, for the film.
  """

  def __init__(
    self, model: Model, spec: SamplerSpec, *, params: Params, seed: int, prefill: str, prompt_buckets: tuple[int, ...]
  ):
    """Begins a conversation; nothing is compiled yet.

    `params` are published weights, `seed` is that of the draws, and `prefill` the start of each answer. For each of the
    prompt buckets there is a canvas, with the length of an answer added; conversations are cut to the largest.

    Raises:
      ValueError: there is no tokenizer, or the engine has not this sampler.
    """
    if model.tokenizer is None:
      raise ValueError("there is no tokenizer; put tokenizer.json, or its parts, beside the model's config.json")
    self.messages: list[Message] = []
    self.spec, self.seed = spec, seed
    self.last: Generation | None = None
    self._model, self._params, self._prefill, self._buckets = model, params, prefill, prompt_buckets
    self._tokenizer: Tokenizer = model.tokenizer
    self._block = spec.block_length  # the longest
    self._engines: dict[int, Engine] = {}
    self._live = command.has_screen()
    self._check(spec)

  @property
  def has_turns(self) -> bool:
    """Whether the model's chat template tells turns apart. Without one, each message is asked by itself."""
    return tells_turns(self._tokenizer.files)

  def greet(self) -> None:
    """Says how to go on, if somebody is there."""
    if sys.stdin is not None and sys.stdin.isatty():
      _say("/help lists the commands, /quit or Ctrl-D ends the chat.")
    if not self.has_turns:
      _say("The model has no chat template, which tells turns apart: each message is asked by itself.")

  def close(self) -> None:
    """Ends the engines."""
    for engine in self._engines.values():
      engine.close(drain=0)

  def take(self, line: str) -> bool:
    """Answers a line, or does what it commands; whether the chat goes on. What is wrong with it is one line."""
    text = line.strip()
    try:
      if text.startswith("/") and not text.startswith("//"):
        return self._obey(text)
      if text:
        self._ask(text[1:] if text.startswith("//") else line)
    except ValueError as error:
      _say(" ".join(str(error).split()))
    except KeyboardInterrupt:  # while something is compiled
      _say("stopped")
    return True

  def _obey(self, text: str) -> bool:
    """Does a command."""
    name, _, argument = (part.strip() for part in text[1:].partition(" "))
    if name == "quit":
      return False
    if name == "help":
      width = max(map(len, COMMANDS))
      _say("\n".join(f"{usage:{width}}  {does}" for usage, does in COMMANDS.items()))
    elif name == "clear":
      self.messages = []
      _say("the conversation is forgotten")
    elif name == "film":
      self._film(argument)
    elif name in _SETTINGS:
      self._set(name, argument)
      spec = self.spec
      now = {"temperature": spec.temperature, "seed": self.seed, "steps": spec.diffusion_steps}
      _say(f"{name} {now.get(name, spec.completion_length)}")
    else:
      known = ", ".join(usage.split()[0] for usage in COMMANDS)
      raise ValueError(f"unknown command /{name}; known: {known}. A message that begins with / is written with two, //")
    return True

  def _set(self, name: str, argument: str) -> None:
    """Changes a setting; without a value, nothing."""
    if not argument:
      return
    limit = TABLE["length" if name == "steps" else name]
    try:
      value = int(argument) if limit.whole else float(argument)
    except ValueError:
      value = float("nan")
    if not limit.allows(value):
      raise ValueError(f"/{name} {argument}: the value must be {limit}".removesuffix(", or None"))
    if name == "seed":
      self.seed = int(value)
      return
    spec = self.spec
    if name == "temperature":
      spec = dataclasses.replace(spec, temperature=float(value))
    elif name == "steps":
      spec = dataclasses.replace(spec, diffusion_steps=int(value))
    else:
      spec = spec.resized(int(value), min(self._block, int(value)))
    self._check(spec)
    self.spec = spec

  def _check(self, spec: SamplerSpec) -> None:
    """Raises a ValueError if answers cannot be sampled so."""
    length = self._canvas(1, spec)
    Engine(self._model, self._params, slots=1, lengths=(length,), block_length=self._block).check(
      Request(np.zeros(1, np.int32), spec)
    )

  def _film(self, argument: str) -> None:
    """Saves the last answer."""
    if self.last is None:
      raise ValueError("/film: there is no answer yet")
    if not argument:
      raise ValueError("/film PATH: name a file that ends in .gif")
    try:
      with extra("eval"):  # only films need these packages
        from d1jax.generation import film
    except RunError as error:
      raise ValueError(str(error)) from None
    path = Path(argument).expanduser()
    try:
      film.save(path, [canvases.of(self.last, self._tokenizer)])
    except OSError as error:
      raise ValueError(f"film={argument!r} could not be written ({error.strerror}); name another place") from None
    _say(f"{path}: {path.stat().st_size / 1024:.0f} KiB")

  def answer(self, text: str, pace: float = 0.0, record: Record | None = None) -> tuple[Generation, str]:
    """Asks a message, and shows the answer while it is denoised, if standard output is a terminal.

    A step takes at least `pace` seconds. If `record` says what the message asks, a Sudoku is drawn as a grid.

    Returns:
      The answer, which is taken away from the screen; and what it took, in words.

    Raises:
      ValueError: the message cannot be used, or there is no answer.
    """
    messages, ids = self._fitted(text)
    engine = self._engine(self._canvas(len(ids), self.spec))
    request = Request(np.asarray(ids, np.int32), self.spec, seed=self.seed, every_step=self._live)
    view = View(self._tokenizer, self.spec, self._prefill, record) if self._live else None
    began = time.monotonic()
    submit = lambda listen: engine.submit(request, listen)
    update = follow(submit, view.show if view else lambda update: None, pace)
    seconds = time.monotonic() - began
    if view:
      view.clear()
    if update.reason == "error":
      raise ValueError(f"there is no answer: {update.message}")
    if not update.known:
      raise ValueError("stopped before a block was finished; the message is forgotten")
    one = self.last = _generation(update, text, self._prefill, self._tokenizer)
    if self.has_turns:
      self.messages = [*messages, {"role": "assistant", "content": one.text}]
    steps = len(np.unique(one.reveal_step[one.reveal_step >= 0]))
    rate = f"{one.length / max(seconds, 1e-9):.{0 if one.length > 10 * seconds else 2}f} tokens a second"
    stopped = ", stopped" if update.reason == "cancelled" else ""
    return one, f"{steps} steps, {seconds:.3g} s, {rate}{stopped}"

  def _ask(self, text: str) -> None:
    """Asks a message, and prints the answer."""
    one, took = self.answer(text)
    command.write((harmless(one.text) if sys.stdout.isatty() else one.text) + "\n")
    if self._live:
      _say(f"({took})\n")

  def _fitted(self, text: str) -> tuple[list[Message], list[int]]:
    """The conversation with a new message, and its ids; the oldest turns are left out where all would be too long."""
    unknown = self._tokenizer.unknown(text + self._prefill)
    if unknown:
      raise ValueError(
        f"the message has characters that the tokenizer does not know: {', '.join(map(repr, unknown))}; write it as the"
        " model was trained to read it"
      )
    messages: list[Message] = [*self.messages, {"role": "user", "content": text}]
    left_out = 0
    while len(ids := self._tokenizer.prompt(messages, self._prefill)) > max(self._buckets):
      if len(messages) == 1:
        raise ValueError(
          f"the message has {len(ids)} tokens, prompt_buckets hold {max(self._buckets)}: shorten it, or raise them"
        )
      messages, left_out = messages[2:], left_out + 2
    if left_out:
      _say(
        f"the conversation has more than the {max(self._buckets)} tokens of prompt_buckets: its {left_out} oldest"
        " messages are left out"
      )
    return messages, ids

  def _canvas(self, tokens: int, spec: SamplerSpec) -> int:
    """The length of the canvas for a prompt of so many tokens."""
    block, width = self._model.rollout_denoiser.block or 1, bucket_for(tokens, self._buckets)
    return -(-((width or tokens) + spec.completion_length) // block) * block

  def _engine(self, length: int) -> Engine:
    """The engine of a canvas, compiled when it is first needed."""
    if length not in self._engines:
      engine = Engine(self._model, self._params, slots=1, lengths=(length,), block_length=self._block)
      engine.prepare((lambda line: _say(f"(compiling for {line})")) if self._live else lambda line: None)
      self._engines[length] = engine
    return self._engines[length]


def _generation(update: Update, text: str, prefill: str, tokenizer: Tokenizer) -> Generation:
  """The answer that an engine has given; of one that was stopped, the finished blocks."""
  known = update.known
  kept = known if update.reason == "cancelled" else len(update.tokens)
  (answer,) = tokenizer.decode_all([update.tokens[:known].tolist()])
  return Generation(text, 0, 0, prefill, prefill + answer, update.tokens[:kept], known, update.reveal_step[:kept])
