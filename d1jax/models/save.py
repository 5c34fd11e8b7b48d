"""Writes a Hugging Face folder that the original PyTorch code loads: the inverse of `load`.

Weights keep the names and dtypes of the folder that they came from, and an unchanged weight keeps its bits. A network
without a folder is written as a LLaDA.
"""

import json
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from d1jax import hub
from d1jax.files import write_check
from d1jax.models import families, names
from d1jax.models.families import llada
from d1jax.models.lora import Adapted
from d1jax.models.quantize import Quantized
from d1jax.models.tensor_files import INDEX, SINGLE, TensorFiles, write
from d1jax.models.transformer import Params, TransformerSize

SHARD = 2 * 2**30
"""The largest size of a file in bytes, unless one tensor is larger."""

DTYPES: Mapping[str, Any] = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16}


def widest(files: TensorFiles) -> Any:
  """The dtype that holds every tensor of a folder without loss."""
  found = set(files.dtypes.values())
  return DTYPES[found.pop()] if len(found) == 1 else np.float32


def export(
  folder: Path,
  params: Params,
  size: TransformerSize,
  *,
  source: Path | None,
  token_ids: Mapping[str, int],
  block: int | None = None,
  texts: Mapping[str, str] | None = None,
  shard_bytes: int = SHARD,
) -> list[str]:
  """Writes weights, config.json and, from `source`, every other file that is not weights.

  Everything is written into a temporary folder beside the target, which is renamed when it is complete.

  Args:
    folder: the target, which must not exist or must be empty.
    params: the weights, without adapters or quantisation.
    size: the sizes of the network.
    source: the folder that the weights came from; None writes a LLaDA in float32.
    token_ids: `mask_token_id`, `eos_token_id`, `pad_token_id`; written if the source's config.json lacks them.
    block: the block length of block-causal attention, which is written under the key of the family; None: the source's.
    texts: further files by name, which go before those of the source.
    shard_bytes: the largest size of a file in bytes.

  Returns:
    The names of files that were not copied, because they are links to outside of the source.

  Raises:
    ValueError: the folder is not empty or cannot be made, or a weight is quantised.
  """
  write_check(folder)
  if folder.exists() and any(folder.iterdir()):
    raise ValueError(f"{folder} is not empty; name a new folder")
  is_kept = lambda kind: any(
    isinstance(x, kind) for x in jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, kind))
  )
  if is_kept(Quantized):
    raise ValueError("quantised weights cannot be exported; read the base again in bfloat16 or float32")
  if is_kept(Adapted):
    raise ValueError("weights with adapters beside them cannot be exported; merge them first")
  folder = folder.resolve()  # a link to an empty folder stays a link
  folder.parent.mkdir(parents=True, exist_ok=True)
  draft = folder.with_name(f"{folder.name}.{secrets.token_hex(8)}.tmp")
  draft.mkdir()  # fails if another process has made this folder
  try:
    left_out: list[str] = []
    if source is None:
      config, scheme, dtypes = dict(llada.config_of(size)), llada.NAMES, dict[str, str]()
      family = llada.FAMILY
    else:
      left_out = _copy_all_but_weights(source, draft)
      files, description = TensorFiles(source), families.describe(source)
      family, config = description.family, dict(description.config)
      scheme, dtypes = family.scheme_of(files.shapes), files.dtypes
      smaller = [key for key in family.size_keys["vocab"] if (config.get(key) or 0) < size.vocab]
      config |= dict.fromkeys(smaller, size.vocab)
    config |= {k: v for k, v in token_ids.items() if config.get(k) is None}
    config |= {} if block is None else {family.block_key: block}
    config |= _code_on_the_hub(source, config)
    for name, text in (texts or {}).items():
      (draft / name).write_text(text, encoding="utf-8")
    (draft / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    _write_shards(draft, _tensors(params, scheme, size.layers, dtypes), shard_bytes)
    if folder.exists():
      folder.rmdir()
    draft.rename(folder)
  except BaseException:
    shutil.rmtree(draft, ignore_errors=True)
    raise
  return left_out


def _code_on_the_hub(source: Path | None, config: Mapping[str, Any]) -> dict[str, Any]:
  """The `auto_map` of a model of the hub with the names of the repository, where its code stays.

  `modeling_llada.LLaDAModelLM` of a folder that has this code no more becomes
  `GSAI-ML/LLaDA-8B-Instruct--modeling_llada.LLaDAModelLM`, which transformers fetches if it is told to trust it.
  """
  origin, named = hub.origin(source) if source else None, config.get("auto_map")
  if origin is None or not isinstance(named, dict):
    return {}

  def full(value: Any) -> Any:
    if not isinstance(value, str) or "--" in value:
      return value
    return f"{origin.repository}--{value}"

  return {"auto_map": {key: full(value) for key, value in named.items()}}


def _copy_all_but_weights(source: Path, target: Path) -> list[str]:
  """Copies files, except links to anything outside of the source; returns the names of those links.

  A link in a downloaded folder may point to any file of this machine, and exports are often given away. In the hub's
  cache all files are links, from `snapshots/REVISION` to `blobs` beside it.
  """
  home = source.resolve()
  inside = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
  left_out = []
  for path in sorted(source.iterdir()):
    is_weights = path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf") or path.name.endswith(".index.json")
    if path.is_file() and not is_weights:
      if path.resolve().parent in inside:
        shutil.copyfile(path, target / path.name)
      else:
        left_out.append(path.name)
  return left_out


def _tensors(
  params: Params, scheme: names.Scheme, layers: int, dtypes: Mapping[str, str]
) -> Iterator[tuple[str, np.ndarray]]:
  """Yields the tensors, one at a time on the host, in their original dtype or in float32."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    where = tuple(entry.key for entry in path)
    for layer, name in enumerate(names.tensors_of(where, scheme[where], layers)):
      value = jnp.asarray(leaf[layer] if where[0] == "blocks" else leaf)
      host = np.asarray(jax.device_get(value)).astype(DTYPES[dtypes.get(name, "F32")])
      yield name, np.ascontiguousarray(host.T if names.is_transposed(where) else host)


def _write_shards(folder: Path, tensors: Iterator[tuple[str, np.ndarray]], shard_bytes: int) -> None:
  """Writes one file, or several and their index; all tensors of a file are in memory together."""
  written: list[tuple[Path, list[str]]] = []
  held: dict[str, np.ndarray] = {}
  total = 0

  def flush() -> None:
    path = folder / f"{len(written)}.part"
    write(path, held)
    written.append((path, list(held)))
    held.clear()

  for name, value in tensors:
    if held and sum(x.nbytes for x in held.values()) + value.nbytes > shard_bytes:
      flush()
    held[name] = value
    total += value.nbytes
  flush()
  if len(written) == 1:
    written[0][0].rename(folder / SINGLE)
    return
  weight_map: dict[str, str] = {}
  for number, (path, contents) in enumerate(written, start=1):
    name = f"model-{number:05d}-of-{len(written):05d}.safetensors"
    path.rename(folder / name)
    weight_map |= dict.fromkeys(contents, name)
  index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
  (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
