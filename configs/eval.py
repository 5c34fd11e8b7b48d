"""Evaluation of a checkpoint: `--config=configs/eval.py --config.checkpoint=DIR`, a work directory or one checkpoint's
folder.
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
  """The configuration of an evaluation; everything about model and task comes with the checkpoint."""
  c = config_dict.ConfigDict()
  c.mode = "eval"
  c.checkpoint = config_dict.placeholder(str)
  c.pretrained = config_dict.placeholder(str)  # where the folder that the run started from is now; None: where it was
  c.split = "test"
  c.temperatures = (0.0, 1.0)  # 0 is greedy
  c.seed = 0  # of the sampled completions
  c.output = config_dict.placeholder(str)  # a folder; None: eval/ in the work directory
  c.batch_size = 440
  c.mesh = dict(data=-1, fsdp=1, tensor=1)
  c.cpu_devices = 2
  return c
