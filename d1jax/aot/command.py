"""Compiles diffu-GRPO for a TPU topology without a TPU: `--config=configs/aot.py:lora --config.topology=v5e:2x4`.

docs/scaling.md explains the numbers.
"""

import importlib.metadata
import json
import time
from typing import Any

import jax
from ml_collections import ConfigDict

from d1jax.aot import topology
from d1jax.aot.analysis import Analysis, iteration
from d1jax.aot.table import GIB, needed, tables
from d1jax.data import tokenizer as tokenizers
from d1jax.data.tokenizer import Tokenizer
from d1jax.errors import RunError, input_checked
from d1jax.parallel import chips
from d1jax.run import experiment as experiments
from d1jax.run.experiment import Experiment
from d1jax.run.workdir import local
from d1jax.training import configured
from d1jax.training.programs import Programs

LLADA_IDS = {"vocab_size": 126464, "mask_token_id": 126336, "eos_token_id": [126081, 126348], "pad_token_id": 126081}
"""The ids of LLaDA-8B-Instruct, from its config.json and tokenizer files."""

REMEDIES = {
  "publish": "cut the weights over more chips: a larger topology, config.mesh, config.rollout_rules",
  "rollout": "raise config.grpo.rollout_chunks, or cut the weights over more chips (config.mesh, config.rollout_rules)",
  "evaluation": "lower config.evaluation.batch_size, or cut the weights over more chips (config.rollout_rules)",
  "update": "raise config.grpo.accumulation, keep config.model.remat, or cut the weights over more chips (config.mesh)",
}


class DoesNotFitError(RunError):
  """The programs need more memory than the chips have."""

  exit_code = 1


def run(config: ConfigDict) -> dict[str, Any]:
  """Compiles and analyses every program; prints tables and a line of JSON, and writes `config.output`.

  Raises:
    DoesNotFitError: a program does not fit; it is raised after everything is printed.
    RunError: the topology or the configuration is wrong.
  """
  if config.topology is None:
    raise RunError("config.topology is not set; name a generation of TPUs and its chips, e.g. v5e:2x4")
  output = None if config.output is None else local("output", config.output)
  with input_checked():
    experiment, programs, width = on_topology(config)
    devices = experiment.model.weights.mesh.devices.flat
    chip = chips.of(devices[0].device_kind)
    if chip is None:
      raise ValueError(f"d1jax.parallel.chips does not know {devices[0].device_kind}: add it there")
    analysis = Analysis(experiment, programs, chip, width)
  result = described(experiment, width, config) | {"available": chip.hbm_bytes, "placements": analysis.placements()}
  chunks = config.grpo.rollout_chunks
  result["programs"] = {}
  for name in analysis.tracing:
    print(f"compiling {name} for {config.topology}", flush=True)
    began = time.process_time()
    with input_checked():
      found = {"runs": chunks if name == "rollout" else 1} | analysis.program(name)
    result["programs"][name] = found
    spent, room = time.process_time() - began, f"{chip.hbm_bytes / GIB:.2f} GiB a chip"
    print(f"{name} takes {needed(found)} of {room}; compiling it took {spent:.0f} s of CPU time", flush=True)
  print(f"compiling evaluation for {config.topology}", flush=True)
  result["evaluation"] = analysis.evaluation()
  parts = result["programs"] | {"evaluation": result["evaluation"]}
  refused = [name for name, found in parts.items() if not found["fits"]]
  read = all("seconds" in found for found in result["programs"].values())
  result |= {"fits": not refused, "iteration": iteration(result["programs"]) if read else None}
  text = json.dumps(result)
  if output is not None:
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text + "\n", encoding="utf-8")
  print(f"{text}\n\n{tables(result)}")
  if refused:
    raise DoesNotFitError(
      f"{config.topology} has {chip.hbm_bytes / 2**30:.2f} GiB a chip: "
      + "; ".join(f"{name} does not fit: {REMEDIES[name]}" for name in refused)
    )
  return result


def on_topology(config: ConfigDict) -> tuple[Experiment, Programs, int]:
  """The run that the configuration describes, on the topology's chips, and the length of its prompts.

  Raises:
    RunError: there is no such topology.
    ValueError: the configuration is wrong.
  """
  devices = topology.devices(config.topology, config.slices)
  meant = ConfigDict(config)
  meant.mode = "grpo"
  tokenizer = None if config.model.pretrained else stand_in_tokenizer(config.model.size)
  experiment = experiments.build(meant, tokenizer, devices)
  experiments.check_batches(meant, experiment.model.ways)
  experiments.check_lengths(meant, experiment.model.length_ways)
  steps = config.grpo.steps * config.grpo.num_iterations
  return (
    experiment,
    configured.programs(experiment, experiment.optimizer(experiment.config.grpo, steps)),
    max(config.data.prompt_buckets),
  )


def stand_in_tokenizer(size: str) -> Tokenizer:
  """A tokenizer of digits that replaces an absent one; for `llada_8b` it has LLaDA's special ids and size.

  No text is tokenised, so only these numbers matter.
  """
  model = tokenizers.train_sentencepiece(["0123456789"], model_type="char", vocab_size=32)
  files = {"tokenizer.model": model}
  files |= {"config.json": json.dumps(LLADA_IDS).encode()} if size == "llada_8b" else {}
  return tokenizers.from_files(files)


def compiler() -> str:
  """The version of the TPU compiler."""
  return importlib.metadata.version("libtpu")


def described(experiment: Experiment, width: int, config: ConfigDict) -> dict[str, Any]:
  """A description of the programs, of the chips and of the software versions."""
  weights, section = experiment.model.weights, config.grpo
  return {
    "jax": jax.__version__,
    "libtpu": compiler(),
    "topology": config.topology,
    "slices": config.slices,
    "mesh": dict(weights.mesh.shape),
    "model": config.model.pretrained or config.model.size,
    "training": "full" if weights.lora is None else f"LoRA rank {weights.lora.rank}",
    "rows": section.prompts_per_iteration * section.num_generations,
    "rollout_chunks": section.rollout_chunks,
    "accumulation": section.accumulation,
    "num_iterations": section.num_iterations,
    "prompt": width,
    "completion": experiment.sampler.completion_length,
    "steps": experiment.sampler.diffusion_steps,
    "cache": experiment.sampler.cache,
  }
