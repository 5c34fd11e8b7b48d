"""Allowed values of the configuration's fields, checked before anything is read, compiled or trained.

One table serves all modes. Conditions on several fields, on data or on devices are checked where these are known.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from d1jax.run.identity import flatten
from d1jax.run.workdir import local


class Limit(NamedTuple):
  """A condition on a number, or on each of several numbers.

  Attributes:
    whole: True: an integer; False: any finite number.
    least: the lower bound.
    most: the upper bound.
    above: whether the lower bound itself is excluded.
    below: whether the upper bound itself is excluded.
    optional: whether None is allowed.
    several: whether the value is a tuple of such numbers.
  """

  whole: bool
  least: float = -math.inf
  most: float = math.inf
  above: bool = False
  below: bool = False
  optional: bool = False
  several: bool = False

  def allows(self, value: Any) -> bool:
    """Whether a value meets the condition for one number."""
    if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
      return False
    if isinstance(value, float) and not math.isfinite(value):
      return False
    more = value > self.least if self.above else value >= self.least
    return more and (value < self.most if self.below else value <= self.most)

  def __str__(self) -> str:
    parts = ["a whole number" if self.whole else "a finite number"]
    if self.least > -math.inf:
      parts.append(f"{'above' if self.above else 'of at least'} {self.least:g}")
    if self.most < math.inf:
      parts.append(f"{'below' if self.below else 'at most'} {self.most if self.whole else format(self.most, 'g')}")
    return f"{parts[0]} {' and '.join(parts[1:])}".strip() + (", or None" if self.optional else "")


COUNT, MANY, MAYBE_COUNT = Limit(True, 1), Limit(True, 0), Limit(True, 1, optional=True)
TOKENS = Limit(True, 1, 2**20)
"""JAX counts the entries of an axis in 32 bits, and no model reads as many tokens at a time."""
REAL, SIZE, POSITIVE = Limit(False), Limit(False, 0), Limit(False, 0, above=True)
MAYBE_REAL, MAYBE_SIZE = Limit(False, optional=True), Limit(False, 0, optional=True)
SHARE, DECAY = Limit(False, 0, 1), Limit(False, 0, 1, below=True)
SEED = Limit(True, 0, 2**32 - 1)
"""JAX would drop higher bits, and would then draw as with another seed."""

_STAGE: Mapping[str, Limit] = {
  "steps": MANY,
  "validate_every": MANY,
  "save_every": MAYBE_COUNT,
  "max_skipped_steps": MANY,
  "patience": MAYBE_COUNT,
  "seconds": POSITIVE._replace(optional=True),
  "accumulation": COUNT,
  "learning_rate": SIZE,
  "warmup_steps": MANY,
  "b1": DECAY,
  "b2": DECAY,
  "weight_decay": SIZE,
  "max_grad_norm": POSITIVE,
  "ema_decay": DECAY._replace(optional=True),
  "logits_tile": MAYBE_COUNT,
}
TABLE: Mapping[str, Limit] = {
  "seed": SEED,
  "cpu_devices": COUNT,
  **{f"model.overrides.{name}": MAYBE_COUNT for name in ("embed", "heads", "mlp", "layers")},
  "model.overrides.rope_theta": Limit(False, 0, above=True, optional=True),
  "model.block": MAYBE_COUNT,
  "model.unroll": COUNT,
  "lora.rank": MANY,
  "lora.alpha": POSITIVE,
  "lora.dropout": DECAY,
  "tokenizer.vocab_size": COUNT,
  **{f"task.sizes.{name}": Limit(True, 0, optional=True) for name in ("demonstrations", "train", "validation", "test")},
  **{f"{section}.prompt_buckets": TOKENS._replace(several=True) for section in ("data", "sft", "dpo", "evaluation")},
  **{f"{stage}.completion_buckets": TOKENS._replace(several=True) for stage in ("sft", "dpo")},
  "rollout.completion_length": TOKENS,
  "rollout.block_length": TOKENS,
  "rollout.temperature": SIZE,
  "rollout.cfg_scale": SIZE,
  "rollout.threshold": REAL,
  "rollout.factor": REAL,
  **{f"{stage}.{name}": limit for stage in ("sft", "dpo", "grpo") for name, limit in _STAGE.items()},
  **{f"{stage}.p_mask_prompt": SHARE for stage in ("sft", "grpo")},
  **{f"{stage}.batch_size": COUNT for stage in ("sft", "dpo")},
  "dpo.samples": COUNT,
  "dpo.beta": POSITIVE,
  "dpo.sft_weight": SIZE,
  "pairs.questions": COUNT,
  "pairs.samples": Limit(True, 2),
  "pairs.held_out": SIZE,
  "rounds": COUNT,
  **{f"distill.{name}": COUNT for name in ("questions", "samples", "most")},
  "distill.temperature": SIZE,
  "sft.held_out": SIZE,
  "sft.samples": MANY,
  "sft.ends": MANY,
  "sft.mask_ratio": SHARE._replace(several=True),
  "sft.grow": TOKENS._replace(several=True),
  "sft.mask_noise_steps": MANY,
  **{f"grpo.{name}": COUNT for name in ("prompts_per_iteration", "num_generations", "num_iterations")},
  **{f"grpo.{name}": COUNT for name in ("rollout_chunks", "oversample")},
  "grpo.rollout_slots": MAYBE_COUNT,
  **{f"grpo.{name}": MANY for name in ("grading_workers", "dump_every", "overlong", "off_policy_steps", "partial_age")},
  "grpo.behaviour_cap": POSITIVE,
  "grpo.length_warmup": MANY,
  "grpo.length_reward": SIZE,
  "grpo.length_curriculum": TOKENS._replace(several=True),
  "grpo.length_threshold": SHARE,
  **{f"grpo.{name}": MAYBE_REAL for name in ("importance_cap", "drift_limit")},
  "grpo.answered": REAL,
  "evaluation.batch_size": COUNT,
  # Fields of evaluations and generations.
  "data_seed": SEED._replace(optional=True),
  "seeds": SEED._replace(several=True),
  "temperature": SIZE,
  "temperatures": SIZE._replace(several=True),
  "cfg_scale": MAYBE_SIZE,
  "threshold": MAYBE_REAL,
  "max_reveal": MAYBE_COUNT,
  "length": TOKENS._replace(optional=True),
  "lengths": TOKENS._replace(several=True),
  "block_length": TOKENS._replace(optional=True),
  "tokens_per_step": MAYBE_COUNT,
  "batch_size": MAYBE_COUNT,
  "samples": COUNT,
  "questions": MAYBE_COUNT,
  "window": TOKENS,
  "mc_num": COUNT,
  "prompt_buckets": TOKENS._replace(several=True),
  "slices": COUNT,
  # Fields of servers.
  "port": Limit(True, 0, 2**16 - 1),
  "slots": COUNT,
  "queue": COUNT,
  "request_seconds": POSITIVE,
  "drain_seconds": SIZE,
}
"""The conditions on the numbers of all configurations, by dotted name."""
MAY_BE_EMPTY = ("lengths", "prompt_buckets", "sft.grow", "grpo.length_curriculum")
"""If `lengths` or `prompt_buckets` is empty, the numbers of the checkpoint are used."""


LOCAL = (
  *("model.pretrained", "data.root", "task.module", "sft.data"),
  *("pretrained", "adapter", "generations", "perplexity", "module", "data_root", "film", "api_key_file"),
)
"""The path fields that must not be in a bucket. `output` may be, but only in an evaluation, which checks it itself."""


def check(config: ConfigDict) -> None:
  """Checks every field.

  Raises:
    ValueError: a value is not allowed; the message names the field and the condition.
    RunError: a path is in a bucket, but must not be.
  """
  for name, value in flatten(config.to_dict()).items():
    if name in LOCAL and isinstance(value, str):
      local(name, value)
    limit = REAL if name.startswith("grpo.reward_weights.") else TABLE.get(name)
    if limit is None or (limit.optional and value is None):
      continue
    if not limit.several:
      if not limit.allows(value):
        raise ValueError(f"{name}={value!r} must be {limit}")
    elif not isinstance(value, tuple | list) or not all(map(limit.allows, value)):
      raise ValueError(f"{name}={value!r} must hold numbers of which each is {limit}")
    elif not value and name not in MAY_BE_EMPTY:
      raise ValueError(f"{name} is empty; it must hold at least one number")
