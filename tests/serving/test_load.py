"""Many clients at once on a real engine, with clients beside them that mean harm."""

import concurrent.futures
import contextlib
import json
import random
import socket
import struct
import threading
import time

import httpx
import pytest

import d1jax
from d1jax.diffusion.rollout import SamplerSpec
from d1jax.serving.engine import Engine
from d1jax.serving.protocol import Served
from d1jax.serving.service import Service
from tests import jobs
from tests.serving.servers import running

PATH = "/v1/chat/completions"
CLIENTS, REQUESTS, DIFFERENT = 24, 96, 24


def made(number: int) -> dict:
  """A request of its own: prompt, length, sampler and seed differ."""
  draw = random.Random(number)
  digits = "".join(draw.choice("01234") for _ in range(draw.choice((4, 16, 40))))
  return {
    "messages": [{"role": "user", "content": digits}],
    "max_tokens": draw.choice((5, 16, 40)),
    "block_length": draw.choice((4, 8)),
    "temperature": draw.choice((0.0, 1.0)),
    "seed": number,
    "stream": False,
  }


def text(response: httpx.Response) -> str:
  """The answer, streamed or not."""
  assert response.status_code == 200, response.text
  if response.headers["content-type"] == "application/json":
    return response.json()["choices"][0]["message"]["content"]
  parts = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line.startswith("data: ")]
  assert parts.pop() == "[DONE]"
  return "".join(choice["delta"].get("content", "") for part in parts for choice in json.loads(part)["choices"])


def harm(address: tuple[str, int], over: threading.Event, kind: int) -> int:
  """Means harm until all is over; how often it did."""
  body = json.dumps(made(kind) | {"stream": True, "d1jax": {"canvas": True}, "max_tokens": 40}).encode()
  head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
  done, kept = 0, contextlib.ExitStack()
  with kept:
    while not over.is_set():
      one = kept.enter_context(socket.create_connection(address))
      with contextlib.suppress(OSError):
        one.settimeout(1)
        if kind == 0:  # reads nothing
          one.sendall((head % len(body)).encode() + body)
        elif kind == 1:  # sends half
          one.sendall((head % len(body)).encode() + body[: len(body) // 2])
        elif kind == 2:  # sends 100 MB
          one.sendall((head % 100_000_000).encode())
          for _ in range(100):
            one.sendall(b" " * 1_000_000)
        elif kind == 3:  # is killed
          one.sendall((head % len(body)).encode() + body)
          time.sleep(0.02)
          one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
          one.close()
        else:  # asks for what cannot be
          content = (b'{"messages": "\xff"}', b'{"n": 1000000}', b"[" * 100_000, b"1" * 100_000)[done % 4]
          one.sendall((head % len(content)).encode() + content)
          answer = one.recv(100)
          assert b" 400 " in answer or not answer, "others need its connection"
      done += 1
      time.sleep(0.1)
  return done


@pytest.mark.slow(reason="a hundred requests on a real engine")
def test_all_are_answered_and_none_is_mixed_up_among_hostile_clients():
  model = d1jax.from_pretrained(str(jobs.START))
  spec = SamplerSpec(completion_length=16, diffusion_steps=8, block_length=8, temperature=0.0, early_exit=True)
  engine = Engine(model, slots=8, lengths=(64, 128), block_length=8, queue=256)
  served = Served("start", spec, None, 128, 8)
  own = Service(engine, model.tokenizer, model.denoiser.mask_id, served, None, True, 300.0)
  engine.prepare()
  over = threading.Event()
  with running(own) as server, concurrent.futures.ThreadPoolExecutor(CLIENTS + 5) as pool:
    with httpx.Client(base_url=server.url, timeout=60) as client:
      alone = [text(client.post(PATH, json=made(number))) for number in range(DIFFERENT)]
    assert len(set(alone)) > DIFFERENT // 2
    hostile = [pool.submit(harm, server.address, over, kind) for kind in range(5)]

    def ask(numbers: list[int]) -> dict[int, str]:
      with httpx.Client(base_url=server.url, timeout=60) as client:
        return {i: text(client.post(PATH, json=made(i % DIFFERENT) | {"stream": i % 3 == 0})) for i in numbers}

    asked = [pool.submit(ask, [*range(first, REQUESTS, CLIENTS)]) for first in range(CLIENTS)]
    answers: dict[int, str] = {}
    for one in asked:
      answers |= one.result()
    over.set()
    assert all(one.result() > 0 for one in hostile)
    assert sorted(answers) == [*range(REQUESTS)]
    assert {i for i in answers if answers[i] != alone[i % DIFFERENT]} == set()
    end = time.monotonic() + 20
    while engine.gauges()["running"] or engine.gauges()["waiting"]:
      assert time.monotonic() < end, "rows of clients that are gone still run"
      time.sleep(0.05)
    assert httpx.get(f"{server.url}/health").json() == {"status": "ready"}
  engine.close()
