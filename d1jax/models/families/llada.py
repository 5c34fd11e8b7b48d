"""LLaDA-8B and LLaDA 1.5 (arXiv 2502.09992): Llama's blocks with other names; position i predicts token i.

A network without a folder is also a LLaDA.
"""

from d1jax.models.families import llama
from d1jax.models.family import Config, Family, count, flag, positive, shown, sizes
from d1jax.models.layers import SelfAttention, TransformerSize
from d1jax.models.names import Scheme

NAMES: Scheme = {
  ("embedding",): "model.transformer.wte.weight",
  ("blocks", "attention_norm", "scale"): "model.transformer.blocks.{}.attn_norm.weight",
  ("blocks", "attention", "query"): "model.transformer.blocks.{}.q_proj.weight",
  ("blocks", "attention", "key"): "model.transformer.blocks.{}.k_proj.weight",
  ("blocks", "attention", "value"): "model.transformer.blocks.{}.v_proj.weight",
  ("blocks", "attention", "out"): "model.transformer.blocks.{}.attn_out.weight",
  ("blocks", "mlp_norm", "scale"): "model.transformer.blocks.{}.ff_norm.weight",
  ("blocks", "mlp", "gate"): "model.transformer.blocks.{}.ff_proj.weight",
  ("blocks", "mlp", "up"): "model.transformer.blocks.{}.up_proj.weight",
  ("blocks", "mlp", "down"): "model.transformer.blocks.{}.ff_out.weight",
  ("final_norm", "scale"): "model.transformer.ln_f.weight",
  ("head",): "model.transformer.ff_out.weight",
}
"""`ff_out` is the down projection inside a block, and the head outside of the blocks."""

FIXED: Config = {
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
"""`bias_for_layer_norm` may be null, as on the hub. The defaults of LLaDA's class for these are GPT-2's."""

SIZE_KEYS = {
  "vocab": ("embedding_size", "vocab_size"),
  "embed": ("d_model",),
  "heads": ("n_heads",),
  "kv_heads": ("n_kv_heads", "n_heads"),
  "mlp": ("mlp_hidden_size",),
  "layers": ("n_layers",),
}


def read(config: Config) -> TransformerSize:
  """The sizes of a config.json; if it does not state the MLP's width, that is `mlp_ratio` times the network's."""
  if config.get("multi_query_attention"):
    value = shown.repr(config["multi_query_attention"])
    raise ValueError(f"multi_query_attention={value} is not supported; use n_kv_heads")
  if config.get("mlp_hidden_size") is None:
    config = {**config, "mlp_hidden_size": count(config, "mlp_ratio") * count(config, "d_model")}
  return sizes(
    config,
    SIZE_KEYS,
    rope_theta=positive(config, "rope_theta"),
    norm_eps=positive(config, "rms_norm_eps"),
    tied=flag(config, "weight_tying"),
  )


def config_of(size: TransformerSize) -> Config:
  """The config.json of a network without a folder.

  Raises:
    ValueError: LLaDA's format cannot express this network.
  """
  if size.qkv_bias or size.rope_scaling or size.head_dim or size.attention_layer is not SelfAttention:
    raise ValueError(f"{size} is no LLaDA: it can only be exported into the names of the folder that it came from")
  return {
    **FIXED,
    "architectures": ["LLaDAModelLM"],
    "d_model": size.embed,
    "embedding_size": size.vocab,
    "max_sequence_length": 4096,
    "mlp_hidden_size": size.mlp,
    "model_type": "llada",
    "n_heads": size.heads,
    "n_kv_heads": size.key_value_heads,
    "n_layers": size.layers,
    "rms_norm_eps": size.norm_eps,
    "rope_theta": size.rope_theta,
    "torch_dtype": "float32",
    "vocab_size": size.vocab,
    "weight_tying": size.tied,
  }


FAMILY = Family(
  model_type="llada",
  shift=0,
  read=read,
  size_keys=SIZE_KEYS,
  tied_key="weight_tying",
  schemes=(NAMES, llama.NAMES),  # some folders were converted to Llama's names
  # `ModelConfig` of LLaDA-8B's configuration_llada.py.
  defaults={"mlp_ratio": 4, "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "weight_tying": True},
  fixed=FIXED,
  presets={
    "tiny": TransformerSize(vocab=32, embed=64, heads=4, mlp=192, layers=3, rope_theta=100.0),
    "small": TransformerSize(vocab=512, embed=192, heads=6, mlp=576, layers=4, rope_theta=1000.0),
    "llada_8b": TransformerSize(vocab=126464, embed=4096, heads=32, mlp=12288, layers=32),
  },
)
