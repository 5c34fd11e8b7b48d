"""Rejection sampling in rounds (DeepSeek-R1): sample a checkpoint, fine-tune on its right answers, go on with RL.

`--config=configs/distill.py:WORDS --config.checkpoint=RUN` takes the words and fields of configs/grpo.py. Each round
samples answers to training questions, keeps right ones, fine-tunes the base on them and goes on with diffu-GRPO, whose
result is sampled in the next round. With `output` it only samples. docs/distill.md has the details.
"""

import runpy
from pathlib import Path

from ml_collections import config_dict

RECIPE = runpy.run_path(str(Path(__file__).with_name("grpo.py")))
WORDS = RECIPE["WORDS"]


def get_config(words: str = "") -> config_dict.ConfigDict:
  """The configuration for the preset words."""
  c = RECIPE["get_config"](words)
  c.mode = "distill"
  c.workdir = "runs/distill"
  del c.sft.data  # the answers of the round

  # Who samples in the first round: a run, or a model's folder. The base that is fine-tuned is `model`.
  c.checkpoint = config_dict.placeholder(str)  # a run's work directory, or the folder of one checkpoint
  c.pretrained = config_dict.placeholder(str)  # a model's folder; with `checkpoint`: the new place of the run's base
  c.rounds = 2
  c.output = config_dict.placeholder(str)  # a new file: answers are sampled into it, and nothing is trained
  c.distill = dict(
    questions=4000,  # the first ones of the training split
    samples=4,  # answers to each question
    temperature=1.0,  # of these answers; diffu-GRPO has rollout.temperature
    keep="shortest",  # the shortest right answer of a question; or distinct: different right ones, at most `most`
    most=4,
  )
  c.sft.held_out = 0.0  # the validation questions decide
  # Questions have the buckets of diffu-GRPO, and an answer may have more tokens than it was sampled with.
  c.sft.prompt_buckets = tuple(c.data.prompt_buckets)
  c.sft.completion_buckets = (c.rollout.completion_length,)
  if c.model.size in ("tiny", "small"):
    c.sft.update(weight_decay=0.1, p_mask_prompt=0.0)  # for some thousand answers
  else:
    c.sft.update(steps=1000, validate_every=250)  # two passes over 4,000 answers: a plan
  if "smoke" in words.split(","):
    c.distill.questions = 200
  return c
