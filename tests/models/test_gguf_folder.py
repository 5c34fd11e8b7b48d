"""A GGUF file of a Llama becomes a folder: rounded weights are computed back, and rows of q and k put in order."""

import json
import struct

import numpy as np
import pytest
from safetensors.numpy import load_file

from benchmarks.gguf_folder import convert
from d1jax.files import FileError
from d1jax.models.tensor_files import TensorFiles
from d1jax.source import inspect
from tests.data.folders import CHATML, load_json, small_files
from tests.models.folders import draw

EMBED, HEADS, KEYS, MLP = 32, 4, 2, 64


def text(value):
  return struct.pack("<Q", len(value.encode())) + value.encode()


def value(found):
  if isinstance(found, list):
    kind, form = (8, "") if isinstance(found[0], str) else (5, "<i")
    items = b"".join(text(one) if kind == 8 else struct.pack(form, one) for one in found)
    return struct.pack("<IIQ", 9, kind, len(found)) + items
  if isinstance(found, str):
    return struct.pack("<I", 8) + text(found)
  kinds = {bool: (7, "<?"), int: (4, "<I"), float: (6, "<f")}
  kind, form = kinds[type(found)]
  return struct.pack("<I", kind) + struct.pack(form, found)


def rounded(kind, weight):
  """The bytes of a weight as F32 (0), Q4_0 (2), Q4_1 (3) or Q8_0 (8), and what they mean."""
  if kind == 0:
    return weight.tobytes(), weight
  blocks = weight.reshape(-1, 32)
  least = blocks.min(axis=1, keepdims=True).astype(np.float16) if kind == 3 else np.zeros((len(blocks), 1), np.float16)
  top, zero = {2: (7, 8), 3: (15, 0), 8: (127, 0)}[kind]
  spread = np.abs(blocks - least.astype(np.float32)).max(axis=1, keepdims=True)
  scale = np.maximum(spread / top, 1e-6).astype(np.float16)
  codes = np.rint((blocks - least.astype(np.float32)) / scale.astype(np.float32)).clip(-zero if zero else -127, top)
  meaning = codes * scale.astype(np.float32) + least.astype(np.float32)
  whole = (codes + zero).astype(np.int64)
  found = b""
  for i in range(len(blocks)):
    found += scale[i].tobytes() + (least[i].tobytes() if kind == 3 else b"")
    found += (
      whole[i].astype(np.int8).tobytes()
      if kind == 8
      else (whole[i][:16] | whole[i][16:] << 4).astype(np.uint8).tobytes()
    )
  return found, meaning.astype(np.float32).reshape(weight.shape)


def gguf(path, **changes):
  """A Llama of one layer, and its weights by GGUF's names; `changes` are of the metadata."""
  vocab = list(json.loads(small_files()["vocab.json"]))
  tokens = [*vocab, "<|end|>", "<|im_start|>", "<|im_end|>", *(f"<{i}>" for i in range(320 - len(vocab) - 3))]
  values = {
    "general.architecture": "llama",
    "llama.embedding_length": EMBED,
    "llama.block_count": 1,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KEYS,
    "llama.feed_forward_length": MLP,
    "llama.rope.freq_base": 10000.0,
    "llama.context_length": 64,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": tokens,
    "tokenizer.ggml.merges": ["Ġ t", "Ġt h"],
    "tokenizer.ggml.token_type": [1] * len(vocab) + [3] * (320 - len(vocab)),
    "tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"),
    "tokenizer.ggml.add_bos_token": False,
    "tokenizer.chat_template": CHATML,
  } | changes
  heads = {"attn_q": HEADS, "attn_k": KEYS}
  shapes = {"token_embd": (320, EMBED), "output_norm": (EMBED,)} | {
    f"blk.0.{name}": shape
    for name, shape in {
      "attn_norm": (EMBED,),
      "ffn_norm": (EMBED,),
      "attn_q": (EMBED, EMBED),
      "attn_output": (EMBED, EMBED),
      "attn_k": (EMBED // 2, EMBED),
      "attn_v": (EMBED // 2, EMBED),
      "ffn_gate": (MLP, EMBED),
      "ffn_up": (MLP, EMBED),
      "ffn_down": (EMBED, MLP),
    }.items()
  }
  infos, data, expected = b"", b"", {}
  for (name, shape), kind in zip(shapes.items(), (8, 0, 0, 0, 3, 2, 3, 8, 2, 3, 8), strict=True):
    weight, part = draw(name, shape), name.rpartition(".")[2]
    encoded, expected[name] = rounded(kind, weight)
    infos += text(f"{name}.weight") + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape[::-1])
    infos += struct.pack("<IQ", kind, len(data))
    data += encoded + b"\0" * (-len(encoded) % 32)
    if part in heads:  # the file has the two halves of a head's rows in turn
      expected[name] = expected[name].reshape(heads[part], -1, 2, EMBED).swapaxes(1, 2).reshape(shape)
  head = (
    b"GGUF" + struct.pack("<IQQ", 3, len(shapes), len(values)) + b"".join(text(k) + value(v) for k, v in values.items())
  )
  head += infos
  path.write_bytes(head + b"\0" * (-len(head) % 32) + data)
  return expected


def test_the_folder_has_the_weights_and_the_tokenizer_of_the_file(tmp_path):
  expected = gguf(tmp_path / "small.gguf")
  convert(tmp_path / "small.gguf", tmp_path / "model")
  files = TensorFiles(tmp_path / "model")
  names = {"token_embd": "model.embed_tokens", "blk.0.attn_q": "model.layers.0.self_attn.q_proj"}
  names |= {"blk.0.attn_k": "model.layers.0.self_attn.k_proj", "blk.0.ffn_down": "model.layers.0.mlp.down_proj"}
  assert len(files.shapes) == len(expected)
  found = load_file(tmp_path / "model" / "model.safetensors")
  for ours, theirs in names.items():
    np.testing.assert_array_equal(found[f"{theirs}.weight"], expected[ours].astype(found[f"{theirs}.weight"].dtype))
  source = inspect(tmp_path / "model")
  assert source.size.vocab == 384, "320 and a new mask, to the next multiple of 128"
  prompt = source.tokenizer.prompt([{"role": "user", "content": "the 12"}], "")
  assert source.tokenizer.decode_raw([prompt]) == ["<|im_start|>user\nthe 12<|im_end|>\n<|im_start|>assistant\n"]
  assert load_json(tmp_path / "model" / "config.json")["tie_word_embeddings"]


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"general.architecture": "mamba"}, "holds a mamba with a tokenizer gpt2, not a llama with gpt2"),
    ({"tokenizer.ggml.model": "llama"}, "holds a llama with a tokenizer llama"),
    (lambda content: content[:300], "cannot be converted"),
    (lambda content: b"PK" + content[2:], "it does not begin with GGUF"),
    (lambda content: content[:4] + b"\x09" + content[5:], "it has version 9, not 2 or 3"),
  ],
)
def test_a_file_that_is_none_is_one_line(tmp_path, change, message):
  path = tmp_path / "small.gguf"
  gguf(path, **(change if isinstance(change, dict) else {}))
  if callable(change):
    path.write_bytes(change(path.read_bytes()))
  with pytest.raises(FileError, match=message) as caught:
    convert(path, tmp_path / "model")
  assert "\n" not in str(caught.value)
  assert not (tmp_path / "model").exists()
