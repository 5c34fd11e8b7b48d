"""Estimates memory and time of diffu-GRPO on TPUs that you do not have: its programs are compiled ahead of time.

`--config=configs/aot.py:WORDS --config.topology=v5p:2x2x4`; the words and the fields are those of configs/grpo.py,
`lora,v5p` for example, and `full,v5p` trains every weight. No weights are read. docs/scaling.md has the details.
"""

import runpy
from pathlib import Path

from ml_collections import config_dict

RECIPE = runpy.run_path(str(Path(__file__).with_name("grpo.py")))
WORDS = RECIPE["WORDS"]


def get_config(words: str = "lora") -> config_dict.ConfigDict:
  """The configuration for the preset words."""
  c = RECIPE["get_config"](words)
  c.mode = "aot"
  c.topology = config_dict.placeholder(str)  # the TPU generation and the chips along each axis, such as v5e:2x4
  c.slices = 1  # the number of such slices; the data-centre network joins them
  c.output = config_dict.placeholder(str)  # a JSON file for the results; None: they are only printed
  return c
