"""What a Hugging Face config.json says, for the model families that can be read.

LLaDA predicts each token at its own position. Dream, and every causal Llama or Qwen2 that is taken as the start of a
diffusion model, predicts the next one: the state at position i predicts token i + 1, and attention sees both ways.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from d1jax.models.layers import RopeScaling
from d1jax.models.transformer import TransformerSize

Config = Mapping[str, Any]

LLADA_FIXED: Config = {
  "alibi": False,
  "attention_layer_norm": False,
  "activation_type": "silu",
  "attention_dropout": 0.0,
  "bias_for_layer_norm": False,
  "block_group_size": 1,
  "block_type": "llama",
  "embedding_dropout": 0.0,
  "include_bias": False,
  "include_qkv_bias": False,
  "input_emb_norm": False,
  "layer_norm_type": "rms",
  "layer_norm_with_affine": True,
  "residual_dropout": 0.0,
  "rope": True,
  "rope_full_precision": True,
  "scale_logits": False,
}
"""The values of LLaDA's options that this network implements; `bias_for_layer_norm` may be null, as on the hub."""

LLAMA_FIXED: Config = {
  "hidden_act": "silu",
  "attention_bias": False,
  "attention_dropout": 0.0,
  "mlp_bias": False,
  "use_sliding_window": False,
  "partial_rotary_factor": 1.0,
  "quantization_config": None,
  "use_mrope": False,
  "pretraining_tp": 1,
}
"""The same for Llama, Qwen2 and Dream."""


@dataclasses.dataclass(frozen=True)
class Description:
  """What a folder's config.json says.

  Attributes:
    family: `llada`, `dream`, `llama` or `qwen2`.
    size: of the network; `vocab` counts the rows in the files.
    shift: how many positions before a token stands the state that predicts it: 0 (LLaDA) or 1.
    config: the whole file.
  """

  family: str
  size: TransformerSize
  shift: int
  config: Config

  @property
  def mask_id(self) -> int | None:
    """The mask token, None in a causal model that has none yet."""
    return self.config.get("mask_token_id")


def describe(folder: Path) -> Description:
  """Reads a folder's config.json.

  Raises:
    ValueError: the file is missing or broken, or holds a value that this network does not implement; the message names
      it.
  """
  path = folder / "config.json"
  try:
    config = json.loads(path.read_text(encoding="utf-8"))
    family = str(config["model_type"]).lower()
  except FileNotFoundError:
    raise ValueError(f"{path} is missing: point to the folder of a downloaded model") from None
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f"{path} is not the configuration of a model ({error!r})") from None
  if family not in FAMILIES:
    raise ValueError(f"{path}: model_type {config['model_type']!r} is not supported; known: {', '.join(FAMILIES)}")
  read, shift = FAMILIES[family]
  try:
    return Description(family, read(config), shift, config)
  except KeyError as error:
    raise ValueError(f"{path}: {error} is missing") from None
  except (TypeError, ValueError) as error:
    raise ValueError(f"{path}: {error}") from None


def with_rows(size: TransformerSize, rows: int | None) -> TransformerSize:
  """The size with a vocabulary of at least `rows`; one that grows, grows to a multiple of 128."""
  if rows is None or rows <= size.vocab:
    return size
  return dataclasses.replace(size, vocab=-(-rows // 128) * 128)


def _check_fixed(config: Config, fixed: Config) -> None:
  for name, expected in fixed.items():
    value = config.get(name, expected)
    if value != expected and not (value is None and not expected):
      raise ValueError(f"{name}={value!r} is not supported, only {expected!r}")


def _positive(config: Config, name: str) -> float:
  """A number above zero."""
  value = config[name]
  is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
  if not is_number or not math.isfinite(value) or value <= 0:
    raise ValueError(f"{name}={value!r} is not a positive number")
  return float(value)


def _count(config: Config, name: str) -> int:
  """A whole number above zero."""
  if not isinstance(config[name], int) or _positive(config, name) < 1:
    raise ValueError(f"{name}={config[name]!r} is not a positive whole number")
  return int(config[name])


def _flag(config: Config, name: str) -> bool:
  """True or false; false where it is not stated."""
  value = config.get(name) or False
  if not isinstance(value, bool):
    raise ValueError(f"{name}={value!r} is neither true nor false")
  return value


def _stated(config: Config, name: str, instead: str) -> str:
  """`name` where the configuration has a value for it, or the name to read instead."""
  return instead if config.get(name) is None else name


def _llada(config: Config) -> TransformerSize:
  _check_fixed(config, LLADA_FIXED)
  if config.get("multi_query_attention"):
    raise ValueError(f"multi_query_attention={config['multi_query_attention']!r} is not supported; use n_kv_heads")
  return TransformerSize(
    vocab=_count(config, _stated(config, "embedding_size", "vocab_size")),
    embed=_count(config, "d_model"),
    heads=_count(config, "n_heads"),
    kv_heads=_count(config, _stated(config, "n_kv_heads", "n_heads")),
    mlp=_count(config, "mlp_hidden_size"),
    layers=_count(config, "n_layers"),
    rope_theta=_positive(config, "rope_theta"),
    norm_eps=_positive(config, "rms_norm_eps"),
    tied=_flag(config, "weight_tying"),
  )


def _rope_scaling(config: Config) -> tuple[float, RopeScaling | None]:
  """Base and scaling of the rotary embedding, from the classic keys or from the `rope_parameters` of transformers 5."""
  name = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
  rope = config.get(name) or {}
  if not isinstance(rope, Mapping):
    raise ValueError(f"{name}={rope!r} is not a table of options")
  theta = _positive(config if rope.get("rope_theta") is None else rope, "rope_theta")
  kind = rope.get("rope_type", rope.get("type", "default"))
  if kind == "default":
    return theta, None
  if kind != "llama3":
    raise ValueError(f"rope_type={kind!r} is not supported; known: default, llama3")
  low, high = _positive(rope, "low_freq_factor"), _positive(rope, "high_freq_factor")
  if low >= high:
    raise ValueError(f"{name}: low_freq_factor={low} is not below high_freq_factor={high}")
  return theta, RopeScaling(_positive(rope, "factor"), low, high, _count(rope, "original_max_position_embeddings"))


def _llama(config: Config, *, qkv_bias: bool = False) -> TransformerSize:
  _check_fixed(config, LLAMA_FIXED)
  kinds = config.get("layer_types") or []
  if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
    raise ValueError(f"layer_types={kinds!r} is not supported, only full_attention")
  theta, scaling = _rope_scaling(config)
  return TransformerSize(
    vocab=_count(config, "vocab_size"),
    embed=_count(config, "hidden_size"),
    heads=_count(config, "num_attention_heads"),
    kv_heads=_count(config, _stated(config, "num_key_value_heads", "num_attention_heads")),
    head_dim=None if config.get("head_dim") is None else _count(config, "head_dim"),
    mlp=_count(config, "intermediate_size"),
    layers=_count(config, "num_hidden_layers"),
    rope_theta=theta,
    rope_scaling=scaling,
    norm_eps=_positive(config, "rms_norm_eps"),
    qkv_bias=qkv_bias,
    tied=_flag(config, "tie_word_embeddings"),
  )


def _qwen2(config: Config) -> TransformerSize:
  return _llama(config, qkv_bias=True)


FAMILIES = {"llada": (_llada, 0), "dream": (_qwen2, 1), "llama": (_llama, 1), "qwen2": (_qwen2, 1)}
"""Model type -> (reader of the sizes, shift)."""
