"""TPU topologies by name, for compilation without TPUs (`jax.experimental.topologies` and the compiler in libtpu)."""

import importlib.util
import os
from typing import Any

import jax
from jax.experimental import topologies

from d1jax.errors import RunError

_ALONE = {  # no TPU machine can be queried; nothing runs on a chip, so processes need no lock
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def devices(name: str, slices: int = 1) -> list[Any]:
  """The chips of a topology.

  Args:
    name: the generation and the chips along each axis, e.g. `v5e:2x4`, `v5p:2x2x4`.
    slices: the number of such slices.

  Raises:
    RunError: the compiler is not installed, or has no such topology.
  """
  if importlib.util.find_spec("libtpu") is None:
    raise RunError(f'compiling for {name} needs the TPU\'s compiler: pip install "jax[tpu]=={jax.__version__}"')
  for variable, value in _ALONE.items():
    os.environ.setdefault(variable, value)
  few = name.endswith(":1x1")
  try:
    return topologies.get_topology_desc(
      platform="tpu",
      topology_name=name,
      **({"num_slices": slices} if slices > 1 else {}),
      **({"chips_per_host_bounds": (1, 1, 1)} if few else {}),
    ).devices
  except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
    raise RunError(
      f"config.topology={name} with config.slices={slices} is no topology of the compiler"
      f" ({str(error).splitlines()[0][:160]}); known are, e.g., v5e:2x4, v5p:2x2x4, v6e:16x16"
    ) from error
