"""Rollouts against d1's loop in PyTorch and against the machine: `python -m benchmarks.rollout`.

One network with random weights, in JAX and in PyTorch. The benchmark stops if their logits differ. Then d1's loop in
PyTorch (temperatures 0.9 and 0) and each of our modes take turns; medians. It prints a JSON line about the machine,
then one for each batch and mode:

- `tokens_per_second`: of all B * C tokens; `seconds`, `fastest`, `slowest`: of a rollout.
- `ratio`: to the PyTorch loop at the same temperature; null without PyTorch, whose rows are missing then.
- `ceiling_share`: the time that the mode's matrix products need alone (see `benchmarks.ceiling`) over `seconds`.
- `token_forwards`: the positions that the passes of a rollout compute, a row.
- `compile_seconds`, and `peak_bytes` beyond weights and prompts: for JAX what the compiler allots on each device; for
  PyTorch what it allocated on a GPU, on a CPU by how much the process grew.

`forward` runs the forward passes of `exact` alone, over its prompts and half-revealed completions: no head, no draws.
One token repeated would not do: a GPU draws less power over equal rows, and clocks higher. `dual_threshold` reveals
four tokens a step, whatever their confidence: random weights are never confident, and this is what threshold decoding
costs at its cap. `block` and `block_4` are the same network with block-causal attention, in blocks of the case's length
and of 4, whose cache is exact.
`--profile DIR` adds lines that say where the time of `exact` and `dual` goes. On a GPU set
XLA_PYTHON_CLIENT_PREALLOCATE=false if PyTorch is there too.
"""

import argparse
import dataclasses
import functools
import importlib.util
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import case as cases
from benchmarks import ceiling, profiles, timing
from benchmarks.case import CASES, Case, Model
from benchmarks.ceiling import Products
from d1jax.diffusion import layout
from d1jax.diffusion.rollout import Rollout, SamplerSpec
from d1jax.diffusion.sampler import sample
from d1jax.parallel import multihost

TEMPERATURE = 0.9
TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-2}
"""Of the root mean square of the difference between the logits of both networks, in their standard deviations."""

MODES: dict[str, dict[str, Any]] = {
  "exact": {},
  "exact_t0": {"temperature": 0.0},
  "prefix": {"cache": "prefix"},
  "window": {"cache": "window"},
  "dual": {"cache": "dual"},
  "dual_threshold": {"cache": "dual", "schedule": "threshold", "threshold": 1e-30, "max_reveal": 4},
}
"""Fields of the sampler."""

BLOCKS = {"block": None, "block_4": 4}
"""Tokens a block of a block-causal network; None: those of the case."""

MODES |= {mode: {"block_length": size} if size else {} for mode, size in BLOCKS.items()}

ARMS = ("torch", "torch_t0", "forward", *MODES)
PROFILED = ("exact", "dual")


class Arm(NamedTuple):
  """What is timed.

  Attributes:
    run: one rollout.
    temperature: of its draws; None where nothing is drawn.
    products: of one rollout.
    compile_seconds: of its program.
    peak_bytes: beyond its arguments.
    text: its optimised HLO.
    token_forwards: positions that its passes compute, a row.
  """

  run: Callable[[], Any]
  temperature: float | None
  products: Products | None = None
  compile_seconds: float | None = None
  peak_bytes: int | None = None
  text: str = ""
  token_forwards: int | None = None


def sampler(case: Case, mode: str) -> SamplerSpec:
  """The sampler of a mode."""
  fields = {"block_length": case.block, "temperature": TEMPERATURE} | MODES[mode]
  return SamplerSpec(case.completion, case.steps, **fields)


def passes_per_block(spec: SamplerSpec) -> int:
  """Forward passes of a block; where confidence decides, as many as at its cap."""
  return spec.steps_per_block if spec.schedule == "static" else -(-spec.block_length // spec.max_reveal)


class Pass(NamedTuple):
  """Forward passes of a rollout with the same shapes.

  Attributes:
    width: positions that a pass computes.
    number: how many of them there are.
    predicted: positions whose logits are computed.
  """

  width: int
  number: int
  predicted: int


def passes(case: Case, spec: SamplerSpec) -> list[Pass]:
  """The passes of a rollout with full attention."""
  length, found = spec.block_length, []
  for start in range(case.prompt, case.canvas, length):
    width = {
      "none": case.canvas,
      "prefix": case.canvas - start,
      "window": min(spec.look_behind + length + spec.look_ahead, case.canvas),
      "dual": length,
    }[spec.cache]
    found += [Pass(case.canvas, 1, length), Pass(width, passes_per_block(spec) - 1, length)]
  return found


def causal_passes(prompt: int, block: int, taken: Sequence[int]) -> list[Pass]:
  """The passes of a block-causal rollout whose prompts have a width of whole blocks, by the steps of each block."""
  found = [Pass(prompt - block, 1, 0)]
  for steps in taken:
    found += [Pass(2 * block, 1, block), Pass(block, steps - 1, block)] if steps else []
  return found


def products(case: Case, made: list[Pass], batch: int, canvas: int) -> Products:
  """The matrix products of a rollout: those of each forward pass, and the head on the block."""
  found: Products = Products()
  for width, number, predicted in made:
    found += ceiling.times(ceiling.forward(case.size, batch, width, canvas, predicted), number)
  return found


def rollout_arm(case: Case, model: Model, mode: str, batch: int) -> Arm:
  """Our sampler in one mode."""
  spec = sampler(case, mode)
  denoiser = cases.denoiser(case, model.network, spec.block_length if mode in BLOCKS else None)
  prompt = cases.prompts(case, batch)
  ids = np.arange(batch, dtype=np.int32)
  rows = cases.place(model, prompt, np.ones(prompt.shape, bool), ids, ids)
  arguments = (model.params, rows, jax.device_put(jax.random.key(1), model.everywhere))

  def rollout(params: Any, rows: tuple[jax.Array, ...], key: jax.Array) -> Rollout:
    prompt, valid, sample_id, group_id = rows
    return sample(denoiser, params, prompt, valid, sample_id, group_id, key, spec=spec)

  placements = (model.everywhere, model.row, model.everywhere)
  program = timing.compiled(rollout, placements, model.row, arguments)
  run = lambda: program.run(*arguments)
  taken, expected = spec.steps_taken(np.asarray(run().reveal_step)), spec.blocks * passes_per_block(spec)
  width = layout.prompt_width(denoiser, case.prompt)
  if mode in BLOCKS:
    made = causal_passes(width, spec.block_length, taken.tolist())
  elif sum(taken) == expected:
    made = passes(case, spec)
  else:
    raise SystemExit(f"mode {mode} took {sum(taken)} denoising steps; its products are those of {expected}")
  forwards = sum(each.width * each.number for each in made)
  needed = products(case, made, batch, width + case.completion)
  return Arm(run, spec.temperature, needed, *program[1:], token_forwards=forwards)


def forward_arm(case: Case, model: Model, batch: int) -> Arm:
  """The forward passes of exact mode and nothing else."""
  prompt, chance = cases.prompts(case, batch), np.random.default_rng(0)
  completion = chance.integers(0, case.mask_id, (batch, case.completion), np.int32)
  completion[chance.random(completion.shape) < 0.5] = case.mask_id
  tokens = np.concatenate([prompt, completion], axis=1)
  rows = cases.place(model, tokens, np.ones(tokens.shape, bool))

  def passes(params: Any, tokens: jax.Array, valid: jax.Array) -> jax.Array:
    def body(_: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
      tokens, _ = carry
      hidden = model.denoiser.encode(params, tokens, valid)
      return tokens.at[:, 0].set(jnp.argmax(hidden[:, 0], axis=-1).astype(tokens.dtype)), hidden

    hidden = jnp.zeros((*tokens.shape, case.size.embed), case.dtype)
    return jax.lax.fori_loop(0, case.steps, body, (tokens, hidden))[1]

  program = timing.compiled(passes, (model.everywhere, model.row, model.row), model.row, (model.params, *rows))
  once = ceiling.forward(case.size, batch, case.canvas, case.canvas, 0)
  run = lambda: program.run(model.params, *rows)
  jax.block_until_ready(run())
  return Arm(run, None, ceiling.times(once, case.steps), *program[1:], token_forwards=case.steps * case.canvas)


def torch_arms(case: Case, model: Model, batch: int) -> dict[str, Arm]:
  """d1's loop at both temperatures; none without PyTorch, or where it does not see the GPU that JAX runs on.

  Raises:
    SystemExit: its network computes other logits than ours.
  """
  if importlib.util.find_spec("torch") is None:
    return {}
  from benchmarks import torch_reference

  if not torch_reference.sees(jax.default_backend()):
    return {}
  network = torch_reference.Transformer(model.params, case.size, case.dtype)
  prompt = cases.prompts(case, batch)
  first = prompt[: len(jax.devices())]  # whole logits of all rows need not fit
  canvas = np.pad(first, ((0, 0), (0, case.completion)), constant_values=case.mask_id)
  check_logits(case, model, canvas, network)
  arms = {}
  for name, temperature in (("torch", TEMPERATURE), ("torch_t0", 0.0)):
    run = functools.partial(
      torch_reference.generate,
      network,
      prompt,
      completion=case.completion,
      block=case.block,
      steps=case.steps,
      temperature=temperature,
      mask_id=case.mask_id,
    )
    short = functools.partial(run, steps=case.completion // case.block)  # as much memory as all steps
    arms[name] = Arm(run, temperature, peak_bytes=torch_reference.peak_bytes(short))
  return arms


def check_logits(case: Case, model: Model, canvas: np.ndarray, network: Any) -> None:
  """Stops the benchmark where both networks do not compute the same logits."""

  def logits(params: Any, tokens: jax.Array, valid: jax.Array) -> jax.Array:
    return model.denoiser.logits(params, model.denoiser.encode(params, tokens, valid))

  rows = cases.place(model, canvas, np.ones(canvas.shape, bool))
  placements = (model.everywhere, model.row, model.row)
  program = jax.jit(logits, in_shardings=placements, out_shardings=model.row)
  ours = np.asarray(program(model.params, *rows))[..., : case.mask_id]  # the mask is forbidden here, not there
  theirs = network.logits(canvas)[..., : case.mask_id]
  error = float(np.sqrt(np.mean((ours - theirs) ** 2)) / np.std(ours))
  if not error <= TOLERANCE[case.dtype]:
    raise SystemExit(
      f"the logits of JAX and PyTorch differ by {error:.1e} standard deviations; {TOLERANCE[case.dtype]} are allowed"
    )
  print(json.dumps({"logits_differ_by": error, "allowed": TOLERANCE[case.dtype]}), flush=True)


def line(case: Case, batch: int, name: str, arm: Arm, seconds: dict[str, list[float]], rates: Any) -> dict[str, Any]:
  """What is printed of an arm."""
  median = statistics.median(seconds[name])
  base = {TEMPERATURE: "torch", 0.0: "torch_t0"}.get(arm.temperature) if arm.temperature is not None else None
  described = ceiling.described(arm.products, rates) if arm.products else {"ceiling_seconds": None}
  share = described["ceiling_seconds"]
  return {
    "mode": name,
    "batch": batch,
    "tokens_per_second": batch * case.completion / median,
    "ratio": statistics.median(seconds[base]) / median if base in seconds else None,
    "ceiling_share": share / median if share else None,
    "token_forwards": arm.token_forwards,
    "compile_seconds": arm.compile_seconds,
    "peak_bytes": arm.peak_bytes,
    **timing.spread(seconds[name]),
    **described,
  }


def measure(case: Case, model: Model, modes: list[str], batch: int, repeats: int) -> dict[str, Arm]:
  """Prints the lines of one batch."""
  arms = torch_arms(case, model, batch) if any(mode.startswith("torch") for mode in modes) else {}
  arms = {mode: arm for mode, arm in arms.items() if mode in modes}
  if "forward" in modes:
    arms["forward"] = forward_arm(case, model, batch)
  arms |= {mode: rollout_arm(case, model, mode, batch) for mode in modes if mode in MODES}
  limit = ceiling.Ceiling([arm.products for arm in arms.values() if arm.products], case.dtype, jax.devices())
  seconds = timing.interleaved({name: arm.run for name, arm in arms.items()} | limit.arms, repeats)
  rates = limit.rates(seconds)
  for name, arm in arms.items():
    print(json.dumps(line(case, batch, name, arm, seconds, rates)), flush=True)
  return arms


def main() -> None:
  """Measures all batches of a case."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--case", choices=CASES, help="default: mid on a CPU, else llada_8b")
  parser.add_argument("--modes", nargs="*", default=list(ARMS), choices=ARMS)
  parser.add_argument("--batches", nargs="*", type=int, help="rows of a rollout; default: the case's")
  parser.add_argument("--repeats", type=int, default=5, help="rounds")
  parser.add_argument("--devices", type=int, default=1, help="into which a CPU is split")
  parser.add_argument("--unroll", type=int, default=1, help="layers that the scan over them unrolls")
  parser.add_argument("--profile", type=Path, help="where traces go")
  options = parser.parse_args()
  if options.profile and not set(PROFILED) <= set(options.modes):
    parser.error(f"--profile needs the modes {', '.join(PROFILED)}")
  multihost.split_cpu(options.devices)
  name = options.case or cases.default_case()
  case = dataclasses.replace(CASES[name], unroll=options.unroll)
  case = dataclasses.replace(case, batches=tuple(options.batches or case.batches))
  model = cases.build(case, jax.devices())
  print(json.dumps({"case": name, **cases.described(case), **timing.machine(len(jax.devices()))}), flush=True)
  for batch in case.batches:
    arms = measure(case, model, options.modes, batch, options.repeats)
    for mode in PROFILED if options.profile else ():
      shares = profiles.shares(arms[mode].run, arms[mode].text, options.profile / f"{mode}-{batch}")
      print(json.dumps({"profile": mode, "batch": batch, **shares}), flush=True)


if __name__ == "__main__":
  main()
