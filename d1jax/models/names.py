"""The names of parameters in the files of a Hugging Face folder.

The files store matrices [out, in]; ours are [in, out], with all layers of a weight in one stack.
"""

from collections.abc import Mapping

Path = tuple[str, ...]

Scheme = Mapping[Path, str]
"""The tensor name of each parameter, with `{}` for the layer."""

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
"""Endings of the names of buffers: rotary tables, positions and masks, which follow from the configuration."""


def is_buffer(tensor: str) -> bool:
  """Whether a tensor is a buffer, which some files hold and no network needs."""
  return tensor.rpartition(".")[2] in BUFFERS


def is_transposed(path: Path) -> bool:
  """Whether the files hold the transpose of a parameter; this is so for all matrices except the embedding."""
  return path == ("head",) or (path[0] == "blocks" and path[-1] != "scale" and not path[-1].endswith("_bias"))


def tensors_of(path: Path, template: str, layers: int) -> list[str]:
  """The tensors of a parameter: one per layer, or only one outside of the blocks."""
  return [template.format(i) for i in range(layers)] if path[0] == "blocks" else [template]
