"""Masked SFT alone, with the same words and fields as configs/grpo.py."""

import importlib.util
from pathlib import Path

from ml_collections import config_dict


def get_config(words: str = "") -> config_dict.ConfigDict:
  """The configuration of the preset words."""
  spec = importlib.util.spec_from_file_location("d1jax_grpo_config", Path(__file__).with_name("grpo.py"))
  if spec is None or spec.loader is None:
    raise ImportError("configs/grpo.py is missing")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  c = module.get_config(words)
  c.mode = "sft"
  c.workdir = c.workdir.replace("grpo", "sft")
  del c.grpo
  return c
