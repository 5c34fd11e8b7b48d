"""Requests, field by field: what is read, and what is refused with which words."""

import dataclasses
import json

import hypothesis
import pytest
from hypothesis import strategies as st

from d1jax.serving import protocol
from d1jax.serving.fields import ApiError
from tests.serving.engines import SERVED

HELLO = {"messages": [{"role": "user", "content": "Hello"}]}
SAY = {"prompt": "Hello"}
BLOCKS = dataclasses.replace(SERVED, block=16)


def parse(fields: dict, chat: bool = True, served=SERVED):
  return protocol.parse((HELLO if chat else SAY) | fields, served, chat=chat)


def test_what_is_not_said_is_as_in_the_checkpoint():
  ask = parse({})
  assert ask.prompts == ([{"role": "user", "content": "Hello"}],)
  assert (ask.tokens, ask.spec, ask.samples, ask.stop, ask.prefill) == (32, SERVED.sampler, 1, (), "")
  assert (ask.stream, ask.usage, ask.logprobs, ask.canvas) == (False, False, False, False)
  assert 0 <= ask.seed < 2**32
  assert len({parse({}).seed for _ in range(5)}) > 1


@pytest.mark.parametrize(
  ("fields", "name", "value"),
  [
    ({"model": "tiny"}, "model", None),
    ({"max_tokens": 5}, "tokens", 5),
    ({"max_completion_tokens": 5}, "tokens", 5),
    ({"max_tokens": 5.0, "max_completion_tokens": 5}, "tokens", 5),
    ({"max_tokens": None}, "tokens", 32),
    ({"seed": 2**32 - 1}, "seed", 2**32 - 1),
    ({"stop": "x"}, "stop", ("x",)),
    ({"stop": ["a", "b"]}, "stop", ("a", "b")),
    ({"n": 3, "temperature": 1}, "samples", 3),
    ({"stream": True, "stream_options": {"include_usage": True}}, "usage", True),
    ({"stream": True, "stream_options": {"include_usage": False, "include_obfuscation": False}}, "usage", False),
    ({"stream": True, "d1jax": {"canvas": True}}, "canvas", True),
    ({"logprobs": True, "top_logprobs": 0, "temperature": 0.5}, "logprobs", True),
    ({"prefill": "So"}, "prefill", "So"),
    ({"tools": [], "tool_choice": "none", "top_p": 1, "presence_penalty": 0.0, "logit_bias": {}}, "samples", 1),
    ({"response_format": {"type": "text"}, "user": "me", "metadata": {"a": "b"}, "audio": None}, "samples", 1),
  ],
  ids=str,
)  # fmt: skip
def test_fields_of_chats(fields, name, value):
  ask = parse(fields)
  if name != "model":
    assert getattr(ask, name) == value


@pytest.mark.parametrize(
  ("fields", "length", "block", "steps"),
  [
    ({"max_tokens": 5}, 8, 8, 4),
    ({"max_tokens": 33}, 40, 8, 20),
    ({"block_length": 4}, 32, 4, 16),
    ({"max_tokens": 10, "block_length": 16}, 16, 16, 8),
    ({"steps": 4}, 32, 8, 4),
    ({"steps": 5}, 32, 8, 8),
    ({"steps": 1000}, 32, 8, 32),
    ({"steps": 1, "max_tokens": 16}, 16, 8, 2),
  ],
  ids=str,
)
def test_completions_are_whole_blocks_with_the_same_steps_in_each(fields, length, block, steps):
  spec = parse(fields).spec
  assert (spec.completion_length, spec.block_length, spec.diffusion_steps) == (length, block, steps)


def test_a_block_causal_network_has_a_grid_of_its_own():
  spec = parse({"max_tokens": 17, "block_length": 8}, served=BLOCKS).spec
  assert (spec.completion_length, spec.block_length, spec.diffusion_steps) == (32, 8, 16)
  with pytest.raises(ApiError, match="block_length=5 does not divide the network's block of 16 tokens: use 16"):
    parse({"block_length": 5}, served=BLOCKS)


def test_the_sampler_of_a_request():
  spec = parse({"temperature": 0.5, "schedule": "threshold", "threshold": 0.8, "max_reveal": 2}).spec
  assert (spec.temperature, spec.schedule, spec.threshold, spec.max_reveal) == (0.5, "threshold", 0.8, 2)
  assert parse({"schedule": "factor", "factor": 2}).spec.factor == 2


@pytest.mark.parametrize(
  ("prompt", "prompts"),
  [
    ("a", ("a",)),
    (["a", "b"], ("a", "b")),
    ([1, 2], ([1, 2],)),
    ([[1, 2], [3]], ([1, 2], [3])),
    (["a", [3]], ("a", [3])),
  ],
)
def test_prompts_of_completions(prompt, prompts):
  assert parse({"prompt": prompt}, chat=False).prompts == prompts


def test_fields_of_completions():
  ask = parse({"logprobs": 1, "temperature": 1, "echo": False, "suffix": None, "best_of": 1}, chat=False)
  assert (ask.logprobs, ask.top, ask.chat) == (True, True, False)
  assert parse({"logprobs": 0, "temperature": 1}, chat=False).top is False


def test_a_message_in_parts_and_one_that_came_from_this_server():
  said = {"role": "assistant", "content": "Hi", "refusal": None, "tool_calls": None, "annotations": []}
  parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
  turns = [{"role": "developer", "content": "Be kind"}, said, {"role": "user", "content": parts}]
  assert parse({"messages": turns}).prompts[0] == [
    {"role": "system", "content": "Be kind"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": "ab"},
  ]


USER = {"role": "user", "content": "a"}
REFUSED = [
  (True, {"model": "gpt-4"}, "the model 'gpt-4' is not served here; use 'tiny'", "model"),
  (True, {"model": 4}, "model=4 must be a text", "model"),
  (True, {"temprature": 1}, "unknown field 'temprature'; did you mean temperature?", "temprature"),
  (True, {"zzzzz": 1}, "unknown field 'zzzzz'; known: block_length, d1jax, ", "zzzzz"),
  (True, {"prompt": "a"}, "unknown field 'prompt'", "prompt"),
  (False, {"messages": []}, "unknown field 'messages'", "messages"),
  (False, {"prefill": "a"}, "unknown field 'prefill'", "prefill"),
  (True, {"tools": [{"type": "function"}]}, "tools=[{'type': 'function'}] is not supported: leave tools out", "tools"),
  (True, {"top_p": 0.9}, "top_p=0.9 is not supported: leave top_p out", "top_p"),
  (True, {"presence_penalty": 1}, "presence_penalty=1 is not supported", "presence_penalty"),
  (True, {"response_format": {"type": "json_object"}}, "response_format=", "response_format"),
  (True, {"audio": {}}, "audio={} is not supported", "audio"),
  (False, {"echo": True}, "echo=True is not supported", "echo"),
  (False, {"suffix": "a"}, "suffix='a' is not supported", "suffix"),
  (False, {"best_of": 2}, "best_of=2 is not supported", "best_of"),
  (True, {"max_tokens": 0}, "max_tokens=0 must be a whole number of at least 1", "max_tokens"),
  (True, {"max_tokens": 1.5}, "max_tokens=1.5 must be a whole number", "max_tokens"),
  (True, {"max_tokens": True}, "max_tokens=True must be a whole number", "max_tokens"),
  (True, {"max_tokens": 10**39}, "max_tokens=1000000", "max_tokens"),
  (True, {"max_tokens": 257}, "max_tokens=257 is more than the 256 tokens of the longest canvas", "max_tokens"),
  (True, {"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens=1 and max_completion_tokens=2 ", "max_tokens"),
  (True, {"block_length": 300}, "block_length=300 is more than the 256 tokens", "block_length"),
  (True, {"temperature": -1}, "temperature=-1 must be a finite number of at least 0", "temperature"),
  (True, {"temperature": "hot"}, "temperature='hot' must be a finite number", "temperature"),
  (True, {"seed": -1}, "seed=-1 must be a whole number of at least 0 and at most 4294967295", "seed"),
  (True, {"seed": 2**32}, "seed=4294967296 must be", "seed"),
  (True, {"steps": 0}, "steps=0 must be", "steps"),
  (True, {"schedule": "fast"}, "schedule='fast' is unknown; known: static, ", "schedule"),
  (True, {"threshold": 0.5}, "threshold is of no use with schedule='static': set schedule to threshold", "threshold"),
  (True, {"max_reveal": 2}, "max_reveal is of no use with schedule='static': set schedule to threshold or factor",
   "max_reveal"),
  (True, {"schedule": "threshold", "threshold": 0}, "threshold=0 must be a finite number above 0 and at most 1",
   "threshold"),
  (True, {"schedule": "factor", "factor": 0}, "factor=0 must be a finite number above 0", "factor"),
  (True, {"n": 0}, "n=0 must be a whole number", "n"),
  (True, {"n": 1_000_000, "temperature": 1}, "n=1000000 for 1 prompts is more than the 8 completions", "n"),
  (True, {"n": 2}, "n is 2, but at temperature 0 all answers are the same: set a temperature, like 0.9", "n"),
  (False, {"prompt": ["a"] * 9}, "n=1 for 9 prompts is more than the 8 completions of a request", "n"),
  (True, {"stream": 1}, "stream=1 must be true or false", "stream"),
  (True, {"stream_options": {"include_usage": True}}, "stream_options is for a stream", "stream_options"),
  (True, {"stream": True, "stream_options": []}, "stream_options=[] must be an object", "stream_options"),
  (True, {"stream": True, "stream_options": {"x": 1}}, "unknown field 'x' of stream_options", "stream_options"),
  (True, {"d1jax": {"canvas": True}}, "d1jax.canvas shows steps in a stream: set stream=true", "d1jax.canvas"),
  (True, {"d1jax": {"film": True}}, "unknown field 'film' of d1jax; known: canvas", "d1jax"),
  (True, {"stream": True, "d1jax": {"canvas": 1}}, "d1jax.canvas=1 must be true or false", "d1jax.canvas"),
  (True, {"logprobs": True}, "logprobs are those of the draws, and at temperature 0 nothing is drawn", "logprobs"),
  (True, {"logprobs": True, "top_logprobs": 3, "temperature": 1}, "top_logprobs=3 must be 0", "top_logprobs"),
  (False, {"logprobs": 2, "temperature": 1}, "logprobs=2 must be 0 or 1", "logprobs"),
  (False, {"logprobs": True, "temperature": 1}, "logprobs=True must be a whole number", "logprobs"),
  (True, {"stop": ""}, "stop='' must be a text that is not empty", "stop"),
  (True, {"stop": [1]}, "stop=[1] must be a text", "stop"),
  (True, {"stop": ["a"] * 5}, "stop must hold at most 4 texts of at most 1000 characters", "stop"),
  (True, {"stop": "a" * 1001}, "stop must hold at most 4 texts", "stop"),
  (True, {"messages": None}, "messages must be a list like", "messages"),
  (True, {"messages": []}, "messages must be a list like", "messages"),
  (True, {"messages": "Hello"}, "messages must be a list like", "messages"),
  (True, {"messages": [USER] * 1025}, "messages has 1025 entries, at most 1024 are read", "messages"),
  (True, {"messages": ["a"]}, "messages[0]='a' must be an object with role and content", "messages[0]"),
  (True, {"messages": [{"role": "user"}]}, "messages[0].content=None must be a text", "messages[0].content"),
  (True, {"messages": [USER | {"role": "tool"}]}, "messages[0].role='tool' must be system, user", "messages[0].role"),
  (True, {"messages": [USER | {"role": ["user"]}]}, "messages[0].role=['user'] must be", "messages[0].role"),
  (True, {"messages": [USER | {"name": "Bob"}]}, "messages[0].name is not supported: leave it out", "messages[0]"),
  (True, {"messages": [USER | {"content": [{"type": "image_url"}]}]},
   "messages[0].content has a part of type 'image_url': only text is read", "messages[0].content"),
  (True, {"messages": [USER | {"content": [7]}]}, "has a part of type 7", "messages[0].content"),
  (True, {"messages": [USER | {"content": " \n"}]}, "the messages are empty; write something", "messages"),
  (True, {"messages": [USER, {"role": "assistant", "content": "b"}]}, "the last message is the assist", "messages"),
  (True, {"prefill": ["a"]}, "prefill=['a'] must be a text", "prefill"),
  (False, {"prompt": None}, "prompt=None must be a text, a list of texts, ids", "prompt"),
  (False, {"prompt": []}, "prompt=[] must be a text", "prompt"),
  (False, {"prompt": ["a", 1]}, "prompt=['a', 1] must be a text", "prompt"),
  (False, {"prompt": [True]}, "prompt=[True] must be a text", "prompt"),
  (False, {"prompt": ["a", ""]}, "a prompt is empty; write something", "prompt"),
  (False, {"prompt": [[1], []]}, "a prompt is empty", "prompt"),
]  # fmt: skip


@pytest.mark.parametrize(("chat", "fields", "message", "param"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_is_refused_is_named(chat, fields, message, param):
  with pytest.raises(ApiError) as caught:
    parse(fields, chat)
  assert message in str(caught.value)
  error = caught.value.body()["error"]
  assert (error["param"], error["type"]) == (param, "invalid_request_error")
  assert caught.value.status == (404 if error["code"] == "model_not_found" else 400)
  assert len(str(caught.value)) < 600
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"", "the request is not JSON"),
    (b"[]", "the request is not an object"),
    (b"{", "the request is not JSON"),
    (b'{"a": "\xff"}', "the request is not UTF-8 (byte 7"),
    (b'{"a": ' + b"[" * 100_000, "the request is nested too deep"),
    (b'{"a": ' + b"1" * 5000 + b"}", "the request holds a number of 5000 digits"),
    (b'{"a": NaN}', "the request holds the number NaN, which is not finite"),
    (b'{"a": 1e999}', "the request holds the number 1e999, which is not finite"),
  ],
  ids=lambda value: str(value[:20]),
)  # fmt: skip
def test_a_body_that_is_no_request(content, message):
  with pytest.raises(ApiError) as caught:
    protocol.json_object(content)
  assert str(caught.value).startswith(message)


ANY = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8) | st.just("user"),
  lambda inner: (
    st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(("role", "content", "type", "text", "canvas")), inner, max_size=3)
  ),
  max_leaves=6,
)
NAMES = sorted({name for chat in (True, False) for name in (*protocol._KNOWN[chat], *protocol._NEUTRAL[chat])})


@hypothesis.given(st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=5), ANY, max_size=4), st.booleans())
def test_any_object_is_a_request_or_an_error(fields, chat):
  try:
    ask = protocol.parse(
      protocol.json_object(json.dumps((HELLO if chat else SAY) | fields).encode()), SERVED, chat=chat
    )
  except ApiError as error:
    json.dumps(error.body()).encode("ascii")
  else:
    assert ask.spec.completion_length >= ask.tokens
