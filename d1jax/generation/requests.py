"""What lm-evaluation-harness asks of a model: its arguments, options of generations, stop strings, pairs of texts."""

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from d1jax.data.tokenizer import Tokenizer, body, prefix
from d1jax.diffusion.rollout import SamplerSpec

MOST_TOKENS = 256
"""Tokens of an answer to a task that does not say it, as in the harness."""

_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
  "top_p": (None, 1),
  "top_k": (None, 0, -1),
  "min_p": (None, 0),
  "num_beams": (None, 1),
  "repetition_penalty": (None, 1),
}
"""Options of a task's generation that d1jax does not have, with the values at which they change nothing."""
_OF_DRAWS = ("top_p", "top_k", "min_p")
"""Those that greedy decoding does not read."""


@dataclasses.dataclass(frozen=True)
class Settings:
  """The arguments of the model, `--model_args NAME=VALUE,...`.

  Attributes:
    pretrained: a model's folder; with `checkpoint`: the new place of the run's base model, if it moved.
    checkpoint: a run's work directory, or the folder of one checkpoint.
    dtype: auto, float32 or bfloat16; of a folder.
    quantize: int8 or nf4; of a folder.
    block: the block length of a block-causal folder.
    data: devices along this axis of the mesh; -1: those that are left. `fsdp`, `tensor` and `sequence` are the others.
    fsdp: see `data`.
    tensor: see `data`.
    sequence: see `data`.
    batch_size: rows of a batch; auto: 16 a device.
    max_batch_size: the most rows of `auto`.
    device: not read, JAX takes the devices that it finds.
    max_length: the most tokens of a context and an answer together; a longer context loses its beginning.
    mc_num: masks of a likelihood, a forward pass each.
    cfg_scale: classifier-free guidance, of likelihoods and generations.
    is_check_greedy: whether a likelihood also says that greedy decoding writes the answer (LAMBADA's accuracy).
    seed: of all draws.
    length: tokens of an answer; None: those of the task.
    block_length: of the sampler; None: 32, or the block of a block-causal network.
    tokens_per_step: that a denoising step unmasks.
    remasking: of the sampler.
    schedule: of the sampler.
    threshold: of the schedule of that name.
    cache: of the sampler.
  """

  pretrained: str | None = None
  checkpoint: str | None = None
  dtype: str = "auto"
  quantize: str | None = None
  block: int | None = None
  data: int = -1
  fsdp: int = 1
  tensor: int = 1
  sequence: int = 1
  batch_size: int | str = 1
  max_batch_size: int | None = None
  device: str | None = None
  max_length: int = 4096
  mc_num: int = 128
  cfg_scale: float = 0.0
  is_check_greedy: bool = True
  seed: int = 0
  length: int | None = None
  block_length: int | None = None
  tokens_per_step: int = 1
  remasking: str = "low_confidence"
  schedule: str = "static"
  threshold: float = 0.9
  cache: str = "none"

  def __post_init__(self) -> None:
    for name in ("block", "max_batch_size", "max_length", "mc_num", "length", "block_length", "tokens_per_step"):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise ValueError(f"model_args: {name}={value} must be at least 1")
    size = self.batch_size
    if not (isinstance(size, int) and size > 0) and not (isinstance(size, str) and size.partition(":")[0] == "auto"):
      raise ValueError(f"batch_size={size!r} must be a number of at least 1, or auto")
    if self.pretrained is None and self.checkpoint is None:
      raise ValueError("model_args name no model: set pretrained=FOLDER or checkpoint=RUN")
    if self.checkpoint is not None and (self.dtype != "auto" or self.quantize or self.block):
      raise ValueError("model_args: dtype, quantize and block are for pretrained=FOLDER; a checkpoint has its own")

  @classmethod
  def of(cls, arguments: Mapping[str, Any]) -> "Settings":
    """The settings of `--model_args`, whose numbers may stand for texts (`pretrained=007`).

    Raises:
      ValueError: an argument is not known, or has a value that is not allowed; the message names it.
    """
    known = [field.name for field in dataclasses.fields(cls)]
    unknown = [name for name in arguments if name not in known]
    if unknown:
      raise ValueError(f"unknown model_args {', '.join(map(repr, unknown))}; known: {', '.join(known)}")
    given = dict(arguments)
    for name in ("pretrained", "checkpoint"):
      if isinstance(given.get(name), int):
        given[name] = str(given[name])
    size = given.get("batch_size")
    if isinstance(size, str) and size.isdecimal():
      given["batch_size"] = int(size)
    hints = typing.get_type_hints(cls)
    for name, value in given.items():
      kinds = typing.get_args(hints[name]) or (hints[name],)
      fits = isinstance(value, (*kinds, int) if float in kinds else kinds)
      if not fits or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join(kind.__name__ for kind in kinds if kind is not type(None))
        raise ValueError(f"model_args: {name}={value!r} must be of the type {wanted}")
    return cls(**given)


class Asked(NamedTuple):
  """What a task wants of a generation: stop strings, the most tokens, temperature, seed."""

  until: tuple[str, ...]
  tokens: int
  temperature: float
  seed: int


def asked(given: Mapping[str, Any], settings: Settings) -> Asked:
  """Reads the options of a generation as the harness does (`normalize_gen_kwargs`).

  Raises:
    ValueError: an option would change the answer, but d1jax does not have it.
  """
  rest = dict(given)
  until = rest.pop("until", None) or []
  lengths = [rest.pop(name, None) for name in _LENGTHS]
  tokens = next((int(length) for length in lengths if length is not None), MOST_TOKENS)
  temperature = float(rest.pop("temperature", None) or 0.0) if rest.pop("do_sample", None) is not False else 0.0
  rest.pop("temperature", None)
  seed = int(rest.pop("seed", settings.seed))
  for name, value in rest.items():
    if name in _OF_DRAWS and not temperature:
      continue
    if name not in _NEUTRAL or value not in _NEUTRAL[name]:
      raise ValueError(
        f"generation_kwargs: {name}={value!r} is not supported by d1jax; known: until, {', '.join(_LENGTHS)},"
        " temperature, do_sample, seed. Change it with --gen_kwargs, or in the task's file"
      )
  until = (until,) if isinstance(until, str) else tuple(until)
  return Asked(tuple(filter(None, until)), settings.length or tokens, temperature, seed)


def sampler(settings: Settings, block: int | None, tokens: int, temperature: float) -> SamplerSpec:
  """The sampler of answers of so many tokens; the canvas is rounded up to whole blocks."""
  size = settings.block_length or block or min(32, tokens)
  unit = block or size
  length = -(-tokens // unit) * unit
  return SamplerSpec(
    completion_length=length,
    diffusion_steps=length // size * max(1, round(size / settings.tokens_per_step)),
    block_length=size,
    temperature=temperature,
    cfg_scale=float(settings.cfg_scale),
    remasking=settings.remasking,
    early_exit=True,
    schedule=settings.schedule,
    threshold=settings.threshold,
    cache=settings.cache,
  )


def until_stop(tokenizer: Tokenizer, ids: Sequence[int], until: Sequence[str]) -> str:
  """The text of an answer before its first stop string, which may be the text of a special token (`<|eot_id|>`)."""
  text = tokenizer.decode_all([ids])[0]
  raw = tokenizer.decode_raw([ids])[0] if until else ""
  hidden = [stop for stop in until if stop in raw and stop not in text]
  if hidden:  # a special token, which the text does not show: keep the tokens before it
    prefixes = tokenizer.decode_raw([ids[:n] for n in range(1, len(ids) + 1)])
    end = next(n for n, start in enumerate(prefixes) if any(stop in start for stop in hidden))
    text = tokenizer.decode_all([ids[:end]])[0]
  return text[: min((text.index(stop) for stop in until if stop in text), default=len(text))]


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
  """The ids of a context and its continuation, as LLaDA's evaluation and the harness split them.

  Spaces at the end of the context belong to the continuation, because tokens begin with their space. Without a context
  a start token stands in front, or the end of sequence.
  """
  spaces = len(context) - len(context.rstrip())
  if spaces:
    context, continuation = context[:-spaces], context[-spaces:] + continuation
  if not context:
    return prefix(tokenizer), body(tokenizer, continuation)
  ids = tokenizer.encode(context)
  return ids, tokenizer.encode(context + continuation)[len(ids) :]
