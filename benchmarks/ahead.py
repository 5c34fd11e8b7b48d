"""Iterations a second with rollouts that do not wait for updates, where a rollout takes as long as an update.

`python -m benchmarks.ahead` gives rollouts one CPU device and updates another. It runs some iterations of diffu-GRPO on
the tiny network synchronously (arm 0) and with `off_policy_steps` of 1 and 2. It prints a JSON line an arm and a table.

The case is artificial: besides its little arithmetic, every program waits inside XLA (`benchmarks.occupied`), a rollout
`--seconds` in all and an update as long. So the numbers say what the loop makes of two sides that work at the same
time, and are the same on a machine with other work. What waits imitates accelerators which are elsewhere. It is no
claim that half of the devices make an update in the same time as all of them: both arms have the same two sides.
"""

import argparse
import dataclasses
import json
import os
import runpy
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from benchmarks import occupied, timing
from d1jax.columns import markdown
from d1jax.parallel import multihost
from d1jax.run import experiment as experiments
from d1jax.training import configured, grpo
from d1jax.training.ahead import Ahead

ROOT = Path(__file__).parent.parent
ROWS, GROUP = 32, 4


def prepared(off_policy_steps: int, seconds: float) -> tuple[Any, Any, Any, int]:
  """The compiled programs, the grading, the state at the start, and the seed."""
  config = runpy.run_path(str(ROOT / "configs" / "grpo.py"))["get_config"]("smoke")
  config.mesh.data, config.rollout_mesh = 1, {"data": 1}
  config.task.sizes.train = 64
  # One token a step: the estimate of the behaviour, one more pass, then adds an eighteenth to a stale rollout.
  config.rollout.diffusion_steps = config.rollout.completion_length
  config.grpo.update(prompts_per_iteration=ROWS // GROUP, num_generations=GROUP, accumulation=1, rollout_chunks=1)
  with config.grpo.unlocked():
    config.grpo.off_policy_steps = off_policy_steps
  built = experiments.build(config, None)
  model, passes = built.model, config.rollout.diffusion_steps
  slower = [
    dataclasses.replace(each, encode=occupied.for_seconds(each.encode, wait))
    for each, wait in ((model.denoiser, seconds), (model.rollout_denoiser, seconds / passes))
  ]
  model = dataclasses.replace(model, denoiser=slower[0], rollout_denoiser=slower[1])
  built = dataclasses.replace(built, model=model)
  optimizer = built.optimizer(built.config.grpo, 100)
  programs, grading = configured.programs(built, optimizer), configured.grading(built)
  programs.compile()
  return programs, grading, built.model.weights.fresh_state(optimizer), config.seed


def run(off_policy_steps: int, seconds: float, iterations: int) -> dict[str, Any]:
  """The line of one arm; the first iterations, in which the queue fills, are not counted."""
  programs, grading, state, seed = prepared(off_policy_steps, seconds)
  frozen = programs.model.weights.frozen
  taken: list[float] = []
  records: list[dict[str, float]] = []
  with tempfile.TemporaryDirectory() as folder, grading.grader:
    make = Ahead if off_policy_steps else grpo.advancer
    advance = make(programs, grading, frozen, 0, Path(folder), seed=seed, gap_every=10**9)
    for iteration in range(off_policy_steps + 1 + iterations):
      began = time.perf_counter()
      state, record = advance(state, iteration)
      taken.append(time.perf_counter() - began)
      records.append(record)
  kept = slice(off_policy_steps + 1, None)
  median = lambda name: statistics.median(r[name] for r in records[kept]) if name in records[-1] else None
  return {
    "off_policy_steps": off_policy_steps,
    "iterations_per_second": iterations / sum(taken[kept]),
    **{name: median(f"async/{name}") for name in ("staleness", "idle/rollout", "idle/update", "queue")},
  }


def main() -> None:
  """Runs all arms."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--seconds", type=float, default=1.0, help="of a rollout, and of an update")
  parser.add_argument("--iterations", type=int, default=10)
  options = parser.parse_args()
  # With threads that both sides share, the arithmetic of one would queue behind the waiting of the other.
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false"
  multihost.split_cpu(2)
  print(json.dumps({"seconds": options.seconds, **timing.machine(jax.device_count())}), flush=True)
  lines = []
  for steps in (0, 1, 2):
    lines.append(run(steps, options.seconds, options.iterations))
    print(json.dumps(lines[-1]), flush=True)
  rows = []
  for line in lines:
    speed, idle = line["iterations_per_second"], [line[f"idle/{side}"] for side in ("rollout", "update")]
    shares = ["" if share is None else f"{share:.0%}" for share in idle]
    gain = speed / lines[0]["iterations_per_second"]
    rows.append((line["off_policy_steps"], f"{speed:.3f}", f"{gain:.2f}", *shares))
  print(markdown(("off_policy_steps", "iterations/s", "times", "rollouts idle", "updates idle"), rows))


if __name__ == "__main__":
  main()
