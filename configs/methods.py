"""The papers' methods by name: the parts of each, and the hyperparameters of its authors.

`configs/grpo.py` takes them as words. Where a preset differs from its reference, docs/methods.md says so.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

Fields = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class MethodPreset:
  """What a word of `configs/grpo.py` sets. A value may be a function of the rollout's fields.

  Attributes:
    source: the paper, and the code of its authors where that is public.
    method: the fields of `config.grpo` that define the method.
    rollout: the fields of `config.rollout` that it needs.
    trained: the values of `config.grpo` with which its authors trained LLaDA-8B.
    sampled: their values of `config.rollout`.
    by_task: their values of `config.grpo` that depend on the task.
    sampled_by_task: their values of `config.rollout` that depend on the task.
    blocks: the fields of `config.grpo` that define the method for a block-causal network, where they differ.
    trained_blocks: the values of `config.grpo` with which its authors trained a block-causal network.
    sampled_blocks: their values of `config.rollout` for it.
  """

  source: str
  method: Fields
  rollout: Fields = dataclasses.field(default_factory=dict)
  trained: Fields = dataclasses.field(default_factory=dict)
  sampled: Fields = dataclasses.field(default_factory=dict)
  by_task: Mapping[str, Fields] = dataclasses.field(default_factory=dict)
  sampled_by_task: Mapping[str, Fields] = dataclasses.field(default_factory=dict)
  blocks: Fields = dataclasses.field(default_factory=dict)
  trained_blocks: Fields = dataclasses.field(default_factory=dict)
  sampled_blocks: Fields = dataclasses.field(default_factory=dict)

  def fields(self, rollout: Fields, *, block_causal: bool = False) -> dict[str, dict[str, Any]]:
    """Fields by section that hold for any model."""
    own, method = _resolved(self.rollout, rollout), _merged(self.method, self.blocks if block_causal else {})
    return {"rollout": own, "grpo": _resolved(method, {**rollout, **own})}

  def paper(self, rollout: Fields, task: str, *, block_causal: bool = False) -> dict[str, dict[str, Any]]:
    """Fields by section that its authors used on their model."""
    sampled = {**self.sampled, **self.sampled_by_task.get(task, {})}
    trained = _merged(self.trained, self.by_task.get(task, {}))
    if block_causal:  # the block length is the network's
      sampled = {name: value for name, value in sampled.items() if name != "block_length"} | dict(self.sampled_blocks)
      trained = _merged(trained, self.trained_blocks)
    own = _resolved(sampled, rollout)
    return {"rollout": own, "grpo": _resolved(trained, {**rollout, **own})}


def _merged(fields: Fields, others: Fields) -> dict[str, Any]:
  """Both sets of fields; the options of a part are merged one by one, and `others` win."""
  inner = {name: _merged(fields.get(name, {}), value) for name, value in others.items() if isinstance(value, dict)}
  return {**fields, **others, **inner}


def _resolved(fields: Fields, rollout: Fields) -> dict[str, Any]:
  resolve = lambda value: _resolved(value, rollout) if isinstance(value, dict) else value
  return {name: value(rollout) if callable(value) else resolve(value) for name, value in fields.items()}


def _clipped_token(epsilon: float, **options: Any) -> dict[str, Any]:
  return dict(loss=dict(name="clipped_token", epsilon=epsilon, epsilon_high=None, **options), aggregation="token")


def _clipped_sequence(epsilon: float, **options: Any) -> dict[str, Any]:
  loss = dict(name="clipped_sequence", epsilon=epsilon, epsilon_high=None, **options)
  return dict(loss=loss, aggregation="sequence", p_mask_prompt=0.0)


_SHRINK = 8
"""Denoising steps that TraceRL merges into one state."""


def _every_token(rollout: Fields) -> int:
  return rollout["completion_length"]


def _trace_beta(rollout: Fields) -> float:
  """TraceRL's 0.01 weighs a KL that is summed over the tokens of a state, beside a surrogate that is their mean.

  Here both are means over tokens, so beta is multiplied by the tokens per state: 8 at one token per step.
  """
  return 0.01 * _SHRINK * rollout["completion_length"] / rollout["diffusion_steps"]


def _merged_in_blocks(rollout: Fields) -> int:
  """Segments of the fewest steps, but at least two, that lie within blocks: of 2 steps if a block has 4 of them."""
  steps = rollout["diffusion_steps"] * rollout["block_length"] // rollout["completion_length"]
  run = next((run for run in range(2, steps + 1) if steps % run == 0), 1)
  return int(rollout["diffusion_steps"] // run)


METHODS: dict[str, MethodPreset] = {
  "d1": MethodPreset(
    "arXiv 2504.12216, dllm-reasoning/d1",
    dict(**_clipped_token(0.5), advantage=dict(name="mean"), estimator=dict(name="one_step")),
  ),
  "wd1": MethodPreset(
    "arXiv 2507.08838, xiaohangt/wd1",
    dict(
      estimator=dict(name="one_step"),
      loss=dict(name="likelihood", beta=0.0),
      advantage=dict(name="softmax"),
      aggregation="fixed",
    ),
    by_task={"countdown": dict(num_iterations=12)},
  ),
  "coupled": MethodPreset(
    "DiffuCoder, arXiv 2506.20639, apple/ml-diffucoder",
    dict(
      **_clipped_token(0.5),
      advantage=dict(name="leave_one_out"),
      estimator=dict(name="coupled", samples=1),
      p_mask_prompt=0.0,
    ),
    trained=dict(loss=dict(beta=0.01), learning_rate=1e-6, num_generations=10, num_iterations=2),
    sampled=dict(diffusion_steps=_every_token, temperature=1.0),
  ),
  "espo": MethodPreset(
    "arXiv 2512.03759, ML-GSAI/ESPO",
    dict(
      **_clipped_sequence(0.2, kl="k2"),
      advantage=dict(name="leave_one_out"),
      estimator=dict(name="elbo", samples=4, masking="count", antithetic=True),
    ),
    trained=dict(learning_rate=3e-6, num_iterations=8, weight_decay=0.01),
    sampled=dict(temperature=1.0),
    by_task={
      "countdown": dict(loss=dict(beta=3e-3, epsilon=0.0)),
      "sudoku": dict(loss=dict(beta=1e-2)),
      "gsm8k": dict(loss=dict(beta=1e-3)),
      "math": dict(loss=dict(beta=1e-3), num_generations=16),
    },
    sampled_by_task={"gsm8k": dict(diffusion_steps=256), "math": dict(diffusion_steps=256)},
  ),
  "gdpo": MethodPreset(
    "arXiv 2510.08554",
    dict(
      **_clipped_sequence(0.5, beta=0.0),
      advantage=dict(name="mean"),
      estimator=dict(name="quadrature", nodes=3),
    ),
    trained=dict(learning_rate=3e-7),
  ),
  "spg": MethodPreset(
    "arXiv 2510.09541, facebookresearch/SPG",
    dict(
      estimator=dict(name="sandwich", samples=2, exponent=1.5),
      loss=dict(name="sandwich", upper_share=0.5, beta=0.0),
      advantage=dict(name="mean"),
      aggregation="token",
    ),
    trained=dict(num_iterations=4),
    by_task={"sudoku": dict(estimator=dict(exponent=1.0))},
    sampled_by_task={"sudoku": dict(temperature=0.3)},
  ),
  # Its scripts are d1's, so mu, beta and all other values that are not named here are d1's.
  "stepmerge": MethodPreset(
    "d2, arXiv 2509.21474, kuleshov-group/d2",
    dict(
      **_clipped_token(0.5),
      advantage=dict(name="mean"),
      estimator=dict(name="step_merged", segments=lambda r: min(16, r["diffusion_steps"] // 2)),
    ),
    by_task={"gsm8k": dict(estimator=dict(segments=8))},
    sampled_by_task={
      "sudoku": dict(completion_length=128, diffusion_steps=64, temperature=0.3),
      "countdown": dict(completion_length=128, diffusion_steps=64),
      "math": dict(completion_length=512, diffusion_steps=256),
    },
    blocks=dict(estimator=dict(segments=_merged_in_blocks)),
  ),
  "tracerl": MethodPreset(
    "arXiv 2509.06949, Gen-Verse/dLLM-RL",
    dict(
      **_clipped_token(0.2, kl_against="old"),
      advantage=dict(name="mean_std"),
      estimator=dict(name="step_merged", segments=lambda r: min(16, r["diffusion_steps"])),
    ),
    trained=dict(
      loss=dict(beta=_trace_beta),
      estimator=dict(segments=lambda r: r["diffusion_steps"] // _SHRINK),
      learning_rate=1e-6,
      num_generations=8,
      prompts_per_iteration=32,
      num_iterations=1,
      warmup_steps=0,
      b2=0.999,
      weight_decay=0.0,
      max_grad_norm=1.0,
    ),
    sampled=dict(completion_length=512, diffusion_steps=512, temperature=0.8),
    blocks=dict(estimator=dict(segments=None)),  # shrink 1: every step is a state
    # configs/rl_sdar.yaml
    trained_blocks=dict(
      loss=dict(beta=0.01), estimator=dict(segments=None), num_generations=16, prompts_per_iteration=64, steps=80
    ),
    sampled_blocks=dict(
      completion_length=2000, diffusion_steps=2000, temperature=1.0, schedule="threshold", threshold=0.9
    ),
  ),
  # As espo, but with masks that are independent; the paper's weights of the noise levels are not public.
  "ebpo": MethodPreset(
    "LLaDA2.1, equation 5",
    dict(
      **_clipped_sequence(0.2, beta=0.0),
      advantage=dict(name="mean"),
      estimator=dict(name="elbo", samples=4, masking="bernoulli", antithetic=False),
    ),
  ),
  "agrpo": MethodPreset(
    "arXiv 2510.04019, probablyabot/agrpo",
    dict(
      loss=dict(name="clipped_token", epsilon=0.2, epsilon_high=None, beta=0.0),
      aggregation="sequence",
      advantage=dict(name="mean"),
      estimator=dict(name="sampled_steps", samples=lambda r: max(2, r["diffusion_steps"] // 32)),
    ),
    trained=dict(
      estimator=dict(samples=24),
      learning_rate=5e-6,
      num_generations=8,
      num_iterations=1,
      weight_decay=0.01,
      max_grad_norm=1.0,
    ),
    sampled=dict(completion_length=384, block_length=12, diffusion_steps=128, temperature=0.6, remasking="random"),
  ),
  "justgrpo": MethodPreset(
    "arXiv 2601.15165, LeapLabTHU/JustGRPO",
    dict(
      estimator=dict(name="left_to_right"),
      loss=dict(name="likelihood", beta=0.0),
      advantage=dict(name="mean_std"),
      aggregation="fixed",
    ),
    rollout=dict(block_length=1, diffusion_steps=_every_token, temperature=1.0),
    trained=dict(
      learning_rate=5e-6,
      num_generations=16,
      prompts_per_iteration=64,
      num_iterations=1,
      steps=125,
      warmup_steps=0,
      accumulation=16,
      rollout_chunks=8,
      b2=0.999,
      weight_decay=0.0,
      max_grad_norm=1.0,
    ),
  ),
}
