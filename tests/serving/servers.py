"""A real server on a free port of this machine, in a thread."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from typing import NamedTuple

from d1jax.serving import app, command, connection
from d1jax.serving.service import Service


class Running(NamedTuple):
  """A server that runs.

  Attributes:
    url: where it is.
    address: the same, for sockets.
    server: uvicorn's.
  """

  url: str
  address: tuple[str, int]
  server: connection.Server


@contextlib.contextmanager
def running(service: Service) -> Iterator[Running]:
  """Serves while the context lasts."""
  listener = command.listener("127.0.0.1", 0)
  address = listener.getsockname()[:2]
  serving = connection.server(app.build(service))
  thread = threading.Thread(target=lambda: asyncio.run(serving.serve(sockets=[listener])))
  thread.start()
  try:
    yield Running(f"http://127.0.0.1:{address[1]}", address, serving)
  finally:
    serving.should_exit = True
    thread.join(30)
    assert not thread.is_alive()
