"""Estimators of log p as values: a function of `d1jax.diffusion`, its options, and what it needs and gives."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import Array, Key

from d1jax.diffusion.denoiser import Denoiser
from d1jax.diffusion.elbo import coupled, elbo, quadrature
from d1jax.diffusion.likelihood import Scores, one_step
from d1jax.diffusion.rollout import Rollout, SamplerSpec
from d1jax.diffusion.sandwich import sandwich
from d1jax.diffusion.trajectory import left_to_right, sampled_steps, step_merged
from d1jax.state import Params


@dataclasses.dataclass(frozen=True)
class Estimator:
  """An estimator of log p: `Estimator(one_step).bind(p_mask_prompt=0.15)`.

  Attributes:
    function: of denoiser, parameters, rollout, sampler and key, which draws its masks from the key of each sample; its
      keywords are its options.
    recorded: whether it scores states that the rollout recorded, and needs `reveal_step`.
    redraws: whether it draws new masks at each inner step; if not, old and reference are scored once per update.
    upper: whether it gives an upper bound too.
    per_sequence: whether its estimate is of the sequence, and the parts of tokens mean nothing alone.
    bound: options by name; all others have the function's defaults.
  """

  function: Callable[..., Scores]
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
  def replays(self) -> bool:
    """Whether it scores each token where it was drawn: under the policy that drew it, log p is `reveal_logp`."""
    return self.function in (step_merged, sampled_steps) and dict(self.bound).get("segments") is None

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

  def __call__(
    self, denoiser: Denoiser, params: Params, rollout: Rollout, sampler: SamplerSpec, key: Key[Array, ""]
  ) -> Scores:
    """Scores the completions of a rollout that `sampler` made."""
    return self.function(denoiser, params, rollout, sampler, key, **dict(self.bound))


ESTIMATORS: Mapping[str, Estimator] = {
  "one_step": Estimator(one_step),
  "coupled": Estimator(coupled),
  "elbo": Estimator(elbo, per_sequence=True),
  "quadrature": Estimator(quadrature, per_sequence=True),
  "sandwich": Estimator(sandwich, upper=True, per_sequence=True),
  "step_merged": Estimator(step_merged, recorded=True, redraws=False),
  "sampled_steps": Estimator(sampled_steps, recorded=True),
  "left_to_right": Estimator(left_to_right, redraws=False),
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
