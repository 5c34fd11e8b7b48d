"""`--config=configs/generate.py`: completes prompts, prints the texts and, on request, the denoising steps."""

import dataclasses
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from ml_collections import ConfigDict

from d1jax import files, keys
from d1jax.completer import Completer
from d1jax.data.tokenizer import Tokenizer
from d1jax.diffusion.blocks import check
from d1jax.diffusion.rollout import SamplerSpec
from d1jax.errors import (
  InterruptedRunError,
  RunError,
  StorageError,
  explained,
  extra,
  harmless,
  input_checked,
  smaller_batches,
)
from d1jax.evaluation import subject
from d1jax.generation import canvas as canvases
from d1jax.generation import puzzle, terminal
from d1jax.generation.generate import Generation, stream
from d1jax.run import limits
from d1jax.tasks.base import Record

WIDEST = 100
"""The largest width of a canvas in columns, even on a wider terminal."""


Live = Callable[..., Generation]
"""Completes one prompt and shows its steps, see `serving.chat.live`."""


def run(config: ConfigDict, live: Live | None = None) -> list[Generation]:
  """Completes `config.prompt`, or the lines of standard input, prints the texts and returns them.

  Args:
    config: a configuration of configs/generate.py.
    live: shows the steps of a single answer while they are computed; None: recorded steps are printed.
  """
  check_fields(config)
  try:
    prompts = _prompts(config)
    path = _film_path(config, len(prompts))
    with input_checked():
      records = [puzzle.read(config.task, prompt) for prompt in prompts] if config.task else []
    with explained("generation", smaller_batches("batch_size", config.batch_size)):
      shown = _answer(config, prompts, records, path, live)
  except KeyboardInterrupt:
    raise InterruptedRunError("SIGINT: stopped before everything was answered") from None
  return shown


def check_fields(config: ConfigDict) -> None:
  """Raises a RunError unless a model is named and the numbers are allowed."""
  if config.checkpoint is None and not config.pretrained:
    raise RunError(
      "nobody to answer: set config.checkpoint (a work directory or a checkpoint's folder) or config.pretrained (a"
      " model's folder)"
    )
  with input_checked():
    limits.check(config)


def _answer(
  config: ConfigDict, prompts: list[str], records: list[Record], path: Path | None, live: Live | None
) -> list[Generation]:
  """Reads the model, completes, prints, and saves the film."""
  found = subject.load(config)
  experiment = found.experiment
  with input_checked():
    sampler = sampler_of(config, experiment.sampler)
    check(experiment.model.rollout_denoiser, sampler, length="length")
    style = experiment.config.task.style
    questions = [puzzle.Question.of(config.task, record, style) for record in records]
    texts = [question.prompt for question in questions] or prompts
    prefill = config.prefill or (questions[0].prefill if questions else "")
    with subject.saying("publishing the weights"):
      params = found.params()
    Completer.of(experiment.model, keys.Purpose.EVALUATION).announce = subject.saying
    if live and len(texts) * config.samples == 1 and not sampler.cfg_scale and sampler.cache == "none":
      one = live(
        experiment.model,
        texts[0],
        sampler,
        params=params,
        config=config,
        prefill=prefill,
        record=records[0] if records else None,
      )
      with config.unlocked():
        config.show_steps = False  # they were shown
      return _shown(iter([one]), config, experiment.tokenizer, questions, path)
    generations = stream(
      experiment.model,
      texts,
      params=params,
      spec=sampler,
      prefill=prefill,
      samples=config.samples,
      seed=config.seed,
      batch_size=config.batch_size,
      prompt_buckets=tuple(config.prompt_buckets),
    )
  return _shown(generations, config, experiment.tokenizer, questions, path, several=len(prompts) > 1)


def _shown(
  generations: Iterator[Generation],
  config: ConfigDict,
  tokenizer: Tokenizer,
  questions: list[puzzle.Question],
  path: Path | None,
  *,
  several: bool = False,
) -> list[Generation]:
  """Prints answers and saves the film."""
  shown = list(_printed(generations, config, tokenizer, questions, several=several))
  if path is not None:
    from d1jax.generation import film

    try:
      film.save(path, [_canvas(one, tokenizer, questions) for one in shown])
    except OSError as error:
      raise StorageError(f"film={str(path)!r} could not be written ({error.strerror}); name another place") from None
    print(harmless(f"{path}: {path.stat().st_size / 1024:.0f} KiB"), file=sys.stderr)
  return shown


def _film_path(config: ConfigDict, prompts: int) -> Path | None:
  """The path of the film, if there is one; a RunError if it cannot be written there."""
  if config.film is None:
    return None
  with extra("eval"):  # only films need these packages
    from d1jax.generation import film
  path = Path(config.film)
  with input_checked():
    film.check(path)
  if prompts * config.samples > film.MOST_CANVASES:
    raise RunError(
      f"a film of {prompts} prompts with {config.samples} samples is too long; ask for at most {film.MOST_CANVASES}"
      " answers"
    )
  return path


def _prompts(config: ConfigDict) -> list[str]:
  """The prompt of the configuration, or the prompts on standard input."""
  if config.prompt is not None:
    if not config.prompt.strip():
      raise RunError("config.prompt is empty; write something")
    return [config.prompt]
  if sys.stdin is None or sys.stdin.isatty():
    raise RunError("no prompt: set config.prompt, or send prompts to standard input, one a line")
  with input_checked():
    text = files.decode(sys.stdin.buffer.read(), "standard input")
  # A line ends only at a line feed; other line ends of Unicode are part of the prompt.
  prompts = [line for line in (line.removesuffix("\r") for line in text.split("\n")) if line.strip()]
  if not prompts:
    raise RunError("no prompt: standard input is empty; send prompts, one a line, or set config.prompt")
  return prompts


def sampler_of(config: ConfigDict, trained: SamplerSpec) -> SamplerSpec:
  """The sampler of answers; fields that are not set are those of the rollouts, including the tokens per step."""
  length = trained.completion_length if config.length is None else config.length
  block = min(trained.block_length, length) if config.block_length is None else config.block_length
  trained = trained.with_cache(config.cache or trained.cache)
  return dataclasses.replace(
    trained.resized(length, block, config.tokens_per_step),
    temperature=config.temperature,
    cfg_scale=trained.cfg_scale if config.cfg_scale is None else config.cfg_scale,
    remasking=config.remasking or trained.remasking,
    early_exit=config.early_exit,
    schedule=config.schedule or trained.schedule,
    threshold=trained.threshold if config.threshold is None else config.threshold,
    max_reveal=trained.max_reveal if config.max_reveal is None else config.max_reveal,
  )


def _canvas(one: Generation, tokenizer: Tokenizer, questions: list[puzzle.Question]) -> canvases.Canvas:
  """The canvas of a completion; of an answer to a Sudoku with its grid."""
  return canvases.of(one, tokenizer, questions[one.index].record if questions else None)


def _printed(
  generations: Iterator[Generation],
  config: ConfigDict,
  tokenizer: Tokenizer,
  questions: list[puzzle.Question],
  *,
  several: bool,
) -> Iterator[Generation]:
  """Prints each completion and yields it."""
  terminals, colored = sys.stdout.isatty(), has_colors()
  columns = min(WIDEST, shutil.get_terminal_size().columns - 1)
  for one in generations:
    names = [f"prompt {one.index + 1}"] * several + [f"sample {one.sample + 1}"] * (config.samples > 1)
    if names:
      asked = " ".join(one.prompt.split())
      head = f"[{', '.join(names)}] {asked if len(asked) <= columns // 2 else asked[: columns // 2] + '...'}"
      write(harmless(head) + "\n")
    if config.show_steps:
      view = terminal.show(_canvas(one, tokenizer, questions), columns=columns, colored=colored)
      write(view + "\n\n")
    text = harmless(one.text) if terminals else one.text
    if questions:
      board = _canvas(one, tokenizer, questions).board
      text = "\n".join([text, *([str(board)] if board else []), questions[one.index].verdict(one.text)])
    write(text + "\n" * (1 + bool(names)))
    yield one


def has_screen() -> bool:
  """Whether standard output is a terminal that can be written over."""
  return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def has_colors() -> bool:
  """Whether standard output is a terminal with colours that its user wants."""
  return has_screen() and not os.environ.get("NO_COLOR")


def write(text: str) -> None:
  """Writes to standard output; characters that its encoding lacks become question marks.

  Raises:
    StorageError: nobody reads standard output.
  """
  encoding = sys.stdout.encoding or "utf-8"
  try:
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()
  except OSError as error:
    raise StorageError(
      f"standard output took no more text ({error.strerror}); send it to a file that has room"
    ) from None
