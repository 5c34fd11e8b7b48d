"""The arithmetic of `benchmarks.methods`: what is compared, which settings a method has, what it all costs."""

import functools
import itertools
import runpy
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from benchmarks import passes
from d1jax.diffusion.rollout import SamplerSpec
from d1jax.run import fields
from d1jax.training import configured

ROOT = Path(__file__).parent.parent
METHODS = runpy.run_path(str(ROOT / "configs" / "methods.py"))["METHODS"]
FIRST = "d1"
"""Whose seconds are the budget of all."""

TEMPERATURES, RATES, GROUPS = (1.0, 2.0, 0.7), (6e-4, 2e-4, 6e-5), (4, 8, 16)
EPSILONS, BETAS = (1.0, 0.4, 2.0), (0.0, 0.01, 0.04)
"""Of the preset's epsilon; of a KL. A setting has one level of each factor; the first levels are the presets'."""

ORDER = ((0, 0), (0, 1), (1, 0), (1, 2), (2, 1), (0, 2), (2, 0), (1, 1), (2, 2))
"""Levels of temperature and rate. All nine are an orthogonal array: each pair of levels of two factors comes once."""

PASS, START, CELL, LEG = 0.045, 45.0, 15.0, 10.0
"""Seconds on two idle cores, for the arithmetic of `seconds_of`: a pass of 256 rows of tiny Sudoku; SFT with its
evaluation; and what a run takes beside its passes (process, compiled programs, validations, evaluations), a first and a
second time."""


class Plan(NamedTuple):
  """What is compared.

  Attributes:
    methods: names of `METHODS`.
    mus: optimiser steps a rollout.
    settings: of each method and mu.
    seeds: fresh ones, counted from 0.
    tuning_passes: of a run that tunes.
    passes: of a run with a fresh seed.
    size: preset word of the model.
    task: preset word of the task.
  """

  methods: tuple[str, ...] = tuple(METHODS)
  mus: tuple[int, ...] = (1, 4)
  settings: int = 4
  seeds: int = 5
  tuning_passes: int = 480
  passes: int = 1200
  size: str = "tiny"
  task: str = "sudoku"

  @property
  def pairs(self) -> list[tuple[str, int]]:
    """Each method with each mu; d1's seconds are needed in any case, so that it comes first."""
    names = dict.fromkeys((FIRST, *self.methods))
    return list(itertools.product(names, self.mus))


SUBSET = Plan(("d1", "wd1", "spg", "stepmerge"), (1,), 2, 2, 160, 480)


def seconds_of(plan: Plan) -> dict[str, float]:
  """What each kind of cell takes, on two idle cores."""
  pairs, budget = len(plan.pairs), plan.passes * PASS
  return {
    "start": (1 + plan.seeds) * START,
    "tuning": pairs * plan.settings * (plan.tuning_passes * PASS + CELL),
    "final": pairs * plan.seeds * (1.15 * budget + CELL + LEG),  # 1.15: equal seconds may allow more passes
    "control": plan.seeds * (budget + START),
  }


class Setting(NamedTuple):
  """The values that are tuned; `own` is an option of the loss and its value, None where the method has none."""

  temperature: float
  learning_rate: float
  group: int
  own: tuple[str, float] | None


def own_levels(name: str, mu: int) -> tuple[str, tuple[float, ...]] | None:
  """The option that is a method's own: the clip where it can bind, or else the weight of a KL to a policy."""
  loss = METHODS[name].method["loss"]
  if mu > 1 and "epsilon" in loss:
    return "epsilon", tuple(round(loss["epsilon"] * factor, 6) for factor in EPSILONS)
  return None if "beta" in loss else ("beta", BETAS)  # a preset that sets beta has no KL


def settings(name: str, mu: int, count: int) -> list[Setting]:
  """The first settings of a method, the preset's at temperature 1 before all others; other factors are all methods'.

  Raises:
    ValueError: there are not so many.
  """
  if not 1 <= count <= len(ORDER):
    raise ValueError(f"--settings={count}: there are 1 to {len(ORDER)}")
  own, found = own_levels(name, mu), []
  for a, b in ORDER[:count]:
    value = None if own is None else (own[0], own[1][(a + 2 * b) % 3])
    found.append(Setting(TEMPERATURES[a], RATES[b], GROUPS[(a + b) % 3], value))
  return found


def configuration(plan: Plan, name: str, mu: int, setting: Setting) -> tuple[ConfigDict, dict[str, Any]]:
  """The configuration of a run with a setting, and the fields that differ from the preset's."""
  config: ConfigDict = runpy.run_path(str(ROOT / "configs" / "grpo.py"))["get_config"](words(plan, name))
  fields.complete(config)
  rows = config.grpo.prompts_per_iteration * config.grpo.num_generations
  chosen = {
    "rollout.temperature": setting.temperature,
    "grpo.learning_rate": setting.learning_rate,
    "grpo.decay": "constant",  # a run is the beginning of a longer one
    "grpo.num_generations": setting.group,
    "grpo.prompts_per_iteration": rows // setting.group,
    "grpo.num_iterations": mu,
  }
  if setting.own is not None:
    chosen[f"grpo.loss.{setting.own[0]}"] = setting.own[1]
  for field, value in chosen.items():
    *path, last = field.split(".")
    functools.reduce(lambda section, part: section[part], path, config)[last] = value
  return config, chosen


def words(plan: Plan, name: str) -> str:
  """The preset words of a method."""
  return f"{plan.size},{plan.task},{name}"


def passes_an_iteration(config: ConfigDict) -> int:
  """Of one completion: its rollout, the scores of old and reference policy, and the update."""
  sampler, mu = SamplerSpec(**config.rollout), config.grpo.num_iterations
  method = configured.method(config.grpo, sampler)
  each, again = passes.of(method.estimator, sampler)
  redraws = method.estimator.redraws
  scored = method.scores_old * (mu - 1 if redraws else min(mu - 1, 1)) + method.scores_reference * (
    mu if redraws else 1
  )
  return int(sampler.blocks * sampler.steps_per_block + each * (scored + 3 * mu) + again * mu)
