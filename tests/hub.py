"""Complete small folders in the layout of the Hugging Face hub: weights, configuration, tokenizer."""

import json
from pathlib import Path

from tests.data.folders import changed, small_files
from tests.data.folders import write_llada_tokenizer as write_real_tokenizer
from tests.models import folders

SIZES = dict(vocab=264, embed=64, heads=2, kv_heads=2, head_size=32, mlp=128, layers=2)
IDS = {"mask_token_id": 261, "eos_token_id": 258, "pad_token_id": 258}
MASKS = {"a2d_qwen3": "<|mask|>", "sdar": "<|MASK|>", "fast_dllm_qwen": "|<MASK>|", "illada": "<[MASK]>"}
"""The text of token 261 where the tokenizer holds the mask; the first two are its `mask_token` too."""
STOPS = {"eos_token_id": [260, 258]}
"""The generation_config.json of these: `<|im_end|>` and the end of a text, as in Qwen's."""


def write(folder: Path, family: str = "llada", *, dtype: str = "bfloat16", **sizes: int) -> Path:
  """A model of 0.1M parameters whose tokenizer reads bytes.

  A block-causal family needs a block length beside it, see `configs.BLOCKS`: `from_pretrained(folder, block=4)`, or
  `--config.model.block=4`. `fast_dllm_qwen` has it in config.json.
  """
  folders.write(folder, family, dtype=dtype, shards=2, **(SIZES | sizes))
  ids = IDS if family in folders.WITH_MASK else {k: v for k, v in IDS.items() if k != "mask_token_id"}
  files, mask = small_files(), MASKS.get(family)
  if mask is not None:
    files = {name: content.replace(b"<|hole|>", mask.encode()) for name, content in files.items()}
    files["generation_config.json"] = json.dumps(STOPS).encode()
  if family in ("a2d_qwen3", "sdar"):
    files = changed(files, "tokenizer_config.json", mask_token=mask)
  for name, content in files.items():
    if name != "config.json":
      (folder / name).write_bytes(content)
  _name_ids(folder, ids)
  return folder


def write_14m(folder: Path) -> Path:
  """A LLaDA of 14M parameters, random weights, with a real vocabulary (see `write_llada_tokenizer`)."""
  sizes = dict(vocab=49424, embed=128, heads=2, kv_heads=2, head_size=64, mlp=1024, layers=4)
  folders.write(folder, "llada", dtype="bfloat16", shards=4, **sizes)
  _name_ids(folder, write_real_tokenizer(folder))
  return folder


def _name_ids(folder: Path, ids: dict[str, int]) -> None:
  path = folder / "config.json"
  config = json.loads(path.read_text())
  path.write_text(json.dumps({k: v for k, v in config.items() if not k.endswith("_token_id")} | ids))
