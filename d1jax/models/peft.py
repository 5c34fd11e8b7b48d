"""Reads and writes adapter folders of the PEFT library: adapter_config.json and adapter_model.safetensors."""

import dataclasses
import json
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from d1jax.errors import reworded
from d1jax.files import read_json, write_check
from d1jax.models.families import FAMILIES
from d1jax.models.family import shown
from d1jax.models.lora import PROJECTIONS, Adapter, LoraSpec
from d1jax.models.names import Scheme
from d1jax.models.tensor_files import TensorFiles, write
from d1jax.models.transformer import Network, Params

LARGEST_SCALE = 1e6
"""The limit of lora_alpha / r, or lora_alpha / sqrt(r). Usual values are 0.01 to 100; float32 ends at 3e38."""

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

FIXED: Mapping[str, Any] = {
  "alpha_pattern": {},
  "bias": "none",
  "fan_in_fan_out": False,
  "layer_replication": None,
  "layers_to_transform": None,
  "lora_bias": False,
  "modules_to_save": None,
  "peft_type": "LORA",
  "rank_pattern": {},
  "trainable_token_indices": None,
  "use_dora": False,
}
"""The supported values of PEFT's options."""


OTHERS: Mapping[str, Any] = {
  "alora_invocation_tokens": None,
  "arrow_config": None,
  "kasa_config": None,
  "monteclora_config": None,
  "target_parameters": None,
  "use_bdlora": None,
  "use_qalora": False,
  "velora_config": None,
}
"""The supported values of options that only newer versions of PEFT have."""

STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` that do not change the base; the others (pissa, olora, ...) subtract from it."""


def _module(scheme: Scheme, target: str) -> str:
  """The module name of a projection, with `{}` for the layer and without `.weight`."""
  return scheme[("blocks", *PROJECTIONS[target])].removesuffix(".weight")


def load(folder: Path, network: Network) -> tuple[LoraSpec, Params]:
  """Reads an adapter folder with the names of any family.

  The tensors determine which projections it has, not `target_modules`, because PEFT silently skips names there that
  match nothing.

  Args:
    folder: a folder with adapter_config.json and adapter_model.safetensors.
    network: the network of the base.

  Returns:
    The adapters' settings, and the adapter tree in float32.

  Raises:
    ValueError: an option is not supported, or a tensor is missing, unknown or misshaped; the message names it.
  """
  spec = _options(folder / CONFIG)
  files = TensorFiles(folder, f"{WEIGHTS}.index.json", WEIGHTS)
  shapes, layers = jax.eval_shape(network.init, jax.random.key(0))["blocks"], network.size.layers
  spelled = _scheme_of(files.shapes)
  unread = set(files.shapes)
  tree: dict[str, dict[str, Adapter]] = {}
  targets = []
  for target, (part, weight) in PROJECTIONS.items():
    module = PREFIX + _module(spelled, target)
    if not any(f"{module.format(i)}.lora_{side}.weight" in files.shapes for i in range(layers) for side in "AB"):
      continue
    inner, outer = shapes[part][weight].shape[1:]
    stacks = []
    for side, shape in (("A", (spec.rank, inner)), ("B", (outer, spec.rank))):
      tensors = [f"{module.format(i)}.lora_{side}.weight" for i in range(layers)]
      for name in tensors:
        if files.shapes.get(name) != shape:
          found = files.shapes.get(name, "no tensor")
          raise ValueError(f"{folder / WEIGHTS}: {name} has shape {found}, expected {shape}")
      stacks.append(jnp.stack([np.asarray(files.read(name), np.float32).T for name in tensors]))
      unread -= set(tensors)
    tree.setdefault(part, {})[weight] = Adapter(stacks[0], stacks[1], spec.scale, spec.dropout)
    targets.append(target)
  if unread:
    example = next(
      (target for target in PROJECTIONS if f"{_module(spelled, target)}.".rpartition(".{}.")[2] in min(unread)),
      "q_proj",
    )
    expected = f"{PREFIX}{_module(spelled, example)}.lora_A.weight".format("N")
    raise ValueError(
      f"{folder / WEIGHTS}: {min(unread)} belongs to no projection of the network; expected names are such as"
      f" {expected}, with N from 0 to {layers - 1}"
    )
  if not targets:
    raise ValueError(f"{folder / WEIGHTS} holds no tensors of an adapter")
  return dataclasses.replace(spec, targets=tuple(targets)), {"blocks": tree}


def _scheme_of(tensors: Collection[str]) -> Scheme:
  """The scheme of the family that these tensor names belong to; the first family's scheme if they belong to none."""
  schemes = [scheme for family in FAMILIES.values() for scheme in family.schemes]
  layers = lambda scheme: _module(scheme, "q_proj").partition("{}")[0]
  return next((scheme for scheme in schemes if any(layers(scheme) in name for name in tensors)), schemes[0])


def _options(path: Path) -> LoraSpec:
  """The settings in an adapter_config.json, without the targets; raises an error for unsupported options."""
  with reworded("", "; point to the folder of a LoRA adapter"):
    config = read_json(path, dict)
  numbers = {
    "r": config.get("r"),
    "lora_alpha": config.get("lora_alpha"),
    "lora_dropout": config.get("lora_dropout", 0),
  }
  for name, value in numbers.items():
    kinds = int if name == "r" else (int, float)
    if not isinstance(value, kinds) or isinstance(value, bool) or not math.isfinite(value):
      number = "a whole number" if name == "r" else "a number"
      raise ValueError(
        f"{path} is not the configuration of a LoRA adapter ({name}={shown.repr(value)} is not {number})"
      )
  rank, alpha, dropout = int(numbers["r"]), float(numbers["lora_alpha"]), float(numbers["lora_dropout"])
  rslora = config.get("use_rslora") or False
  if not isinstance(rslora, bool):
    raise ValueError(f"{path}: use_rslora={shown.repr(rslora)} is neither true nor false")
  with reworded(f"{path} is not the configuration of a LoRA adapter (", ")"):
    spec = LoraSpec(rank, alpha, dropout, rslora=rslora)
  if spec.scale > LARGEST_SCALE:
    raise ValueError(f"{path}: lora_alpha={alpha:g} is more than {LARGEST_SCALE:g} times r={rank}; correct it")
  start = config.get("init_lora_weights", True)
  if start not in STARTS:
    raise ValueError(f"{path}: init_lora_weights={shown.repr(start)} is not supported: it changes the base")
  for name, expected in {**FIXED, **OTHERS}.items():
    value = config.get(name, expected)
    is_empty = value is None or value is False or value in ({}, [])
    if value != expected and (expected or not is_empty):
      raise ValueError(f"{path}: {name}={shown.repr(value)} is not supported, only {expected!r}")
  return spec


def save(folder: Path, adapter: Params, spec: LoraSpec, *, base: str, scheme: Scheme) -> None:
  """Writes an adapter folder that PEFT loads.

  `folder` is made, `base` is the name or folder of the base model, and `scheme` has the names of its tensors.

  Raises:
    ValueError: the folder, or a parent of it, is a file.
  """
  write_check(folder)
  folder.mkdir(parents=True, exist_ok=True)
  tensors: dict[str, np.ndarray] = {}
  modules = {target: _module(scheme, target) for target in spec.targets}
  for target, module in modules.items():
    part, weight = PROJECTIONS[target]
    stack: Adapter = adapter["blocks"][part][weight]
    for side, layers in (("A", stack.a), ("B", stack.b)):
      for i, value in enumerate(np.asarray(jax.device_get(layers))):
        tensors[f"{PREFIX}{module.format(i)}.lora_{side}.weight"] = np.ascontiguousarray(value.T)
  write(folder / WEIGHTS, tensors)
  config = {
    **FIXED,
    "base_model_name_or_path": base,
    "inference_mode": True,
    "lora_alpha": spec.alpha,
    "lora_dropout": spec.dropout,
    "r": spec.rank,
    "target_modules": _target_modules(scheme, list(modules.values())),
    "task_type": None,
    "use_rslora": spec.rslora,
  }
  (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _target_modules(scheme: Scheme, modules: list[str]) -> list[str] | str:
  """The modules' last names; or a pattern, if another module has the same last name, like LLaDA's head (`ff_out`)."""
  last = lambda module: module.rpartition(".")[2]
  others = {last(module) for name in scheme.values() if (module := name.removesuffix(".weight")) not in modules}
  leaves = [last(module) for module in modules]
  if others.isdisjoint(leaves):
    return leaves
  layers = last(modules[0].partition(".{}.")[0])
  return rf".*\.{layers}\.\d+\.({'|'.join(re.escape(module.partition('.{}.')[2]) for module in modules)})"
