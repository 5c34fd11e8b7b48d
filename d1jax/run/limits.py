"""Which values a field of the configuration may have: looked at before anything is read, compiled or trained.

One table for all modes. What depends on several fields, on the data or on the devices is checked where these are known.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from d1jax.run.identity import flatten
from d1jax.run.workdir import local


class Limit(NamedTuple):
  """What a number, or each of several, must be.

  Attributes:
    whole: an integer, or any finite number.
    least: it may not be less.
    most: it may not be more.
    above: it must be more than `least`.
    below: it must be less than `most`.
    optional: None is a value too.
    several: a tuple of such numbers.
  """

  whole: bool
  least: float = -math.inf
  most: float = math.inf
  above: bool = False
  below: bool = False
  optional: bool = False
  several: bool = False

  def allows(self, value: Any) -> bool:
    """Whether this is such a number."""
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
"""JAX would drop higher bits, and take another seed's draws."""

_STAGE: Mapping[str, Limit] = {
  "steps": MANY,
  "validate_every": MANY,
  "save_every": MAYBE_COUNT,
  "max_skipped_steps": MANY,
  "patience": MAYBE_COUNT,
  "accumulation": COUNT,
  "learning_rate": SIZE,
  "warmup_steps": MANY,
  "b1": DECAY,
  "b2": DECAY,
  "weight_decay": SIZE,
  "max_grad_norm": POSITIVE,
  "ema_decay": DECAY._replace(optional=True),
  "p_mask_prompt": SHARE,
  "logits_tile": MAYBE_COUNT,
}
TABLE: Mapping[str, Limit] = {
  "seed": SEED,
  "cpu_devices": COUNT,
  **{f"model.overrides.{name}": MAYBE_COUNT for name in ("embed", "heads", "mlp", "layers")},
  "model.overrides.rope_theta": Limit(False, 0, above=True, optional=True),
  "model.unroll": COUNT,
  "lora.rank": MANY,
  "lora.alpha": POSITIVE,
  "lora.dropout": DECAY,
  "tokenizer.vocab_size": COUNT,
  **{f"task.sizes.{name}": Limit(True, 0, optional=True) for name in ("demonstrations", "train", "validation", "test")},
  **{f"{section}.prompt_buckets": TOKENS._replace(several=True) for section in ("data", "sft", "evaluation")},
  "sft.completion_buckets": TOKENS._replace(several=True),
  "rollout.completion_length": TOKENS,
  "rollout.block_length": TOKENS,
  "rollout.temperature": SIZE,
  "rollout.cfg_scale": SIZE,
  "rollout.threshold": REAL,
  "rollout.factor": REAL,
  **{f"{stage}.{name}": limit for stage in ("sft", "grpo") for name, limit in _STAGE.items()},
  "sft.batch_size": COUNT,
  "sft.held_out": DECAY,
  **{f"grpo.{name}": COUNT for name in ("prompts_per_iteration", "num_generations", "num_iterations")},
  **{f"grpo.{name}": COUNT for name in ("rollout_chunks", "oversample")},
  **{f"grpo.{name}": MANY for name in ("grading_workers", "dump_every", "overlong")},
  **{f"grpo.{name}": MAYBE_REAL for name in ("importance_cap", "drift_limit")},
  "grpo.answered": REAL,
  "evaluation.batch_size": COUNT,
  # Of evaluations and generations.
  "data_seed": SEED._replace(optional=True),
  "seeds": SEED._replace(several=True),
  "temperature": SIZE,
  "temperatures": SIZE._replace(several=True),
  "cfg_scale": MAYBE_SIZE,
  "threshold": MAYBE_REAL,
  "length": TOKENS._replace(optional=True),
  "lengths": TOKENS._replace(several=True),
  "block_length": TOKENS._replace(optional=True),
  "tokens_per_step": MAYBE_COUNT,
  "batch_size": MAYBE_COUNT,
  "samples": COUNT,
  "questions": MAYBE_COUNT,
  "prompt_buckets": TOKENS._replace(several=True),
  "slices": COUNT,
}
"""The numbers of all configurations, by their dotted names."""
NONE_IS_ALL = ("lengths", "prompt_buckets")
"""Of these no number at all means those of the checkpoint."""


LOCAL = (
  *("model.pretrained", "data.root", "task.module", "sft.data"),
  *("pretrained", "adapter", "generations", "module", "data_root", "film"),
)
"""The paths of all configurations that cannot lie in a bucket; `output` can in an evaluation, and is checked there."""


def check(config: ConfigDict) -> None:
  """Looks at every field.

  Raises:
    ValueError: the value of a field makes no sense; the message names it, and what it must be.
    RunError: a path lies in a bucket and cannot.
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
    elif not value and name not in NONE_IS_ALL:
      raise ValueError(f"{name} is empty; it must hold at least one number")
