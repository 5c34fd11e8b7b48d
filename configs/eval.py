"""Evaluation: of a checkpoint, of a model's folder, or of completions in a file.

`--config=configs/eval.py:WORDS --config.checkpoint=DIR`, words separated by commas: a size (`tiny`, the default, which
takes lengths, steps and prompts from the checkpoint; `d1`, d1's evaluation, once `llada_8b`), any number of
tasks (none: those of the checkpoint) and the chips that hold a large model (`v5e`, `v5p`, `v6e`, `h100`).
docs/evaluation.md tells all of it.
"""

import runpy
from pathlib import Path

from ml_collections import config_dict

RECIPE = runpy.run_path(str(Path(__file__).with_name("grpo.py")))
SIZES = ("tiny", "d1")
WORDS = {"size": SIZES, "task": RECIPE["TASKS"], "chips": tuple(RECIPE["CHIPS"])}
"""All preset words."""


def get_config(words: str = "") -> config_dict.ConfigDict:
  """The configuration of the words."""
  known = [word for group in WORDS.values() for word in group]
  chosen = [{"llada_8b": "d1"}.get(word, word) for word in words.split(",") if word]
  unknown = [word for word in chosen if word not in known]
  if unknown:
    raise ValueError(f"unknown preset word {unknown[0]!r}; known: {', '.join(known)}")
  sizes = [word for word in chosen if word in SIZES] or [SIZES[0]]
  chips = [word for word in chosen if word in RECIPE["CHIPS"]]
  if len(sizes) > 1:
    raise ValueError(f"preset words {', '.join(sizes)} exclude each other: name one of {', '.join(SIZES)}")
  none, grpo = config_dict.placeholder, RECIPE["get_config"](",".join(("lora", *chips)))
  c = config_dict.ConfigDict()
  c.mode = "eval"

  # What is evaluated: one of these three.
  c.checkpoint = none(str)  # a run's work directory, or the folder of one checkpoint
  c.pretrained = none(str)  # a model's folder; beside `checkpoint`: where the folder that the run started from is now
  c.generations = none(str)  # completions to grade without a model: a file, or a folder with a file a process

  # On what.
  # Without names and file: those of the checkpoint.
  c.tasks = tuple(word for word in chosen if word in RECIPE["TASKS"])
  c.module = none(str)  # the file of a task of your own
  c.split = "test"
  c.questions = none(int)  # at most so many of each task
  c.data_root = none(str)  # None: the checkpoint's
  c.data_seed = none(int)  # of generated questions; None: the checkpoint's
  c.style = none(str)  # of prompts: d1_eval, d1, terse; None: the checkpoint's
  c.prefill = none(str)  # how each answer starts; None: as the style has it
  c.protocol = "strict"  # or d1

  # How. None, or no lengths: as the checkpoint's rollouts.
  c.lengths = ()
  c.block_length = none(int)
  c.tokens_per_step = none(int)
  c.cfg_scale = none(float)
  c.remasking = none(str)
  c.cache = none(str)  # none, prefix, dual, window
  c.schedule = none(str)  # static, threshold, factor
  c.early_exit = none(bool)  # None: yes under `strict`; the d1 protocol reads on behind the stop
  c.temperatures = (0.0,)  # 0 is greedy: one seed and one sample are enough
  c.seeds = (0,)
  c.samples = 1  # of each question under each seed

  c.compare = none(str)  # the output of an earlier evaluation on the same questions
  c.chosen_beforehand = False  # let a checkpoint meet the test split that validation did not choose
  c.output = none(str)  # a folder; None: a new one in the work directory, the same for the same evaluation
  c.batch_size = none(int)  # None: the checkpoint's
  c.prompt_buckets = ()  # none: the checkpoint's
  c.mesh = dict(data=-1, fsdp=1, tensor=1, sequence=1)
  c.cpu_devices = 2

  # What a model's folder does not say.
  sections = ("seed", "rules", "rollout_rules", "model", "lora", "data", "task", "rollout", "evaluation")
  c.bare = {name: grpo[name] for name in sections}
  c.bare.model.quantize = "none"
  c.bare.lora.rank = 0
  if chips:
    c.mesh = grpo.mesh
    c.bare.rules = grpo.rules.to_dict() | grpo.rollout_rules.to_dict()
    c.bare.rollout_rules = {}

  if sizes[0] == "d1":
    c.style = "d1_eval"
    c.lengths, c.block_length, c.tokens_per_step = (128, 256, 512), 32, 2
  return c
