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

Config = dict[str, Any]

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}

SIZES: dict[str, dict[str, int]] = {
  "llada": dict(vocab=83, embed=64, heads=4, kv_heads=4, head_size=16, mlp=96, layers=2),
  "llada_llama_names": dict(vocab=80, embed=64, heads=4, kv_heads=4, head_size=16, mlp=96, layers=2),
  "dream": dict(vocab=72, embed=64, heads=4, kv_heads=2, head_size=16, mlp=96, layers=3),
  "qwen2": dict(vocab=72, embed=64, heads=4, kv_heads=2, head_size=16, mlp=80, layers=3),
  "qwen3": dict(vocab=72, embed=64, heads=4, kv_heads=2, head_size=32, mlp=128, layers=3),
  "llama": dict(vocab=72, embed=64, heads=4, kv_heads=2, head_size=16, mlp=96, layers=2),
  "llama_tied": dict(vocab=72, embed=64, heads=4, kv_heads=1, head_size=24, mlp=96, layers=3),
}
"""Default sizes of a family; those of `WITH_HEAD_DIM` may have heads * head_size other than embed."""

WITH_HEAD_DIM = ("llama_tied", "qwen3")

FAMILIES = tuple(SIZES)


def llada_config(s: dict[str, int], dtype: str) -> Config:
  """The keys of GSAI-ML/LLaDA-8B-Instruct."""
  return {
    "activation_type": "silu",
    "alibi": False,
    "alibi_bias_max": 8.0,
    "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True,
    "auto_map": {
      "AutoConfig": "configuration_llada.LLaDAConfig",
      "AutoModel": "modeling_llada.LLaDAModelLM",
      "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
    },
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": s["embed"],
    "embedding_dropout": 0.0,
    "embedding_size": s["vocab"],
    "eos_token_id": s["vocab"] - 8,
    "flash_attention": True,
    "flash_attn_varlen": True,
    "include_bias": False,
    "include_qkv_bias": False,
    "init_cutoff_factor": None,
    "init_device": "meta",
    "init_fn": "mitchell",
    "init_std": 0.02,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": s["vocab"] - 4,
    "max_sequence_length": 4096,
    "mlp_hidden_size": s["mlp"],
    "mlp_ratio": 4,  # of no effect beside mlp_hidden_size
    "model_type": "llada",
    "multi_query_attention": None,
    "n_heads": s["heads"],
    "n_kv_heads": s["kv_heads"],
    "n_layers": s["layers"],
    "pad_token_id": s["vocab"] - 8,
    "precision": "amp_bf16",
    "residual_dropout": 0.0,
    "rms_norm_eps": 1e-05,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "torch_dtype": dtype,
    "transformers_version": "4.51.2",
    "use_cache": False,
    "vocab_size": s["vocab"],
    "weight_tying": False,
  }


def hub_config(s: dict[str, int], dtype: str) -> Config:
  """The keys that Llama, Qwen2 and Dream share, as transformers 4 writes them."""
  return {
    "attention_dropout": 0.0,
    "bos_token_id": s["vocab"] - 9,
    "eos_token_id": s["vocab"] - 9,
    "hidden_act": "silu",
    "hidden_size": s["embed"],
    "initializer_range": 0.02,
    "intermediate_size": s["mlp"],
    "max_position_embeddings": 131072,
    "num_attention_heads": s["heads"],
    "num_hidden_layers": s["layers"],
    "num_key_value_heads": s["kv_heads"],
    "rms_norm_eps": 1e-06,
    "torch_dtype": dtype,
    "use_cache": True,
    "vocab_size": s["vocab"],
  }


def dream_config(s: dict[str, int], dtype: str) -> Config:
  """The keys of Dream-org/Dream-v0-Instruct-7B."""
  return hub_config(s, dtype) | {
    "_name_or_path": "Dream-org/Dream-v0-Instruct-7B",
    "architectures": ["DreamModel"],
    "attn_implementation": "flash_attention_2",
    "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
    "mask_token_id": s["vocab"] - 4,
    "max_window_layers": s["layers"],
    "model_type": "Dream",
    "pad_token_id": s["vocab"] - 9,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "transformers_version": "4.46.2",
    "use_mrope": False,
    "use_sliding_window": False,
  }


def qwen2_config(s: dict[str, int], dtype: str) -> Config:
  """The keys of Qwen/Qwen2.5-0.5B: the sliding window is stated and not used."""
  return hub_config(s, dtype) | {
    "architectures": ["Qwen2ForCausalLM"],
    "max_position_embeddings": 32768,
    "max_window_layers": s["layers"],
    "model_type": "qwen2",
    "rope_theta": 1000000.0,
    "sliding_window": 4,
    "tie_word_embeddings": True,
    "transformers_version": "4.43.1",
    "use_mrope": False,
    "use_sliding_window": False,
  }


def qwen3_config(s: dict[str, int], dtype: str) -> Config:
  """The keys of Qwen/Qwen3-8B."""
  return hub_config(s, dtype) | {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": s["head_size"],
    "max_position_embeddings": 40960,
    "max_window_layers": s["layers"],
    "model_type": "qwen3",
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "transformers_version": "4.51.0",
    "use_sliding_window": False,
  }


def llama_config(s: dict[str, int], dtype: str) -> Config:
  """The keys of meta-llama/Llama-3.1-8B-Instruct; the rotary scaling is strong enough to matter in ten positions.

  With theta 100 and 8 frequencies the wavelengths are 6.3, 11, 20, 35, 63, ...: one is kept, three are in the smooth
  part and the others are divided by the factor.
  """
  return hub_config(s, dtype) | {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "eos_token_id": [s["vocab"] - 9, s["vocab"] - 8, s["vocab"] - 7],
    "mlp_bias": False,
    "model_type": "llama",
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
      "factor": 8.0,
      "low_freq_factor": 1.0,
      "high_freq_factor": 4.0,
      "original_max_position_embeddings": 40,
      "rope_type": "llama3",
    },
    "rope_theta": 100.0,
    "tie_word_embeddings": False,
    "transformers_version": "4.42.3",
  }


def llama_tied_config(s: dict[str, int], dtype: str) -> Config:
  """A tied Llama as transformers 5 writes it: `dtype`, `rope_parameters`, an explicit `head_dim`."""
  config = hub_config(s, dtype) | {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "dtype": dtype,
    "head_dim": s["head_size"],
    "mlp_bias": False,
    "model_type": "llama",
    "pad_token_id": None,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_parameters": {
      "factor": 32.0,
      "high_freq_factor": 4.0,
      "low_freq_factor": 1.0,
      "original_max_position_embeddings": 40,
      "rope_theta": 200.0,
      "rope_type": "llama3",
    },
    "tie_word_embeddings": True,
    "transformers_version": "5.23.0",
  }
  del config["torch_dtype"]
  return config


CONFIGS = {
  "llada": llada_config,
  "llada_llama_names": llada_config,
  "dream": dream_config,
  "qwen2": qwen2_config,
  "qwen3": qwen3_config,
  "llama": llama_config,
  "llama_tied": llama_tied_config,
}


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
  biases, tied = family in ("dream", "qwen2"), family in ("qwen2", "llama_tied")
  return llama_shapes(s, biases=biases, norms=family == "qwen3", tied=tied)


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
