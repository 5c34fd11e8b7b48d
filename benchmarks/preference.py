"""Preference tuning measured: `python -m benchmarks.preference variance`, and `... learning`.

`variance`: how noisy the preference score is, against the masks n of an answer, where the truth is known: random
denoisers of three tokens over answers of four (`benchmarks.enumeration`), the policy a random step away from the
reference, all pairs of answers. A row an arm and n:

- `one time`: one noise level a model and answer, n masks of it; policy and reference draw their own;
- `apart`: n noise levels, one mask each; policy and reference draw their own;
- `shared`: the same, with the same draws for policy and reference: VRPO, and what training does;
- `pair`: both answers of a pair share them too, which answers of one length can.

`std`: of the score, enumerated over all masks; `measured`: the same from `d1jax.rl.preference.bounds`, under random
keys; `loss`: the mean of the loss with these scores, less the loss of the true score, which is the bias that the noise
causes (beta 0.2).

`learning`: from one supervised start, tiny Sudoku from pairs of its own graded rollouts, and by diffu-GRPO for as many
seconds, the making of pairs included.
"""

import functools
import itertools
import json
import runpy
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from benchmarks import timing
from benchmarks.enumeration import LENGTH, Truth, draw_params
from d1jax.aot.table import markdown
from d1jax.data.pairs import PairBatch
from d1jax.diffusion.rollout import SamplerSpec
from d1jax.rl.preference import bounds, preference_score
from d1jax.run.metrics import read_records

ROOT = Path(__file__).parent.parent
ARMS = ("one time", "apart", "shared", "pair")
SAMPLES = (1, 2, 4, 8)
BETA = 0.2
KEYS = 500
SHIFT = 40
"""Pair i is of answers i and i + SHIFT, modulo their number."""


def moved(params: Any, seed: int, distance: float) -> Any:
  """Weights a random step away, of `distance` times their own size."""
  rng = np.random.default_rng(500 + seed)
  return jax.tree.map(lambda x: x + distance * float(jnp.std(x)) * rng.normal(size=x.shape).astype(np.float32), params)


@functools.cache
def _masks() -> tuple[np.ndarray, np.ndarray]:
  """Every mask [S C], and the number of tokens that it hides."""
  masks = np.asarray([m for m in itertools.product((False, True), repeat=LENGTH) if any(m)])
  return masks, masks.sum(axis=1)


def estimates(truth: Truth, params: Any) -> np.ndarray:
  """What each mask makes of the bound of each answer [S O]: n / l times the sum over the l tokens that it hides."""
  masks, counts = _masks()
  by_subset = truth.by_subset(params)
  rows = [np.asarray(by_subset[tuple(bool(x) for x in ~mask)], np.float64)[:, mask].sum(axis=1) for mask in masks]
  return LENGTH / counts[:, None] * np.stack(rows)


def _partners(values: np.ndarray) -> np.ndarray:
  return np.roll(values, -SHIFT, axis=-1)


def _weights() -> np.ndarray:
  """The probability of each mask: a number of hidden tokens, uniform from 1 to all, and then a set of so many."""
  _, counts = _masks()
  return 1 / LENGTH / np.bincount(counts)[counts]


def _variance(values: np.ndarray) -> np.ndarray:
  weights = _weights()
  return weights @ values**2 - (weights @ values) ** 2


def _variance_of_one_time(values: np.ndarray, samples: int) -> np.ndarray:
  """Of the mean of so many masks that hide equally many tokens."""
  _, counts = _masks()
  inside = [values[counts == n] for n in range(1, LENGTH + 1)]
  means = np.stack([x.mean(axis=0) for x in inside])
  return means.var(axis=0) + np.stack([x.var(axis=0) for x in inside]).mean(axis=0) / samples


def exact(truth: Truth, policy: Any, arm: str, samples: int) -> np.ndarray:
  """The variance of the score of each pair [O]."""
  values = [estimates(truth, params) for params in (policy, truth.params)]
  gain = values[0] - values[1]
  if arm == "pair":
    return _variance(gain - _partners(gain)) / samples
  if arm == "shared":
    each = _variance(gain) / samples
  elif arm == "apart":
    each = (_variance(values[0]) + _variance(values[1])) / samples
  else:
    each = _variance_of_one_time(values[0], samples) + _variance_of_one_time(values[1], samples)
  return each + _partners(each)


def true_scores(truth: Truth, policy: Any) -> np.ndarray:
  """The score of each pair [O] of the bounds themselves."""
  gain = np.asarray(truth.lower_bound(policy) - truth.lower_bound(truth.params), np.float64)
  return gain - _partners(gain)


def measured(truth: Truth, policy: Any, samples: int, keys_each: int = KEYS) -> dict[str, np.ndarray]:
  """The score of each pair [keys O] by `bounds`, with masks apart and shared."""
  count = len(truth.completions)
  answers = np.stack([truth.completions, np.roll(truth.completions, -SHIFT, axis=0)], axis=1)
  prompt = np.broadcast_to(np.asarray(truth.prompt, np.int32), (count, len(truth.prompt)))
  batch = PairBatch(
    np.arange(count, dtype=np.int32), prompt, np.ones(prompt.shape, bool), answers, np.full((count, 2), LENGTH)
  )
  batch = jax.tree.map(jnp.asarray, batch)

  def one(index: jax.Array) -> tuple[jax.Array, jax.Array]:
    key, other = (jax.random.fold_in(jax.random.key(seed), index) for seed in (0, 1))
    score = functools.partial(bounds, truth.denoiser, batch=batch, samples=samples)
    current = score(policy, key=key)
    return preference_score(current, score(truth.params, key=other)), preference_score(
      current, score(truth.params, key=key)
    )

  apart, shared = jax.jit(lambda: jax.lax.map(one, jnp.arange(keys_each)))()
  return {"apart": np.asarray(apart, np.float64), "shared": np.asarray(shared, np.float64)}


def _loss(score: np.ndarray) -> np.ndarray:
  return np.logaddexp(0, -BETA * score)


def variances(seeds: int, distances: Sequence[float], samples: Sequence[int]) -> list[tuple[Any, ...]]:
  """A row a distance, arm and number of masks: means over random denoisers."""
  rows = []
  for distance, arm, count in itertools.product(distances, ARMS, samples):
    found = []
    for seed in range(seeds):
      truth = Truth(draw_params(seed), SamplerSpec(LENGTH, LENGTH, LENGTH))
      policy = moved(truth.params, seed, distance)
      true = true_scores(truth, policy)
      std = np.sqrt(exact(truth, policy, arm, count).mean())
      numbers = [np.sqrt(np.mean(true**2)), std, np.nan, np.nan]
      if arm in ("apart", "shared"):
        scores = measured(truth, policy, count)[arm]
        numbers[2:] = [np.sqrt(scores.var(axis=0).mean()), np.mean(_loss(scores) - _loss(true))]
      found.append(numbers)
    means = [float(x) for x in np.mean(found, axis=0)]
    shown = [f"{means[0]:.2f}", f"{means[1]:.3f}", *("" if np.isnan(x) else f"{x:.3f}" for x in means[2:])]
    rows.append((distance, arm, count, *shown))
    print(json.dumps(rows[-1]), flush=True)
  return rows
