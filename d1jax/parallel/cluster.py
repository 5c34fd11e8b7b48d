"""What the environment says about other processes of the same job, for the clusters that JAX detects; no socket is
opened.
"""

import contextlib
import importlib.util
import ipaddress
import logging
import os
import re
import socket
import urllib.request
from collections.abc import Mapping

from d1jax.errors import RunError

log = logging.getLogger(__name__)

METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"
"""Where a Cloud TPU VM reads the addresses of the hosts of its slice, and how many slices there are."""


def surroundings(environment: Mapping[str, str]) -> tuple[str, int]:
  """What says that this process is one of several, and how many: the clusters that JAX detects.

  A single host, a Colab or Kaggle TPU among them, is 1, whatever else its variables say. 0: JAX has to ask.

  Args:
    environment: `os.environ`.
  """

  def hosts(name: str) -> int:
    return len([host for host in environment.get(name, "").split(",") if host])

  if {"SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID"} <= environment.keys():
    # A shell inside of an allocation has the allocation's SLURM_NTASKS, but is a step of one task.
    name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
    return name, number(environment, name) or 1
  if "OMPI_COMM_WORLD_SIZE" in environment:
    return "OMPI_COMM_WORLD_SIZE", number(environment, "OMPI_COMM_WORLD_SIZE") or 1
  slices = number(environment, "MEGASCALE_NUM_SLICES") or 1
  for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"):
    if name in environment:
      return name, max(hosts(name), 1) * slices
  if "TPU_SKIP_MDS_QUERY" not in environment:  # JAX sets it where it finds no TPU
    match = re.search(r"MEGASCALE_NUM_SLICES: '(\d+)'", _metadata("tpu-env"))
    slices = int(match[1]) if match else slices
    return "the TPU's metadata", len(_metadata("worker-network-endpoints").split(",")) * slices
  if {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environment.keys():
    if importlib.util.find_spec("kubernetes"):
      return "JOB_COMPLETION_INDEX", 0
    if number(environment, "JOB_COMPLETION_INDEX"):
      raise RunError(
        "JOB_COMPLETION_INDEX says that this is one of several pods, which are found with the package kubernetes:"
        " pip install kubernetes, or set distributed.coordinator=HOST:PORT, distributed.processes and"
        " distributed.process"
      )
  return "nothing", 1


def number(environment: Mapping[str, str], name: str) -> int | None:
  """The whole number that a variable holds; None if it is not set, or empty.

  Raises:
    RunError: it holds something else.
  """
  value = environment.get(name, "").strip()
  if not value:
    return None
  if not value.isascii() or not value.isdigit() or len(value) > 9:
    raise RunError(f"the environment says {name}={value!r}, which is not a whole number: correct it, or unset {name}")
  return int(value)


def check_launcher(environment: Mapping[str, str]) -> None:
  """Raises a RunError in a process that torchrun or accelerate started beside others, which JAX does not detect.

  Each of them would run as a single process, and all would write to the same work directory.
  """
  processes = number(environment, "WORLD_SIZE") or 1
  if processes > 1 and environment.get("RANK", "").strip():
    raise RunError(
      f"the environment says WORLD_SIZE={processes} and RANK={number(environment, 'RANK')}, as torchrun sets them, and"
      " nothing that JAX detects: start one process on each host without torchrun, with"
      f" --config.distributed.coordinator=HOST:PORT --config.distributed.processes={processes}"
      " --config.distributed.process=NUMBER; or unset WORLD_SIZE and RANK if this process is alone"
    )


def check_xla_flags(environment: Mapping[str, str]) -> None:
  """Raises a RunError if XLA does not accept XLA_FLAGS; call it before JAX asks for devices.

  XLA ends its process if a flag is wrong, and only XLA knows its flags: for this reason a copy of this process lets XLA
  read them first.
  """
  flags = environment.get("XLA_FLAGS", "").strip()
  if not flags:
    return
  from jaxlib import xla_client

  reading_end, writing_end = os.pipe()
  child = os.fork()
  if child == 0:
    try:
      os.dup2(writing_end, 2)
      xla_client.CompileOptions()
    finally:
      os._exit(0)
  os.close(writing_end)
  with open(reading_end, encoding="utf-8", errors="replace") as stream:
    lines = stream.read().strip().splitlines()
  if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
    reason = lines[-1].rpartition("] ")[2][:160] if lines else "no reason is given"
    raise RunError(f"XLA_FLAGS={flags} is not accepted by XLA ({reason}): correct it, or unset XLA_FLAGS")


def bind_address(coordinator: str) -> str | None:
  """Where process 0 listens as coordinator, `HOST:PORT`; None leaves it to JAX, which listens on all interfaces.

  Anyone who can reach the coordinator can end the run and take part in it. For this reason it listens only at the
  address that the other processes use, if this address belongs to this machine. A host name that resolves to the
  loopback address on this machine, as the host's own name does on Debian, does not tell which address the others use.

  Args:
    coordinator: `HOST:PORT`, the address that all processes are given.
  """
  host, _, port = coordinator.rpartition(":")
  host = host.strip("[]")
  if host == "localhost" or _is_loopback(host):
    return coordinator
  with contextlib.suppress(OSError, UnicodeError):
    for family, _, _, _, address in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM):
      candidate = str(address[0])
      if not _is_loopback(candidate):
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as probe:
          probe.bind((candidate, 0))
          return f"[{candidate}]:{port}" if family == socket.AF_INET6 else f"{candidate}:{port}"
  log.warning("distributed.coordinator %s is not an address of this machine: it listens on all interfaces", coordinator)
  return None


def _is_loopback(host: str) -> bool:
  try:
    return ipaddress.ip_address(host).is_loopback
  except ValueError:
    return False


def _metadata(name: str) -> str:
  """An attribute of this machine; empty if there is no such attribute."""
  request = urllib.request.Request(METADATA + name, headers={"Metadata-Flavor": "Google"})
  try:
    with urllib.request.urlopen(request, timeout=5) as answer:
      return answer.read().decode()
  except OSError:
    return ""


def check(coordinator: str | None, processes: int | None, process: int | None, timeout: int) -> None:
  """Raises a RunError if the settings of `distributed` do not fit together."""
  if timeout < 1:
    raise RunError(f"distributed.timeout is {timeout}; give at least 1 second")
  if processes is not None and processes < 1:
    raise RunError(f"distributed.processes is {processes}; give at least 1")
  if process is not None and (process < 0 or (processes is not None and process >= processes)):
    raise RunError(f"distributed.process is {process}; processes are numbered from 0, below processes={processes}")
  if coordinator is not None and not coordinator.rpartition(":")[2].isdigit():
    raise RunError(f"distributed.coordinator is {coordinator!r}; give HOST:PORT, the address of process 0")
  settings = {"coordinator": coordinator, "processes": processes, "process": process}
  missing = [name for name, value in settings.items() if value is None]
  if 0 < len(missing) < 3 and processes != 1 and surroundings(os.environ)[1] == 1:
    raise RunError(
      f"distributed.{' and distributed.'.join(missing)} must be set too: the environment does not say how many"
      " processes there are"
    )
