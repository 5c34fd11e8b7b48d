"""What a request asks for: OpenAI's fields and d1jax's own. Nothing here knows sockets, tokenizers or devices."""

import dataclasses
import difflib
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from d1jax import files
from d1jax.diffusion.rollout import SamplerSpec
from d1jax.run.limits import COUNT, POSITIVE, SEED, SHARE, SIZE, TOKENS, Limit
from d1jax.serving.fields import ApiError, Fields, shown
from d1jax.tasks.base import Message

MOST_STOPS, LONGEST_STOP = 4, 1000
"""Stop texts of a request, and the characters of one."""

MOST_MESSAGES = 1024
"""Messages of a conversation, and prompts of a request."""

CHARACTERS_A_TOKEN = 128
"""No token of a usual vocabulary has more, so that a longer prompt is refused before it is read as tokens."""

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}

_COMMON: dict[str, tuple[Any, ...]] = {
  "top_p": (1,),
  "presence_penalty": (0,),
  "frequency_penalty": (0,),
  "logit_bias": ({},),
}
_NEUTRAL: Mapping[bool, Mapping[str, tuple[Any, ...]]] = {
  True: _COMMON
  | {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "store": (False,),
    "service_tier": ("auto", "default"),
  },
  False: _COMMON | {"echo": (False,), "suffix": ("",), "best_of": (1,)},
}
"""OpenAI's fields of chats and of completions that d1jax has nothing for, and the values that change nothing. None
(JSON's null) is always one.
"""

_IGNORED = ("user", "metadata", "safety_identifier", "prompt_cache_key")
"""OpenAI's fields that say who asks, and never change an answer."""

_SAMPLING = ("block_length", "steps", "schedule", "threshold", "factor", "max_reveal")
_BOTH = ("model", "max_tokens", "temperature", "seed", "stop", "n", "stream", "stream_options", "logprobs", "d1jax")
_KNOWN: Mapping[bool, tuple[str, ...]] = {
  True: ("messages", "max_completion_tokens", "top_logprobs", "prefill", *_BOTH, *_SAMPLING),
  False: ("prompt", *_BOTH, *_SAMPLING),
}
_MESSAGE = ("role", "content")


@dataclasses.dataclass(frozen=True)
class Served:
  """What a server serves.

  Attributes:
    name: the model's name.
    sampler: the sampler of requests that say nothing.
    block: the block of a block-causal network, or None.
    longest: the longest prompt with its completion, in tokens.
    most: the most completions of one request.
  """

  name: str
  sampler: SamplerSpec
  block: int | None
  longest: int
  most: int


@dataclasses.dataclass(frozen=True)
class Ask:
  """A request whose fields are right.

  Attributes:
    chat: whether it is of `/v1/chat/completions`.
    prompts: a conversation; or texts and lists of ids, each to be completed by itself.
    prefill: the start of the answer.
    tokens: the most tokens of an answer.
    spec: the sampler; its completion is `tokens`, rounded up to whole blocks.
    seed: of the draws.
    samples: the completions of each prompt.
    stop: texts of which the first that appears ends an answer; it is no part of it.
    stream: whether the answer comes in parts.
    usage: whether the last part counts the tokens.
    logprobs: whether the tokens come with their log-probabilities; `top` is whether a list of the most probable tokens
      is asked for, which holds the drawn one.
    canvas: whether each denoising step is shown.
  """

  chat: bool
  prompts: tuple[Sequence[Message] | str | Sequence[int], ...]
  prefill: str
  tokens: int
  spec: SamplerSpec
  seed: int
  samples: int
  stop: tuple[str, ...]
  stream: bool
  usage: bool
  logprobs: bool
  top: bool
  canvas: bool


def unknown_model(name: str, served: Served) -> ApiError:
  """The error of a request for another model."""
  message = f"the model {shown(name)} is not served here; use {served.name!r}"
  return ApiError(message, status=404, param="model", code="model_not_found")


def json_object(content: bytes) -> dict[str, Any]:
  """The JSON object of a request's body; an `ApiError` if there is none."""
  try:
    return files.parse_json(files.decode(content, "the request"), "the request", dict, finite=True)
  except files.FileError as error:
    raise ApiError(str(error)) from None


def parse(body: Mapping[str, Any], served: Served, *, chat: bool) -> Ask:
  """Reads a request.

  `chat` says whether it is of `/v1/chat/completions`, not of `/v1/completions`.

  Raises:
    ApiError: a field is unknown, unsupported, or has a value that cannot be used; the message names it.
  """
  _check_names(body, chat)
  fields = Fields({name: value for name, value in body.items() if value is not None})
  model = fields.text("model", served.name)
  if model != served.name:
    raise unknown_model(model, served)
  tokens = _tokens(fields, served.sampler.completion_length)
  spec = sampler(fields, served, tokens)
  samples = fields.number("n", 1, TOKENS)
  prompts: tuple[Any, ...] = (_messages(body.get("messages")),) if chat else _prompts(body.get("prompt"))
  if samples * len(prompts) > served.most:
    raise ApiError(
      f"n={samples} for {len(prompts)} prompts is more than the {served.most} completions of a request; ask in parts",
      param="n",
    )
  if samples > 1 and spec.temperature == 0 and spec.remasking != "random":
    raise ApiError(
      f"n is {samples}, but at temperature 0 all answers are the same: set a temperature, like 0.9", param="n"
    )
  logprobs, top = _logprobs(fields, spec, chat)
  stream = fields.flag("stream")
  options, own = fields.options("stream_options"), fields.options("d1jax")
  usage, canvas = options.flag("include_usage"), own.flag("canvas")
  if options.given and not stream:
    raise ApiError("stream_options is for a stream: set stream=true, or leave it out", param="stream_options")
  if canvas and not stream:
    raise ApiError("d1jax.canvas shows steps in a stream: set stream=true, or leave it out", param="d1jax.canvas")
  prefill = fields.text("prefill", "")
  seed = fields.number("seed", None, SEED)
  return Ask(
    chat=chat,
    prompts=prompts,
    prefill=prefill,
    tokens=tokens,
    spec=spec,
    seed=secrets.randbits(32) if seed is None else seed,
    samples=samples,
    stop=_stops(fields.given.get("stop")),
    stream=stream,
    usage=usage,
    logprobs=logprobs,
    top=top,
    canvas=canvas,
  )


def _check_names(body: Mapping[str, Any], chat: bool) -> None:
  """Refuses fields that d1jax does not know, and OpenAI's that it has nothing for."""
  neutral, known = _NEUTRAL[chat], _KNOWN[chat]
  for name, value in body.items():
    if name in known or name in _IGNORED or value is None:
      continue
    if name in neutral:
      if value not in neutral[name]:
        raise ApiError(f"{name}={shown(value)} is not supported: leave {name} out", param=name, code="unsupported")
      continue
    near = difflib.get_close_matches(name[:40], known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(known))}"
    raise ApiError(f"unknown field {shown(name)}; {hint}", param=name[:80], code="unknown_field")


def _tokens(fields: Fields, default: int) -> int:
  """The most tokens of an answer."""
  new, old = (fields.number(name, None, TOKENS) for name in ("max_completion_tokens", "max_tokens"))
  if new is not None and old is not None and new != old:
    raise ApiError(f"max_tokens={old} and max_completion_tokens={new} differ: give one of them", param="max_tokens")
  return int(new or old or default)


def sampler(fields: Fields, served: Served, tokens: int) -> SamplerSpec:
  """The sampler of a request; what the request does not say is as in the server's own sampler, including the tokens a
  step.
  """
  usual = served.sampler
  block = fields.number("block_length", usual.block_length, TOKENS)
  if served.block is not None and served.block % block:
    raise ApiError(
      f"block_length={block} does not divide the network's block of {served.block} tokens: use {served.block}",
      param="block_length",
    )
  length = -(-tokens // (served.block or block)) * (served.block or block)
  if max(length, block) > served.longest:
    name, value = ("max_tokens", tokens) if block <= served.longest else ("block_length", block)
    raise ApiError(f"{name}={value} is more than the {served.longest} tokens of the longest canvas", param=name)
  blocks = length // block
  steps = fields.number("steps", None, TOKENS)
  per_block = round(block * usual.diffusion_steps / usual.completion_length) if steps is None else -(-steps // blocks)
  schedule = fields.text("schedule", usual.schedule)
  for name, users in (("threshold", "threshold"), ("factor", "factor"), ("max_reveal", "threshold factor")):
    if name in fields.given and schedule not in users.split():
      raise ApiError(
        f"{name} is of no use with schedule={shown(schedule)}: set schedule to {users.replace(' ', ' or ')}",
        param=name,
      )
  try:
    return dataclasses.replace(
      usual,
      completion_length=length,
      block_length=block,
      diffusion_steps=blocks * min(block, max(1, per_block)),
      temperature=fields.number("temperature", usual.temperature, SIZE),
      schedule=schedule,
      threshold=fields.number("threshold", usual.threshold, SHARE._replace(above=True)),
      factor=fields.number("factor", usual.factor, POSITIVE),
      max_reveal=fields.number("max_reveal", usual.max_reveal, COUNT),
    )
  except ValueError as error:
    raise ApiError(str(error), param="schedule") from None


def _logprobs(fields: Fields, spec: SamplerSpec, chat: bool) -> tuple[bool, bool]:
  """Whether log-probabilities are asked for, and a list of the most probable tokens with them."""
  if chat:
    wanted, top = fields.flag("logprobs"), False
    if fields.number("top_logprobs", 0, Limit(True, 0)) != 0:
      raise fields.fail("top_logprobs", "0: only the token that was drawn has a log-probability")
  else:
    number = fields.number("logprobs", None, Limit(True, 0))
    if number is not None and number > 1:
      raise fields.fail("logprobs", "0 or 1: only the token that was drawn has a log-probability")
    wanted, top = number is not None, number == 1
  if wanted and spec.temperature == 0:
    raise ApiError(
      "logprobs are those of the draws, and at temperature 0 nothing is drawn: set a temperature, like 0.9",
      param="logprobs",
    )
  return wanted, top


def _stops(value: Any) -> tuple[str, ...]:
  """The stop texts."""
  stops = [value] if isinstance(value, str) else [] if value is None else value
  if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
    raise ApiError(f"stop={shown(value)} must be a text that is not empty, or a list of such texts", param="stop")
  if len(stops) > MOST_STOPS or any(len(stop) > LONGEST_STOP for stop in stops):
    raise ApiError(f"stop must hold at most {MOST_STOPS} texts of at most {LONGEST_STOP} characters", param="stop")
  return tuple(stops)


def _messages(value: Any) -> list[Message]:
  """The conversation."""
  if not isinstance(value, list) or not value:
    raise ApiError('messages must be a list like [{"role": "user", "content": "Hello"}]', param="messages")
  if len(value) > MOST_MESSAGES:
    raise ApiError(f"messages has {len(value)} entries, at most {MOST_MESSAGES} are read", param="messages")
  turns = [_message(one, f"messages[{number}]") for number, one in enumerate(value)]
  if turns[-1]["role"] == "assistant":
    raise ApiError(
      "the last message is the assistant's: end with the user's, or give the start of the answer as prefill",
      param="messages",
    )
  if not "".join(turn["content"] for turn in turns).strip():
    raise ApiError("the messages are empty; write something", param="messages")
  return turns


def _message(one: Any, name: str) -> Message:
  if not isinstance(one, dict):
    raise ApiError(f"{name}={shown(one)} must be an object with role and content", param=name)
  unknown = next((key for key, value in one.items() if key not in _MESSAGE and value not in (None, [])), None)
  if unknown is not None:
    raise ApiError(f"{name}.{unknown[:40]} is not supported: leave it out", param=name)
  role, content = one.get("role"), one.get("content")
  if not isinstance(role, str) or role not in ROLES:
    raise ApiError(f"{name}.role={shown(role)} must be system, user or assistant", param=f"{name}.role")
  if isinstance(content, list):
    content = "".join(_part(part, name) for part in content)
  if not isinstance(content, str):
    raise ApiError(f"{name}.content={shown(content)} must be a text, or parts of type text", param=f"{name}.content")
  return {"role": ROLES[role], "content": content}


def _part(part: Any, name: str) -> str:
  text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
  if not isinstance(text, str):
    kind = part.get("type") if isinstance(part, dict) else part
    raise ApiError(f"{name}.content has a part of type {shown(kind)}: only text is read", param=f"{name}.content")
  return text


def _prompts(value: Any) -> tuple[str | list[int], ...]:
  """The prompts of a completion: a text, a list of texts, ids, or a list of lists of ids."""
  if isinstance(value, str) or (isinstance(value, list) and value and all(map(_is_id, value))):
    value = [value]
  right = isinstance(value, list) and all(
    isinstance(one, str) or (isinstance(one, list) and all(map(_is_id, one))) for one in value
  )
  if not right or not value:
    raise ApiError(f"prompt={shown(value)} must be a text, a list of texts, ids, or a list of ids", param="prompt")
  if not all(one.strip() if isinstance(one, str) else one for one in value):
    raise ApiError("a prompt is empty; write something", param="prompt")
  return tuple(value)


def _is_id(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)
