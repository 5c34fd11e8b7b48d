"""What a run learned as a folder for PyTorch: `--config=configs/export.py --config.checkpoint=DIR --config.output=DIR`.

A whole model in the names and the dtype of the folder that it started from, adapters merged; or the adapters alone as
PEFT keeps them. A PEFT adapter that was trained elsewhere is merged the same way.
"""

import dataclasses
from pathlib import Path

from ml_collections import ConfigDict

from d1jax.errors import RunError, input_checked
from d1jax.evaluation.subject import find_checkpoint
from d1jax.models import export, lora, names, peft, pretrained
from d1jax.models.tensor_files import TensorFiles
from d1jax.models.transformer import Params
from d1jax.pretrained import inspect
from d1jax.state import merge_for_rollout
from d1jax.training import experiment as experiments
from d1jax.training.checkpoint import Checkpoints
from d1jax.training.weights import Weights, check_base
from d1jax.training.workdir import read_tokenizer

FORMS = ("model", "adapter")


def run(config: ConfigDict) -> Path:
  """Writes `config.output` from a run's checkpoint, or from a folder and a PEFT adapter; returns it."""
  if config.output is None:
    raise RunError("config.output is not set; name a new folder")
  if config.form not in FORMS:
    raise RunError(f"config.form is {config.form!r}; known: {', '.join(FORMS)}")
  output = Path(config.output)
  with input_checked():
    if config.checkpoint is not None:
      _from_checkpoint(find_checkpoint(Path(config.checkpoint)), output, config)
    elif config.pretrained is not None and config.adapter is not None:
      _from_adapter(Path(config.pretrained), Path(config.adapter), output)
    else:
      raise RunError("name a run with config.checkpoint, or config.pretrained and config.adapter")
  print(f"{output}: {', '.join(sorted(path.name for path in output.iterdir()))}")
  return output


def _from_checkpoint(folder: Path, output: Path, config: ConfigDict) -> None:
  checkpoints = Checkpoints(folder.parent)
  metadata = checkpoints.metadata(int(folder.name))
  trained = experiments.of_checkpoint(metadata["config"], config)
  experiment = experiments.build(trained, read_tokenizer(folder.parent.parent.parent))
  weights, section = experiment.weights, trained[folder.parent.name]
  abstract = weights.abstract_state(experiment.optimizer(section, section.steps))
  trainable = checkpoints.restore(int(folder.name), abstract).state.trainable
  check_base(weights, metadata)
  if config.form == "adapter":
    _save_adapter(output, trainable, weights)
    return
  params = trainable
  if weights.lora is not None:
    # The same base as it is stored, so that nothing but the adapters' own matrices changes.
    dtype = export.widest(TensorFiles(weights.source.folder)) if weights.source else weights.base_dtype
    dense = dataclasses.replace(weights, quantized=None, base_dtype=dtype)
    params = merge_for_rollout(trainable, dense.frozen)
  source = weights.source.folder if weights.source else None
  tokenizer = experiment.tokenizer
  token_ids = {
    "mask_token_id": tokenizer.mask_id,
    "eos_token_id": tokenizer.stop_ids[0],
    "pad_token_id": tokenizer.pad_id,
  }
  _say_left_out(export.export(output, params, weights.network.size, source=source, token_ids=token_ids))
  if source is None:
    for name, content in tokenizer.files.items():
      if not (output / name).exists():
        (output / name).write_bytes(content)


def _from_adapter(base: Path, adapter: Path, output: Path) -> None:
  ids = inspect(base).ids
  loaded = pretrained.load(base, export.widest(TensorFiles(base)), rows=ids.mask_id + 1)
  _, tree = peft.load(adapter, loaded.network)
  params = lora.merged(lora.overlay(loaded.params, tree))
  token_ids = {"mask_token_id": ids.mask_id, "eos_token_id": ids.stop_ids[0], "pad_token_id": ids.pad_id}
  _say_left_out(export.export(output, params, loaded.network.size, source=base, token_ids=token_ids))


def _say_left_out(names_of_links: list[str]) -> None:
  if names_of_links:
    print(f"left out, as links out of the model's folder: {', '.join(names_of_links)}")


def _save_adapter(output: Path, adapter: Params, weights: Weights) -> None:
  if weights.lora is None:
    raise ValueError("the run trained every weight and has no adapter; use config.form=model")
  if output.exists() and any(output.iterdir()):
    raise ValueError(f"{output} is not empty; name a new folder")
  source = weights.source.folder if weights.source else None
  scheme = names.scheme_of(TensorFiles(source).shapes) if source else names.LLADA
  peft.save(output, adapter, weights.lora, base=str(source or ""), scheme=scheme)
