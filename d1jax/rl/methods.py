"""The tables that methods are made of: estimators, losses, advantages; what goes with what.

A new estimator is a function and a line in `ESTIMATORS`; docs/methods.md shows one.
"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from jaxtyping import Array, Float

from d1jax.diffusion.elbo import coupled, elbo, quadrature
from d1jax.diffusion.likelihood import Estimator, Scores, one_step
from d1jax.diffusion.replay import blocks_spanned
from d1jax.diffusion.rollout import SamplerSpec
from d1jax.diffusion.sandwich import sandwich
from d1jax.diffusion.trajectory import left_to_right, sampled_steps, step_merged
from d1jax.rl import advantage, losses
from d1jax.rl.losses import LossOptions, PolicyLoss, Terms

Options = Mapping[str, Any]


class Passes(NamedTuple):
  """What one estimate of a sequence costs.

  Attributes:
    number: forward passes; None: one a denoising step that any row took.
    predicted: completion positions that a pass makes logits for; None: all.
    times: 2 where guidance makes each pass two.
    repeated: whether each pass is computed again in the backward pass, so that memory does not grow with their number.
  """

  number: int | None = 1
  predicted: int | None = None
  times: int = 1
  repeated: bool = False


@dataclasses.dataclass(frozen=True)
class EstimatorInfo:
  """An estimator, and what it needs and gives.

  Attributes:
    function: as `d1jax.diffusion.likelihood.Estimator`, with its options as keywords.
    passes: what one estimate costs, by its options and the sampler.
    recorded: whether it scores states that the rollout recorded, and needs `reveal_step`.
    redraws: whether it draws anew at each inner step.
    upper: whether it gives an upper bound too.
    sequence: whether its estimate is of the sequence, and the parts of tokens mean nothing alone.
  """

  function: Callable[..., Scores]
  passes: Callable[[Options, SamplerSpec], Passes]
  recorded: bool = False
  redraws: bool = True
  upper: bool = False
  sequence: bool = False

  @property
  def options(self) -> Mapping[str, inspect.Parameter]:
    """The keywords that its function takes."""
    parameters = inspect.signature(self.function).parameters.items()
    return {name: parameter for name, parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}


@dataclasses.dataclass(frozen=True)
class LossInfo:
  """A loss, and what it needs.

  Attributes:
    function: of `d1jax.rl.losses`.
    ratio: whether it clips a ratio to the old policy.
    sequence: whether ratio and KL are of sequences.
    upper: whether it needs an upper bound.
  """

  function: Callable[[Terms, LossOptions], PolicyLoss]
  ratio: bool = False
  sequence: bool = True
  upper: bool = False


def _scanned(number: int) -> Passes:
  """Passes over masked completions, one in memory at a time."""
  return Passes(number, repeated=True)


def _along(number: int | None, spec: SamplerSpec, predicted: int | None = None) -> Passes:
  """Passes along a path of reveals, guided as the sampler's; each makes logits of a block, or of `predicted`."""
  return Passes(number, predicted or spec.block_length, 2 if spec.cfg_scale else 1, repeated=True)


def _merged(segments: int | None, spec: SamplerSpec) -> Passes:
  """Passes over runs of steps, which may span blocks."""
  return _along(segments, spec, None if segments is None else blocks_spanned(spec, segments) * spec.block_length)


def _places(options: Options, spec: SamplerSpec) -> int:
  """The tokens of a completion that are scored one by one."""
  share = options.get("top_entropy")
  return spec.completion_length if share is None else math.ceil(share * spec.completion_length)


ONE_PASS = Passes()

ESTIMATORS: dict[str, EstimatorInfo] = {
  "one_step": EstimatorInfo(one_step, lambda options, spec: ONE_PASS),
  "coupled": EstimatorInfo(coupled, lambda options, spec: _scanned(2 * options["samples"] + 1)),
  "elbo": EstimatorInfo(elbo, lambda options, spec: _scanned(options["samples"]), sequence=True),
  "quadrature": EstimatorInfo(quadrature, lambda options, spec: _scanned(options["nodes"]), sequence=True),
  "sandwich": EstimatorInfo(sandwich, lambda options, spec: _scanned(options["samples"]), upper=True, sequence=True),
  "step_merged": EstimatorInfo(
    step_merged, lambda options, spec: _merged(options.get("segments"), spec), recorded=True, redraws=False
  ),
  "sampled_steps": EstimatorInfo(sampled_steps, lambda options, spec: _along(options["samples"], spec), recorded=True),
  "left_to_right": EstimatorInfo(
    left_to_right, lambda options, spec: _along(_places(options, spec), spec, predicted=1), redraws=False
  ),
}

LOSSES: dict[str, LossInfo] = {
  "clipped_token": LossInfo(losses.clipped_token, ratio=True, sequence=False),
  "clipped_sequence": LossInfo(losses.clipped_sequence, ratio=True),
  "likelihood": LossInfo(losses.likelihood),
  "sandwich": LossInfo(losses.sandwich, upper=True),
}

ADVANTAGES: dict[str, Callable[[Float[Array, "B"], int], Float[Array, "B"]]] = {
  "mean": advantage.mean,
  "mean_std": advantage.mean_std,
  "leave_one_out": advantage.leave_one_out,
  "softmax": advantage.softmax,
}


def check_names(estimator: str, loss: str, advantage: str) -> None:
  """Raises a ValueError where a part of a method is in no table."""
  named: dict[str, tuple[str, Collection[str]]]
  named = {"estimator": (estimator, ESTIMATORS), "loss": (loss, LOSSES), "advantage": (advantage, ADVANTAGES)}
  for field, (value, known) in named.items():
    _check_choice(field, value, known)


def check(
  *,
  estimator: str,
  loss: str,
  loss_options: LossOptions,
  importance_cap: float | None,
  options: Options,
  sampler: SamplerSpec,
  num_generations: int,
) -> None:
  """Checks that the parts of a method go together; the names are the fields of `config.grpo`.

  Args:
    estimator: a key of `ESTIMATORS`.
    loss: a key of `LOSSES`.
    loss_options: of the loss.
    importance_cap: see `UpdateSpec`.
    options: of estimators, by name; None leaves one at its default.
    sampler: that makes the rollouts.
    num_generations: completions a prompt.

  Raises:
    ValueError: a part lacks what another needs, or is not asked for; the message names the field, the value and the
      remedy.
  """
  _check_options(estimator, options, sampler)
  _check_loss(loss, loss_options)
  scored, minimised = ESTIMATORS[estimator], LOSSES[loss]
  if minimised.upper and not scored.upper:
    having = ", ".join(name for name, info in ESTIMATORS.items() if info.upper)
    raise ValueError(f"grpo.loss={loss} needs an upper bound, which grpo.estimator={estimator} has not; use: {having}")
  if scored.sequence and not minimised.sequence:
    raise ValueError(
      f"grpo.loss={loss} takes the ratio of each token, but grpo.estimator={estimator} estimates a sequence, whose"
      " tokens mean nothing alone: use clipped_sequence or likelihood"
    )
  if importance_cap is not None and not importance_cap > 0:
    raise ValueError(f"grpo.importance_cap={importance_cap} must be positive; None weighs every token the same")
  if importance_cap is not None and not scored.recorded:
    raise ValueError(
      f"grpo.importance_cap={importance_cap} needs an estimator of the recorded states (grpo.estimator=step_merged):"
      f" for {estimator} a cache shifts the data, not the ratio, and its drift is what a run logs"
    )
  if importance_cap is not None and loss == "clipped_sequence":
    raise ValueError(f"grpo.importance_cap={importance_cap} weighs tokens, but grpo.loss={loss} has none: leave it out")
  if num_generations < 2:
    raise ValueError(f"grpo.num_generations={num_generations}: a group of one has no baseline; use at least 2")


def _check_options(estimator: str, options: Options, sampler: SamplerSpec) -> None:
  known = ESTIMATORS[estimator].options
  for name, value in options.items():
    if value is not None and name not in known:
      having = ", ".join(name for name in known if name in options) or "none of them"
      raise ValueError(
        f"grpo.{name}={value} is no option of grpo.estimator={estimator}, which has {having}: leave it None"
      )
    if value is None and name in known and known[name].default is inspect.Parameter.empty:
      raise ValueError(f"grpo.{name}=None, but grpo.estimator={estimator} needs it: set it")
  counts = [name for name in ("samples", "nodes", "segments") if options.get(name) is not None]
  for name in counts:
    if options[name] < 1:
      raise ValueError(f"grpo.{name}={options[name]} must be at least 1")
  steps, segments = sampler.blocks * sampler.steps_per_block, options.get("segments")
  if segments is not None and steps % segments:
    raise ValueError(
      f"grpo.segments={segments} does not divide the {steps} denoising steps of a rollout: use a divisor, or None for"
      " every step"
    )


def _check_choice(field: str, value: str, known: Collection[str]) -> None:
  if value not in known:
    raise ValueError(f"unknown grpo.{field} {value!r}; choose one of: {', '.join(known)}")


def _check_loss(loss: str, options: LossOptions) -> None:
  _check_choice("kl", options.kl, losses.KLS)
  _check_choice("kl_against", options.kl_against, losses.TARGETS)
  for field in ("epsilon", "epsilon_high"):
    value = getattr(options, field)
    if value is not None and not LOSSES[loss].ratio:
      raise ValueError(f"grpo.{field}={value} clips a ratio, but grpo.loss={loss} has none: set it to None")
    if value is not None and not value >= 0:
      raise ValueError(f"grpo.{field}={value} must not be negative")
  if options.epsilon is None and LOSSES[loss].ratio:
    raise ValueError(f"grpo.epsilon=None: grpo.loss={loss} clips its ratio; give the half width of the clip")
  if options.beta < 0:
    raise ValueError(f"grpo.beta={options.beta} must not be negative; 0 leaves the KL out")
  share = options.upper_share
  if (share is not None) != LOSSES[loss].upper:
    remedy = "give the share of the upper bound, 0 to 1" if LOSSES[loss].upper else "set it to None"
    raise ValueError(f"grpo.upper_share={share} with grpo.loss={loss}: {remedy}")
  if share is not None and not 0 <= share <= 1:
    raise ValueError(f"grpo.upper_share={share} must be from 0 to 1")


def bind(estimator: str, options: Options) -> Estimator:
  """The estimator with its options; those that are None, or that it does not have, stay at its defaults."""
  info = ESTIMATORS[estimator]
  given = {name: value for name, value in options.items() if value is not None and name in info.options}
  return functools.partial(info.function, **given)


def passes(estimator: str, options: Options, sampler: SamplerSpec) -> Passes:
  """What one estimate of a sequence costs."""
  return ESTIMATORS[estimator].passes(options, sampler)
