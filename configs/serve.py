"""Serves a checkpoint, or the model in a folder, to OpenAI's clients over HTTP, with a chat as a page.

`--config=configs/serve.py --config.checkpoint=DIR`, and then http://127.0.0.1:8000. docs/serving.md has the details.
"""

import runpy
from pathlib import Path

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
  """The configuration of a server."""
  none = config_dict.placeholder
  c = config_dict.ConfigDict()
  c.mode = "serve"

  # The model: set one of these two fields.
  c.checkpoint = none(str)  # a run's work directory, or the folder of one checkpoint
  c.pretrained = none(str)  # a model folder; with `checkpoint`: the new place of the run's base model, if it moved
  c.name = none(str)  # what clients call it; None: the folder's name

  # Who may ask.
  c.host = "127.0.0.1"  # 0.0.0.0: other machines too, which needs an API key
  c.port = 8000  # 0: any that is free
  c.api_key_file = none(str)  # a file that holds the key; None: whoever can connect may ask

  # What runs at once. Each of `lengths` is compiled for 1, 2, 4, ... `slots` rows.
  c.slots = 16  # answers at a time
  c.lengths = (256, 512, 1024)  # of a prompt and its answer together, in tokens
  c.block_length = none(int)  # the longest block of a request; None: that of the checkpoint's rollouts
  c.queue = 64  # answers that wait; more are refused
  c.request_seconds = 300.0  # of an answer, the wait included
  c.drain_seconds = 30.0  # for what runs, after SIGTERM or Ctrl-C; a second signal ends at once

  c.mesh = dict(data=-1, fsdp=1, tensor=1, sequence=1)
  c.cpu_devices = 1
  # Settings for a model folder, which does not contain them.
  c.bare = runpy.run_path(str(Path(__file__).with_name("eval.py")))["get_config"]().bare
  return c
