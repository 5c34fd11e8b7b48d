"""JAX's runtime of several processes: how they meet, tell each other small things, and end together.

Every process runs the same program. What a process reads from its own clock, signals, files or rows goes through this
file before anything depends on it, so that all decide alike. With one process everything here is trivial and free.
"""

import contextlib
import ctypes
import functools
import hashlib
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils
from jaxtyping import Int
from orbax.checkpoint import multihost as orbax_multihost

from d1jax.errors import PREEMPTED, LostError, RunError, harmless, line_of
from d1jax.parallel import cluster

LEAVING_SECONDS = 10
"""How long a process that ends with an error waits for others that end too."""

OWN_SECONDS = 3
"""How long a process that hears of another's failure may take to end by itself: mostly all meet the same one."""

log = logging.getLogger(__name__)


def prepare(cpu_devices: int) -> None:
  """Sets what a run takes from no environment, and splits the CPU; call it before the first array is made.

  Raises:
    RunError: JAX cannot use the platform that the environment asks for.
  """
  for name, wanted in (("jax_threefry_partitionable", True), ("jax_enable_x64", False)):
    if getattr(jax.config, name) != wanted:
      log.warning("%s is set to %s in the environment; a run needs %s", name.upper(), not wanted, wanted)
      jax.config.update(name, wanted)
  split_cpu(cpu_devices)
  asked = os.environ.get("JAX_PLATFORMS")
  if asked and alone():
    try:
      jax.devices()
    except (RuntimeError, AssertionError, ValueError) as error:
      reason = f" ({line_of(error)})" if str(error).strip() else ""
      raise RunError(
        f"JAX_PLATFORMS={asked} names a platform that JAX cannot use here{reason}: unset it, or install JAX for that"
        " platform and look whether the machine has its driver"
      ) from error


def split_cpu(devices: int) -> None:
  """Splits the CPU into several devices, so that a batch is shared between cores; call it before the first array is
  made.

  Programs of small models hardly use a second core within an operation. Accelerators are not affected, and a number set
  by `--xla_force_host_platform_device_count` in `XLA_FLAGS` stands.
  """
  if devices < 1:
    raise RunError(f"cpu_devices is {devices}; give at least 1")
  if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    jax.config.update("jax_num_cpu_devices", devices)


def check_alone(mode: str) -> None:
  """Raises a RunError where a mode that runs in one process was started in several."""
  name, processes = cluster.surroundings(os.environ)
  if processes != 1:
    raise RunError(
      f"mode {mode} runs in one process, but {name} tells of {processes}: start it on one host alone, or unset {name}"
      " if it is alone"
    )
  cluster.check_launcher(os.environ)


def initialize(run: str, coordinator: str | None, processes: int | None, process: int | None, timeout: int) -> None:
  """Meets the other processes, if there are any; call it before anything else asks JAX for devices.

  What is not given is detected as JAX does it: TPU VMs, GKE, Slurm, Open MPI. Where nothing is detected this process
  stays alone, and opens no socket.

  Args:
    run: names the run in messages.
    coordinator: `host:port` of process 0.
    processes: how many there are.
    process: the number of this one, from 0.
    timeout: seconds to wait for the others at the start, and without a sign of life of one until all give up.

  Raises:
    RunError: the settings do not fit together.
    LostError: the others did not come in time.
  """
  coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
  processes = cluster.number(os.environ, "JAX_NUM_PROCESSES") if processes is None else processes
  process = cluster.number(os.environ, "JAX_PROCESS_ID") if process is None else process
  cluster.check(coordinator, processes, process, timeout)
  told = None not in (coordinator, processes, process)
  if processes == 1:
    return
  if not told:
    detected = cluster.surroundings(os.environ)
    if detected[1] == 1:
      return cluster.check_launcher(os.environ)
    if detected[0] == "SLURM_STEP_NUM_TASKS":  # JAX reads the allocation's
      processes = processes or detected[1]
  listens = cluster.bind_address(coordinator) if coordinator and process == 0 else None
  # Stop signals are answered between two iterations, by all processes together: training/interrupts.py.
  jax.config.update("jax_enable_preemption_service", False)
  unmet = f"the processes did not meet at {coordinator or 'the coordinator'} within {timeout} seconds"
  unmet += ": start the same command on every host, with the address of process 0 as coordinator"
  _answer_aborts(f"{run}: {unmet}")
  try:
    jax.distributed.initialize(
      coordinator,
      processes,
      process,
      cluster_detection_method="deactivate" if told else None,
      initialization_timeout=timeout,
      coordinator_bind_address=os.environ.get("JAX_COORDINATOR_BIND_ADDRESS") or listens,
      heartbeat_timeout_seconds=timeout,
      shutdown_timeout_seconds=timeout,
    )
  except (ValueError, TypeError, KeyError) as error:
    raise RunError(
      f"the processes of this run could not be detected ({line_of(error)}): set distributed.coordinator=HOST:PORT,"
      " distributed.processes and distributed.process"
    ) from error
  except RuntimeError as error:
    raise LostError(f"{unmet} ({line_of(error)})") from error
  _answer_aborts(
    f"{run}: another process is gone or has not answered for {timeout} seconds, or JAX failed (see above); run the same"
    " command again, it goes on from the last checkpoint"
  )
  threading.Thread(target=_listen, daemon=True).start()


def _answer_aborts(message: str) -> None:
  """Ends this process with a line and the code to try again where JAX would abort it.

  JAX aborts a process from a thread of its own when the coordinator is gone or says that another process is; Python's
  handlers of signals, which run in the main thread, would come too late.
  """

  @ctypes.CFUNCTYPE(None, ctypes.c_int)
  def handler(number: int) -> None:
    del number
    code, reason = _heard[0] if _heard else (PREEMPTED, message)
    if not _leaving.is_set():
      say_last(reason)
    os._exit(code)

  _stderr()  # while it is still what it was at the start
  _kept.append(handler)
  install = ctypes.CDLL(None).signal
  install.argtypes, install.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
  install(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))


_kept: list[Any] = []
"""What the C library calls must not be collected."""


@functools.cache
def _stderr() -> int:
  """Standard error as it was at the start."""
  return os.dup(2)


def say_last(message: str) -> None:
  """Writes a line on standard error that nothing follows: the threads of JAX, which log what they saw of a lost
  process while this one ends, are silenced first.

  They may call this at the same time as the main thread: both lines are written then.
  """
  stderr = _stderr()
  os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
  os.write(stderr, f"\nd1jax: {harmless(message)}\n".encode(errors="replace"))


_FAILED = "d1jax/failed"
"""Where the first process that ends with an error says so to the others, in the store of JAX's coordinator."""

_heard: list[tuple[int, str]] = []
"""The exit code and the line of the failure that ends the run."""

_leaving = threading.Event()
"""Whether this process is about to end with an error of its own."""


def _listen() -> None:
  """Ends this process when another one has failed, with the code of that failure; runs in a thread of its own.

  What only one process meets, such as a grader that raises, leaves the others waiting in a collective operation. They
  would see no more than a process that is gone, and a launcher would try the same failure again.
  """
  client: Any = distributed.global_state.client
  while not (_leaving.is_set() or _heard):
    time.sleep(1)
    with contextlib.suppress(Exception):  # nothing is said, or the coordinator is gone
      code, process, message = json.loads(client.key_value_try_get(_FAILED))
      _heard.append((code, f"process {process} ended: {message}"))
  if not _leaving.wait(OWN_SECONDS):
    say_last(_heard[0][1])
    _end(_heard[0][0])


def failure_of_another() -> tuple[int, str] | None:
  """Exit code and line of the process that failed first, for one that sees no more than that another is gone."""
  end = time.monotonic() + OWN_SECONDS
  while not _heard and time.monotonic() < end:
    time.sleep(0.1)
  return _heard[0] if _heard else None


def alone() -> bool:
  """Whether this is the only process."""
  return not jax.distributed.is_initialized()


def is_main() -> bool:
  """Whether this is process 0, the only one that writes files and prints."""
  return alone() or jax.process_index() == 0


def leave(code: int, message: str, *, together: bool = True) -> None:
  """Ends this process with an exit code, where there are several, without the waiting of an interpreter that ends.

  Args:
    code: the exit code.
    message: why, for the processes that do not meet the same failure: they end with the same code.
    together: the others are there; they get a moment to say so if they end with an error too.
  """
  if alone():
    return
  _heard.append((code, message))
  _leaving.set()
  with contextlib.suppress(AttributeError, OSError, ValueError):
    sys.stdout.flush()
    sys.stderr.flush()
  if not together:
    os._exit(code)
  client: Any = distributed.global_state.client
  with contextlib.suppress(Exception):  # another process was the first
    client.key_value_set(_FAILED, json.dumps([code, distributed.global_state.process_id, message[:500]]))
  _end(code)


def _end(code: int) -> None:
  """Ends this process when the others are about to."""
  with contextlib.suppress(Exception):
    orbax_multihost.get_barrier_sync_fn()(key="leaving", timeout_ms=1000 * LEAVING_SECONDS)
    if distributed.global_state.process_id == 0:
      time.sleep(1)  # with this process goes the coordinator, which the others would miss
  os._exit(code)


def barrier(name: str) -> None:
  """Waits until all processes are here."""
  if not alone():
    multihost_utils.sync_global_devices(name)


def largest(value: int) -> int:
  """The largest of the processes' numbers."""
  if alone():
    return value
  return int(np.max(multihost_utils.process_allgather(np.int32(value))))


def any_of(flag: bool) -> bool:
  """Whether it is true on any process."""
  return bool(largest(int(flag)))


def gather(value: Any) -> list[Any]:
  """The value of every process, in their order; what JSON can say, and not much of it.

  Raises:
    TypeError: JSON cannot say it.
  """
  if alone():
    return [value]
  text = np.frombuffer(json.dumps([jax.process_index(), value]).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.int32(len(text)))
  padded = np.zeros(1 << max(10, int(sizes.max() - 1).bit_length()), np.uint8)  # few sizes: few programs
  padded[: len(text)] = text
  rows = multihost_utils.process_allgather(padded)
  found = [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]
  return [each for _, each in sorted(found, key=lambda pair: pair[0])]


def gather_rows(rows: Int[np.ndarray, "R"], values: Sequence[Any]) -> list[Any]:
  """The values of all rows of a batch, in their order.

  Args:
    rows: the rows of which this process has the value.
    values: one a row.
  """
  if alone():
    return [values[i] for i in np.argsort(rows)]
  found = [pair for part in gather([rows.tolist(), list(values)]) for pair in zip(*part, strict=True)]
  return [value for _, value in sorted(found, key=lambda pair: pair[0])]


def from_main(find: Callable[[], Any]) -> Any:
  """What process 0 finds, heard by all; so is a RunError that ends it. JSON, as in `gather`."""
  if alone():
    return find()
  found, failure = None, None
  if is_main():
    try:
      found = find()
    except RunError as error:
      failure = str(error)
  heard = gather([found, failure])[0]
  if heard[1] is not None:
    raise RunError(heard[1])
  return heard[0]


def check_same(name: str, value: Any) -> None:
  """Raises a RunError on all processes when they do not have the same value, which JSON can say."""
  if alone():
    return
  digests = gather(hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest())
  others = [str(i) for i, digest in enumerate(digests) if digest != digests[0]]
  if others:
    raise RunError(f"{name} of process {', '.join(others)} is not that of process 0: start all with the same command")


def local_rows(tree: Any) -> tuple[Int[np.ndarray, "R"], Any]:
  """The row numbers and the rows of which this process holds replica 0; every row is on one process.

  Args:
    tree: arrays of one batch, cut along their rows in the same way.
  """
  leaves, structure = jax.tree.flatten(tree)
  total = leaves[0].shape[0]
  if alone():
    return np.arange(total), jax.device_get(tree)

  def own(array: jax.Array) -> list[Any]:
    shards = [shard for shard in array.addressable_shards if shard.replica_id == 0]
    return sorted(shards, key=lambda shard: shard.index[0].indices(total)[0])

  parts = jax.device_get([[shard.data for shard in own(leaf)] for leaf in leaves])
  rows = [np.arange(total)[shard.index[0]] for shard in own(leaves[0])]
  joined = [
    np.concatenate([np.zeros((0, *leaf.shape[1:]), leaf.dtype), *part])
    for leaf, part in zip(leaves, parts, strict=True)
  ]
  return np.concatenate([np.arange(0), *rows]), jax.tree.unflatten(structure, joined)


def fetch(tree: Any) -> Any:
  """Whole arrays on every process's host, wherever their parts are; meant for small ones."""

  def whole(array: jax.Array) -> np.ndarray:
    if array.is_fully_addressable or array.is_fully_replicated:
      return jax.device_get(array)
    return multihost_utils.process_allgather(array, tiled=True)

  return jax.device_get(tree) if alone() else jax.tree.map(whole, tree)
