"""Masked SFT alone, with the same words and fields as configs/grpo.py, and the adaptation of a causal model.

`--config=configs/sft.py:lora` is d1's fine-tuning on s1K; docs/d1.md sets each of its values beside d1's.

`--config=configs/sft.py:adapt` makes a causal Llama, Qwen2 or Qwen3 a masked diffusion model, on your own data
(docs/adapt.md). It takes a size of the model (`0.1b`, the default, `0.6b`, `2b`, `8b`), `lora` for adapters instead of
every weight, `block` for attention in blocks, and a task for the evaluation at the end, which is left out without one.
"""

import runpy
from pathlib import Path
from typing import NamedTuple

from ml_collections import config_dict

RECIPE = runpy.run_path(str(Path(__file__).with_name("grpo.py")))


class Size(NamedTuple):
  """The values of a model's size: rates with every weight trained and with adapters, and the sizes of a step."""

  learning_rate: float
  lora_rate: float
  batch_size: int  # rows
  accumulation: int
  row: int  # tokens
  steps: int


ADAPT = {
  "0.1b": Size(1e-4, 5e-4, 8, 1, 512, 1000),  # for SmolLM2 135M on two cores; rates from short runs
  "0.6b": Size(1e-4, 3e-4, 2048, 64, 1024, 5000),  # rate, batch and row of dllm's Tiny-A2D; steps and lora: a plan
  "2b": Size(5e-5, 2e-4, 1024, 64, 1024, 5000),  # a plan
  "8b": Size(1e-5, 1e-4, 512, 64, 1024, 5000),  # a plan; the rate is LLaDA2's
}
"""docs/adapt.md says what of this was measured, what was published and what is a plan."""

WORDS = {**RECIPE["WORDS"], "adapt": ("adapt",), "size of adapt": tuple(ADAPT)}


def get_config(words: str = "") -> config_dict.ConfigDict:
  """The configuration for the preset words."""
  chosen = [word for word in words.split(",") if word]
  sizes = [word for word in chosen if word in ADAPT]
  if "adapt" in chosen:
    return _adapt(chosen, sizes)
  if sizes:
    raise ValueError(f"preset word {sizes[0]} is a size of adapt: write adapt,{sizes[0]}")
  c = _fine_tuning(words)
  if {"lora", "full", "llada_8b"} & set(chosen):
    _large(c)
  return c


def _fine_tuning(words: str) -> config_dict.ConfigDict:
  c = RECIPE["get_config"](words)
  c.mode = "sft"
  c.workdir = c.workdir.replace("grpo", "sft")
  del c.grpo
  return c


def _large(c: config_dict.ConfigDict) -> None:
  c.model.quantize = "none"
  c.lora.update(alpha=256.0, targets=("q_proj", "k_proj", "v_proj"))
  c.sft.update(
    data="s1k/s1k.jsonl",
    steps=2460,
    completion_buckets=(512, 1024, 2048, 3584),
    truncate=True,
  )


def _adapt(chosen: list[str], sizes: list[str]) -> config_dict.ConfigDict:
  """A causal model becomes a diffusion model; rows are packed, and each validation shows samples."""
  rest = [word for word in chosen if word != "adapt" and word not in ADAPT]
  small = {"tiny", "smoke", "small"} & set(rest)
  if len(sizes) > 1 or small:
    excluding = ", ".join([*sizes, *sorted(small)])
    raise ValueError(f"preset words {excluding} exclude each other or adapt: name one of {', '.join(ADAPT)}")
  size, full = ADAPT[(sizes or ["0.1b"])[0]], "lora" not in rest
  c = _fine_tuning(",".join(rest if {"lora", "full"} & set(rest) else ["full", *rest]))
  c.workdir = "runs/adapt"
  c.model.quantize = "none"
  c.lora.update(alpha=256.0, targets=RECIPE["PROJECTIONS"])
  if not set(RECIPE["TASKS"]) & set(rest):
    c.task.name = "none"
    c.rollout.update(completion_length=64)  # of samples
  # A model that has only begun to learn can fill one token at a time.
  c.rollout.update(diffusion_steps=c.rollout.completion_length, block_length=32, early_exit=True)
  c.task.protocol = "strict"
  c.sft.update(
    steps=size.steps,
    batch_size=size.batch_size,
    accumulation=size.accumulation,
    packed=True,
    prompt_buckets=(size.row // 2,),  # a row is as long as both together
    completion_buckets=(size.row // 2,),
    learning_rate=size.learning_rate if full else size.lora_rate,
    warmup_steps=size.steps // 20,
    validate_every=size.steps // 20,
    held_out=64.0,
    samples=4,
  )
  if "block" in rest:
    c.model.block = 32
  else:
    c.sft.ends = 32
  return c
