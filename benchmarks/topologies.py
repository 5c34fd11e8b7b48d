"""How an iteration of diffu-GRPO scales over 8 to 256 chips of TPU v5e, by ahead-of-time compilation.

`python -m benchmarks.topologies weak` keeps twelve completions a chip, as d1's 96 are on eight; `strong` keeps 768
completions. Both compile `configs/aot.py:llada_8b,gsm8k,v5e`, with adapters and, where it fits, with every weight
trained, and print a JSON line a case, then tables. It needs `pip install "jax[tpu]"` and no TPU; minutes a case.
"""

import argparse
import contextlib
import io
import json
import os
import runpy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

from d1jax.aot import command
from d1jax.aot.table import GIB, markdown, overview

TOPOLOGIES = {8: "v5e:2x4", 16: "v5e:4x4", 32: "v5e:4x8", 64: "v5e:8x8", 128: "v5e:8x16", 256: "v5e:16x16"}
GENERATIONS = 6
"""Completions a prompt."""

ROWS_A_CHIP = 12
"""In weak scaling, and the most of a micro-batch."""

STRONG_ROWS = 768
FULL_FROM = 16
"""Chips that every weight's moments need."""


def analyse(chips: int, rows: int, full: bool) -> dict[str, Any]:
  """What `d1jax.main --config=configs/aot.py` writes of a topology."""
  get_config = runpy.run_path(str(Path(__file__).parents[1] / "configs" / "aot.py"))["get_config"]
  config = get_config("llada_8b,gsm8k,v5e" + ",full" * full)
  config.topology = TOPOLOGIES[chips]
  config.grpo.prompts_per_iteration = rows // GENERATIONS
  config.grpo.accumulation = max(1, rows // chips // ROWS_A_CHIP)
  config.grpo.rollout_chunks = max(1, rows // chips // GENERATIONS)
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
    chips, programs, each = result["chips"], result["programs"], result["iteration"]
    total = lambda kind, programs=programs: sum(found["runs"] * found["seconds"][kind] for found in programs.values())
    received = sum(found["runs"] * e["bytes"] for found in programs.values() for e in found["collectives"])
    most = max(found["memory"]["total"] for found in programs.values())
    rates = [result["rows"] / chips / each[kind] for kind in ("seconds_apart", "seconds")]
    first = first or rates
    efficiency = " - ".join(f"{rate / best:.0%}" for rate, best in zip(rates, first, strict=True))
    seconds = [f"{total(kind):.1f}" for kind in ("compute", "memory", "network")]
    span = f"{each['seconds']:.1f} - {each['seconds_apart']:.1f}"
    rows.append((chips, result["rows"], f"{most / GIB:.2f}", f"{received / GIB:.0f}", *seconds, span, efficiency))
  head = ("chips", "rows", "GiB a chip", "GiB received", "compute s", "memory s", "network s", "s an iteration")
  return markdown((*head, "efficiency"), rows)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("kind", choices=("weak", "strong"))
  parser.add_argument("--chips", type=int, nargs="+", default=list(TOPOLOGIES), choices=list(TOPOLOGIES))
  wanted = parser.parse_args()
  for full in (False, True):
    results = []
    for chips in wanted.chips:
      if full and chips < FULL_FROM:
        continue
      rows = ROWS_A_CHIP * chips if wanted.kind == "weak" else STRONG_ROWS
      results.append(analyse(chips, rows, full) | {"chips": chips})
      shown = {name: value for name, value in results[-1].items() if name != "placements"}
      print(json.dumps(shown), flush=True)
    print(f"\n{overview(results)}\n\n{scaling(results)}\n", flush=True)


if __name__ == "__main__":
  main()
