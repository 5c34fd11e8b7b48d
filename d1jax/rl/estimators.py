"""Estimators of log p as values: a function of `d1jax.diffusion`, its options, and what it needs, gives and costs."""

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxtyping import Array, Key

from d1jax.diffusion.denoiser import Denoiser
from d1jax.diffusion.elbo import coupled, elbo, quadrature
from d1jax.diffusion.likelihood import Scores, one_step
from d1jax.diffusion.replay import blocks_spanned
from d1jax.diffusion.rollout import Rollout, SamplerSpec
from d1jax.diffusion.sandwich import sandwich
from d1jax.diffusion.trajectory import left_to_right, sampled_steps, step_merged
from d1jax.state import Params

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


def _one_pass(options: Options, sampler: SamplerSpec) -> Passes:
  return Passes()


@dataclasses.dataclass(frozen=True)
class Estimator:
  """An estimator of log p: `Estimator(one_step).bind(p_mask_prompt=0.15)`.

  Attributes:
    function: of denoiser, parameters, rollout, sampler and key, which draws its masks from the key of each sample; its
      keywords are its options.
    cost: passes of one estimate, by the options and the sampler.
    recorded: whether it scores states that the rollout recorded, and needs `reveal_step`.
    redraws: whether it draws anew at each inner step; where not, old and reference are scored once an update.
    upper: whether it gives an upper bound too.
    per_sequence: whether its estimate is of the sequence, and the parts of tokens mean nothing alone.
    bound: options by name; those that are not here have the function's defaults.
  """

  function: Callable[..., Scores]
  cost: Callable[[Options, SamplerSpec], Passes] = _one_pass
  recorded: bool = False
  redraws: bool = True
  upper: bool = False
  per_sequence: bool = False
  bound: tuple[tuple[str, Any], ...] = ()

  @property
  def name(self) -> str:
    """Of the function."""
    return self.function.__name__

  @property
  def options(self) -> Mapping[str, inspect.Parameter]:
    """The keywords that its function takes."""
    parameters = inspect.signature(self.function).parameters.items()
    return {name: parameter for name, parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}

  def bind(self, **options: Any) -> "Estimator":
    """The estimator with some options.

    Raises:
      ValueError: an option that the function has not.
    """
    for name in options.keys() - self.options.keys():
      raise ValueError(f"{name} is no option of {self.name}, which has: {', '.join(self.options) or 'none'}")
    return dataclasses.replace(self, bound=tuple((dict(self.bound) | options).items()))

  def passes(self, sampler: SamplerSpec) -> Passes:
    """What one estimate of a sequence costs."""
    return self.cost(dict(self.bound), sampler)

  def __call__(
    self, denoiser: Denoiser, params: Params, rollout: Rollout, sampler: SamplerSpec, key: Key[Array, ""]
  ) -> Scores:
    """Scores the completions of a rollout that `sampler` made."""
    return self.function(denoiser, params, rollout, sampler, key, **dict(self.bound))


def _scanned(option: str) -> Callable[[Options, SamplerSpec], Passes]:
  """Passes over masked completions, as many as an option says, one in memory at a time."""
  return lambda options, sampler: Passes(options[option], repeated=True)


def _along(number: int | None, spec: SamplerSpec, predicted: int | None = None) -> Passes:
  """Passes along a path of reveals, guided as the sampler's; each makes logits of a block, or of `predicted`."""
  return Passes(number, predicted or spec.block_length, 2 if spec.cfg_scale else 1, repeated=True)


def _merged(options: Options, spec: SamplerSpec) -> Passes:
  """Passes over runs of steps, which may span blocks."""
  segments = options.get("segments")
  return _along(segments, spec, None if segments is None else blocks_spanned(spec, segments) * spec.block_length)


def _one_by_one(options: Options, spec: SamplerSpec) -> Passes:
  """A pass for each token of a completion that is scored."""
  share = options.get("top_entropy")
  return _along(math.ceil((1.0 if share is None else share) * spec.completion_length), spec, predicted=1)


ESTIMATORS: Mapping[str, Estimator] = {
  "one_step": Estimator(one_step),
  "coupled": Estimator(coupled, lambda options, sampler: Passes(2 * options["samples"] + 1, repeated=True)),
  "elbo": Estimator(elbo, _scanned("samples"), per_sequence=True),
  "quadrature": Estimator(quadrature, _scanned("nodes"), per_sequence=True),
  "sandwich": Estimator(sandwich, _scanned("samples"), upper=True, per_sequence=True),
  "step_merged": Estimator(step_merged, _merged, recorded=True, redraws=False),
  "sampled_steps": Estimator(
    sampled_steps, lambda options, sampler: _along(options["samples"], sampler), recorded=True
  ),
  "left_to_right": Estimator(left_to_right, _one_by_one, redraws=False),
}
"""The estimators that have a name."""


def estimator(name: str, **options: Any) -> Estimator:
  """The estimator of a name: `estimator("one_step", p_mask_prompt=0.15)` is d1's.

  Raises:
    ValueError: an unknown name, or an option that the estimator has not.
  """
  if name not in ESTIMATORS:
    raise ValueError(f"unknown estimator {name!r}; known: {', '.join(ESTIMATORS)}")
  return ESTIMATORS[name].bind(**options)
