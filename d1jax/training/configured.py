"""Builds the values that the stages take from a configuration, and checks them before anything is compiled.

Messages name fields of the command line here and in `parts`; `d1jax.rl` does not know these fields.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from d1jax.diffusion import blocks
from d1jax.diffusion.corruption import NoiseSpec
from d1jax.diffusion.denoiser import Denoiser
from d1jax.diffusion.layout import extra
from d1jax.diffusion.likelihood import Scores
from d1jax.diffusion.rollout import Rollout, SamplerSpec
from d1jax.errors import reworded
from d1jax.rl.curriculum import Curriculum
from d1jax.rl.grading import Grader
from d1jax.rl.losses import Ratios, Terms
from d1jax.rl.method import Method
from d1jax.rl.preference import Preference
from d1jax.rl.prompts import Prompts
from d1jax.rl.shaping import UNSHAPED, Shaping
from d1jax.run import parts
from d1jax.run.experiment import Experiment
from d1jax.run.inputs import data_root
from d1jax.tasks import Mixture, Task
from d1jax.training import dpo, drift, sft_data
from d1jax.training.host import Grading
from d1jax.training.lengths import Lengths
from d1jax.training.programs import Programs
from d1jax.training.shape import Shape

TAKEN = (
  "loss",
  "grad_norm",
  "finite",
  "sampling_gap",
  "reference_gap",
  "behaviour_gap",
  "reward",
  "stage",
  "iteration",
  "alarms",
)
"""Names in the records of `metrics.jsonl` that a figure of a loss must not have."""


def method(section: ConfigDict, sampler: SamplerSpec, block: int | None = None) -> Method:
  """The method of `config.grpo`, for a network with blocks of this length.

  Raises:
    ValueError: see `parts.build` and `Method` (parts that do not fit together); or a part fails when it is tried out.
  """
  shared = {"p_mask_prompt": section.p_mask_prompt, "tile": section.logits_tile}
  estimator = parts.build("estimator", section.estimator, **shared)
  loss, advantage = parts.build("loss", section.loss), parts.build("advantage", section.advantage)
  with reworded("grpo."):
    built = Method(
      estimator,
      loss,
      advantage,
      section.num_iterations,
      section.accumulation,
      section.aggregation,
      section.importance_cap,
      section.score_reference,
      section.behaviour_cap if section.off_policy_steps or section.partial_age else None,
    )
  if section.num_generations < 2:
    raise ValueError(f"grpo.num_generations={section.num_generations}: a group of one has no baseline; use at least 2")
  _try_out(built, section, sampler, block)
  return built


def _try_out(method: Method, section: ConfigDict, sampler: SamplerSpec, block: int | None) -> None:
  """Traces the parts with a denoiser of one token and the mask, so that wrong options are reported now."""
  encode = lambda params, tokens, valid: jnp.zeros((*tokens.shape, 1))
  denoiser = Denoiser(encode, lambda params: jnp.zeros((1, 2)), mask_id=1, stop_ids=(), forbidden_ids=(1,), vocab=2)
  if block is not None:
    both = lambda params, clean, noisy, valid, first: (encode(params, clean, valid), encode(params, noisy, valid))
    unused: Callable[..., Any] = lambda *arguments: None
    denoiser = dataclasses.replace(denoiser, block=block, encode_streams=both, init_cache=unused, encode_window=unused)
  needs, rows = method.loss.needs, jnp.ones(1)

  def score(key: jax.Array) -> Scores:
    ids, zeros = jnp.zeros(1, jnp.int32), jnp.zeros((1, sampler.completion_length + extra(denoiser)), jnp.int32)
    valid, every = jnp.ones((1, 1), bool), jnp.ones(zeros.shape, bool)
    rollout = Rollout(ids, ids, zeros[:, :1], valid, zeros, every, zeros, jnp.zeros(zeros.shape))
    return method.estimator(denoiser, {}, rollout, sampler, key)

  def minimise(scores: Scores) -> Any:
    logp = scores.logp
    old, reference = (logp if name in needs else None for name in ("old", "reference"))
    return method.loss(Terms(scores, old, reference, rows, jnp.ones(logp.shape), jnp.ones(logp.shape)))

  with parts.naming("estimator", section.estimator.name):
    scores = jax.eval_shape(score, jax.random.key(0))
  with parts.naming("loss", section.loss.name):
    _check_loss(jax.eval_shape(minimise, scores))
  with parts.naming("advantage", section.advantage.name):
    advantages = jax.eval_shape(lambda rewards: method.advantage(rewards, 2), jnp.ones(4))
    if getattr(advantages, "shape", None) != (4,):
      raise ValueError(f"the advantages of 4 rewards are {advantages}; there must be one for each")


def _check_loss(found: Any) -> None:
  """Raises a ValueError if a loss function returns anything but a loss with figures."""
  if not isinstance(found, tuple) or len(found) != 2 or getattr(found[0], "shape", None) != ():
    raise ValueError(f"returned {found}; it must return a number and a dictionary of figures")
  for name, figure in found[1].items():
    if name in TAKEN:
      raise ValueError(f"the figure {name} has a name that is taken: {', '.join(TAKEN)}")
    if not isinstance(figure, Ratios) and getattr(figure, "shape", None) != ():
      raise ValueError(f"the figure {name} is {figure}; it must be a number, a sum over the batch, or Ratios")


def shaping(section: ConfigDict, task: Task, protocol: str, sampler: SamplerSpec) -> Shaping:
  """The conversion of a task's grades into rewards, from `config.grpo`.

  Raises:
    ValueError: a weight names a component that neither the right nor the constant answer to a training question has.
  """
  with reworded("grpo."):
    found = Shaping(
      section.reward_weights.to_dict(),
      section.overlong,
      section.answered,
      section.length_reward,
      section.length_warmup,
    )
  if found != UNSHAPED:
    names: dict[str, None] = {}
    for one in task.tasks.values() if isinstance(task, Mixture) else [task]:
      record = one.records("train")[0]
      for text in (one.demonstration(record, "d1"), one.baseline(record, "d1")):
        names |= dict.fromkeys(one.grade(text, record, protocol).components)
    with reworded("grpo."):
      found.check(list(names), min((*section.length_curriculum, sampler.completion_length)))
  return found


def grading(experiment: Experiment) -> Grading:
  """The grading of completions of the training split.

  Raises:
    ValueError: the split is empty, or the task cannot be sent to workers; see also `shaping`.
  """
  config, task = experiment.config, experiment.task
  shaped = shaping(config.grpo, task, config.task.protocol, experiment.sampler)
  grader = Grader(task, config.grpo.grading_workers)
  length = experiment.sampler.completion_length
  return Grading(experiment.prompts("train"), grader, config.task.protocol, shaped, length)


def curriculum(experiment: Experiment, prompts: Prompts) -> Curriculum | None:
  """The curriculum of `config.grpo` over the training prompts; None if each prompt comes once an epoch."""
  section = experiment.config.grpo
  if not section.curriculum:
    return None
  groups = section.oversample * section.prompts_per_iteration
  return Curriculum(
    prompts,
    groups=groups,
    num_generations=section.num_generations,
    seed=experiment.config.seed,
    ahead=section.off_policy_steps + section.partial_age,
  )


def lengths(experiment: Experiment, optimizer: optax.GradientTransformation, whole: Programs) -> Lengths | None:
  """The curriculum of `config.grpo` over completion lengths, whose last programs are `whole`; None: there is none.

  Raises:
    ValueError: the lengths do not fit the sampler, or rollouts are drawn before it is known how long they may be.
  """
  section, sampler = experiment.config.grpo, experiment.sampler
  chosen = tuple(section.length_curriculum)
  if not chosen:
    return None
  if list(chosen) != sorted(set(chosen)) or chosen[-1] != sampler.completion_length:
    raise ValueError(
      f"grpo.length_curriculum={chosen} must ascend and end with rollout.completion_length, here"
      f" {sampler.completion_length}; grpo.length_curriculum=() has no shorter lengths"
    )
  for early in ("off_policy_steps", "partial_age"):
    if section[early]:
      raise ValueError(
        f"grpo.length_curriculum={chosen} takes the next length after an iteration, but grpo.{early}={section[early]}"
        f" draws completions before it: set grpo.{early}=0, or grpo.length_curriculum=()"
      )
  with reworded(f"grpo.length_curriculum={chosen}: "):
    shorter = [sampler.resized(length, min(length, sampler.block_length)) for length in chosen[:-1]]
    for each in shorter:
      blocks.check(experiment.model.denoiser, each)
  found = [programs(dataclasses.replace(experiment, sampler=each), optimizer) for each in shorter]
  return Lengths([*found, whole], section.length_threshold)


def programs(experiment: Experiment, optimizer: optax.GradientTransformation) -> Programs:
  """The programs of a GRPO iteration; nothing is compiled yet.

  Raises:
    ValueError: fields do not fit together.
  """
  section, sampler = experiment.config.grpo, experiment.sampler
  shape = Shape(
    section.prompts_per_iteration,
    section.num_generations,
    tuple(experiment.config.data.prompt_buckets),
    section.oversample,
    section.rollout_chunks,
    section.rollout_slots,
    section.off_policy_steps,
    section.partial_age,
  )
  watch = drift.Watch(section.drift_every, section.drift_limit)
  chosen = method(section, sampler, experiment.model.denoiser.block)
  return Programs(experiment.model, sampler, chosen, shape, optimizer, watch)


def fine_tuning(config: ConfigDict) -> sft_data.Options:
  """The options of `config.sft`.

  Raises:
    ValueError: options of the noise do not fit together.
  """
  section = config.sft
  with reworded("sft."):
    noise = NoiseSpec(tuple(map(float, section.mask_ratio)), section.weighting, section.complementary)
  return sft_data.Options(
    section.batch_size,
    tuple(section.prompt_buckets),
    tuple(section.completion_buckets),
    section.accumulation,
    section.truncate,
    section.p_mask_prompt,
    section.logits_tile,
    noise,
    tuple(section.grow),
    section.mask_noise_steps,
    section.packed,
    section.ends,
  )


def preferences(config: ConfigDict) -> dpo.Options:
  """The options of `config.dpo`.

  Raises:
    ValueError: an option of the loss is not a number of its range.
  """
  section = config.dpo
  with reworded("dpo."):
    loss = Preference(section.beta, section.sft_weight)
  return dpo.Options(
    loss,
    section.batch_size,
    tuple(section.prompt_buckets),
    tuple(section.completion_buckets),
    section.samples,
    section.accumulation,
    section.logits_tile,
  )


def demonstrations(experiment: Experiment) -> tuple[sft_data.Demonstrations, sft_data.Demonstrations | None]:
  """The demonstrations: the task's own, or those of a file with a held-out part for validation.

  Raises:
    ValueError: no demonstration fits the buckets, or the file cannot be read.
  """
  config, options, block = experiment.config, fine_tuning(experiment.config), experiment.model.denoiser.block
  if not config.sft.data:
    return sft_data.of_task(experiment.prompts("demonstrations"), config.task.style, options, block), None
  root = data_root(config.data.root)
  return sft_data.of_file(root, config.sft.data, experiment.tokenizer, config.sft.held_out, options, block)
