"""Small programs with known collectives, compiled for eight forced CPU devices or for eight TPUs."""

import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from d1jax.aot import topology

PLATFORMS = ("cpu", "v5e:2x4")


def devices(platform: str) -> list[Any]:
  """Eight devices; skips where the TPU's compiler is not installed."""
  if platform == "cpu":
    return jax.devices()
  if importlib.util.find_spec("libtpu") is None:
    pytest.skip("libtpu is not installed: tests/requirements.txt names the one that goes with this JAX")
  return topology.devices(platform)


def compiled(
  platform: str, function: Callable[..., Any], *shapes: tuple[int, ...], sizes: tuple[int, int] = (4, 2)
) -> Any:
  """`function` of each device's part of float32 arrays that are cut along their first axis over a mesh (a, b)."""
  mesh = Mesh(np.asarray(devices(platform)).reshape(sizes), ("a", "b"))
  spec = PartitionSpec(("a", "b"))
  mapped = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
  arrays = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec)) for shape in shapes]
  return jax.jit(mapped).lower(*arrays).compile()
