"""Llama 2, 3, 3.1 and 3.2 as the start of a diffusion model, and the parts that other families share with them.

Like every causal model that serves as a start, it predicts the next token: the hidden state at position i predicts
token i + 1. Attention is bidirectional.
"""

from collections.abc import Mapping
from typing import Any

from d1jax.models.family import Config, Family, count, flag, positive, shown, sizes
from d1jax.models.layers import RopeScaling, TransformerSize
from d1jax.models.names import Scheme

NAMES: Scheme = {
  ("embedding",): "model.embed_tokens.weight",
  ("blocks", "attention_norm", "scale"): "model.layers.{}.input_layernorm.weight",
  ("blocks", "attention", "query"): "model.layers.{}.self_attn.q_proj.weight",
  ("blocks", "attention", "key"): "model.layers.{}.self_attn.k_proj.weight",
  ("blocks", "attention", "value"): "model.layers.{}.self_attn.v_proj.weight",
  ("blocks", "attention", "out"): "model.layers.{}.self_attn.o_proj.weight",
  ("blocks", "mlp_norm", "scale"): "model.layers.{}.post_attention_layernorm.weight",
  ("blocks", "mlp", "gate"): "model.layers.{}.mlp.gate_proj.weight",
  ("blocks", "mlp", "up"): "model.layers.{}.mlp.up_proj.weight",
  ("blocks", "mlp", "down"): "model.layers.{}.mlp.down_proj.weight",
  ("final_norm", "scale"): "model.norm.weight",
  ("head",): "lm_head.weight",
}

SIZE_KEYS = {
  "vocab": ("vocab_size",),
  "embed": ("hidden_size",),
  "heads": ("num_attention_heads",),
  "kv_heads": ("num_key_value_heads", "num_attention_heads"),
  "head_dim": ("head_dim",),
  "mlp": ("intermediate_size",),
  "layers": ("num_hidden_layers",),
}


def read(config: Config, **others: Any) -> TransformerSize:
  """The sizes of a config.json of transformers; `others` are fields with a fixed value in a family."""
  kinds = config.get("layer_types") or []
  if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
    raise ValueError(f"layer_types={shown.repr(kinds)} is not supported, only full_attention")
  theta, scaling = _rope_scaling(config)
  return sizes(
    config,
    SIZE_KEYS,
    head_dim=None if config.get("head_dim") is None else count(config, "head_dim"),
    rope_theta=theta,
    rope_scaling=scaling,
    norm_eps=positive(config, "rms_norm_eps"),
    tied=flag(config, "tie_word_embeddings"),
    **others,
  )


def _rope_scaling(config: Config) -> tuple[float, RopeScaling | None]:
  """Base and scaling of the rotary embedding, from the classic keys or from the `rope_parameters` of transformers 5."""
  name = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
  rope = config.get(name) or {}
  if not isinstance(rope, Mapping):
    raise ValueError(f"{name}={shown.repr(rope)} is not a table of options")
  theta = positive(config if rope.get("rope_theta") is None else rope, "rope_theta")
  kind = rope.get("rope_type", rope.get("type", "default"))
  if kind == "default":
    return theta, None
  if kind != "llama3":
    raise ValueError(f"rope_type={shown.repr(kind)} is not supported; known: default, llama3")
  low, high = positive(rope, "low_freq_factor"), positive(rope, "high_freq_factor")
  if low >= high:
    raise ValueError(f"{name}: low_freq_factor={low} is not below high_freq_factor={high}")
  return theta, RopeScaling(positive(rope, "factor"), low, high, count(rope, "original_max_position_embeddings"))


FAMILY = Family(
  model_type="llama",
  shift=1,
  read=read,
  size_keys=SIZE_KEYS,
  tied_key="tie_word_embeddings",
  schemes=(NAMES,),
  # From `LlamaConfig` of transformers 4.57.1; for example, Llama 2's files do not state `rope_theta`.
  defaults={"rope_theta": 10000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": False},
  fixed={  # `pretraining_tp` has no effect: it splits the same products into parts
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
    "use_mrope": False,
  },
)
