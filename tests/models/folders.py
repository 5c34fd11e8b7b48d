"""Small Hugging Face folders with the real names, layouts and configuration keys of the models that d1jax reads.

A weight depends on its name and the seed alone, so that the PyTorch script and the tests write the same bytes.
"""

import json
import os
import unittest
import zlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from tests.models.configs import CONFIGS

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}

SIZES: dict[str, dict[str, int]] = {
  "llada": dict(vocab=83, embed=64, heads=4, kv_heads=4, head_size=16, mlp=96, layers=2),
  "llada_llama_names": dict(vocab=80, embed=64, heads=4, kv_heads=4, head_size=16, mlp=96, layers=2),
  "dream": dict(vocab=72, embed=64, heads=4, kv_heads=2, head_size=16, mlp=96, layers=3),
  "qwen2": dict(vocab=72, embed=64, heads=4, kv_heads=2, head_size=16, mlp=80, layers=3),
  "qwen3": dict(vocab=72, embed=64, heads=4, kv_heads=2, head_size=32, mlp=128, layers=3),
  "a2d_qwen3": dict(vocab=72, embed=64, heads=4, kv_heads=2, head_size=32, mlp=128, layers=3),
  "sdar": dict(vocab=72, embed=64, heads=4, kv_heads=2, head_size=32, mlp=128, layers=3),
  "fast_dllm_qwen": dict(vocab=72, embed=64, heads=4, kv_heads=2, head_size=16, mlp=192, layers=3),
  "illada": dict(vocab=72, embed=64, heads=4, kv_heads=2, head_size=16, mlp=128, layers=2),
  "llama": dict(vocab=72, embed=64, heads=4, kv_heads=2, head_size=16, mlp=96, layers=2),
  "llama_tied": dict(vocab=72, embed=64, heads=4, kv_heads=1, head_size=24, mlp=96, layers=3),
}
"""Default sizes of a family; those of `WITH_HEAD_DIM` may have heads * head_size other than embed."""

WITH_HEAD_DIM = ("llama_tied", "qwen3", "a2d_qwen3", "sdar")

FAMILIES = tuple(SIZES)

TIED = ("qwen2", "a2d_qwen3", "fast_dllm_qwen", "illada", "llama_tied")
BIASED = ("dream", "qwen2", "fast_dllm_qwen")
NORMED = ("qwen3", "a2d_qwen3", "sdar")
WITH_MASK = ("llada", "llada_llama_names", "dream")
"""Families with a tied head; with biases and with norms of q and k; and with a mask id in config.json."""


def llada_shapes(s: dict[str, int]) -> dict[str, tuple[int, ...]]:
  """The names of LLaDA's own code. A block's down projection and the head end in the same word."""
  inner, keys = s["heads"] * s["head_size"], s["kv_heads"] * s["head_size"]
  root = "model.transformer"
  shapes: dict[str, tuple[int, ...]] = {
    f"{root}.wte.weight": (s["vocab"], s["embed"]),
    f"{root}.ln_f.weight": (s["embed"],),
    f"{root}.ff_out.weight": (s["vocab"], s["embed"]),
  }
  for i in range(s["layers"]):
    block = f"{root}.blocks.{i}"
    shapes |= {
      f"{block}.attn_norm.weight": (s["embed"],),
      f"{block}.q_proj.weight": (inner, s["embed"]),
      f"{block}.k_proj.weight": (keys, s["embed"]),
      f"{block}.v_proj.weight": (keys, s["embed"]),
      f"{block}.attn_out.weight": (s["embed"], inner),
      f"{block}.ff_norm.weight": (s["embed"],),
      f"{block}.ff_proj.weight": (s["mlp"], s["embed"]),
      f"{block}.up_proj.weight": (s["mlp"], s["embed"]),
      f"{block}.ff_out.weight": (s["embed"], s["mlp"]),
    }
  return shapes


def llama_shapes(
  s: dict[str, int], *, biases: bool = False, norms: bool = False, tied: bool = False
) -> dict[str, tuple[int, ...]]:
  """The names of Llama, Qwen2 (biases of q, k and v) and Qwen3 (norms of q and k) in transformers."""
  inner, keys = s["heads"] * s["head_size"], s["kv_heads"] * s["head_size"]
  shapes: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (s["vocab"], s["embed"]),
    "model.norm.weight": (s["embed"],),
  }
  if not tied:
    shapes["lm_head.weight"] = (s["vocab"], s["embed"])
  for i in range(s["layers"]):
    layer = f"model.layers.{i}"
    for name, rows in (("q", inner), ("k", keys), ("v", keys)):
      shapes[f"{layer}.self_attn.{name}_proj.weight"] = (rows, s["embed"])
      if biases:
        shapes[f"{layer}.self_attn.{name}_proj.bias"] = (rows,)
    if norms:
      shapes |= {f"{layer}.self_attn.{name}_norm.weight": (s["head_size"],) for name in "qk"}
    shapes |= {
      f"{layer}.self_attn.o_proj.weight": (s["embed"], inner),
      f"{layer}.mlp.gate_proj.weight": (s["mlp"], s["embed"]),
      f"{layer}.mlp.up_proj.weight": (s["mlp"], s["embed"]),
      f"{layer}.mlp.down_proj.weight": (s["embed"], s["mlp"]),
      f"{layer}.input_layernorm.weight": (s["embed"],),
      f"{layer}.post_attention_layernorm.weight": (s["embed"],),
    }
  return shapes


def shapes_of(family: str, s: dict[str, int]) -> dict[str, tuple[int, ...]]:
  """The tensors of a family, [out, in] as PyTorch stores them."""
  if family == "llada":
    return llada_shapes(s)
  return llama_shapes(s, biases=family in BIASED, norms=family in NORMED, tied=family in TIED)


def draw(name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
  """The float32 weight of this name: matrices of variance 1 / fan in, norms around 1, small biases.

  `RandomState` draws the same numbers in every version of numpy.
  """
  noise = np.random.RandomState(zlib.crc32(name.encode()) ^ seed).standard_normal(shape)
  if len(shape) == 1:
    values = 0.1 * noise if name.endswith(".bias") else 1 + 0.1 * noise
  else:
    values = noise / np.sqrt(shape[-1])
  return values.astype(np.float32)


def probe(matrix: np.ndarray) -> float:
  """u^T W v with fixed u and v, in float64: one number that a transposed or permuted matrix does not have."""
  rows, columns = (np.cos(np.arange(1, n + 1)) for n in matrix.shape)
  return float(rows @ matrix.astype(np.float64) @ columns)


def write(
  folder: Path, family: str, *, dtype: str = "float32", shards: int = 1, seed: int = 0, **sizes: int
) -> dict[str, np.ndarray]:
  """Writes config.json and the weights of a small model, and returns the weights as they were written.

  Args:
    folder: is made where it does not exist.
    family: one of `FAMILIES`.
    dtype: `float32` or `bfloat16`; bfloat16 weights are the float32 ones, rounded.
    shards: more than one writes an index, too; tensors are dealt out one by one, so that no shard holds a whole layer.
    seed: of the weights, from 0 to 2^32 - 1.
    **sizes: what differs from `SIZES[family]`: vocab, embed, heads, kv_heads, head_size, mlp, layers.

  Raises:
    ValueError: of an unknown size, or of more shards than tensors.
  """
  if unknown := set(sizes) - set(SIZES[family]):
    raise ValueError(f"unknown sizes {sorted(unknown)}; there are {sorted(SIZES[family])}")
  size = SIZES[family] | sizes
  if family not in WITH_HEAD_DIM and size["heads"] * size["head_size"] != size["embed"]:
    raise ValueError(f"{family} has no head_dim: heads * head_size must be embed, got {size}")
  weights = {name: draw(name, shape, seed).astype(DTYPES[dtype]) for name, shape in shapes_of(family, size).items()}
  if shards > len(weights):
    raise ValueError(f"shards={shards}, but {family} has {len(weights)} tensors")
  folder.mkdir(parents=True, exist_ok=True)
  config = dict(sorted(CONFIGS[family](size, dtype).items()))
  (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

  if shards == 1:
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return weights
  homes = {name: i % shards for i, name in enumerate(sorted(weights))}
  files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
  for i, file in enumerate(files):
    mine = {name: weights[name] for name, home in homes.items() if home == i}
    save_file(mine, folder / file, metadata={"format": "pt"})
  index = {
    "metadata": {"total_size": sum(weight.nbytes for weight in weights.values())},
    "weight_map": {name: files[home] for name, home in homes.items()},
  }
  (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
  return weights


def hub() -> Path:
  """The real models' config.json and indices of tensors, in the data folder.

  Raises:
    SkipTest: there is no such folder.
  """
  root = Path(os.environ.get("D1JAX_DATA", Path(__file__).parents[2] / "../shared/data")).resolve()
  if not (root / "tokenizers" / "llada8b" / "model.safetensors.index.json").is_file():
    raise unittest.SkipTest(f"no tokenizers in the data folder {root}; set D1JAX_DATA to one (see its README)")
  return root / "tokenizers"


def edit_config(folder: Path, **changes: Any) -> None:
  """Changes keys of a folder's config.json; `...` takes one away."""
  path = folder / "config.json"
  config = json.loads(path.read_text(encoding="utf-8")) | changes
  path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}), encoding="utf-8")
