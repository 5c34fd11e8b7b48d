"""Preference tuning: masked SFT, then DPO on pairs of answers (VRPO, LLaDA 1.5), then evaluation.

`--config=configs/dpo.py:WORDS` takes the words of configs/grpo.py but those of methods, and its fields outside of
`grpo`. The pairs come from a file (`pairs.file`), or from graded rollouts on training questions, of another run
(`pairs.checkpoint`) or of the policy at the start of the stage: a right answer against a wrong one. docs/methods.md has
the details.
"""

import runpy
from pathlib import Path

from ml_collections import config_dict

RECIPE = runpy.run_path(str(Path(__file__).with_name("grpo.py")))
WORDS = {group: words for group, words in RECIPE["WORDS"].items() if group != "method"}


def get_config(words: str = "") -> config_dict.ConfigDict:
  """The configuration for the preset words."""
  methods = sorted(set(words.split(",")) & set(RECIPE["METHODS"]))
  if methods:
    raise ValueError(f"preset word {methods[0]!r} is a method of configs/grpo.py: leave it out")
  c = RECIPE["get_config"](words)
  c.mode = "dpo"
  c.workdir = c.workdir.replace("grpo", "dpo")
  rate = {name: c.grpo[name] for name in ("b2", "weight_decay", "logits_tile")}
  del c.grpo

  c.pairs = dict(
    file=config_dict.placeholder(str),  # JSON lines under data.root; None: pairs are made from rollouts
    checkpoint=config_dict.placeholder(str),  # a run that samples them; None: the policy at the start samples
    questions=2000,  # the first ones of the training split
    samples=8,  # answers to each question
    held_out=0.05,  # share that validates
  )
  # LLaDA 1.5's values: beta, samples, the learning rate, and pairs a step; one pass over 2,000 pairs.
  c.dpo = dict(
    steps=32,
    batch_size=64,
    accumulation=4 if set(words.split(",")) & set(RECIPE["CHIPS"]) else 8,  # micro-batches
    prompt_buckets=tuple(c.data.prompt_buckets),
    completion_buckets=(c.rollout.completion_length,),  # ascending
    beta=0.2,
    samples=8,  # masks of an answer, a noise level each; policy and reference share them
    sft_weight=0.0,  # weight of the chosen answer's own loss
    learning_rate=5e-7,
    warmup_steps=5,
    decay="linear",
    max_grad_norm=1.0,
    validate_every=8,
    **rate,
  )
  if c.model.size in ("tiny", "small"):
    c.rollout.temperature = 1.0
    c.pairs.update(questions=4000, samples=16)
    c.dpo.update(steps=300, accumulation=1, samples=4, learning_rate=3e-4, warmup_steps=20, validate_every=50)
  if "smoke" in words.split(","):
    c.pairs.update(questions=200, samples=8)
    c.dpo.update(steps=8, batch_size=16, warmup_steps=2, validate_every=4)
  return c
