"""Draws the page of a run again: `--config=configs/report.py --config.workdir=DIR --config.output=FILE.html`."""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
  """The configuration of a page."""
  c = config_dict.ConfigDict()
  c.mode = "report"
  c.workdir = config_dict.placeholder(str)  # a run's folder, at work or finished; nothing is written there
  c.compare = config_dict.placeholder(str)  # the folder of a run to draw on the same axes
  c.output = config_dict.placeholder(str)  # the page, a file outside of the run's folder
  c.cpu_devices = 1
  return c
