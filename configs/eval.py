"""Evaluates a checkpoint, a model folder, or completions in a file; or scores a file of text.

`--config=configs/eval.py:WORDS --config.checkpoint=DIR`, words separated by commas: a size (`tiny`, the default, which
takes lengths, steps and prompts from the checkpoint; `d1`, d1's evaluation, once `llada_8b`), any number of
tasks (none: those of the checkpoint) and the chips that hold a large model (`v5e`, `v5p`, `v6e`, `h100`).
docs/evaluation.md has the details.
"""

import runpy
from pathlib import Path

from ml_collections import config_dict

RECIPE = runpy.run_path(str(Path(__file__).with_name("grpo.py")))
SIZES = ("tiny", "d1")
WORDS = {"size": SIZES, "task": RECIPE["TASKS"], "chips": tuple(RECIPE["CHIPS"])}
"""All preset words."""


def get_config(words: str = "") -> config_dict.ConfigDict:
  """The configuration for the preset words."""
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

  # What to evaluate: set one of these three fields.
  c.checkpoint = none(str)  # a run's work directory, or the folder of one checkpoint
  c.pretrained = none(str)  # a model folder; with `checkpoint`: the new place of the run's base model, if it moved
  c.generations = none(str)  # completions to grade without a model: a file, or a folder with one file per process

  # Instead of questions: the text that the model is to predict, a file of one document or JSON lines with `text`.
  c.perplexity = none(str)
  c.window = 1024  # the most tokens that are scored at a time
  c.mc_num = 128  # masks of each window, a forward pass each; one is enough for blocks of one token

  # The questions. If neither `tasks` nor `module` is set, the tasks of the checkpoint are used.
  c.tasks = tuple(word for word in chosen if word in RECIPE["TASKS"])
  c.module = none(str)  # the Python file of your own task
  c.split = "test"
  c.questions = none(int)  # the largest number of questions of each task; None: all
  c.data_root = none(str)  # None: as in the checkpoint
  c.data_seed = none(int)  # the seed of generated questions; None: as in the checkpoint
  c.style = none(str)  # the prompt style: d1_eval, d1, terse; None: as in the checkpoint
  c.prefill = none(str)  # the start of each answer; None: the one of the style
  c.protocol = "strict"  # or d1

  # How to sample. For None, or an empty `lengths`, the value of the checkpoint's rollouts is used.
  c.lengths = ()
  c.block_length = none(int)
  c.tokens_per_step = none(int)
  c.cfg_scale = none(float)
  c.remasking = none(str)
  c.cache = none(str)  # none, prefix, dual, window
  c.schedule = none(str)  # static, sequential, threshold, factor
  c.early_exit = none(bool)  # None: yes with `strict`; the d1 protocol also reads text after the stop
  c.temperatures = (0.0,)  # 0 is greedy: one seed and one sample are enough
  c.seeds = (0,)
  c.samples = 1  # completions of each question for each seed

  c.compare = none(str)  # the output folder of an earlier evaluation on the same questions
  c.chosen_beforehand = False  # True: evaluate on the test split a checkpoint that validation did not choose
  c.output = none(str)  # a folder; None: one in the work directory, named by a hash of the evaluation
  c.batch_size = none(int)  # None: as in the checkpoint
  c.prompt_buckets = ()  # empty: as in the checkpoint
  c.mesh = dict(data=-1, fsdp=1, tensor=1, sequence=1)
  c.cpu_devices = 2

  # Settings for a model folder, which does not contain them.
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
