"""Writes a Hugging Face folder that the original PyTorch code loads: the inverse of `pretrained`.

Weights go out in the names and the dtype of the folder that they came from; one that was never changed has the same
bits as there. A network that came from no folder is written as a LLaDA.
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

from d1jax.files import write_check
from d1jax.models import families, names
from d1jax.models.families import llada
from d1jax.models.lora import Adapted
from d1jax.models.quantize import Quantized
from d1jax.models.tensor_files import INDEX, SINGLE, TensorFiles, write
from d1jax.models.transformer import Params, TransformerSize

SHARD = 2 * 2**30
"""Bytes of a file, unless one tensor is larger."""

DTYPES: Mapping[str, Any] = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16}


def widest(files: TensorFiles) -> Any:
  """The dtype in which every tensor of a folder is held without loss."""
  found = set(files.dtypes.values())
  return DTYPES[found.pop()] if len(found) == 1 else np.float32


def export(
  folder: Path,
  params: Params,
  size: TransformerSize,
  *,
  source: Path | None,
  token_ids: Mapping[str, int],
  shard_bytes: int = SHARD,
) -> list[str]:
  """Writes weights, config.json and, from `source`, every other file that is not weights.

  Everything is written into a new folder beside the one that is asked for, and moved there when it is complete.

  Args:
    folder: made; must not exist, or be empty.
    params: dense.
    size: of the network.
    source: the folder that the weights came from; None writes a LLaDA in float32.
    token_ids: `mask_token_id`, `eos_token_id`, `pad_token_id`; written where the source's config.json lacks them.
    shard_bytes: the most bytes of a file.

  Returns:
    The names of the source's files that were not copied, because they are links out of it.

  Raises:
    ValueError: the folder is in use or cannot be one, or a weight is quantised.
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
  folder = folder.resolve()  # a link to an empty folder stays one
  folder.parent.mkdir(parents=True, exist_ok=True)
  draft = folder.with_name(f"{folder.name}.{secrets.token_hex(8)}.tmp")
  draft.mkdir()  # fails rather than take a folder that another process has made
  try:
    left_out: list[str] = []
    if source is None:
      config, scheme, dtypes = dict(llada.config_of(size)), llada.NAMES, dict[str, str]()
    else:
      left_out = _copy_all_but_weights(source, draft)
      files, description = TensorFiles(source), families.describe(source)
      scheme, dtypes = description.family.scheme_of(files.shapes), files.dtypes
      config = dict(description.config)
      smaller = [key for key in description.family.size_keys["vocab"] if (config.get(key) or 0) < size.vocab]
      config |= dict.fromkeys(smaller, size.vocab)
    config |= {k: v for k, v in token_ids.items() if config.get(k) is None}
    (draft / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    _write_shards(draft, _tensors(params, scheme, size.layers, dtypes), shard_bytes)
    if folder.exists():
      folder.rmdir()
    draft.rename(folder)
  except BaseException:
    shutil.rmtree(draft, ignore_errors=True)
    raise
  return left_out


def _copy_all_but_weights(source: Path, target: Path) -> list[str]:
  """Copies files, but no link to anything but another file of the source, and returns the names of those links.

  A link in a downloaded folder may point to any file of this machine, and an export is made to be given away. In the
  hub's cache all files are links, from `snapshots/REVISION` to `blobs` beside it.
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
  """Every tensor in turn, on the host one at a time, in the dtype that it had or in float32."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    where = tuple(entry.key for entry in path)
    for layer, name in enumerate(names.tensors_of(where, scheme[where], layers)):
      value = jnp.asarray(leaf[layer] if where[0] == "blocks" else leaf)
      host = np.asarray(jax.device_get(value)).astype(DTYPES[dtypes.get(name, "F32")])
      yield name, np.ascontiguousarray(host.T if names.is_transposed(where) else host)


def _write_shards(folder: Path, tensors: Iterator[tuple[str, np.ndarray]], shard_bytes: int) -> None:
  """One file, or several and their index; a file's tensors are in memory together."""
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
