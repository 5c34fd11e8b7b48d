"""Rollouts and iterations of diffu-GRPO on TPUs, by ahead-of-time compilation: `python -m benchmarks.topologies KIND`.

`weak` and `strong` say how an iteration scales over 8 to 256 chips of v5e: `weak` keeps twelve completions a chip, as
d1's 96 are on eight; `strong` keeps 768 completions. Both compile `configs/aot.py:llada_8b,gsm8k,v5e`, with adapters
and, where it fits, with every weight trained. `rollouts` compiles rollouts of 1,024 tokens in 512 denoising steps,
those of SDAR-8B in blocks of 4 and of 32 beside the exact ones of LLaDA-8B. They print a JSON line a case, then tables.
It needs `pip install "jax[tpu]"` and no TPU; minutes a case.
"""

import argparse
import contextlib
import io
import json
import math
import os
import runpy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

from ml_collections import ConfigDict

from d1jax.aot import command
from d1jax.aot.analysis import Analysis
from d1jax.aot.roofline import Roofline
from d1jax.aot.table import GIB, overview
from d1jax.columns import markdown
from d1jax.parallel import chips
from d1jax.run import fields

TOPOLOGIES = {8: "v5e:2x4", 16: "v5e:4x4", 32: "v5e:4x8", 64: "v5e:8x8", 128: "v5e:8x16", 256: "v5e:16x16"}
GENERATIONS = 6
"""Completions a prompt."""

ROWS_A_CHIP = 12
"""In weak scaling, and the most of a micro-batch."""

STRONG_ROWS = 768
ROLLOUTS = ("v5e:2x4", "v5p:2x2x4", "v6e:4x4")
LENGTH, STEPS = 1024, 512
NETWORKS: dict[str, dict[str, Any]] = {
  "LLaDA-8B, exact": {"model.size": "llada_8b"},
  "SDAR-8B, blocks of 4": {"model.size": "sdar_8b", "model.block": 4, "rollout.block_length": 4},
  "SDAR-8B, blocks of 32": {"model.size": "sdar_8b", "model.block": 32, "rollout.block_length": 32},
}

FULL_FROM = 16
"""Chips that every weight's moments need."""


def preset(words: str) -> ConfigDict:
  """`configs/aot.py:WORDS`."""
  config = runpy.run_path(str(Path(__file__).parents[1] / "configs" / "aot.py"))["get_config"](words)
  fields.complete(config)
  return config


def rollouts(topology: str) -> list[dict[str, Any]]:
  """What `Analysis.program` says of the rollouts of each network; twelve completions a chip, in two chunks."""
  found = []
  for name, changes in NETWORKS.items():
    config = preset(f"lora,gsm8k,{topology.partition(':')[0]}")
    config.topology = topology
    config.rollout.update(completion_length=LENGTH, diffusion_steps=STEPS)
    count = math.prod(int(size) for size in topology.partition(":")[2].split("x"))
    config.grpo.prompts_per_iteration = ROWS_A_CHIP * count // GENERATIONS
    for field, value in changes.items():
      config.update_from_flattened_dict({field: value})
    experiment, programs, width = command.on_topology(config)
    chip = chips.of(experiment.model.weights.mesh.devices.flat[0].device_kind)
    if chip is None:
      raise SystemExit(f"d1jax.parallel.chips does not know the chips of {topology}")
    program = Analysis(experiment, programs, chip, width).program("rollout")
    found.append({"topology": topology, "network": name, "runs": config.grpo.rollout_chunks, **program})
    print(json.dumps(found[-1]), flush=True)
  return found


def rollout_table(results: Sequence[dict[str, Any]]) -> str:
  """A row a network; `ratio` is the seconds of LLaDA-8B over its own, for the lower and the upper end of both."""
  rows: list[Sequence[Any]] = []
  first: list[float] = []
  for each in results:
    line = Roofline(**each["seconds"]).times(each["runs"])
    ends = [line.seconds, line.apart]
    first = ends if each["network"] == next(iter(NETWORKS)) else first
    ratio = " - ".join(f"{x:.0f}" for x in sorted(base / end for base, end in zip(first, ends, strict=True)))
    cells = [f"{each['memory']['total'] / GIB:.2f}", *(f"{seconds:.1f}" for seconds in line)]
    rows.append((each["topology"], each["network"], *cells, f"{ends[0]:.1f} - {ends[1]:.1f}", line.bound, ratio))
  head = ("topology", "network", "GiB a chip", "compute s", "memory s", "network s", "s an iteration", "bound", "ratio")
  return markdown(head, rows)


def analyse(count: int, rows: int, full: bool) -> dict[str, Any]:
  """What `d1jax.main --config=configs/aot.py` writes of a topology."""
  config = preset("llada_8b,gsm8k,v5e" + ",full" * full)
  config.topology = TOPOLOGIES[count]
  config.grpo.prompts_per_iteration = rows // GENERATIONS
  config.grpo.accumulation = max(1, rows // count // ROWS_A_CHIP)
  config.grpo.rollout_chunks = max(1, rows // count // GENERATIONS)
  with tempfile.TemporaryDirectory() as folder:
    config.output = f"{folder}/found.json"
    with contextlib.suppress(command.DoesNotFitError), contextlib.redirect_stdout(io.StringIO()):
      command.run(config)
    return json.loads(Path(config.output).read_text(encoding="utf-8"))


def scaling(results: Sequence[dict[str, Any]]) -> str:
  """A row a number of chips; efficiency is completions a second and chip, relative to the fewest chips."""
  rows, first = [], None
  for result in results:
    if not result["fits"]:
      continue
    count, programs, each = result["chips"], result["programs"], result["iteration"]
    total = lambda kind, programs=programs: sum(found["runs"] * found["seconds"][kind] for found in programs.values())
    received = sum(found["runs"] * e["bytes"] for found in programs.values() for e in found["collectives"])
    most = max(found["memory"]["total"] for found in programs.values())
    rates = [result["rows"] / count / each[kind] for kind in ("seconds_apart", "seconds")]
    first = first or rates
    efficiency = " - ".join(f"{rate / best:.0%}" for rate, best in zip(rates, first, strict=True))
    seconds = [f"{total(kind):.1f}" for kind in ("compute", "memory", "network")]
    span = f"{each['seconds']:.1f} - {each['seconds_apart']:.1f}"
    rows.append((count, result["rows"], f"{most / GIB:.2f}", f"{received / GIB:.0f}", *seconds, span, efficiency))
  head = ("chips", "rows", "GiB a chip", "GiB received", "compute s", "memory s", "network s", "s an iteration")
  return markdown((*head, "efficiency"), rows)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("kind", choices=("weak", "strong", "rollouts"))
  parser.add_argument("--topologies", nargs="+", default=list(ROLLOUTS), help="of rollouts")
  parser.add_argument("--chips", type=int, nargs="+", default=list(TOPOLOGIES), choices=list(TOPOLOGIES))
  wanted = parser.parse_args()
  if wanted.kind == "rollouts":
    print(rollout_table([each for topology in wanted.topologies for each in rollouts(topology)]))
    return
  for full in (False, True):
    results = []
    for count in wanted.chips:
      if full and count < FULL_FROM:
        continue
      rows = ROWS_A_CHIP * count if wanted.kind == "weak" else STRONG_ROWS
      results.append(analyse(count, rows, full) | {"chips": count})
      shown = {name: value for name, value in results[-1].items() if name != "placements"}
      print(json.dumps(shown), flush=True)
    print(f"\n{markdown(*overview(results))}\n\n{scaling(results)}\n", flush=True)


if __name__ == "__main__":
  main()
