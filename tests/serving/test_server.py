"""A real server: OpenAI's own client, and clients that mean harm."""

import contextlib
import json
import socket
import time

import httpx
import openai
import pytest

from d1jax.serving import app, connection
from tests.serving.engines import StandIn, service, written
from tests.serving.servers import running

ASK = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "seed": 7}
SAID = "1234567é and some more ✓ text"


def client(own, **options) -> openai.OpenAI:
  return openai.OpenAI(base_url=f"{own.url}/v1", api_key="secret", max_retries=0, timeout=20, **options)


def test_openais_client_asks_and_is_answered():
  with running(service(StandIn(lambda request: written(SAID)), key=b"secret")) as own, client(own) as asked:
    assert [model.id for model in asked.models.list()] == ["tiny"]
    assert asked.models.retrieve("tiny").owned_by == "d1jax"
    answer = asked.chat.completions.create(**ASK, extra_body={"block_length": 4, "steps": 8})
    assert answer.choices[0].message.content == SAID
    assert (answer.choices[0].finish_reason, answer.usage.prompt_tokens) == ("stop", 24)
    assert answer.model_extra["d1jax"]["seed"] == 7
    parts = [*asked.chat.completions.create(**ASK, stream=True, stream_options={"include_usage": True})]
    assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == SAID
    assert parts[-1].usage == answer.usage
    shown = [*asked.chat.completions.create(**ASK, stream=True, extra_body={"d1jax": {"canvas": True}})]
    assert sum("tokens" in part.model_extra.get("d1jax", {}) for part in shown) >= 4
    raw = asked.chat.completions.with_raw_response.create(**ASK)
    assert raw.headers["content-type"] == "application/json"
    assert raw.parse().choices[0].message.content == SAID
    with asked.chat.completions.with_streaming_response.create(**ASK, stream=True) as stream:
      assert [*stream.iter_lines()][-2:] == ["data: [DONE]", ""]
    plain = asked.completions.create(model="tiny", prompt=["a", [1, 2]], logprobs=0, temperature=0.5)
    assert [choice.text for choice in plain.choices] == [SAID, SAID]
    assert plain.choices[0].logprobs.token_logprobs[0] == -0.5
    turns = [*ASK["messages"], answer.choices[0].message.model_dump(), {"role": "user", "content": "And?"}]
    assert asked.chat.completions.create(model="tiny", messages=turns).choices[0].message.content == SAID


def test_errors_are_the_exceptions_of_openais_client():
  engine = StandIn(queue=1)
  with running(service(engine, key=b"secret")) as own, client(own) as asked:
    for kind, fields in (
      (openai.NotFoundError, {"model": "gpt-4"}),
      (openai.BadRequestError, {"temperature": -1}),
      (openai.BadRequestError, {"tools": [{"type": "function", "function": {"name": "f"}}]}),
    ):
      with pytest.raises(kind) as caught:
        asked.chat.completions.create(**ASK | fields)
    assert (caught.value.param, caught.value.code) == ("tools", "unsupported")
    with pytest.raises(openai.AuthenticationError):
      client(own).with_options(api_key="wrong").models.list()
    engine.queue = 0
    with pytest.raises(openai.RateLimitError) as caught:
      asked.chat.completions.create(**ASK)
    assert caught.value.response.headers["retry-after"] == "2"
    engine.queue, engine.ready = 1, False
    with pytest.raises(openai.InternalServerError) as caught:
      asked.chat.completions.create(**ASK)
    assert caught.value.status_code == 503


def test_an_error_within_a_stream_is_raised_by_openais_client():
  engine = StandIn(seconds=0.1)
  with running(service(engine, request_seconds=0.3)) as own, client(own) as asked:
    parts = asked.chat.completions.create(**ASK, stream=True, extra_body={"d1jax": {"canvas": True}})
    with pytest.raises(openai.APIError, match=r"took longer than the 0\.3 seconds"):
      list(parts)


def until(true, seconds: float = 10.0) -> None:
  end = time.monotonic() + seconds
  while not true():
    assert time.monotonic() < end
    time.sleep(0.01)


def head(length: int = 10) -> bytes:
  return f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n".encode()


def asking(**fields) -> bytes:
  body = json.dumps(ASK | fields).encode()
  return head(length=len(body)) + body


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_frees_its_row(stream):
  engine = StandIn()
  engine.go.clear()
  with running(service(engine)) as own:
    with socket.create_connection(own.address) as one:
      one.sendall(asking(stream=stream))
      until(lambda: engine.tickets)
      assert not engine.tickets[0].cancelled.is_set()
    until(engine.tickets[0].cancelled.is_set)


def closed(one: socket.socket) -> bytes:
  """What is still sent before the other side ends the connection."""
  found = b""
  one.settimeout(10)
  with contextlib.suppress(ConnectionError):
    while part := one.recv(1 << 16):
      found += part
  return found


def test_half_requests_and_slow_readers_are_cut_off_and_harm_nobody(monkeypatch):
  monkeypatch.setattr(connection, "WAIT_SECONDS", 0.3)
  monkeypatch.setattr(connection, "WRITE_SECONDS", 0.3)
  monkeypatch.setattr(app, "BODY_SECONDS", 0.3)
  with running(service()) as own, contextlib.ExitStack() as stack:
    open_ = lambda: stack.enter_context(socket.create_connection(own.address))
    silent, half, bodiless, slow, odd, long = (open_() for _ in range(6))
    half.sendall(head()[:40])
    bodiless.sendall(head() + b"{")
    odd.sendall(b"\x16\x03\x01\x00 no HTTP\r\n\r\n")
    long.sendall(b"GET / HTTP/1.1\r\nX: " + b"x" * (1 << 16))
    slow.setblocking(False)
    with contextlib.suppress(BlockingIOError):
      for _ in range(3000):
        slow.send(b"GET /page.js HTTP/1.1\r\nHost: localhost\r\n\r\n" * 10)
    with client(own) as asked:
      assert asked.chat.completions.create(**ASK).choices[0].message.content == "Hello 7 0"
    assert closed(silent) == b""
    assert closed(half) == b""
    assert closed(bodiless).startswith(b"HTTP/1.1 408 ")
    assert closed(odd).startswith(b"HTTP/1.1 400 ")
    assert closed(long).startswith(b"HTTP/1.1 400 ")
    until(lambda: not own.server.server_state.connections)


def test_connections_that_only_wait_make_room_for_others(monkeypatch):
  monkeypatch.setattr(connection, "MOST_CONNECTIONS", 3)
  with running(service()) as own, contextlib.ExitStack() as stack:
    idle = []
    for number in range(3):
      idle.append(stack.enter_context(socket.create_connection(own.address)))
      until(lambda number=number: len(own.server.server_state.connections) == number + 1)
    idle[1].sendall(head() + b"{")
    until(lambda: own.server.server_state.tasks)
    for number in range(2):
      asked = stack.enter_context(client(own))
      assert asked.chat.completions.create(**ASK).choices[0].message.content == "Hello 7 0"
      assert closed(idle[number]) == b""
    idle[2].sendall(asking())
    assert idle[2].recv(20).startswith(b"HTTP/1.1 200 ")


def test_a_large_body_is_refused_at_once():
  with running(service()) as own, socket.create_connection(own.address) as one:
    one.sendall(head(length=100_000_000))
    one.settimeout(5)
    assert one.recv(20).startswith(b"HTTP/1.1 413 ")
    content = b" " * 20_000_000
    answer = httpx.post(f"{own.url}/v1/chat/completions", content=content)
    assert (answer.status_code, answer.json()["error"]["type"]) == (413, "invalid_request_error")
    parts = (content[:1_000_000] for _ in range(20))
    assert httpx.post(f"{own.url}/v1/chat/completions", content=parts).status_code == 413


def test_headers_of_a_client_that_continues():
  with running(service()) as own, socket.create_connection(own.address) as one:
    body = json.dumps(ASK).encode()
    one.sendall(head(length=len(body)).replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n"))
    one.settimeout(5)
    assert one.recv(100).startswith(b"HTTP/1.1 100 ")
    one.sendall(body)
    assert one.recv(20).startswith(b"HTTP/1.1 200 ")
