"""Exports a run as a folder for PyTorch: `--config=configs/export.py --config.checkpoint=DIR --config.output=DIR`.

The export is a whole model with merged adapters, in the names and the dtype of the folder that training started from;
or the adapters alone, as PEFT stores them. A PEFT adapter that was trained elsewhere is merged the same way.
"""

import dataclasses
import tempfile
from pathlib import Path

from ml_collections import ConfigDict

from d1jax.data import folder as folders
from d1jax.errors import RunError, input_checked
from d1jax.evaluation.subject import Found, find_checkpoint, read_run
from d1jax.files import FileError, write_check
from d1jax.models import families, load, lora, peft, save
from d1jax.models.families import llada
from d1jax.models.tensor_files import TensorFiles
from d1jax.models.transformer import Params
from d1jax.run import limits
from d1jax.run.workdir import folder, local, unwritable
from d1jax.source import inspect
from d1jax.state import merge_for_rollout
from d1jax.weights import Weights

FORMS = ("model", "adapter")


def run(config: ConfigDict) -> Path:
  """Writes `config.output` from a run's checkpoint, or from a folder and a PEFT adapter; returns it."""
  if config.output is None:
    raise RunError("config.output is not set; name a new folder")
  if config.form not in FORMS:
    raise RunError(f"config.form is {config.form!r}; known: {', '.join(FORMS)}")
  output = local("output", config.output)
  with input_checked():
    limits.check(config)
    check_output(output)
    if config.checkpoint is not None:
      _from_checkpoint(find_checkpoint(folder(config.checkpoint)), output, config)
    elif config.pretrained is not None and config.adapter is not None:
      _from_adapter(Path(config.pretrained), Path(config.adapter), output)
    else:
      raise RunError("name a run with config.checkpoint, or config.pretrained and config.adapter")
  print(f"{output}: {', '.join(sorted(path.name for path in output.iterdir()))}")
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
  _, experiment, trainable = read_run(found, config)
  weights = experiment.model.weights
  if config.form == "adapter":
    _save_adapter(output, trainable, weights)
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
  block = experiment.model.denoiser.block
  _say_left_out(save.export(output, params, weights.network.size, source=source, token_ids=token_ids, block=block))
  if source is None:
    for name, content in tokenizer.files.items():
      if not (output / name).exists():
        (output / name).write_bytes(content)
  elif weights.source is not None and weights.source.as_start():
    for name, content in folders.with_mask(folders.read(output), tokenizer.mask_id).items():
      (output / name).write_bytes(content)


def _from_adapter(base: Path, adapter: Path, output: Path) -> None:
  ids = inspect(base).ids
  loaded = load.load(base, save.widest(TensorFiles(base)), rows=ids.mask_id + 1)
  _, tree = peft.load(adapter, loaded.network)
  params = lora.merged(lora.overlay(loaded.params, tree))
  token_ids = {"mask_token_id": ids.mask_id, "eos_token_id": ids.stop_ids[0], "pad_token_id": ids.pad_id}
  _say_left_out(save.export(output, params, loaded.network.size, source=base, token_ids=token_ids))


def _say_left_out(names_of_links: list[str]) -> None:
  if names_of_links:
    print(f"left out, as links out of the model's folder: {', '.join(names_of_links)}")


def _save_adapter(output: Path, adapter: Params, weights: Weights) -> None:
  if weights.lora is None:
    raise ValueError("the run trained every weight and has no adapter; use config.form=model")
  source = weights.source.folder if weights.source else None
  tensors = TensorFiles(source).shapes if source else {}
  scheme = families.describe(source).family.scheme_of(tensors) if source else llada.NAMES
  peft.save(output, adapter, weights.lora, base=str(source or ""), scheme=scheme)
