"""What diffu-GRPO takes on chips that are not at hand: its programs, compiled ahead of time.

`--config=configs/aot.py:WORDS --config.topology=v5p:2x2x4`; the words and the fields are those of configs/grpo.py,
`lora,v5p` for example, and `full,v5p` trains every weight. No weights are read. docs/scaling.md tells all of it.
"""

import runpy
from pathlib import Path

from ml_collections import config_dict

RECIPE = runpy.run_path(str(Path(__file__).with_name("grpo.py")))
WORDS = RECIPE["WORDS"]


def get_config(words: str = "lora") -> config_dict.ConfigDict:
  """The configuration of the words."""
  c = RECIPE["get_config"](words)
  c.mode = "aot"
  c.topology = config_dict.placeholder(str)  # a generation of TPUs and the chips along each axis
  c.slices = 1  # such slices, joined by the network of the data centre
  c.output = config_dict.placeholder(str)  # a JSON file; None: only printed
  return c
