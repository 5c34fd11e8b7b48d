"""Where each parameter stands in a Hugging Face folder: LLaDA's own names and Llama's.

Both store matrices [out, in]; ours are [in, out], with all layers of a weight in one stack.
"""

from collections.abc import Collection, Mapping

Path = tuple[str, ...]

LLAMA: Mapping[Path, str] = {
  ("embedding",): "model.embed_tokens.weight",
  ("blocks", "attention_norm", "scale"): "model.layers.{}.input_layernorm.weight",
  ("blocks", "attention", "query"): "model.layers.{}.self_attn.q_proj.weight",
  ("blocks", "attention", "query_bias"): "model.layers.{}.self_attn.q_proj.bias",
  ("blocks", "attention", "key"): "model.layers.{}.self_attn.k_proj.weight",
  ("blocks", "attention", "key_bias"): "model.layers.{}.self_attn.k_proj.bias",
  ("blocks", "attention", "value"): "model.layers.{}.self_attn.v_proj.weight",
  ("blocks", "attention", "value_bias"): "model.layers.{}.self_attn.v_proj.bias",
  ("blocks", "attention", "out"): "model.layers.{}.self_attn.o_proj.weight",
  ("blocks", "mlp_norm", "scale"): "model.layers.{}.post_attention_layernorm.weight",
  ("blocks", "mlp", "gate"): "model.layers.{}.mlp.gate_proj.weight",
  ("blocks", "mlp", "up"): "model.layers.{}.mlp.up_proj.weight",
  ("blocks", "mlp", "down"): "model.layers.{}.mlp.down_proj.weight",
  ("final_norm", "scale"): "model.norm.weight",
  ("head",): "lm_head.weight",
}
"""Llama, Qwen2, Dream, and LLaDA folders that were converted to these names."""

LLADA: Mapping[Path, str] = {
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
"""LLaDA; `ff_out` is a block's down projection and, outside the blocks, the head."""

BUFFERS = (
  "inv_freq",
  "original_inv_freq",
  "cos_cached",
  "sin_cached",
  "position_ids",
  "causal_mask",
  "attention_mask",
  "attn_mask",
  "masked_bias",
)
"""Last words of the names of buffers: rotary tables, positions and masks, which follow from the configuration."""


def is_buffer(tensor: str) -> bool:
  """Whether a tensor is one that some files carry and no network needs."""
  return tensor.rpartition(".")[2] in BUFFERS


def scheme_of(tensors: Collection[str]) -> Mapping[Path, str]:
  """The naming scheme of a folder, told by its embedding."""
  return LLADA if LLADA[("embedding",)] in tensors else LLAMA


def is_transposed(path: Path) -> bool:
  """Whether the files hold the transpose of a parameter: all matrices but the embedding."""
  return path == ("head",) or (path[0] == "blocks" and path[-1] != "scale" and not path[-1].endswith("_bias"))


def tensors_of(path: Path, template: str, layers: int) -> list[str]:
  """The tensors that make up a parameter, one a layer or one in all."""
  return [template.format(i) for i in range(layers)] if path[0] == "blocks" else [template]
