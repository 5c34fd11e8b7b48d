"""What a Hugging Face config.json says, for the model families that can be read.

LLaDA predicts each token at its own position. Dream, and every causal Llama or Qwen2 that is taken as the start of a
diffusion model, predicts the next one: the state at position i predicts token i + 1, and attention sees both ways.
"""

import dataclasses
import math
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from d1jax.files import FileError, read_json
from d1jax.models.layers import RopeScaling
from d1jax.models.transformer import TransformerSize

Config = Mapping[str, Any]

DEFAULTS: Mapping[str, Config] = {
  "llada": {"mlp_ratio": 4, "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "weight_tying": True},
  "dream": {"rope_theta": 10000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": False},
  "llama": {"rope_theta": 10000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": False},
  "qwen2": {"rope_theta": 10000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": False},
}
"""What a key that config.json lacks means, by model type: the defaults of the configuration's class. Llama 2's files,
e.g., do not state `rope_theta`. Sizes must be stated.

Sources: `ModelConfig` of LLaDA-8B's configuration_llada.py, `DreamConfig` of Dream-7B's configuration_dream.py, and
`LlamaConfig` and `Qwen2Config` of transformers 4.57.1. What `LLADA_FIXED` and `LLAMA_FIXED` list may be left out, too,
and is then taken to be as this network has it; the other defaults of LLaDA's class are GPT-2's.
"""

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
  "use_mrope": False,
}
"""The same for Llama, Qwen2 and Dream. `pretraining_tp` is of no effect: it cuts the same products into parts."""

ROWS = 128
"""A vocabulary that grows becomes a multiple of this many rows."""

SIZE_KEYS: Mapping[str, tuple[str, ...]] = {
  "vocab": ("embedding_size", "vocab_size"),
  "embed": ("d_model", "hidden_size"),
  "heads": ("n_heads", "num_attention_heads"),
  "kv_heads": ("n_kv_heads", "num_key_value_heads"),
  "head_dim": ("head_dim",),
  "mlp": ("mlp_hidden_size", "intermediate_size", "mlp_ratio"),
  "layers": ("n_layers", "num_hidden_layers"),
}
"""What config.json calls the sizes of a network."""

shown = reprlib.Repr()
shown.maxstring = shown.maxother = 80
"""Writes a value of a file into a message, shortened where it is long or deep."""


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
  def tied_key(self) -> str:
    """The key that says whether the head is the embedding."""
    return "weight_tying" if self.family == "llada" else "tie_word_embeddings"

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
    config = read_json(path, dict)
  except FileError as error:
    raise ValueError(f"{error}; point to the folder of a downloaded model") from None
  if "model_type" not in config:
    raise ValueError(f"{path} is not the configuration of a model (it has no model_type)")
  family = str(config["model_type"]).lower() if isinstance(config["model_type"], str) else ""
  if family not in FAMILIES:
    known = ", ".join(FAMILIES)
    raise ValueError(f"{path}: model_type {shown.repr(config['model_type'])} is not supported; known: {known}")
  read, shift = FAMILIES[family]
  try:
    if config.get("quantization_config"):
      raise ValueError(
        f"quantization_config={shown.repr(config['quantization_config'])} is not supported: fetch the unquantised"
        " model, or take the key out of config.json if the weights are not quantised"
      )
    return Description(family, read({**DEFAULTS[family], **config}), shift, config)
  except KeyError as error:
    raise ValueError(f"{path}: {error} is missing") from None
  except (TypeError, ValueError) as error:
    raise ValueError(f"{path}: {error}") from None


def check_claims(folder: Path, description: Description, shapes: Mapping[str, tuple[int, ...]]) -> None:
  """Compares the sizes that config.json claims with the most that the weights' files can hold.

  For the time before anything is made of the sizes, be it a list of names: a network of 10^9 layers would take all
  memory before the first of its tensors was found to be missing. Whether each tensor has its shape is checked later.

  Args:
    folder: whose config.json it is.
    description: what it says.
    shapes: of the tensors in the files.

  Raises:
    ValueError: no tensor has an axis as long as a size, or there are fewer tensors than layers.
  """
  stored = [axis for shape in shapes.values() if 0 not in shape for axis in shape]  # an empty tensor can claim any size
  longest = max(stored, default=0)
  for name, keys in SIZE_KEYS.items():
    value = getattr(description.size, name) or 0
    most = len(shapes) if name == "layers" else longest
    if value > most:
      key = next((key for key in keys if description.config.get(key) == value), keys[-1])
      held = f"there are {most} tensors" if name == "layers" else f"the longest axis of a tensor has {most}"
      raise ValueError(
        f"{folder / 'config.json'}: {key}={shown.repr(value)} is more than the safetensors hold: {held};"
        " fetch the files of one and the same model"
      )


def with_rows(size: TransformerSize, rows: int | None) -> TransformerSize:
  """The size with a vocabulary of at least `rows`; one that grows, grows to a multiple of `ROWS`."""
  if rows is None or rows <= size.vocab:
    return size
  return dataclasses.replace(size, vocab=-(-rows // ROWS) * ROWS)


def _check_fixed(config: Config, fixed: Config) -> None:
  for name, expected in fixed.items():
    value = config.get(name, expected)
    if value != expected and not (value is None and not expected):
      raise ValueError(f"{name}={shown.repr(value)} is not supported, only {expected!r}")


def _positive(config: Config, name: str) -> float:
  """A number above zero."""
  value = config[name]
  is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
  if not is_number or not math.isfinite(value) or value <= 0:
    raise ValueError(f"{name}={shown.repr(value)} is not a positive number")
  return float(value)


def _count(config: Config, name: str) -> int:
  """A whole number above zero."""
  if not isinstance(config[name], int) or _positive(config, name) < 1:
    raise ValueError(f"{name}={shown.repr(config[name])} is not a positive whole number")
  return int(config[name])


def _flag(config: Config, name: str) -> bool:
  """True or false; null is false."""
  value = config[name] or False
  if not isinstance(value, bool):
    raise ValueError(f"{name}={shown.repr(value)} is neither true nor false")
  return value


def _stated(config: Config, name: str, instead: str) -> str:
  """`name` where the configuration has a value for it, or the name to read instead."""
  return instead if config.get(name) is None else name


def _llada(config: Config) -> TransformerSize:
  _check_fixed(config, LLADA_FIXED)
  if config.get("multi_query_attention"):
    value = shown.repr(config["multi_query_attention"])
    raise ValueError(f"multi_query_attention={value} is not supported; use n_kv_heads")
  if config.get("mlp_hidden_size") is None:
    config = {**config, "mlp_hidden_size": _count(config, "mlp_ratio") * _count(config, "d_model")}
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
    raise ValueError(f"{name}={shown.repr(rope)} is not a table of options")
  theta = _positive(config if rope.get("rope_theta") is None else rope, "rope_theta")
  kind = rope.get("rope_type", rope.get("type", "default"))
  if kind == "default":
    return theta, None
  if kind != "llama3":
    raise ValueError(f"rope_type={shown.repr(kind)} is not supported; known: default, llama3")
  low, high = _positive(rope, "low_freq_factor"), _positive(rope, "high_freq_factor")
  if low >= high:
    raise ValueError(f"{name}: low_freq_factor={low} is not below high_freq_factor={high}")
  return theta, RopeScaling(_positive(rope, "factor"), low, high, _count(rope, "original_max_position_embeddings"))


def _llama(config: Config, *, qkv_bias: bool = False) -> TransformerSize:
  _check_fixed(config, LLAMA_FIXED)
  kinds = config.get("layer_types") or []
  if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
    raise ValueError(f"layer_types={shown.repr(kinds)} is not supported, only full_attention")
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
