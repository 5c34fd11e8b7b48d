"""`--config=configs/serve.py`: reads a model, compiles, and serves it until a signal comes."""

import asyncio
import contextlib
import dataclasses
import errno
import functools
import os
import signal
import socket
import stat
import sys
import time
from pathlib import Path

from ml_collections import ConfigDict

from d1jax import files
from d1jax.diffusion.blocks import check
from d1jax.diffusion.rollout import SamplerSpec
from d1jax.errors import InterruptedRunError, RunError, explained, harmless, input_checked, smaller_batches
from d1jax.evaluation import subject
from d1jax.generation.command import check_fields
from d1jax.model import Model
from d1jax.serving import app
from d1jax.serving.connection import server
from d1jax.serving.engine import Engine
from d1jax.serving.protocol import Served
from d1jax.serving.service import Service

MOST_CHOICES = 128
"""Completions of one request, as OpenAI allows."""

_KEY_BYTES = 4096


def run(config: ConfigDict) -> None:
  """Serves until SIGTERM or Ctrl-C, and then finishes what runs."""
  check_fields(config)
  with input_checked():
    if not config.lengths:
      raise ValueError("lengths is empty; it must hold the length of a canvas, like (256,)")
    key = api_key(config.api_key_file)
  local = app.is_loopback(config.host)
  if not local and key is None:
    _warn(f"whoever reaches host={config.host} may use this server: set config.api_key_file")
  listening = listener(config.host, config.port)
  try:
    with contextlib.closing(listening), explained("serving", smaller_batches("slots", config.slots)):
      service = _service(config, key, local)
      asyncio.run(_serve(service, listening, config.drain_seconds))
  except KeyboardInterrupt:
    raise InterruptedRunError("SIGINT: stopped before anything was served") from None


def api_key(path: str | None) -> bytes | None:
  """The API key in a file; None without one."""
  if path is None:
    return None
  file = Path(path)
  key = files.read_text(file, _KEY_BYTES).strip()
  if not key or not key.isascii() or not key.isprintable() or " " in key:
    raise ValueError(f"api_key_file={path!r} must hold one key of letters, digits and signs, without spaces")
  if file.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
    _warn(f"others can read api_key_file={path!r}: chmod 600 {path}")
  return key.encode()


def _warn(message: str) -> None:
  print(harmless(f"warning: {message}"), file=sys.stderr, flush=True)


def listener(host: str, port: int) -> socket.socket:
  """A socket that listens, before anything is read or compiled, so that a port in use is found at once."""
  remedy = "choose another with --config.port, or 0 for any that is free"
  try:
    choices = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, number, _, address = choices[0]
    found = socket.socket(family, kind, number)
  except (OSError, UnicodeError) as error:
    reason = error.strerror if isinstance(error, OSError) else "not a name"
    raise RunError(f"host={host!r} is no address of this machine ({reason}); try 127.0.0.1") from None
  try:
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    found.bind(address)
    found.listen(128)
  except OSError as error:
    found.close()
    if error.errno == errno.EADDRNOTAVAIL:
      raise RunError(f"host={host!r} is no address of this machine ({error.strerror}); try 127.0.0.1") from None
    raise RunError(f"port={port} of host={host} cannot be listened on ({error.strerror}); {remedy}") from None
  return found


def _service(config: ConfigDict, key: bytes | None, local: bool) -> Service:
  """Reads the model."""
  found = subject.load(config)
  model, trained = found.experiment.model, found.experiment.sampler
  with input_checked():
    lengths = tuple(sorted(config.lengths))
    sampler = usual(trained, model, config.block_length, lengths[-1])
    if trained.cfg_scale:
      _warn(f"the rollouts of this model have cfg_scale={trained.cfg_scale}, which no request here has")
    check(model.rollout_denoiser, sampler)
    engine = Engine(
      model,
      found.params(),
      slots=config.slots,
      lengths=lengths,
      block_length=config.block_length or sampler.block_length,
      queue=config.queue,
    )
  name = config.name or Path(config.checkpoint or config.pretrained).absolute().name
  served = Served(name, sampler, model.denoiser.block, lengths[-1], min(MOST_CHOICES, config.queue))
  return Service(
    engine=engine,
    tokenizer=found.experiment.tokenizer,
    mask_id=model.denoiser.mask_id,
    served=served,
    key=key,
    local=local,
    request_seconds=config.request_seconds,
  )


def usual(trained: SamplerSpec, model: Model, block_length: int | None, longest: int) -> SamplerSpec:
  """The sampler of requests that say nothing: that of the rollouts, greedy and exact, in blocks of at most
  `block_length`, with completions of at most half of the longest canvas.
  """
  block = min(trained.block_length, block_length or trained.block_length)
  grid = model.denoiser.block or block
  if grid % block:
    raise ValueError(f"block_length={block} does not divide the network's block of {grid} tokens: use {grid}")
  length = min(trained.completion_length, max(longest // 2, grid)) // grid * grid
  return dataclasses.replace(trained.greedy().resized(length, block), cfg_scale=0.0, early_exit=True)


async def _serve(service: Service, listening: socket.socket, drain_seconds: float) -> None:
  """Compiles while it says so, serves, and drains."""
  loop, stop = asyncio.get_running_loop(), asyncio.Event()
  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
      loop.add_signal_handler(number, functools.partial(_note, number, stop))
  serving = server(app.build(service))
  running = asyncio.create_task(serving.serve(sockets=[listening]))
  host, port = listening.getsockname()[:2]
  print(f"listening on http://{f'[{host}]' if ':' in host else host}:{port}, compiling", flush=True)
  began = time.monotonic()
  say = lambda what: print(f"compiling for {what}", flush=True)
  preparing = asyncio.create_task(asyncio.to_thread(service.engine.prepare, say))
  stopping = asyncio.create_task(stop.wait())
  await asyncio.wait({running, preparing, stopping}, return_when=asyncio.FIRST_COMPLETED)
  if not stop.is_set():
    if running.done():
      running.result()
    await preparing
    print(f"ready after {time.monotonic() - began:.0f} s, as the model {service.served.name}", flush=True)
    await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
  service.draining = True
  if not preparing.done():
    _leave(0, "stopped while it compiled")  # which nothing interrupts
  await asyncio.to_thread(service.engine.close, drain_seconds)
  serving.should_exit = True
  await running


def _note(number: signal.Signals, stop: asyncio.Event) -> None:
  """Takes a signal: the first one drains, the second one ends at once."""
  if stop.is_set():
    _leave(InterruptedRunError.exit_code, f"{number.name}: stopped at once, answers were cut off")
  print(f"{number.name}: finishing what runs; a second signal ends at once", file=sys.stderr, flush=True)
  stop.set()


def _leave(code: int, message: str) -> None:
  """Ends the process at once: threads that compute would keep it alive."""
  print(f"d1jax: {message}", file=sys.stderr, flush=True)
  sys.stdout.flush()
  os._exit(code)
