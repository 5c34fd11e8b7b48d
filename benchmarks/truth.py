"""Estimators of log p against what they estimate: `python -m benchmarks.truth`.

Random denoisers of three tokens over completions of four, small enough to be enumerated (`benchmarks.enumeration`), and
every path that the sampler can take through them, one token a step. A row an estimator and number of samples, means
over the denoisers, in nats a sequence:

- `order`, `path`, `sampler`: the mean of the estimate less log p under random order, less the sum of token terms at the
  recorded reveals, less log p under the real sampler with its choice of positions.
- `std`: over masks, of one completion's estimate.
- `cosine`: of the mean of the gradient that the estimate yields, `A grad log p`, to the exact gradient of the expected
  reward over paths, and `length`, its norm over the exact one's. Rewards are random, A is exact.
- `SNR`: |mean|^2 / E |gradient - mean|^2 of a batch of 64 rollouts: masks and rollouts both vary.
- `forward`, `backward`: passes of a completion for one gradient; forward passes that the backward pass repeats count.

`sandwich` has two rows, `lower` and `upper`; the gradient of the second is that of SPG's loss, which is made of both.
"""

import argparse
import json
import runpy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from benchmarks import passes, timing
from benchmarks.enumeration import LENGTH, Truth, draw_params
from d1jax.columns import markdown
from d1jax.diffusion.likelihood import Scores
from d1jax.diffusion.rollout import Rollout, SamplerSpec
from d1jax.rl.estimators import ESTIMATORS, Estimator

SPEC = SamplerSpec(completion_length=LENGTH, diffusion_steps=LENGTH, block_length=LENGTH, temperature=1.0)
BATCH = 64
METHODS = runpy.run_path(str(Path(__file__).parents[1] / "configs" / "methods.py"))["METHODS"]
UPPER_SHARE = METHODS["spg"].method["loss"]["upper_share"]
"""w of SPG's loss."""

SAMPLES = (1, 2, 4, 8)
ARMS: tuple[tuple[str, dict[str, Any], str, tuple[int, ...]], ...] = (
  ("one_step", {"p_mask_prompt": 0.0}, "", ()),
  ("one_step", {"p_mask_prompt": 0.15}, "", ()),
  ("coupled", {}, "samples", SAMPLES),
  ("elbo", {"masking": "bernoulli"}, "samples", SAMPLES),
  ("elbo", {"masking": "count"}, "samples", SAMPLES),
  ("elbo", {"masking": "count", "antithetic": True}, "samples", SAMPLES[1:]),
  ("quadrature", {}, "nodes", SAMPLES),
  ("sandwich", {"exponent": 1.5}, "samples", SAMPLES),
  ("step_merged", {}, "segments", SAMPLES[:-1]),
  ("sampled_steps", {}, "samples", SAMPLES[:-1]),
  ("left_to_right", {}, "", ()),
)
"""Estimator, options, the option that counts, its values. There are four steps: none of the path's has eight."""


class Found(NamedTuple):
  """What one estimator gives of every path under many keys.

  Attributes:
    logp: [keys, N] estimates of log p.
    mean: [N, P] over keys, of its gradient.
    square: [N] likewise, of its gradient's squared norm.
  """

  logp: np.ndarray
  mean: np.ndarray
  square: np.ndarray


def estimates(truth: Truth, rollout: Rollout, read: Callable[[Scores], Any], estimator: Any, keys: int) -> Found:
  """Every path under `keys` keys; `read` takes what each token adds from the scores of some rows."""
  flat, unflatten = ravel_pytree(truth.params)

  def one(params: jax.Array, row: Rollout, key: Any) -> jax.Array:
    scores = estimator(truth.denoiser, unflatten(params), jax.tree.map(lambda x: x[None], row), truth.spec, key)
    return jnp.sum(jnp.where(scores.weight > 0, read(scores), 0.0))

  every = jax.vmap(jax.value_and_grad(one), in_axes=(None, 0, None))

  def step(carry: tuple[jax.Array, jax.Array], index: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    logp, gradient = every(flat, rollout, jax.random.fold_in(jax.random.key(0), index))
    return (carry[0] + gradient / keys, carry[1] + jnp.sum(gradient**2, axis=1) / keys), logp

  rows = rollout.completion.shape[0]
  start = (jnp.zeros((rows, flat.size)), jnp.zeros(rows))
  (mean, square), logp = jax.jit(lambda: jax.lax.scan(step, start, jnp.arange(keys)))()
  return Found(*(np.asarray(x, np.float64) for x in (logp, mean, square)))


def judged(truth: Truth, rollout: Rollout, probability: np.ndarray, reward: np.ndarray, found: Found) -> np.ndarray:
  """Bias against each truth, standard deviation, cosine, length and signal-to-noise ratio."""
  completion, steps = np.asarray(rollout.completion), np.asarray(rollout.reveal_step)
  which = truth.index(completion)
  truths = (
    np.asarray(truth.random_order(truth.params))[which],
    np.asarray(truth.along(truth.params, completion, steps)).sum(axis=1),
    np.asarray(truth.sampler(truth.params))[which],
  )
  biases = [probability @ (found.logp.mean(axis=0) - each) for each in truths]
  deviation = np.sqrt(probability @ found.logp.var(axis=0))
  exact = np.asarray(ravel_pytree(truth.path_gradient(reward))[0], np.float64)
  pull = truth.advantage(completion, reward)
  mean = (probability * pull) @ found.mean
  noise = ((probability * pull**2) @ found.square - mean @ mean) / BATCH
  lengths = np.linalg.norm(mean), np.linalg.norm(exact)
  return np.asarray([*biases, deviation, mean @ exact / np.prod(lengths), lengths[0] / lengths[1], mean @ mean / noise])


def compare(seeds: int, keys: int) -> list[dict[str, Any]]:
  """A record an estimator and number of samples."""
  toys = []
  for seed in range(seeds):
    truth = Truth(draw_params(seed), SPEC)
    reward = np.random.default_rng(1000 + seed).normal(size=len(truth.completions))
    toys.append((truth, *truth.paths(), reward))
  records = []
  for name, options, counted, counts in ARMS:
    for count in counts or (None,):
      given = options | ({counted: count} if count else {})
      estimator = _estimator(name, given)
      each: dict[str, list[np.ndarray]] = {}
      for truth, rollout, probability, reward in toys:
        found = {"": estimates(truth, rollout, _lower, estimator, keys)}
        if name == "sandwich":
          lower = found.pop("")
          found = {"lower": lower, "upper": spg(truth, rollout, reward, estimator, lower, keys)}
        for what, one in found.items():
          each.setdefault(what, []).append(judged(truth, rollout, probability, reward, one))
      number, again = passes.of(estimator, SPEC)
      for what, numbers in each.items():
        labels = [what, *(f"{key}={value}" for key, value in options.items())]
        records.append(
          {
            "estimator": name,
            "options": ", ".join(label for label in labels if label),
            "samples": count,
            "numbers": np.mean(numbers, axis=0).tolist(),
            "forward": number + again,
            "backward": number,
          }
        )
        print(json.dumps(records[-1]), flush=True)
  return records


def _estimator(name: str, options: Mapping[str, Any]) -> Estimator:
  """The estimator, which masks no prompt where nothing else is said."""
  estimator = ESTIMATORS[name]
  prompt = {"p_mask_prompt": 0.0} if "p_mask_prompt" in estimator.options else {}
  return estimator.bind(**{**prompt, **options})


def _lower(scores: Scores) -> jax.Array:
  return scores.weight * scores.logp


def _upper(scores: Scores) -> jax.Array:
  assert scores.upper is not None
  assert scores.upper_weight is not None
  return scores.upper_weight * scores.upper


def spg(truth: Truth, rollout: Rollout, reward: np.ndarray, estimator: Any, lower: Found, keys: int) -> Found:
  """The upper bound, with the gradient of SPG's loss: the lower bound's where the advantage is not negative."""
  upper = estimates(truth, rollout, _upper, estimator, keys)
  mixed = lambda scores: UPPER_SHARE * _upper(scores) + (1 - UPPER_SHARE) * _lower(scores)
  both = estimates(truth, rollout, mixed, estimator, keys)
  negative = truth.advantage(np.asarray(rollout.completion), reward) < 0
  mean = np.where(negative[:, None], both.mean, lower.mean)
  return Found(upper.logp, mean, np.where(negative, both.square, lower.square))


def table(records: Sequence[Mapping[str, Any]]) -> str:
  """Markdown."""
  head = ("estimator", "options", "samples", "order", "path", "sampler", "std", "cosine", "length", "SNR")
  rows = []
  for one in records:
    *biases, deviation, cosine, length, ratio = one["numbers"]
    numbers = [f"{bias + 0.0:+.2f}" for bias in biases] + [f"{x:.2f}" for x in (deviation, cosine, length)]
    count = one["samples"] or ""
    rows.append((one["estimator"], one["options"], count, *numbers, f"{ratio:.3g}", one["forward"], one["backward"]))
  return markdown((*head, "forward", "backward"), rows)


def main() -> None:
  """Prints a JSON line an estimator, then the table."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--denoisers", type=int, default=3)
  parser.add_argument("--keys", type=int, default=256)
  wanted = parser.parse_args()
  print(json.dumps({"denoisers": wanted.denoisers, "keys": wanted.keys, **timing.machine(1)}), flush=True)
  print(f"\n{table(compare(wanted.denoisers, wanted.keys))}")


if __name__ == "__main__":
  main()
