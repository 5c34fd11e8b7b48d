"""Completes prompts with a checkpoint or with the model in a folder.

`--config=configs/generate.py --config.checkpoint=DIR --config.prompt="What is 2 + 2?"`; without a prompt, the lines of
standard input are the prompts. docs/generation.md has the details.
"""

import runpy
from pathlib import Path

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
  """The configuration of a generation."""
  none = config_dict.placeholder
  c = config_dict.ConfigDict()
  c.mode = "generate"

  # The model: set one of these two fields.
  c.checkpoint = none(str)  # a run's work directory, or the folder of one checkpoint
  c.pretrained = none(str)  # a model folder, or d1jax:sudoku; with `checkpoint`: where the run's base model is now

  # A conversation on the terminal, answer by answer (docs/generation.md); a prompt is then its first message.
  c.chat = False

  # The prompts.
  c.prompt = none(str)  # None: the lines of standard input
  c.task = none(str)  # sudoku or countdown: prompts are its questions, written as the model was trained, and graded
  c.prefill = ""  # the start of each answer
  c.samples = 1  # answers to each prompt
  c.seed = 0

  # How to sample. For None, the value of the checkpoint's rollouts is used.
  c.temperature = 0.0  # 0 is greedy
  c.length = none(int)  # of the completion in tokens
  c.block_length = none(int)
  c.tokens_per_step = none(int)
  c.cfg_scale = none(float)
  c.remasking = none(str)  # low_confidence, random
  c.early_exit = True  # no further blocks are computed for an answer that has ended
  c.cache = none(str)  # none, prefix, dual, window
  c.schedule = none(str)  # static, sequential, threshold, factor
  c.threshold = none(float)  # for the schedule `threshold`
  c.max_reveal = none(int)  # the most tokens a step, for the schedules `threshold` and `factor`

  # What to show besides the text.
  c.show_steps = False  # the canvas after each step, as tokens are unmasked
  c.film = none(str)  # the same as an animated picture: a .gif

  c.batch_size = 16  # answers at a time
  c.prompt_buckets = (64, 128, 256, 512, 1024, 2048, 4096)
  c.mesh = dict(data=-1, fsdp=1, tensor=1, sequence=1)
  c.cpu_devices = 1
  # Settings for a model folder, which does not contain them.
  c.bare = runpy.run_path(str(Path(__file__).with_name("eval.py")))["get_config"]().bare
  return c
