"""Peak memory of a load: `python -m tests.models.peak TINY FOLDER DEVICES` prints one line of JSON.

The tiny folder is loaded first, so that what is imported and compiled once counts as resident before.
"""

import json
import os
import sys
from pathlib import Path


def resident() -> dict[str, int]:
  """Bytes of this process: the peak since it was reset, and what it has now, of files and of its own."""
  lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
  table = dict(line.split(":", 1) for line in lines)
  return {name: 1024 * int(table[name].split()[0]) for name in ("VmHWM", "VmRSS", "RssAnon", "RssFile")}


def main() -> None:
  """Loads a folder in float32 over DEVICES devices, the weights split among them."""
  tiny, folder, devices = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
  os.environ["JAX_PLATFORMS"] = "cpu"
  os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
  import jax
  import jax.numpy as jnp
  import numpy as np

  from d1jax.models import families, load, transformer
  from d1jax.parallel import mesh as meshes

  mesh = meshes.make_mesh({"data": 1, "fsdp": devices, "tensor": 1})

  def read(folder: Path) -> transformer.Params:
    network = transformer.build(families.describe(folder).size, dtype=jnp.float32)
    placements = meshes.shardings(mesh, meshes.RULES, network.axes)
    return jax.block_until_ready(load.read(folder, network, jnp.float32, placements))

  read(tiny)
  Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts again from here
  before = resident()
  params = read(folder)
  after = resident()
  leaves = jax.tree.leaves(params)
  held = sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards)
  sample = np.asarray(params["blocks"]["mlp"]["up"][-1], np.float32)
  print(
    json.dumps(
      {
        "before": before,
        "after": after,
        "arrays": held,
        "excess": after["VmHWM"] - before["VmRSS"] - held,
        "sample": float(sample.astype(np.float64).sum()),
      }
    )
  )


if __name__ == "__main__":
  main()
