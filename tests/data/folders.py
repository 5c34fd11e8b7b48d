"""Tokenizer folders for tests: small ones, and one made of the shared data."""

import json
import os
import unittest
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers

LLADA_TOKENS = 126080
"""LLaDA's first special id: the tokens below are its own vocabulary."""

SMALL_TOKENS = 49152
"""SmolLM2's vocabulary, which stands in for it."""


def shared_tokenizers() -> Path:
  """The folder of shared tokenizers; without it the test that asks is skipped."""
  root = Path(os.environ.get("D1JAX_DATA", Path(__file__).parents[2] / "../shared/data")).resolve()
  if not (root / "tokenizers/dream7b/vocab.json").is_file():
    raise unittest.SkipTest(f"no tokenizers in the data folder {root}; set D1JAX_DATA to one (see its README)")
  return root / "tokenizers"


def load_json(path: Path) -> Any:
  """The content of a JSON file."""
  return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
  """Writes a JSON file."""
  path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


CHATML = (
  "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
  "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def small_files(template: str | None = CHATML, **config: Any) -> dict[str, bytes]:
  """A folder's files: a byte-level vocabulary of 258 tokens, and four special ones behind it.

  Args:
    template: the chat template, None for none.
    **config: the content of config.json.
  """
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  vocab = {token: i for i, token in enumerate([*alphabet, "Ġt", "Ġth"])}
  added = {f"{258 + i}": text for i, text in enumerate(("<|end|>", "<|im_start|>", "<|im_end|>", "<|hole|>"))}
  files: dict[str, Any] = {
    "vocab.json": vocab,
    "tokenizer_config.json": {
      "added_tokens_decoder": {i: {"content": text, "special": True} for i, text in added.items()},
      "eos_token": "<|end|>",
    },
  }
  if template is not None:
    files["tokenizer_config.json"]["chat_template"] = template
  if config:
    files["config.json"] = config
  merges = "#version: 0.2\nĠ t\nĠt h\n"
  return {name: json.dumps(value).encode() for name, value in files.items()} | {"merges.txt": merges.encode()}


def changed(files: dict[str, bytes], name: str, **values: Any) -> dict[str, bytes]:
  """The files with some keys of one JSON file set anew; a file that is absent is made."""
  return files | {name: json.dumps(json.loads(files.get(name, b"{}")) | values).encode()}


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
  """Writes files into a folder that exists, and returns the folder."""
  for name, content in files.items():
    (folder / name).write_bytes(content)
  return folder


def write_llada_tokenizer(folder: Path, *, double_bos: bool = False) -> dict[str, int]:
  """Writes tokenizer.json, tokenizer_config.json and special_tokens_map.json of a small tokenizer like LLaDA's.

  The vocabulary is SmolLM2's. LLaDA's special tokens stand behind it in LLaDA's order; SmolLM2's own special tokens
  are no longer special.

  Args:
    folder: where to write; it exists.
    double_bos: whether the post-processor adds a start token, as that of many tokenizers does.

  Returns:
    The special ids under the names that a model's config.json has for them.
  """
  source = shared_tokenizers()
  config = load_json(source / "llada8b/tokenizer_config.json")
  tokenizer = load_json(source / "smollm2/tokenizer.json")
  vocab = tokenizer["model"]["vocab"]
  vocab["<|smollm2|>"] = vocab.pop("<|endoftext|>")  # LLaDA has a token of this name
  added = {SMALL_TOKENS + int(i) - LLADA_TOKENS: token for i, token in config["added_tokens_decoder"].items()}
  ids = {token["content"]: i for i, token in added.items()}
  start = "<|startoftext|>"
  tokenizer["added_tokens"] = [{"id": i, **token} for i, token in added.items()]
  if double_bos:
    both = [{"SpecialToken": {"id": start, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    tokenizer["post_processor"] = {
      "type": "TemplateProcessing",
      "single": both,
      "pair": [*both, {"Sequence": {"id": "B", "type_id": 1}}],
      "special_tokens": {start: {"id": start, "ids": [ids[start]], "tokens": [start]}},
    }
  write_json(folder / "tokenizer.json", tokenizer)
  write_json(folder / "tokenizer_config.json", config | {"added_tokens_decoder": {str(i): t for i, t in added.items()}})
  (folder / "special_tokens_map.json").write_bytes((source / "llada8b/special_tokens_map.json").read_bytes())
  end = ids["<|endoftext|>"]
  return {"mask_token_id": ids["<|mdm_mask|>"], "eos_token_id": end, "pad_token_id": end, "bos_token_id": ids[start]}
