"""Exports a run as a folder for PyTorch: `--config=configs/export.py --config.checkpoint=DIR --config.output=DIR`."""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
  """The configuration of an export."""
  c = config_dict.ConfigDict()
  c.mode = "export"
  c.checkpoint = config_dict.placeholder(str)  # a work directory or a checkpoint folder
  c.adapter = config_dict.placeholder(str)  # in place of `checkpoint`: a PEFT adapter to merge into `pretrained`
  c.pretrained = config_dict.placeholder(str)  # the base model of `adapter`; or the new place of a run's base model
  c.output = config_dict.placeholder(str)  # a new folder
  c.form = "model"  # or "adapter": a PEFT folder of a run's adapters alone
  c.push_to_hub = config_dict.placeholder(str)  # OWNER/NAME on the Hugging Face hub; HF_TOKEN must be set
  c.private = True  # whether a repository that is made for it is private
  c.mesh = dict(data=1, fsdp=-1, tensor=1, sequence=1)
  c.cpu_devices = 1
  return c
