"""Exports a run as a folder for PyTorch: `--config=configs/export.py --config.checkpoint=DIR --config.output=DIR`.

The export is a whole model with merged adapters, in the names and the dtype of the folder that training started from;
or the adapters alone, as PEFT stores them. A PEFT adapter that was trained elsewhere is merged the same way. A model
card and a generation_config.json tell how the run went and how it samples.
"""

import dataclasses
import json
import logging
import tempfile
from pathlib import Path

from ml_collections import ConfigDict

from d1jax import card, generation_config, hub
from d1jax.data import folder as folders
from d1jax.data.folder import SpecialIds
from d1jax.data.tokenizer import Tokenizer
from d1jax.diffusion.rollout import SamplerSpec
from d1jax.errors import RunError, input_checked
from d1jax.evaluation.subject import Found, find_checkpoint, read_run, saying
from d1jax.files import FileError, read_json, write_check
from d1jax.models import families, load, lora, peft, save
from d1jax.models.families import llada
from d1jax.models.tensor_files import TensorFiles
from d1jax.models.transformer import Params
from d1jax.run import limits
from d1jax.run.experiment import Experiment
from d1jax.run.workdir import Folder, folder, local, unwritable
from d1jax.source import fetch, inspect
from d1jax.state import merge_for_rollout
from d1jax.weights import Weights

FORMS = ("model", "adapter")

log = logging.getLogger(__name__)


def run(config: ConfigDict) -> Path:
  """Writes `config.output` from a run's checkpoint, or from a folder and a PEFT adapter; returns it.

  With `config.push_to_hub` it is pushed too.
  """
  if config.output is None:
    raise RunError("config.output is not set; name a new folder")
  if config.form not in FORMS:
    raise RunError(f"config.form is {config.form!r}; known: {', '.join(FORMS)}")
  output = local("output", config.output)
  with input_checked():
    limits.check(config)
    check_output(output)
    if config.push_to_hub is not None:
      hub.check_push(config.push_to_hub)
    if config.checkpoint is not None:
      _from_checkpoint(find_checkpoint(folder(config.checkpoint)), output, config)
    elif config.pretrained is not None and config.adapter is not None:
      _from_adapter(fetch(config.pretrained), fetch(config.adapter), output)
    else:
      raise RunError("name a run with config.checkpoint, or config.pretrained and config.adapter")
  print(f"{output}: {', '.join(sorted(path.name for path in output.iterdir()))}")
  if config.push_to_hub is not None:
    with input_checked():
      print(f"pushed to {hub.push(output, config.push_to_hub, private=config.private)}")
  return output


def check_output(output: Path) -> None:
  """Checks, before a model is read, that an export can be written: the folder must be new or empty.

  Raises:
    FileError: a file or a link has the name of this folder, or of one of its parents.
    RunError: it cannot be written there.
  """
  write_check(output)
  if output.is_symlink():
    raise FileError(f"{output} is a link; name the folder that it leads to, or a new one")
  if output.is_dir() and any(output.iterdir()):
    raise FileError(f"{output} is not empty; name a new folder")
  place = next(folder for folder in output.parents if folder.exists())
  try:
    with tempfile.TemporaryDirectory(dir=place, prefix=f".{output.name}."):
      pass
  except OSError as error:
    raise unwritable(place, error) or error from None


def _from_checkpoint(found: Found, output: Path, config: ConfigDict) -> None:
  home, experiment, trainable = read_run(found, config)
  weights = experiment.model.weights
  if config.form == "adapter":
    _save_adapter(output, trainable, weights)
    for name, text in _about(found, home, experiment, config).items():
      (output / name).write_text(text, encoding="utf-8")
    return
  params = trainable
  if weights.lora is not None:
    # The base keeps its stored dtype, so that only the matrices with adapters change.
    dtype = save.widest(TensorFiles(weights.source.folder)) if weights.source else weights.base_dtype
    dense = dataclasses.replace(weights, quantized=None, base_dtype=dtype)
    params = merge_for_rollout(trainable, dense.frozen)
  source = weights.source.folder if weights.source else None
  tokenizer = experiment.tokenizer
  token_ids = {
    "mask_token_id": tokenizer.mask_id,
    "eos_token_id": tokenizer.stop_ids[0],
    "pad_token_id": tokenizer.pad_id,
  }
  block, texts = experiment.model.denoiser.block, _about(found, home, experiment, config)
  size = weights.network.size
  with saying(f"writing {output}"):
    left_out = save.export(output, params, size, source=source, token_ids=token_ids, block=block, texts=texts)
  _say_left_out(left_out)
  if source is None:
    for name, content in tokenizer.files.items():
      if not (output / name).exists():
        (output / name).write_bytes(content)
  elif weights.source is not None and weights.source.as_start():
    for name, content in folders.with_mask(folders.read(output), tokenizer.mask_id).items():
      (output / name).write_bytes(content)


def _from_adapter(base: Path, adapter: Path, output: Path) -> None:
  ids = inspect(base).ids
  with saying(f"reading {base} and {adapter}"):
    loaded = load.load(base, save.widest(TensorFiles(base)), rows=ids.mask_id + 1)
    _, tree = peft.load(adapter, loaded.network)
  params = lora.merged(lora.overlay(loaded.params, tree))
  token_ids = {"mask_token_id": ids.mask_id, "eos_token_id": ids.stop_ids[0], "pad_token_id": ids.pad_id}
  texts, size = _sampling(base, generation_config.read_sampler(adapter), ids), loaded.network.size
  with saying(f"writing {output}"):
    left_out = save.export(output, params, size, source=base, token_ids=token_ids, texts=texts)
  _say_left_out(left_out)


def _sampling(source: Path | None, sampler: SamplerSpec | None, ids: Tokenizer | SpecialIds) -> dict[str, str]:
  """generation_config.json: that of the source, and how the run samples; nothing if nobody knows."""
  if sampler is None:
    return {}
  path = source / generation_config.FILE if source else None
  stops = list(ids.stop_ids) if len(ids.stop_ids) > 1 else ids.stop_ids[0]
  is_there = path is not None and path.exists()
  found = read_json(path, dict) if is_there else {"eos_token_id": stops, "pad_token_id": ids.pad_id}
  return {generation_config.FILE: json.dumps(found | generation_config.keys_of(sampler), indent=2) + "\n"}


def _about(found: Found, home: Folder, experiment: Experiment, config: ConfigDict) -> dict[str, str]:
  """The texts that tell of a run: its model card and its generation_config.json."""
  weights, stage = experiment.model.weights, home.parent.name
  source = weights.source.folder if weights.source else None
  base = None if source is None else hub.origin(source) or source.absolute().name
  results = None
  if (found.workdir / "results.json").exists():
    try:
      results = read_json(found.workdir / "results.json", dict)
    except FileError as error:
      log.warning("%s; the model card has no results", error)
  is_of_it = results is not None and str(results.get("checkpoint")).split("/")[-2:] == [stage, home.name]
  facts = card.Facts(
    config.push_to_hub or Path(config.output).absolute().name,
    config.form,
    base,
    stage,
    int(home.name),
    experiment.config.to_dict(),
    results if is_of_it else None,
    experiment.sampler,
  )
  try:
    text = card.write(facts)
  except (LookupError, TypeError, ValueError, AttributeError) as error:
    log.warning("%s/results.json is damaged (%s); the model card has no results", found.workdir, error)
    text = card.write(facts._replace(results=None))
  return _sampling(source, experiment.sampler, experiment.tokenizer) | {"README.md": text}


def _say_left_out(names_of_links: list[str]) -> None:
  if names_of_links:
    print(f"left out, as links out of the model's folder: {', '.join(names_of_links)}")


def _save_adapter(output: Path, adapter: Params, weights: Weights) -> None:
  if weights.lora is None:
    raise ValueError("the run trained every weight and has no adapter; use config.form=model")
  source = weights.source.folder if weights.source else None
  tensors = TensorFiles(source).shapes if source else {}
  scheme = families.describe(source).family.scheme_of(tensors) if source else llada.NAMES
  origin = hub.origin(source) if source else None
  peft.save(output, adapter, weights.lora, base=origin.repository if origin else str(source or ""), scheme=scheme)
