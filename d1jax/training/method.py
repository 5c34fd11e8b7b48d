"""From the configuration to a checked method: what estimates log p, what is minimised, how rewards are compared."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from d1jax.diffusion.denoiser import Denoiser
from d1jax.diffusion.likelihood import Estimator, Scores
from d1jax.diffusion.rollout import Rollout, SamplerSpec
from d1jax.rl import methods
from d1jax.rl.losses import LossOptions
from d1jax.rl.shaping import Shaping, parse_weights
from d1jax.rl.update import UpdateSpec
from d1jax.tasks import Mixture, Task


class Method(NamedTuple):
  """A method, as an update takes it.

  Attributes:
    estimator: with its options.
    advantages: from rewards and the completions a prompt.
    spec: of the update.
  """

  estimator: Estimator
  advantages: Callable[[jax.Array, int], jax.Array]
  spec: UpdateSpec


def build(section: ConfigDict, sampler: SamplerSpec) -> Method:
  """The method of `config.grpo`.

  Raises:
    ValueError: parts that do not go together, see `methods.check`, or options that the estimator refuses.
  """
  options = {
    "samples": section.samples,
    "nodes": section.nodes,
    "segments": section.segments,
    "masking": section.masking,
    "antithetic": section.antithetic,
    "exponent": section.exponent,
    "top_entropy": section.top_entropy,
  }
  methods.check_names(section.estimator, section.loss, section.advantage)
  told = LossOptions(
    section.epsilon, section.beta, section.epsilon_high, section.kl, section.kl_against, section.upper_share
  )
  methods.check(
    estimator=section.estimator,
    loss=section.loss,
    loss_options=told,
    importance_cap=section.importance_cap,
    options=options,
    sampler=sampler,
    num_generations=section.num_generations,
  )
  spec = UpdateSpec(
    section.num_iterations,
    section.accumulation,
    told,
    section.aggregation,
    recorded_states=not methods.ESTIMATORS[section.estimator].redraws,
    importance_cap=section.importance_cap,
    loss=section.loss,
    score_reference=section.score_reference,
    passes=methods.passes(section.estimator, options, sampler),
  )
  shared = {"p_mask_prompt": section.p_mask_prompt, "tile": section.logits_tile}
  estimator = methods.bind(section.estimator, options | shared)
  try:
    _scores_anything(estimator, sampler)
  except ValueError as error:
    raise ValueError(f"grpo.estimator={section.estimator}: {error}") from error
  return Method(estimator, methods.ADVANTAGES[section.advantage], spec)


def _scores_anything(estimator: Estimator, sampler: SamplerSpec) -> None:
  """Traces an estimator with a denoiser of one token and the mask: what it says of its options, it says here."""
  encode = lambda params, tokens, valid: jnp.zeros((*tokens.shape, 1))
  denoiser = Denoiser(encode, lambda params: jnp.zeros((1, 2)), mask_id=1, stop_ids=(), forbidden_ids=(1,), vocab=2)

  def score(key: jax.Array) -> Scores:
    ids, zeros = jnp.zeros(1, jnp.int32), jnp.zeros((1, sampler.completion_length), jnp.int32)
    valid, every = jnp.ones((1, 1), bool), jnp.ones(zeros.shape, bool)
    rollout = Rollout(ids, ids, zeros[:, :1], valid, zeros, every, zeros, jnp.zeros(zeros.shape))
    return estimator(denoiser, {}, rollout, sampler, key)

  jax.eval_shape(score, jax.random.key(0))


def shaping(section: ConfigDict, task: Task, protocol: str, sampler: SamplerSpec) -> Shaping:
  """How `config.grpo` makes rewards of a task's grades.

  Raises:
    ValueError: a weight of a component that neither the right nor the constant answer to a training question has.
  """
  found = Shaping(parse_weights(section.reward_weights), section.overlong, section.answered)
  if found.weights or found.overlong or found.answered:
    names: dict[str, None] = {}
    for one in task.tasks.values() if isinstance(task, Mixture) else [task]:
      record = one.records("train")[0]
      for text in (one.demonstration(record, "d1"), one.baseline(record, "d1")):
        names |= dict.fromkeys(one.grade(text, record, protocol).components)
    found.check(list(names), sampler.completion_length)
  return found
