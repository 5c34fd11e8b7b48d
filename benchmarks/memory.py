"""Does diffu-GRPO on LLaDA-8B fit? Bytes a device by count, and by the TPU compiler's own account, without a TPU.

`python -m benchmarks.memory` compiles the real programs of `configs/grpo.py:llada_8b` ahead of time for v5e chips
(16 GiB), one row a way of training and a number of chips, and prints JSON lines and a Markdown table. It needs
`pip install "jax[tpu]"` and no accelerator; about two minutes a program.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost")
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # nothing is run on a chip, so processes need not take turns

import jax
import numpy as np
from jax.experimental import topologies
from ml_collections import ConfigDict

from d1jax.run import experiment as experiments
from d1jax.training import configured
from d1jax.training.programs import Programs

GIB = 2**30
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ROWS_A_CHIP = 6
"""Rows of a micro-batch on each chip: d1's, on each of its GPUs."""

TRAININGS: dict[str, dict[str, Any]] = {
  "full, float32": {"lora.rank": 0, "model.quantize": "none"},
  "LoRA, bfloat16 base": {"model.quantize": "none"},
  "LoRA, int8 base": {"model.quantize": "int8"},
  "LoRA, NF4 base": {"model.quantize": "nf4"},
  "LoRA on all seven, NF4 base": {"model.quantize": "nf4", "lora.targets": ALL},
}
TOPOLOGIES = {1: "v5e:1x1", 8: "v5e:2x4", 16: "v5e:4x4"}


def load(chips: int, changes: dict[str, Any]) -> ConfigDict:
  """The preset at d1's batch (96 completions) with `ROWS_A_CHIP` rows of a micro-batch on each chip."""
  path = Path(__file__).parents[1] / "configs" / "grpo.py"
  spec = importlib.util.spec_from_file_location("config_grpo", path)
  if spec is None or spec.loader is None:
    raise ImportError(f"{path} is missing")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config("llada_8b")
  parts = config.grpo.prompts_per_iteration * config.grpo.num_generations // (ROWS_A_CHIP * chips)
  fields = {
    "model.dtype": "bfloat16",
    "data.prompt_buckets": (200,),
    "grpo.accumulation": parts,
    "grpo.rollout_chunks": parts,
    **changes,
  }
  for field, value in fields.items():
    config.update_from_flattened_dict({field: value})
  return config


def bytes_a_device(tree: Any) -> int:
  """Bytes of the largest share of a tree that a device holds."""
  sizes = (np.prod(x.sharding.shard_shape(x.shape), dtype=np.int64) * x.dtype.itemsize for x in jax.tree.leaves(tree))
  return int(sum(sizes))


def count(experiment: experiments.Experiment, programs: Programs, config: ConfigDict) -> dict[str, int]:
  """Bytes a device, from shapes and placements alone."""
  weights = experiment.model.weights
  optimizer = experiment.optimizer(experiment.config.grpo, 1)
  state, size = weights.abstract_state(optimizer), weights.network.size
  frozen = weights.abstract_frozen(with_reference=programs.method.scores_reference)
  tokens = ROWS_A_CHIP * (max(config.data.prompt_buckets) + config.rollout.completion_length)
  return {
    "frozen": bytes_a_device(frozen),
    "trained": bytes_a_device(state.trainable),
    "gradients": bytes_a_device(state.trainable),
    "optimiser": bytes_a_device(state.opt_state),
    "activations": size.layers * tokens * size.embed * 2,  # one residual stream a layer; the rest is computed again
    "logits": ROWS_A_CHIP * config.rollout.completion_length * config.grpo.logits_tile * 4,
  }


def compiled(trace: Any) -> dict[str, Any]:
  """What the compiler says of a program: its peak, or what it would have needed."""
  began = time.time()
  try:
    memory = trace().lower().compile().memory_analysis()
  except jax.errors.JaxRuntimeError as error:
    found = re.search(r"Used ([\d.]+)G of|temporaries \(([\d.]+)G\) exceeds", str(error))
    if found is None:
      raise
    needed = float(found[1] or found[2]) * GIB  # of temporaries alone in the second case
    return {"fits": False, "peak_bytes": needed, "seconds": round(time.time() - began)}
  return {
    "fits": True,
    "peak_bytes": memory.peak_memory_in_bytes,
    "argument_bytes": memory.argument_size_in_bytes,
    "temporary_bytes": memory.temp_size_in_bytes,
    "seconds": round(time.time() - began),
  }


def measure(chips: int, training: str) -> dict[str, Any]:
  """One row of the table."""
  config = load(chips, TRAININGS[training])
  name = TOPOLOGIES[chips]
  bounds = {"chips_per_host_bounds": (1, 1, 1)} if chips == 1 else {}
  devices = topologies.get_topology_desc(platform="tpu", topology_name=name, **bounds).devices
  experiment = experiments.build(config, None, devices)
  programs = configured.programs(
    experiment, experiment.optimizer(experiment.config.grpo, config.grpo.steps * config.grpo.num_iterations)
  )
  row = {"training": training, "chips": chips, "topology": name, "counted": count(experiment, programs, config)}
  width = max(config.data.prompt_buckets)
  return row | {name: compiled(trace) for name, trace in programs.tracing(width).items()}


def table(rows: list[dict[str, Any]]) -> str:
  """Markdown, in GiB a chip."""
  parts = list(rows[0]["counted"])
  lines = [
    f"| training | chips | {' | '.join(parts)} | counted | publish, compiled | rollout, compiled | update, compiled |",
    f"|---|--:|{'--:|' * (len(parts) + 4)}",
  ]
  for row in rows:
    counted = [f"{row['counted'][part] / GIB:.2f}" for part in parts]
    total = sum(row["counted"].values()) / GIB
    found = []
    for program in ("publish", "rollout", "update"):
      peak = f"{row[program]['peak_bytes'] / GIB:.2f}"
      found.append(peak if row[program]["fits"] else f"no: {peak}")
    lines.append(f"| {row['training']} | {row['chips']} | {' | '.join(counted)} | {total:.2f} | {' | '.join(found)} |")
  return "\n".join(lines)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Keeps the chatter of the topology's description away."""
  with contextlib.redirect_stderr(io.StringIO()):
    yield


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--chips", type=int, nargs="*", default=list(TOPOLOGIES), choices=list(TOPOLOGIES))
  parser.add_argument("--training", nargs="*", default=list(TRAININGS), choices=list(TRAININGS))
  arguments = parser.parse_args()
  rows = []
  for training in arguments.training:
    for chips in arguments.chips:
      with quiet():
        rows.append(measure(chips, training))
      print(json.dumps(rows[-1]), flush=True)
  print(f"\nGiB a chip; a v5e has 15.75 for programs; `no`: does not fit.\n\n{table(rows)}")


if __name__ == "__main__":
  main()
