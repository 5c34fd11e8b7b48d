"""What slots save in rollouts whose completions have a long tail of lengths.

`python -m benchmarks.continuous` completes the same prompts in batches of as many rows as there are slots, in one batch
of all rows, and in slots (`grpo.rollout_slots`). The arms take turns, and their tokens must be equal. The network has
random weights, and a stand-in decides where its completions end: each token is the stop id with the probability 4 / C,
so that lengths are drawn from a geometric distribution, and their mean is a quarter of the longest, C. Tokens are
unmasked in random order, because a network with random weights has no confidence. It prints a JSON line an arm:
completions a second of wall time, and of this process's CPU time (which says more on a CPU that others use too); and
the denoising steps of a row.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from benchmarks import case as cases
from benchmarks import timing
from benchmarks.case import Case
from d1jax.diffusion.continuous import sample_in_slots
from d1jax.diffusion.denoiser import Denoiser
from d1jax.diffusion.rollout import Rollout, SamplerSpec
from d1jax.diffusion.sampler import sample
from d1jax.models.transformer import TransformerSize
from d1jax.telemetry import cost

MEAN_SHARE = 4
"""The longest completion is so many times the mean."""

ARMS = ("batches", "whole", "slots")
SMALL = Case(TransformerSize(2048, 64, 4, 192, 2), "float32", (16,), 32, 256, 16, 32)


@dataclasses.dataclass(frozen=True)
class Ending(Denoiser):
  """A denoiser each of whose tokens is the stop id with the probability `rate`."""

  rate: float = 0.0

  def logits(self, params: Any, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
    """Logits with that of the stop id set."""
    logits, stop = super().logits(params, hidden), self.stop_ids[0]
    others = jax.nn.logsumexp(logits.at[..., stop].set(-jnp.inf), axis=-1)
    return logits.at[..., stop].set(others + np.log(self.rate / (1 - self.rate)))


def build(case: Case, block: int | None) -> tuple[Ending, Any]:
  """The denoiser and its weights."""
  model = cases.build(case, jax.devices()[:1])
  made = cases.denoiser(case, model.network, block)
  fields = {field.name: getattr(made, field.name) for field in dataclasses.fields(made)}
  return Ending(**fields, rate=MEAN_SHARE / case.completion), model.params


def arms(case: Case, denoiser: Denoiser, params: Any, spec: SamplerSpec, rows: int, slots: int) -> dict[str, Any]:
  """Functions that compile an arm, a function that completes all prompts."""
  ids, key = jnp.arange(rows, dtype=jnp.int32), jax.random.key(1)
  prompt = jnp.asarray(cases.prompts(case, rows))
  prompts = (prompt, jnp.ones(prompt.shape, bool), ids, ids)

  def batches(size: int) -> Callable[[], Rollout]:
    parts = [tuple(x[i : i + size] for x in prompts) for i in range(0, rows, size)]
    program = jax.jit(functools.partial(sample, denoiser, spec=spec)).lower(params, *parts[0], key).compile()
    run = lambda: [jax.block_until_ready(program(params, *part, key)) for part in parts]
    return lambda: jax.tree.map(lambda *x: np.concatenate(x), *run())

  def in_slots() -> Callable[[], Rollout]:
    program = jax.jit(functools.partial(sample_in_slots, denoiser, spec=spec, slots=slots))
    compiled = program.lower(params, *prompts, key).compile()
    return lambda: jax.block_until_ready(compiled(params, *prompts, key))

  return {"batches": lambda: batches(slots), "whole": lambda: batches(rows), "slots": in_slots}


def steps_taken(spec: SamplerSpec, rollout: Rollout, slots: int, block: int | None) -> dict[str, int]:
  """The denoising steps of a row that each arm computes."""
  rows = len(rollout.sample_id)
  parts = [Rollout(*(x[first : first + slots] for x in rollout)) for first in range(0, rows, slots)]
  reached = {
    "batches": cost.reached(spec, parts, slots, 1, block),
    "whole": cost.reached(spec, [rollout], rows, 1, block),
    "slots": cost.reached(spec, [rollout], rows, 1, block, slots),
  }
  computed = {name: reach.turns or reach for name, reach in reached.items()}
  return {name: int(np.sum(reach.steps * reach.rows)) for name, reach in computed.items()}


def main() -> None:
  """Measures the arms."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--rows", type=int, default=128, help="of a rollout")
  parser.add_argument("--slots", type=int, default=16)
  parser.add_argument("--completion", type=int, default=SMALL.completion, help="tokens of the longest")
  parser.add_argument("--block", type=int, help="of a block-causal network; default: full attention")
  parser.add_argument("--embed", type=int, default=SMALL.size.embed, help="width of the network, of two layers")
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--arms", nargs="*", choices=ARMS, default=list(ARMS), help="batches and slots are always there")
  options = parser.parse_args()
  size = options.block or SMALL.block
  steps = options.completion * SMALL.steps // SMALL.completion
  network = dataclasses.replace(SMALL.size, embed=options.embed, mlp=3 * options.embed)
  case = dataclasses.replace(SMALL, size=network, completion=options.completion, block=size, steps=steps)
  spec = SamplerSpec(case.completion, steps, size, temperature=1.0, remasking="random", early_exit=True)
  denoiser, params = build(case, options.block)
  ways = arms(case, denoiser, params, spec, options.rows, options.slots)
  ways = {name: run() for name, run in ways.items() if name in (*options.arms, "batches", "slots")}
  found = {name: jax.device_get(run()) for name, run in ways.items()}
  for rollout in found.values():
    for name in ("completion", "completion_mask", "reveal_step"):
      np.testing.assert_array_equal(getattr(rollout, name), getattr(found["slots"], name), err_msg=name)
  lengths = found["slots"].completion_mask.sum(axis=1)
  print(json.dumps({**timing.machine(1), **vars(options), **cases.described(case)}), flush=True)
  gaps = {name: float(np.abs(one.reveal_logp - found["slots"].reveal_logp).max()) for name, one in found.items()}
  print(json.dumps({"mean": float(lengths.mean()), "longest": int(lengths.max()), "logp_gaps": gaps}), flush=True)
  steps_of = steps_taken(spec, found["slots"], options.slots, options.block)
  wall: dict[str, list[float]] = {name: [] for name in ways}
  worked: dict[str, list[float]] = {name: [] for name in ways}
  for _ in range(options.rounds):
    for name, run in ways.items():
      began = time.process_time()
      wall[name].append(timing.timed(run))
      worked[name].append(time.process_time() - began)
  for name in ways:
    line = {
      "arm": name,
      "completions_per_second": options.rows / statistics.median(wall[name]),
      "completions_per_cpu_second": options.rows / statistics.median(worked[name]),
      "steps_of_a_row": steps_of[name],
      "ratio": statistics.median(a / b for a, b in zip(wall["batches"], wall[name], strict=True)),
      "cpu_ratio": statistics.median(a / b for a, b in zip(worked["batches"], worked[name], strict=True)),
      **timing.spread(wall[name]),
    }
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
  main()
