"""uvicorn's connections, with limits of time: whoever sends half a request, or reads no answer, is disconnected."""

import asyncio
import contextlib
import logging
from collections.abc import Iterator

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

WAIT_SECONDS = 20
"""From a connection's start, or from an answer, to the last byte of the next request's headers."""

WRITE_SECONDS = 30.0
"""In which a client must read some of an answer that it has let wait."""

LINGER_SECONDS = 2.0
"""In which the rest of a request that was answered before its end is read and dropped: a client that is cut off while
it writes may never see the answer.
"""

MOST_CONNECTIONS = 512
"""Connections at a time. Beyond them the one is ended whose client has let wait longest for a request, or for the rest
of one; if all wait for answers, status 503 is the answer to more.
"""

HEADER_BYTES = 16 << 10
"""The largest headers of a request."""


class Connection(H11Protocol):
  """A connection to one client."""

  _reading: asyncio.TimerHandle | None = None
  _seconds: float | None = None
  _writing: asyncio.TimerHandle | None = None
  _since = 0.0

  def connection_made(self, transport: asyncio.BaseTransport) -> None:
    """Begins."""
    assert isinstance(transport, asyncio.Transport)
    super().connection_made(transport)
    self._since = self.loop.time()
    self._expect()
    if len(self.connections) > MOST_CONNECTIONS:
      self._make_room()

  def data_received(self, data: bytes) -> None:
    """Reads."""
    super().data_received(data)
    self._expect()

  def on_response_complete(self) -> None:
    """Waits for the next request, or for the rest of this one."""
    super().on_response_complete()
    self._since = self.loop.time()
    self._expect()

  def connection_lost(self, exc: Exception | None) -> None:
    """Ends."""
    for timer in (self._reading, self._writing):
      if timer is not None:
        timer.cancel()
    super().connection_lost(exc)

  def pause_writing(self) -> None:
    """Gives the client some time to read."""
    super().pause_writing()
    self._writing = self.loop.call_later(WRITE_SECONDS, self.transport.abort)

  def resume_writing(self) -> None:
    """The client has read."""
    super().resume_writing()
    if self._writing is not None:
      self._writing.cancel()

  def _make_room(self) -> None:
    """Ends the connection whose client has let wait longest."""
    others = [one for one in self.connections if isinstance(one, Connection) and one is not self]
    waiting = [one for one in others if one.conn.their_state in (h11.IDLE, h11.SEND_BODY)]
    if waiting:
      longest = min(waiting, key=lambda one: one._since)
      longest.transport.abort()
      self.connections.discard(longest)

  def _expect(self) -> None:
    """Sets the timer where the client has to send something; what it sends does not set it back."""
    answered = self.cycle is not None and self.cycle.response_complete
    if self.conn.their_state is h11.IDLE:
      seconds: float | None = WAIT_SECONDS
    else:
      seconds = LINGER_SECONDS if answered and self.conn.their_state is h11.SEND_BODY else None
    if seconds != self._seconds:
      if self._reading is not None:
        self._reading.cancel()
      self._reading = None if seconds is None else self.loop.call_later(seconds, self.transport.abort)
      self._seconds = seconds


class Server(uvicorn.Server):
  """uvicorn's server, which leaves signals to whoever runs it."""

  @contextlib.contextmanager
  def capture_signals(self) -> Iterator[None]:
    """Captures none."""
    yield


def server(app: ASGIApp) -> Server:
  """What serves an application: `await ....serve(sockets=[...])` runs until its `should_exit` is true."""
  logging.getLogger("uvicorn").setLevel(logging.ERROR)  # any client could fill the log with warnings
  return Server(
    uvicorn.Config(
      app,
      http=Connection,
      ws="none",
      lifespan="off",
      log_config=None,
      access_log=False,
      proxy_headers=False,
      server_header=False,
      timeout_keep_alive=WAIT_SECONDS,
      timeout_graceful_shutdown=5,
      limit_concurrency=MOST_CONNECTIONS + 1,
      h11_max_incomplete_event_size=HEADER_BYTES,
    )
  )
