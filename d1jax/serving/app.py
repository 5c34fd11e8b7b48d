"""The HTTP application: OpenAI's endpoints, health, metrics and the page; who may ask, and how much."""

import asyncio
import contextlib
import functools
import hmac
import ipaddress
import math
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from d1jax.data.chat import tells_turns
from d1jax.serving import protocol
from d1jax.serving.answers import dumped
from d1jax.serving.fields import ApiError
from d1jax.serving.service import Reply, Service, events, whole

MOST_BYTES = 4 << 20
"""The largest body of a request."""

BODY_SECONDS = 30.0
"""In which a body must arrive."""

PAGE = {
  "/": ("page.html", "text/html"),
  "/page.css": ("page.css", "text/css"),
  "/page.js": ("page.js", "text/javascript"),
}
"""The files of the page."""

GET = (*PAGE, "/health", "/metrics", "/v1/models")
POST = {"/v1/chat/completions": True, "/v1/completions": False}
"""The paths; of completions, whether they are chats."""

POLICY = (
  "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:;"
  " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""What the page may do: nothing but to run its own script and to ask this server."""

_HEADERS = {
  "x-content-type-options": "nosniff",
  "referrer-policy": "no-referrer",
  "cross-origin-resource-policy": "same-origin",
  "cache-control": "no-store",
}


class Events(StreamingResponse):
  """The events of a stream; whatever ends it frees its rows."""

  def __init__(self, reply: Reply):
    """Streams the answers of a request."""
    self._reply, self._events = reply, events(reply)
    super().__init__(self._events, media_type="text/event-stream", headers={"x-accel-buffering": "no"})

  async def stream_response(self, send: Send) -> None:
    """Sends the events."""
    try:
      async with contextlib.aclosing(self._events):
        await super().stream_response(send)
    finally:
      self._reply.cancel()  # a generator that was never asked knows nothing of its end


async def _read(request: Request) -> bytes:
  """The body; an `ApiError` if it is too large, too slow, or does not come."""
  large = ApiError(f"the request is larger than {MOST_BYTES} bytes; shorten it", status=413)
  if int(request.headers.get("content-length", 0)) > MOST_BYTES:
    raise large
  content = bytearray()
  try:
    async with asyncio.timeout(BODY_SECONDS):
      async for chunk in request.stream():
        content += chunk
        if len(content) > MOST_BYTES:
          raise large
  except TimeoutError:
    raise ApiError(f"the request did not arrive within {BODY_SECONDS:g} seconds", status=408) from None
  except ClientDisconnect:
    raise ApiError("the client is gone", status=499) from None
  return bytes(content)


async def _complete(service: Service, request: Request, *, chat: bool) -> Response:
  """Answers a request for completions."""
  content = await _read(request)
  service.check_open()
  ask = protocol.parse(protocol.json_object(content), service.served, chat=chat)
  rows = await asyncio.to_thread(service.rows, ask)
  reply = Reply(service, ask, rows)
  if ask.stream:
    return Events(reply)
  answer = asyncio.ensure_future(whole(reply))
  gone = asyncio.ensure_future(request.receive())  # of a request that was read, only its client's end comes
  try:
    await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
    if not answer.done():
      raise ApiError("the client is gone", status=499)
    return _json(answer.result())
  finally:
    answer.cancel()
    gone.cancel()
    reply.cancel()


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
  return Response(dumped(value), status, headers, "application/json")


def _failed(error: ApiError) -> Response:
  """The answer that is an error."""
  headers = {} if error.retry_after is None else {"retry-after": str(math.ceil(error.retry_after))}
  if error.status == 401:
    headers["www-authenticate"] = "Bearer"
  return _json(error.body(), error.status, headers)


async def _on_error(request: Request, error: Exception) -> Response:
  """The answer to an exception; one that nobody foresaw is in the server's log too."""
  if isinstance(error, HTTPException):
    what = f"{request.method} {request.url.path[:80]}"
    error = ApiError(
      f"{what!r} is not known here; known: GET {', GET '.join(GET)}, POST {', POST '.join(POST)}",
      status=error.status_code,
    )
  if not isinstance(error, ApiError):
    error = ApiError("the server failed; its log has more", status=500)
  return _failed(error)


class Guard:
  """Decides who may ask, counts the answers, and gives them headers.

  A page of another site must not use a server that asks for no key. Its requests have an `Origin` of that site. If it
  leads its own name to the loopback (DNS rebinding), they have its name in `Host`.
  """

  def __init__(self, app: ASGIApp, service: Service):
    """Guards an application."""
    self._app, self._service = app, service

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    """Answers a request."""
    if scope["type"] != "http":
      return
    path = scope["path"]
    label = "/v1/models" if path.startswith("/v1/models/") else path if path in (*GET, *POST) else "other"

    async def counted(message: Message) -> None:
      if message["type"] == "http.response.start":
        headers = MutableHeaders(scope=message)
        for name, value in _HEADERS.items():
          headers[name] = value
        self._service.metrics.answered(label, message["status"])
      await send(message)

    try:
      self._admit(Headers(scope=scope), path)
    except ApiError as error:
      await _failed(error)(scope, receive, counted)
    else:
      await self._app(scope, receive, counted)

  def _admit(self, headers: Headers, path: str) -> None:
    """Raises an `ApiError` if this client may not ask this."""
    host, origin, key = headers.get("host", ""), headers.get("origin"), self._service.key
    if key is None and self._service.local and host and not is_loopback(_split(f"//{host}").hostname or ""):
      raise ApiError(
        f"the server listens on this machine alone, and not for {host[:80]!r}: ask it as localhost", status=403
      )
    if origin is not None and _split(origin).netloc.lower() != host.lower():
      raise ApiError(f"pages of {origin[:80]!r} may not ask this server", status=403)
    if key is not None and path not in PAGE and path != "/health":
      kind, _, given = headers.get("authorization", "").partition(" ")
      if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), key):
        raise ApiError(
          "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'", status=401, code="invalid_api_key"
        )


def _split(address: str) -> SplitResult:
  """The parts of an address; an `ApiError` if it is none."""
  try:
    return urlsplit(address)
  except ValueError:
    raise ApiError(f"{address[:80]!r} in Host or Origin is no address") from None


def is_loopback(host: str) -> bool:
  """Whether a name or an address is that of the machine itself."""
  try:
    return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
  except ValueError:
    return False


def build(service: Service) -> ASGIApp:
  """The application of a service."""
  models = {"object": "list", "data": [_model(service)]}
  files = {path: (Path(__file__).with_name(name).read_bytes(), kind) for path, (name, kind) in PAGE.items()}

  async def health(request: Request) -> Response:
    status = "draining" if service.draining else "ready" if service.engine.ready else "compiling"
    return _json({"status": status}, 200 if status == "ready" else 503)

  async def metrics(request: Request) -> Response:
    return Response(service.metrics.text(service.engine.gauges()), media_type="text/plain; version=0.0.4")

  async def listed(request: Request) -> Response:
    return _json(models)

  async def model(request: Request) -> Response:
    name = request.path_params["model"]
    if name != service.served.name:
      raise protocol.unknown_model(name, service.served)
    return _json(models["data"][0])

  async def page(request: Request) -> Response:
    content, kind = files[request.url.path]
    return Response(content, headers={"content-security-policy": POLICY}, media_type=kind)

  async def complete(chat: bool, request: Request) -> Response:
    return await _complete(service, request, chat=chat)

  routes = [
    *(Route(path, page) for path in PAGE),
    Route("/health", health),
    Route("/metrics", metrics),
    Route("/v1/models", listed),
    Route("/v1/models/{model:path}", model),
    *(Route(path, functools.partial(complete, chat), methods=["POST"]) for path, chat in POST.items()),
  ]
  handlers: Any = {ApiError: _on_error, HTTPException: _on_error, Exception: _on_error}
  starlette = Starlette(routes=routes, exception_handlers=handlers)
  starlette.router.redirect_slashes = False
  return Guard(starlette, service)


def _model(service: Service) -> dict[str, Any]:
  """What is said about the model."""
  served, usual = service.served, service.served.sampler
  names = ("temperature", "block_length", "schedule", "threshold", "factor", "max_reveal")
  own = {
    "longest": served.longest,
    "block": served.block,
    "turns": tells_turns(service.tokenizer.files),
    "defaults": {
      "max_tokens": usual.completion_length,
      "steps": usual.diffusion_steps,
      **{name: getattr(usual, name) for name in names},
    },
  }
  return {"id": served.name, "object": "model", "created": service.created, "owned_by": "d1jax", "d1jax": own}
