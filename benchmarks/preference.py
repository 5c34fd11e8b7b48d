"""Preference tuning measured: `python -m benchmarks.preference variance`, and `... learning`.

`variance`: how noisy the preference score is, against the masks n of an answer, where the truth is known: random
denoisers of three tokens over answers of four (`benchmarks.enumeration`), the policy a random step away from the
reference, a pair for each answer. A row an arm, a distance and n:

- `one time`: one noise level a model and answer, n masks of it; policy and reference draw their own;
- `apart`: n noise levels, one mask each; policy and reference draw their own;
- `shared`: the same, with the same draws for policy and reference: VRPO, and what training does;
- `pair`: both answers of a pair share them too, which answers of one length can.

`score` is the root mean square of the true scores; `std`: of the score, enumerated over all masks; `measured`: the same
from `d1jax.rl.preference.bounds`, under random keys; `loss`: the mean of the loss with these scores, less the loss of
the true score, which is the bias that the noise causes (beta 0.2).

`learning`: from one supervised start a seed, tiny Sudoku from pairs of its own graded rollouts, and by diffu-GRPO for
as many seconds; making the pairs counts. It prints a JSON line a run, then a table. `--dpo` sets fields of the first:
`--dpo dpo.steps=100 dpo.beta=0.1`.
"""

import argparse
import functools
import itertools
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from benchmarks.enumeration import DENOISER, LENGTH, Truth, draw_params
from d1jax.columns import markdown
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


def exact(policy: np.ndarray, reference: np.ndarray, arm: str, samples: int) -> np.ndarray:
  """The variance of the score of each pair [O], from the `estimates` of both models."""
  gain = policy - reference
  if arm == "pair":
    return _variance(gain - _partners(gain)) / samples
  if arm == "shared":
    each = _variance(gain) / samples
  elif arm == "apart":
    each = (_variance(policy) + _variance(reference)) / samples
  else:
    each = _variance_of_one_time(policy, samples) + _variance_of_one_time(reference, samples)
  return each + _partners(each)


def true_scores(truth: Truth, policy: Any) -> np.ndarray:
  """The score of each pair [O] of the bounds themselves."""
  gain = np.asarray(truth.lower_bound(policy) - truth.lower_bound(truth.params), np.float64)
  return gain - _partners(gain)


@functools.cache
def _scorer(samples: int, keys: int) -> Any:
  """`(policy, reference, batch) -> scores` [keys O] with masks apart and shared, compiled once."""

  def one(policy: Any, reference: Any, batch: PairBatch, index: jax.Array) -> tuple[jax.Array, jax.Array]:
    score = functools.partial(bounds, DENOISER, batch=batch, samples=samples)
    key, other = (jax.random.fold_in(jax.random.key(seed), index) for seed in (0, 1))
    current = score(policy, key=key)
    apart, shared = score(reference, key=other), score(reference, key=key)
    return preference_score(current, apart), preference_score(current, shared)

  every = lambda *given: jax.lax.map(functools.partial(one, *given), jnp.arange(keys))
  return jax.jit(every)


def measured(truth: Truth, policy: Any, samples: int, keys: int = KEYS) -> dict[str, np.ndarray]:
  """The score of each pair [keys O] by `bounds`, with masks apart and shared."""
  count = len(truth.completions)
  answers = np.stack([truth.completions, np.roll(truth.completions, -SHIFT, axis=0)], axis=1)
  prompt = np.broadcast_to(np.asarray(truth.prompt, np.int32), (count, len(truth.prompt)))
  ids, length = np.arange(count, dtype=np.int32), np.full((count, 2), LENGTH, np.int32)
  batch = jax.tree.map(jnp.asarray, PairBatch(ids, prompt, np.ones(prompt.shape, bool), answers, length))
  found = _scorer(samples, keys)(policy, truth.params, batch)
  return dict(zip(("apart", "shared"), (np.asarray(x, np.float64) for x in found), strict=True))


def _loss(score: np.ndarray) -> np.ndarray:
  return np.logaddexp(0, -BETA * score)


def variances(seeds: int, distances: Sequence[float], samples: Sequence[int]) -> list[tuple[Any, ...]]:
  """A row an arm, distance and number of masks: means over random denoisers."""
  found: dict[tuple[Any, ...], list[list[float]]] = {}
  for distance, seed in itertools.product(distances, range(seeds)):
    truth = Truth(draw_params(seed), SamplerSpec(LENGTH, LENGTH, LENGTH))
    policy = moved(truth.params, seed, distance)
    true, near, far = true_scores(truth, policy), estimates(truth, policy), estimates(truth, truth.params)
    for count in samples:
      scores = measured(truth, policy, count)
      for arm in ARMS:
        numbers = [np.sqrt(np.mean(true**2)), np.sqrt(exact(near, far, arm, count).mean()), np.nan, np.nan]
        if arm in scores:
          deviation = np.sqrt(scores[arm].var(axis=0).mean())
          numbers[2:] = [deviation, np.mean(_loss(scores[arm]) - _loss(true))]
        found.setdefault((arm, distance, count), []).append([float(x) for x in numbers])
  rows = []
  for label in sorted(found, key=lambda label: (label[1], ARMS.index(label[0]), label[2])):
    size, *rest = np.mean(found[label], axis=0)
    rows.append((*label, f"{size:.2f}", *("" if np.isnan(x) else f"{x:.3f}" for x in rest)))
  return rows


def _run(preset: str, fields: dict[str, Any]) -> None:
  flags = [f"--config.{name}={value}" for name, value in fields.items()]
  command = [sys.executable, "-m", "d1jax.main", f"--config=configs/{preset}.py", *flags]
  subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)


def _train(stage: str, workdir: Path, fields: dict[str, Any]) -> dict[str, Any]:
  """Trains a run, or reads it if it is finished; returns its results."""
  _run(f"{stage}:tiny,sudoku", fields | {"workdir": workdir})
  results: dict[str, Any] = json.loads((workdir / "results.json").read_text(encoding="utf-8"))
  return results


def _line(stage: str, seed: int, workdir: Path, results: dict[str, Any]) -> dict[str, Any]:
  records = [r for r in read_records(workdir / "metrics.jsonl") if r["stage"] == stage]
  pairs = workdir / "pairs.jsonl"
  return {
    "arm": {"dpo": "pairs", "grpo": "diffu-GRPO"}[stage],
    "seed": seed,
    "iterations": len(records),
    "pairs": len(pairs.read_text(encoding="utf-8").splitlines()) if pairs.exists() else None,
    "before": results["before"]["solved"],
    "solved": results["after"]["solved"],
    "solved_interval": results["after"]["solved_interval"],
    "seconds": results["seconds"][stage],
    "validation": max(r["validation"] for r in records if "validation" in r),
  }


def learning(seed: int, folder: Path, pilot: int, fields: dict[str, Any]) -> list[dict[str, Any]]:
  """The lines of both arms of a seed; `pilot` iterations of diffu-GRPO say how many of them the seconds allow."""
  folder = folder.absolute()
  start = folder / f"start-{seed}"
  if not start.exists():
    _train("sft", folder / f"sft-{seed}", {"seed": seed})
    _run("export", {"checkpoint": folder / f"sft-{seed}", "output": start})
  shared = {"seed": seed, "model.pretrained": start, "sft.steps": 0}
  workdirs = {name: folder / f"{name}-{seed}" for name in ("dpo", "pilot", "grpo")}
  results = _train("dpo", workdirs["dpo"], shared | fields)
  tried = _train("grpo", workdirs["pilot"], shared | {"grpo.steps": pilot, "grpo.validate_every": pilot})
  steps = max(1, round(results["seconds"]["dpo"] / tried["seconds"]["grpo"] * pilot))
  last = _train("grpo", workdirs["grpo"], shared | {"grpo.steps": steps, "grpo.validate_every": max(1, steps // 10)})
  return [_line("dpo", seed, workdirs["dpo"], results), _line("grpo", seed, workdirs["grpo"], last)]


def main() -> None:
  """Runs what the first argument names."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("what", choices=("variance", "learning"))
  parser.add_argument("--seeds", type=int, default=3, help="random denoisers, or seeds of training")
  parser.add_argument("--distances", type=float, nargs="+", default=[0.05, 0.2], help="of policy and reference")
  parser.add_argument("--samples", type=int, nargs="+", default=list(SAMPLES))
  parser.add_argument("--pilot", type=int, default=30, help="iterations of diffu-GRPO that say how long one takes")
  parser.add_argument("--folder", type=Path, default=Path("runs/preference"), help="finished runs are read")
  parser.add_argument("--dpo", nargs="*", default=[], help="fields of the runs on pairs: NAME=VALUE")
  options = parser.parse_args()
  jax.config.update("jax_platforms", "cpu")
  print(json.dumps({**vars(options), "folder": str(options.folder), **timing.host()}), flush=True)
  if options.what == "variance":
    rows = variances(options.seeds, options.distances, options.samples)
    print(markdown(("arm", "distance", "n", "score", "std", "measured", "loss"), rows))
    return
  lines = []
  for seed in range(options.seeds):
    for line in learning(seed, options.folder, options.pilot, dict(one.split("=", 1) for one in options.dpo)):
      lines.append(line)
      print(json.dumps(line), flush=True)
  head = ("arm", "seed", "iterations", "pairs", "before", "solved", "seconds")
  print(
    markdown(
      head, [[f"{x:.1%}" if isinstance(x, float) and x <= 1 else x for x in map(line.get, head)] for line in lines]
    )
  )


if __name__ == "__main__":
  main()
