"""JAX's runtime of several processes: how they find each other, exchange small values, and end together.

Every process runs the same program. Whatever only one process can see (its clock, a signal, a file, its rows of a
batch) is shared with all others through this file before any of them acts on it, so that all decide alike. With one
process all functions here are trivial and cost nothing.
"""

import contextlib
import ctypes
import functools
import hashlib
import itertools
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
"""How long a process that learns of another's failure may take to end by itself: often all fail for the same reason."""

LONGEST_SECONDS = 12 * 3600
"""How long processes wait for one that downloads."""

_waits = itertools.count()
log = logging.getLogger(__name__)


def prepare(cpu_devices: int) -> None:
  """Sets the options of JAX that the environment must not change, and splits the CPU; call it before the first array is
  made.

  Raises:
    RunError: JAX cannot use the platform that the environment names.
  """
  for name, wanted in (("jax_threefry_partitionable", True), ("jax_enable_x64", False)):
    if getattr(jax.config, name) != wanted:
      log.warning("%s is set to %s in the environment; a run needs %s", name.upper(), not wanted, wanted)
      jax.config.update(name, wanted)
  split_cpu(cpu_devices)
  platform = os.environ.get("JAX_PLATFORMS")
  if platform and alone():
    try:
      jax.devices()
    except (RuntimeError, AssertionError, ValueError) as error:
      reason = f" ({line_of(error)})" if str(error).strip() else ""
      raise RunError(
        f"JAX_PLATFORMS={platform} names a platform that JAX cannot use here{reason}: unset it, or install JAX for that"
        " platform and check that the machine has its driver"
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
  """Raises a RunError if a mode that runs in one process was started in several."""
  name, processes = cluster.surroundings(os.environ)
  if processes != 1:
    raise RunError(
      f"mode {mode} runs in one process, but {name} tells of {processes}: start it on one host alone, or unset {name}"
      " if it is alone"
    )
  cluster.check_launcher(os.environ)


def initialize(run: str, coordinator: str | None, processes: int | None, process: int | None, timeout: int) -> None:
  """Connects to the other processes, if there are any; call it before anything else asks JAX for devices.

  Arguments that are None are detected as JAX does it, on TPU VMs, GKE, Slurm and Open MPI. If nothing is detected, this
  process is alone, and opens no socket.

  Args:
    run: names the run in messages.
    coordinator: `host:port` of process 0.
    processes: their number.
    process: the number of this one, from 0.
    timeout: seconds to wait for the others at the start, and seconds without a sign of life from a process after which
      all others end.

  Raises:
    RunError: the settings do not fit together.
    LostError: the others did not connect in time.
  """
  coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
  processes = cluster.number(os.environ, "JAX_NUM_PROCESSES") if processes is None else processes
  process = cluster.number(os.environ, "JAX_PROCESS_ID") if process is None else process
  cluster.check(coordinator, processes, process, timeout)
  is_configured = None not in (coordinator, processes, process)
  if processes == 1:
    return
  if not is_configured:
    detected = cluster.surroundings(os.environ)
    if detected[1] == 1:
      return cluster.check_launcher(os.environ)
    if detected[0] == "SLURM_STEP_NUM_TASKS":  # JAX reads the allocation's
      processes = processes or detected[1]
  listens = cluster.bind_address(coordinator) if coordinator and process == 0 else None
  # Stop signals are answered between two iterations, by all processes together: run/interrupts.py.
  jax.config.update("jax_enable_preemption_service", False)
  unmet = f"the processes did not meet at {coordinator or 'the coordinator'} within {timeout} seconds"
  unmet += ": start the same command on every host, with the address of process 0 as coordinator"
  _answer_aborts(f"{run}: {unmet}")
  try:
    jax.distributed.initialize(
      coordinator,
      processes,
      process,
      cluster_detection_method="deactivate" if is_configured else None,
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
    f"{run}: another process ended or has not answered for {timeout} seconds, or JAX failed (see above); run the same"
    " command again to resume from the last checkpoint"
  )
  threading.Thread(target=_listen, daemon=True).start()


def _answer_aborts(message: str) -> None:
  """Makes this process end with a line and the exit code for "run again" when JAX would abort it.

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
  """Standard error at the start of the process."""
  return os.dup(2)


def say_last(message: str) -> None:
  """Writes the last line on standard error. First it silences the threads of JAX, which log errors about a lost process
  while this one ends.

  Such a thread may call this at the same time as the main thread; then both lines are written.
  """
  stderr = _stderr()
  os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
  os.write(stderr, f"\nd1jax: {harmless(message)}\n".encode(errors="replace"))


_FAILED = "d1jax/failed"
"""The key, in the store of JAX's coordinator, under which the first process that fails tells the others."""

_heard: list[tuple[int, str]] = []
"""The exit code and the line of the failure that ends the run."""

_leaving = threading.Event()
"""Whether this process is about to end with an error of its own."""


def _listen() -> None:
  """Ends this process when another one has failed, with the code of that failure; runs in a thread of its own.

  If only one process fails, for example because a grader raises, the others wait for it in a collective operation. They
  would only see that a process is gone, would end with the code for "run again", and the same failure would follow.
  """
  client: Any = distributed.global_state.client
  while not (_leaving.is_set() or _heard):
    time.sleep(1)
    with contextlib.suppress(Exception):  # no process has failed, or the coordinator is gone
      code, process, message = json.loads(client.key_value_try_get(_FAILED))
      _heard.append((code, f"process {process} ended: {message}"))
  if not _leaving.wait(OWN_SECONDS):
    say_last(_heard[0][1])
    _end(_heard[0][0])


def failure_of_another() -> tuple[int, str] | None:
  """Exit code and line of the process that failed first, for a process that only sees that another one is gone."""
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
  """Ends this process with an exit code, if there are several, without the waits at the end of an interpreter.

  Args:
    code: the exit code.
    message: the reason, for processes that do not have the same failure: they end with the same code.
    together: whether the others still run; then they get a moment to end with their own error.
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


def wait_long(name: str) -> None:
  """Waits until all processes are here, for hours if need be: a collective operation could time out meanwhile."""
  if not alone():
    client: Any = distributed.global_state.client
    client.wait_at_barrier(f"{name} {next(_waits)}", 1000 * LONGEST_SECONDS)


def largest(value: int) -> int:
  """The largest of the processes' numbers."""
  if alone():
    return value
  return int(np.max(multihost_utils.process_allgather(np.int32(value))))


def gather(value: Any) -> list[Any]:
  """The value of every process, in the order of the processes. Values must be small, and of types that JSON has.

  Raises:
    TypeError: JSON has no such type.
  """
  if alone():
    return [value]
  # Arrays of an all-gather have the same shape on each process, but texts differ in length: of 700 and 1,500 bytes both
  # are padded to 2,048, and their true sizes, gathered first, cut them again. Powers of two keep the number of compiled
  # programs small. Each text names its process, because the order of the rows is that of the devices.
  text = np.frombuffer(json.dumps([jax.process_index(), value]).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.int32(len(text)))
  padded = np.zeros(1 << max(10, int(sizes.max() - 1).bit_length()), np.uint8)
  padded[: len(text)] = text
  rows = multihost_utils.process_allgather(padded)
  values = [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]
  return [each for _, each in sorted(values, key=lambda pair: pair[0])]


def gather_rows(rows: Int[np.ndarray, "R"], values: Sequence[Any]) -> list[Any]:
  """The values of all rows of a batch, in their order.

  `rows` are those whose values this process has, one value each.
  """
  if alone():
    return [values[i] for i in np.argsort(rows)]
  pairs = [pair for part in gather([rows.tolist(), list(values)]) for pair in zip(*part, strict=True)]
  return [value for _, value in sorted(pairs, key=lambda pair: pair[0])]


def from_main(find: Callable[[], Any]) -> Any:
  """The result of `find` on process 0, on all processes; if it raises a RunError there, all raise it. The result must
  be of types that JSON has.
  """
  if alone():
    return find()
  value, failure = None, None
  if is_main():
    try:
      value = find()
    except RunError as error:
      failure = str(error)
  answer = gather([value, failure])[0]
  if answer[1] is not None:
    raise RunError(answer[1])
  return answer[0]


def check_same(name: str, value: Any) -> None:
  """Raises a RunError on all processes if they do not have the same value, which must be of types that JSON has."""
  if alone():
    return
  digests = gather(hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest())
  others = [str(i) for i, digest in enumerate(digests) if digest != digests[0]]
  if others:
    raise RunError(
      f"{name} of process {', '.join(others)} differs from that of process 0: start all with the same command"
    )


def local_rows(tree: Any) -> tuple[Int[np.ndarray, "R"], Any]:
  """The numbers and the contents of the rows whose replica 0 this process holds; each row belongs to one process.

  Args:
    tree: arrays of one batch, sharded along their rows in the same way.
  """
  leaves, structure = jax.tree.flatten(tree)
  total = leaves[0].shape[0]
  if alone():
    return np.arange(total), jax.device_get(tree)

  def own_shards(array: jax.Array) -> list[Any]:
    shards = [shard for shard in array.addressable_shards if shard.replica_id == 0]
    return sorted(shards, key=lambda shard: shard.index[0].indices(total)[0])

  parts = jax.device_get([[shard.data for shard in own_shards(leaf)] for leaf in leaves])
  rows = [np.arange(total)[shard.index[0]] for shard in own_shards(leaves[0])]
  joined = [
    np.concatenate([np.zeros((0, *leaf.shape[1:]), leaf.dtype), *part])
    for leaf, part in zip(leaves, parts, strict=True)
  ]
  return np.concatenate([np.arange(0), *rows]), jax.tree.unflatten(structure, joined)


def fetch(tree: Any) -> Any:
  """Copies whole arrays to the host of every process, wherever their parts are; meant for small arrays."""

  def whole(array: jax.Array) -> np.ndarray:
    if array.is_fully_addressable or array.is_fully_replicated:
      return jax.device_get(array)
    return multihost_utils.process_allgather(array, tiled=True)

  return jax.device_get(tree) if alone() else jax.tree.map(whole, tree)
