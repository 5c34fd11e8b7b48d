"""The jobs whose analyses are kept: every topology, with adapters and with every weight trained."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from d1jax.aot import command
from tests import jobs

GOLDENS = Path(__file__).with_name("goldens")
TOPOLOGIES = ("v5e:2x4", "v5e:4x4", "v5p:2x2x4", "v6e:4x4", "v5p:4x4x4", "v6e:16x16")

SMALL = {
  "model.size": "tiny",
  "model.overrides.embed": 512,
  "model.overrides.heads": 16,
  "model.overrides.mlp": 1024,
  "model.overrides.layers": 2,
  "lora.rank": 8,
  "data.prompt_buckets": (104,),
  "rollout.completion_length": 24,
  "rollout.diffusion_steps": 6,
  "rollout.block_length": 12,
  "grpo.num_iterations": 2,
  "grpo.logits_tile": 32,
}
"""A network and a rollout that compile in seconds, on the placements of the large one."""


@dataclasses.dataclass(frozen=True)
class Case:
  """One job: LLaDA-8B, or a small network, on a topology; twelve rows a chip, as d1's 96 are on eight."""

  topology: str
  full: bool = False
  small: bool = False
  prompts_a_chip: int = 2
  block: int | None = None

  @property
  def chips(self) -> int:
    count = 1
    for size in self.topology.partition(":")[2].split("x"):
      count *= int(size)
    return count

  @property
  def name(self) -> str:
    """Of its file."""
    words = ["small" if self.small else "llada_8b", self.topology.replace(":", "_"), "full" if self.full else "lora"]
    return "-".join(words + ([f"block_{self.block}"] if self.block else []))

  @property
  def fields(self) -> dict[str, Any]:
    """What the case changes of its preset."""
    fields: dict[str, Any] = {"topology": self.topology, "grpo.prompts_per_iteration": self.prompts_a_chip * self.chips}
    if self.full and self.chips < 16:
      fields |= {"mesh.fsdp": 2, "mesh.tensor": 4}  # its preset is for 16 chips
    if self.small:
      fields |= SMALL | ({"lora.rank": 0} if self.full else {})
    if self.block:
      fields |= {"model.block": self.block, "rollout.block_length": self.block, "rollout.diffusion_steps": 12}
    return fields

  @property
  def words(self) -> str:
    """The preset."""
    return ",".join(["llada_8b", "gsm8k", self.topology.partition(":")[0], *(["full"] if self.full else [])])

  @property
  def config(self) -> ConfigDict:
    """The configuration."""
    config = jobs.load("aot", self.words)
    for field, value in self.fields.items():
      config.update_from_flattened_dict({field: value})
    return config

  @property
  def flags(self) -> list[str]:
    """The same on the command line."""
    return [
      f"--config=configs/aot.py:{self.words}",
      *(f"--config.{name}={value}" for name, value in self.fields.items()),
    ]

  def golden(self) -> Path:
    """The file of this case under the compiler at hand."""
    return GOLDENS / f"libtpu-{command.compiler()}" / f"{self.name}.json"


SMALL_CASES = [Case(topology, full, small=True) for topology in TOPOLOGIES for full in (False, True)]
BLOCK_CASE = Case("v5e:2x4", small=True, block=4)
"""A block-causal network, which takes two steps a block."""

LARGE_CASES = [Case(topology, full) for topology in TOPOLOGIES for full in (False, True)]


def summary(result: dict[str, Any]) -> dict[str, Any]:
  """What must stay: placements and collectives exactly, and bytes, nearly."""
  programs = {}
  for name, found in result["programs"].items():
    programs[name] = {"fits": found["fits"]}
    if "memory" in found:
      kinds = sorted({(each["kind"], each["in_loop"]) for each in found["collectives"]})
      programs[name] |= {"collectives": [list(kind) for kind in kinds], "weights_in_loop": found["weights_in_loop"] > 0}
  return {"placements": result["placements"], "programs": programs}


def sizes(result: dict[str, Any]) -> dict[str, int]:
  """The bytes of a result by what they are."""
  found: dict[str, int] = {}
  for name, program in result["programs"].items():
    if "memory" not in program:
      found[f"{name} needed"] = program["needed"]
      continue
    memory = program["memory"]
    found |= {f"{name} {kind}": size for kind, size in memory["arguments"].items() if kind != "rest"}
    found |= {f"{name} {kind}": memory[kind] for kind in ("outputs", "temporaries", "elsewhere", "total")}
    for each in program["collectives"]:
      found[f"{name} {each['kind']} in_loop={each['in_loop']}"] = each["bytes"]
  return found


def read(path: Path) -> dict[str, Any]:
  """A golden file."""
  return json.loads(path.read_text())
