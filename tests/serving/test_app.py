"""The application without sockets, on a stand-in for the engine: answers, statuses, who may ask."""

import asyncio
import json

import httpx
import pytest

from d1jax.serving import app
from d1jax.serving import service as services
from tests.serving.engines import StandIn, service, written

HELLO = {"messages": [{"role": "user", "content": "Hello"}], "seed": 7}
CHAT = "/v1/chat/completions"


def request(own, method, path, *, base="http://localhost", **options) -> httpx.Response:
  async def ask():
    transport = httpx.ASGITransport(app.build(own), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url=base) as client:
      return await client.request(method, path, **options)

  return asyncio.run(ask())


def chat(fields: dict, own=None, path=CHAT, **options) -> httpx.Response:
  body = (HELLO if path == CHAT else {"prompt": "Hello", "seed": 7}) | fields
  return request(own or service(), "POST", path, content=json.dumps(body), **options)


def events(response: httpx.Response) -> list[dict]:
  lines = [line for line in response.text.split("\n\n") if line]
  assert response.headers["content-type"].startswith("text/event-stream")
  assert lines.pop() == "data: [DONE]"
  return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_a_chat_is_openais():
  answer = chat({"model": "tiny"})
  assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
  found = answer.json()
  assert found.pop("id").startswith("chatcmpl-")
  own = found.pop("d1jax")
  assert (own["steps"], own["seed"]) == (16, 7)
  assert own["seconds"] > 0
  assert own["tokens_per_second"] > 0
  assert found.pop("created") > 1e9
  assert found == {
    "object": "chat.completion",
    "model": "tiny",
    "choices": [{
      "index": 0,
      "message": {"role": "assistant", "content": "Hello 7 0", "refusal": None},
      "finish_reason": "stop",
      "logprobs": None,
    }],
    "usage": {"prompt_tokens": 24, "completion_tokens": 10, "total_tokens": 34},
  }  # fmt: skip


def test_a_stream_has_the_same_text_in_parts():
  said = "1234567é and some more"
  own = service(StandIn(lambda request: written(said)))
  parts = events(chat({"stream": True, "stream_options": {"include_usage": True}}, own))
  assert {part["object"] for part in parts} == {"chat.completion.chunk"}
  assert len({part["id"] for part in parts}) == 1
  choices = [part["choices"][0] for part in parts[:-1]]
  deltas = [choice["delta"] for choice in choices]
  assert (deltas[0], deltas[-1]) == ({"role": "assistant", "content": ""}, {})
  assert "".join(delta["content"] for delta in deltas[1:-1]) == said
  assert deltas[1]["content"] in ("1234567", "1234567é and so", said), "half a character is held back"
  assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]
  assert parts[-2]["d1jax"]["steps"] == 24
  assert parts[-1]["choices"] == []
  assert parts[-1]["usage"]["completion_tokens"] == 24
  assert chat({}, own).json()["choices"][0]["message"]["content"] == said


def test_a_canvas_is_shown_step_by_step_beside_the_text():
  own = service(StandIn(seconds=0.01))
  parts = events(chat({"stream": True, "d1jax": {"canvas": True}, "max_tokens": 16}, own))
  shown = [part["d1jax"] for part in parts if "tokens" in part.get("d1jax", {})]
  steps = [own["step"] for own in shown]
  assert len(steps) > 2
  assert steps == sorted(set(steps))
  assert [sum(token is not None for token in own["tokens"]) for own in shown[:-1]] == steps[:-1]
  assert [token for token in shown[0]["tokens"] if token is not None] == [*"Hello 7 0"][8 - steps[0] : 8]
  assert shown[-1]["tokens"] == [*"Hello 7 0", ""]
  assert shown[-1]["steps"] == [*range(7, -1, -1), 15, 14]
  assert all(part["choices"][0]["delta"] == {} for part in parts if "tokens" in part.get("d1jax", {}))
  assert "".join(part["choices"][0]["delta"].get("content", "") for part in parts) == "Hello 7 0"


def test_several_answers_and_prompts_have_indices():
  found = chat({"n": 2, "prompt": ["a", "b"], "temperature": 1}, path="/v1/completions").json()
  assert [(one["index"], one["text"]) for one in found["choices"]] == [
    (0, "a 7 0"), (1, "a 7 1"), (2, "b 7 0"), (3, "b 7 1"),
  ]  # fmt: skip
  assert found["object"] == "text_completion"
  assert found["usage"] == {"prompt_tokens": 2, "completion_tokens": 24, "total_tokens": 26}
  parts = events(chat({"n": 2, "temperature": 1, "stream": True}))
  texts = ["", ""]
  for part in parts:
    for choice in part["choices"]:
      texts[choice["index"]] += choice["delta"].get("content", "")
  assert texts == ["Hello 7 0", "Hello 7 1"]
  assert sum(part["choices"][0]["finish_reason"] == "stop" for part in parts) == 2


def test_log_probabilities_are_those_of_openai():
  (choice,) = chat({"logprobs": True, "temperature": 1}).json()["choices"]
  first = choice["logprobs"]["content"][0]
  assert first == {"token": "H", "logprob": -0.5, "bytes": [72], "top_logprobs": []}
  assert "".join(one["token"] for one in choice["logprobs"]["content"]) == "Hello 7 0"
  (choice,) = chat({"logprobs": 1, "temperature": 1}, path="/v1/completions").json()["choices"]
  found = choice["logprobs"]
  assert (found["tokens"][:2], found["text_offset"][:2], found["token_logprobs"][:2]) == (
    ["H", "e"],
    [0, 1],
    [-0.5, -1],
  )
  assert found["top_logprobs"][0] == {"H": -0.5}


def test_an_answer_begins_with_its_prefill():
  own = service(StandIn(lambda request: written(" it is")))
  assert chat({"prefill": "So"}, own).json()["choices"][0]["message"]["content"] == "So it is"
  assert events(chat({"prefill": "So", "stream": True}, own))[0]["choices"][0]["delta"]["content"] == "So"


def test_a_stop_text_frees_its_row():
  engine = StandIn(lambda request: written("Hello there, this goes on"))
  answer = chat({"stop": "there"}, service(engine))
  assert answer.json()["choices"][0]["message"]["content"] == "Hello "
  assert engine.tickets[0].cancelled.is_set()


@pytest.mark.parametrize(
  ("fields", "status", "message"),
  [
    ({"model": "gpt-4"}, 404, "the model 'gpt-4' is not served here"),
    ({"messages": [{"role": "user", "content": "é\ud800"}]}, 400, "is not Unicode"),
    ({"messages": [{"role": "user", "content": "a" * 300}]}, 400, "the prompt has 3"),
    ({"messages": [{"role": "user", "content": "a" * 40_000}]}, 400, "the prompt has 40000 characters, far more than"),
    ({"stop": "\ud800", "model": "\ud800"}, 404, "the model '\\ud800' is not served"),
  ],
)
def test_an_error_is_openais(fields, status, message):
  answer = chat(fields)
  assert answer.status_code == status
  error = answer.json()["error"]
  assert message in error["message"]
  assert set(error) == {"message", "type", "param", "code"}
  assert error["param"] == ("model" if status == 404 else "messages")


@pytest.mark.parametrize(
  ("ids", "message"), [([261], "the id 261 of the prompt"), ([1, -1], "id -1"), ([9999], "9999")]
)
def test_ids_that_no_prompt_has(ids, message):
  answer = chat({"prompt": ids}, path="/v1/completions")
  assert (answer.status_code, message in answer.json()["error"]["message"]) == (400, True)


def test_a_full_queue_is_said_and_leaves_nothing_behind():
  engine = StandIn(queue=1)
  engine.go.clear()
  answer = chat({"n": 2, "temperature": 1}, service(engine))
  assert (answer.status_code, answer.headers["retry-after"]) == (429, "2")
  assert answer.json()["error"]["code"] == "queue_full"
  assert [ticket.cancelled.is_set() for ticket in engine.tickets] == [True]


def test_an_answer_that_takes_too_long_ends():
  engine = StandIn()
  engine.go.clear()
  own = service(engine, request_seconds=0.05)
  answer = chat({}, own)
  assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline")
  assert "took longer than the 0.05 seconds of a request" in answer.json()["error"]["message"]
  stream = chat({"stream": True}, own).text.split("\n\n")
  assert json.loads(stream[-2].removeprefix("data: "))["error"]["code"] == "deadline"


def test_a_quiet_stream_says_that_it_lives(monkeypatch):
  monkeypatch.setattr(services, "QUIET_SECONDS", 0.02)
  text = chat({"stream": True}, service(StandIn(seconds=0.05))).text
  assert text.count(": the answer is on its way\n\n") >= 2
  assert text.endswith("data: [DONE]\n\n")


def test_health_says_what_the_server_does():
  own = service()
  seen = []
  for own.engine.ready, own.draining in ((False, False), (True, False), (True, True)):
    answer = request(own, "GET", "/health")
    seen.append((answer.status_code, answer.json()["status"]))
    if answer.status_code == 503:
      refused = chat({}, own)
      assert (refused.status_code, int(refused.headers["retry-after"]) > 0) == (503, True)
  assert seen == [(503, "compiling"), (200, "ready"), (503, "draining")]


def test_models_and_paths():
  own = service()
  (model,) = request(own, "GET", "/v1/models").json()["data"]
  assert (model["id"], model["d1jax"]["defaults"]["max_tokens"], model["d1jax"]["turns"]) == ("tiny", 32, True)
  assert request(own, "GET", "/v1/models/tiny").json() == model
  assert request(own, "GET", "/v1/models/a/b").json()["error"]["code"] == "model_not_found"
  for method, path, status in (
    ("GET", "/v2", 404),
    ("GET", CHAT, 405),
    ("POST", "/health", 405),
    ("GET", "/page.py", 404),
  ):
    answer = request(own, method, path)
    assert (answer.status_code, "is not known here; known: GET /" in answer.json()["error"]["message"]) == (
      status,
      True,
    )


def test_metrics_are_prometheus_text():
  own = service()
  chat({}, own)
  chat({"n": 0}, own)
  request(own, "GET", "/" + "x" * 50)
  lines = request(own, "GET", "/metrics").text.splitlines()
  assert f'd1jax_http_requests_total{{path="{CHAT}",status="200"}} 1' in lines
  assert f'd1jax_http_requests_total{{path="{CHAT}",status="400"}} 1' in lines
  assert 'd1jax_http_requests_total{path="other",status="404"} 1' in lines
  assert "d1jax_running 0" in lines
  assert "d1jax_tokens_total 1000000" in lines
  for name in ("queued", "first_block", "completion"):
    assert f'd1jax_{name}_seconds_bucket{{le="+Inf"}} 1' in lines
  assert all(line.startswith("#") or len(line.rsplit(" ", 1)) == 2 for line in lines)


KEYED = {"Authorization": "Bearer secret"}


@pytest.mark.parametrize(
  ("path", "headers", "status"),
  [
    ("/v1/models", {}, 401),
    ("/v1/models", {"Authorization": "Bearer wrong"}, 401),
    ("/v1/models", {"Authorization": "Basic secret"}, 401),
    ("/v1/models", {"Authorization": "Bearer secret\xff".encode("latin-1")}, 401),
    ("/v1/models", KEYED, 200),
    ("/metrics", {}, 401),
    ("/metrics", KEYED, 200),
    ("/nothing", {}, 401),
    ("/health", {}, 200),
    ("/page.js", {}, 200),
    ("/v1/models", KEYED | {"Host": "api.example"}, 200),
    ("/v1/models", KEYED | {"Origin": "http://evil.example"}, 403),
  ],
  ids=str,
)  # fmt: skip
def test_a_key_is_asked_for_where_there_is_one(path, headers, status):
  answer = request(service(key=b"secret"), "GET", path, headers=headers)
  assert answer.status_code == status
  if status == 401:
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize(
  ("base", "origin", "status"),
  [
    ("http://localhost:8000", None, 200),
    ("http://127.0.0.1:8000", "http://127.0.0.1:8000", 200),
    ("http://[::1]:8000", "http://[::1]:8000", 200),
    ("http://LOCALHOST:8000", "http://localhost:8000", 200),
    ("http://localhost:8000", "http://localhost:9000", 403),
    ("http://localhost:8000", "https://evil.example", 403),
    ("http://localhost:8000", "null", 403),
    ("http://evil.example:8000", "http://evil.example:8000", 403),
    ("http://evil.example:8000", None, 403),
    ("http://192.168.1.7:8000", None, 403),
    ("http://localhost:8000", "http://[::", 400),
  ],
)
def test_pages_of_other_sites_may_not_ask(base, origin, status):
  headers = {} if origin is None else {"Origin": origin}
  answer = chat({}, base=base, headers=headers)
  assert answer.status_code == status
  assert not any(name.startswith("access-control") for name in answer.headers)


def test_a_server_for_other_machines_has_any_name():
  own = service(local=False)
  assert chat({}, own, base="http://192.168.1.7:8000").status_code == 200
  assert chat({}, own, base="http://192.168.1.7:8000", headers={"Origin": "http://evil.example"}).status_code == 403


def test_the_page_may_do_nothing_but_ask_this_server():
  answer = request(service(), "GET", "/")
  assert answer.headers["content-type"].startswith("text/html")
  policy = answer.headers["content-security-policy"]
  assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';")
  assert "unsafe" not in policy
  assert answer.headers["x-content-type-options"] == "nosniff"


async def _pieces(sizes):
  for size in sizes:
    yield b" " * size


@pytest.mark.parametrize(
  ("options", "status"),
  [
    ({"content": b" " * (app.MOST_BYTES + 1)}, 413),
    ({"content": _pieces([1 << 20] * 100)}, 413),
    ({"content": b"{" + b" " * app.MOST_BYTES, "headers": {"Content-Length": "10"}}, 413),
    ({"content": b"[" * 1_000_000}, 400),
    ({"content": b'{"messages": "\xff"}'}, 400),
    ({"content": b""}, 400),
  ],
  ids=["declared", "chunked", "lying", "deep", "encoding", "empty"],
)  # fmt: skip
def test_bodies_that_are_no_requests(options, status):
  assert request(service(), "POST", CHAT, **options).status_code == status


def test_what_nobody_foresaw_is_an_error_of_the_server(monkeypatch):
  own = service()
  monkeypatch.setattr(own.engine, "submit", lambda *arguments: 1 / 0)
  answer = chat({}, own)
  assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
  assert "ZeroDivision" not in answer.text
