"""A server for the page that plays canned answers, as `d1jax.serving` would stream them."""

import contextlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

from d1jax import serving

PAGE = Path(serving.__file__).parent
TYPES = {"page.html": "text/html", "page.css": "text/css", "page.js": "text/javascript"}
POLICY = (
  "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none';"
  " form-action 'none'; frame-ancestors 'none'"
)

ANSWERS = {
  "hello": [["Hel", "lo"], [" you", "."]],
  "hostile": [["<img src=x onerror=alert(1)>", "\u202e<script>alert(2)</script>"], ["\0\x1b[2J", "&lt;b&gt;"]],
  "nothing": [["", ""]],
  "long": [[f"word{i} " for i in range(8 * b, 8 * b + 8)] for b in range(8)],
}
"""The tokens of each block, by the message that asks for them."""


def chunks(blocks: list[list[str]], masks: int = 0) -> Iterator[dict]:
  """The events of an answer: a token a step from right to left in each block, and a chunk of text after each block."""
  width = sum(map(len, blocks)) + masks
  tokens: list[str | None] = [None] * width
  steps: list[int | None] = [None] * width
  first = step = 0
  for block in blocks:
    for place in reversed(range(len(block))):
      tokens[first + place], steps[first + place] = block[place], step
      yield delta({}, d1jax={"step": step, "tokens": [*tokens], "steps": [*steps]})
      step += 1
    first += len(block)
    yield delta({"content": "".join(block)})
  facts = {"steps": step, "seconds": 0.5, "tokens_per_second": 12.34, "queued_seconds": 0.0, "seed": 7}
  yield delta({}, "stop", d1jax=facts)


def delta(content: dict, reason: str | None = None, **more) -> dict:
  return {
    "object": "chat.completion.chunk",
    "choices": [{"index": 0, "delta": content, "finish_reason": reason}],
  } | more


MODEL: dict = {
  "id": "a <b>model</b>",
  "d1jax": {"turns": True, "defaults": {"temperature": 0.0, "steps": 64, "schedule": "static"}},
}
"""What `/v1/models` says of the model."""


class Server(http.server.ThreadingHTTPServer):
  """Answers by the last message: `ANSWERS`, or "wait", which stops in its second block until `goes_on`."""

  daemon_threads = True

  def __init__(self) -> None:
    super().__init__(("127.0.0.1", 0), Handler)
    self.key: str | None = None
    self.model = MODEL
    self.asked: list[dict] = []
    self.goes_on = threading.Event()
    self.left = threading.Event()
    """Set when a client has left before its answer was complete."""

  @property
  def address(self) -> str:
    return f"http://127.0.0.1:{self.server_port}/"


class Handler(http.server.BaseHTTPRequestHandler):
  server: Server

  def log_message(self, *arguments) -> None:
    pass

  def reply(self, status: int, kind: str, content: bytes) -> None:
    self.send_response(status)
    self.send_header("Content-Type", kind)
    self.send_header("Content-Length", str(len(content)))
    self.send_header("Content-Security-Policy", POLICY)
    self.end_headers()
    self.wfile.write(content)

  def fail(self, status: int, message: str) -> None:
    self.reply(status, "application/json", json.dumps({"error": {"message": message}}).encode())

  def do_GET(self) -> None:
    name = self.path.removeprefix("/") or "page.html"
    if name in TYPES:
      self.reply(200, f"{TYPES[name]}; charset=utf-8", (PAGE / name).read_bytes())
    elif name == "v1/models" and self.allowed():
      self.reply(200, "application/json", json.dumps({"data": [self.server.model]}).encode())
    elif name != "v1/models":
      self.fail(404, "nothing there")

  def allowed(self) -> bool:
    if self.server.key and self.headers["Authorization"] != f"Bearer {self.server.key}":
      self.fail(401, "this server wants an API key")
      return False
    return True

  def do_POST(self) -> None:
    given = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
    if not self.allowed():
      return
    self.server.asked.append(given)
    asked = given["messages"][-1]["content"]
    if asked == "fail":
      self.fail(400, "temperature=-1 must be at least 0 <b>")
      return
    self.send_response(200)
    self.send_header("Content-Type", "text/event-stream")
    self.end_headers()
    with contextlib.suppress(OSError):
      self.stream(asked)

  def stream(self, asked: str) -> None:
    say = lambda event: self.wfile.write(f"data: {json.dumps(event)}\r\n\r\n".encode())
    if asked == "break":
      say(delta({"content": "Half"}))
      say({"error": {"message": "the device is gone"}})
    elif asked == "wait":
      *most, rest = [*chunks(ANSWERS["hello"], masks=60)][:5]
      for event in (*most, rest):
        say(event)
      try:
        while not self.server.goes_on.wait(0.02):
          self.wfile.write(b": still there\r\n\r\n")
      except OSError:
        self.server.left.set()
    else:
      for event in chunks(ANSWERS.get(asked, [["?"]])):
        say(event)
      self.wfile.write(b"data: [DONE]\r\n\r\n")


@contextlib.contextmanager
def serving_page() -> Iterator[Server]:
  """Runs the stand-in in a thread."""
  server = Server()
  thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
  thread.start()
  try:
    yield server
  finally:
    server.goes_on.set()
    server.shutdown()
    thread.join()
    server.server_close()
