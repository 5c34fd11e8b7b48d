"""What the environment says about other processes of the same job: the clusters that JAX detects, without a socket."""

import importlib.util
import os
import re
import urllib.request
from collections.abc import Mapping

from d1jax.errors import RunError

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
    return "SLURM_NTASKS", int(environment.get("SLURM_NTASKS", "1"))
  if "OMPI_COMM_WORLD_SIZE" in environment:
    return "OMPI_COMM_WORLD_SIZE", int(environment["OMPI_COMM_WORLD_SIZE"])
  slices = int(environment.get("MEGASCALE_NUM_SLICES") or "1")
  for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"):
    if name in environment:
      return name, max(hosts(name), 1) * slices
  if "TPU_SKIP_MDS_QUERY" not in environment:  # JAX sets it where it finds no TPU
    found = re.search(r"MEGASCALE_NUM_SLICES: '(\d+)'", _metadata("tpu-env"))
    slices = int(found[1]) if found else slices
    return "the TPU's metadata", len(_metadata("worker-network-endpoints").split(",")) * slices
  if {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environment.keys():
    return "JOB_COMPLETION_INDEX", 0 if importlib.util.find_spec("kubernetes") else 1
  return "nothing", 1


def _metadata(name: str) -> str:
  """An attribute of this machine; empty where there is no such thing."""
  request = urllib.request.Request(METADATA + name, headers={"Metadata-Flavor": "Google"})
  try:
    with urllib.request.urlopen(request, timeout=5) as answer:
      return answer.read().decode()
  except OSError:
    return ""


def check(coordinator: str | None, processes: int | None, process: int | None, timeout: int) -> None:
  """Raises a RunError where the settings of `distributed` do not fit together."""
  if timeout < 1:
    raise RunError(f"distributed.timeout is {timeout}; give at least 1 second")
  if processes is not None and processes < 1:
    raise RunError(f"distributed.processes is {processes}; give at least 1")
  if process is not None and (process < 0 or (processes is not None and process >= processes)):
    raise RunError(f"distributed.process is {process}; processes are numbered from 0, below processes={processes}")
  if coordinator is not None and not coordinator.rpartition(":")[2].isdigit():
    raise RunError(f"distributed.coordinator is {coordinator!r}; give HOST:PORT, the address of process 0")
  given = {"coordinator": coordinator, "processes": processes, "process": process}
  missing = [name for name, value in given.items() if value is None]
  if 0 < len(missing) < 3 and processes != 1 and surroundings(os.environ)[1] == 1:
    raise RunError(
      f"distributed.{' and distributed.'.join(missing)} must be set too: nothing here says how many processes there are"
    )
