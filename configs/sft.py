"""Masked SFT alone, with the same words and fields as configs/grpo.py.

`--config=configs/sft.py:lora` is d1's fine-tuning on s1K; docs/d1.md sets each of its values beside d1's.
"""

import runpy
from pathlib import Path

from ml_collections import config_dict

RECIPE = runpy.run_path(str(Path(__file__).with_name("grpo.py")))
WORDS = RECIPE["WORDS"]


def get_config(words: str = "") -> config_dict.ConfigDict:
  """The configuration for the preset words."""
  c = RECIPE["get_config"](words)
  c.mode = "sft"
  c.workdir = c.workdir.replace("grpo", "sft")
  del c.grpo
  if {"lora", "full", "llada_8b"} & set(words.split(",")):
    _large(c)
  return c


def _large(c: config_dict.ConfigDict) -> None:
  c.model.quantize = "none"
  c.lora.update(alpha=256.0, targets=("q_proj", "k_proj", "v_proj"))
  c.sft.update(
    data="s1k/s1k.jsonl",
    steps=2460,
    completion_buckets=(512, 1024, 2048, 3584),
    truncate=True,
  )
