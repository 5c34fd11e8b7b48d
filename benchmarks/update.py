"""The whole diffu-GRPO update against the same in PyTorch and against the machine: `python -m benchmarks.update`.

One batch of completions and advantages, mu AdamW steps on all weights, a KL term to a reference with weights of its
own, so that the losses depend on every log-probability. In PyTorch as d1 computes it: logits [B, L, V], the masks of
all steps of a micro-batch in one forward pass for old and reference log-probabilities, autograd. The benchmark stops if
the losses differ. It prints a JSON line about the machine, then one for each way, with the fields of
`benchmarks.rollout` and `updates_per_second` in place of its tokens:

- `torch`: null `ceiling_share`; the list of products is of ours alone.
- `plain`: `d1jax.rl.update`, logits of all completion positions of a micro-batch at a time.
- `tiled`: the same in tiles of the vocabulary, whose backward pass computes the head's products once more.
- `path`: the same network with block-causal attention in blocks of 4, which scores the path of a rollout exactly: one
  pass over prompt, completion and a noisy copy of it for each of the two steps of a block.

Our products are three forward passes for what is trained and one for what is scored: old in all but the first step,
reference in all. Weights are float32, products in the case's dtype.
"""

import argparse
import functools
import importlib.util
import json
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import case as cases
from benchmarks import ceiling, profiles, timing
from benchmarks.case import CASES, Case, Model
from benchmarks.ceiling import Products
from d1jax import optimizer
from d1jax.diffusion.corruption import mask_prompt
from d1jax.diffusion.denoiser import Denoiser
from d1jax.diffusion.replay import CHUNK
from d1jax.diffusion.rollout import Rollout, SamplerSpec
from d1jax.diffusion.sampler import sample
from d1jax.parallel import multihost
from d1jax.rl.estimators import ESTIMATORS
from d1jax.rl.losses import ClippedToken
from d1jax.rl.method import Method
from d1jax.rl.update import Metrics, inner_keys, update
from d1jax.state import Frozen, TrainState

STEPS, EPSILON, BETA, P_MASK_PROMPT = 4, 0.5, 0.04, 0.15
BLOCK = 4
WAYS = ("plain", "tiled", "path", "torch")
ADAMW = {"learning_rate": 1e-4, "weight_decay": 0.1, "b1": 0.9, "b2": 0.99}
MAX_GRAD_NORM = 0.2
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
"""Relative difference between the losses of a step, of all steps in float32. In bfloat16 of the first alone: d1 takes
the cross-entropy of bfloat16 logits, and AdamW turns small differences of gradients into large ones of weights.
"""


class Work(NamedTuple):
  """What an update is given."""

  rollout: Rollout
  advantages: jax.Array


def work(case: Case, model: Model, rows: int) -> Work:
  """Random prompts, completions without a stop id, and advantages that add up to 0."""
  rng = np.random.default_rng(1)
  prompt = cases.prompts(case, rows)
  completion = rng.integers(0, case.mask_id - 1, (rows, case.completion), np.int32)
  advantages = rng.normal(size=rows).astype(np.float32)
  ids, zeros = np.arange(rows, dtype=np.int32), np.zeros(completion.shape, np.float32)
  valid, used = np.ones(prompt.shape, bool), np.ones(completion.shape, bool)
  placed = cases.place(model, ids, ids, prompt, valid, completion, used, zeros.astype(np.int32), zeros)
  return Work(Rollout(*placed), *cases.place(model, advantages - advantages.mean()))


def sampled(case: Case, model: Model, denoiser: Denoiser, given: Work) -> Work:
  """The same prompts and advantages, with completions that a block-causal network sampled, and their paths."""
  prompts = (given.rollout.prompt, given.rollout.prompt_valid)
  ids = (given.rollout.sample_id, given.rollout.group_id)
  run = functools.partial(sample, denoiser, spec=path_sampler(case))
  program = jax.jit(run, out_shardings=model.row)
  return Work(program(model.params, *prompts, *ids, jax.random.key(2)), given.advantages)


def path_sampler(case: Case) -> SamplerSpec:
  """Of the rollouts whose paths are scored."""
  return SamplerSpec(case.completion, case.steps, BLOCK)


def products(case: Case, rows: int, parts: int, steps: int) -> Products:
  """The matrix products of an update."""
  once = ceiling.forward(case.size, rows // parts, case.canvas, case.canvas, case.completion)
  scored = ceiling.times(once, parts * (2 * steps - 1))
  return scored + ceiling.times(once + ceiling.backward(once), parts * steps)


def path_products(case: Case, rows: int, parts: int, steps: int) -> Products:
  """Those of an update by exact paths; old and reference probabilities of the recorded states are scored once each.

  With blocks of 4 and two steps a block, a pass has two noisy copies; logits exist for 32 tokens at a time.
  """
  copies, recorded = path_sampler(case).steps_per_block, case.completion + BLOCK
  length, predicted = case.canvas + copies * recorded, -(-recorded // CHUNK) * CHUNK
  once = ceiling.forward(case.size, rows // parts, length, length, predicted)
  trained = ceiling.times(once + ceiling.backward(once), steps)
  return ceiling.times(ceiling.times(once, 2) + trained, parts)


class Arm(NamedTuple):
  """What is timed.

  Attributes:
    run: one update.
    losses: of the steps of the first update.
    peak_bytes: see `benchmarks.rollout`.
    compile_seconds: of its program.
    text: its optimised HLO.
  """

  run: Callable[[], Any]
  losses: list[float]
  peak_bytes: int | None
  compile_seconds: float | None = None
  text: str = ""


def own_arm(
  case: Case, model: Model, reference: Model, given: Work, parts: int, tile: int | None, path: bool = False
) -> Arm:
  """Our update; each call goes on from the state of the one before."""
  rule = optimizer.adamw(steps=1, warmup_steps=0, decay="constant", max_grad_norm=MAX_GRAD_NORM, **ADAMW)
  denoiser, sampler = model.denoiser, SamplerSpec(case.completion, case.steps, case.block)
  estimator = ESTIMATORS["one_step"].bind(p_mask_prompt=P_MASK_PROMPT, tile=tile)
  if path:
    denoiser, sampler = cases.denoiser(case, model.network, BLOCK), path_sampler(case)
    estimator, given = ESTIMATORS["step_merged"].bind(), sampled(case, model, denoiser, given)
  loss = ClippedToken(epsilon=EPSILON, beta=BETA)
  method = Method(estimator, loss, num_iterations=STEPS, accumulation=parts)

  def program(state: TrainState, frozen: Frozen, *rows: Any) -> tuple[TrainState, Metrics]:
    return update(state, frozen, *rows, method=method, denoiser=denoiser, sampler=sampler, optimizer=rule)

  copy = lambda tree: jax.tree.map(jnp.copy, tree)
  params = jax.jit(copy, out_shardings=model.everywhere)(model.params)
  moments = jax.jit(rule.init, out_shardings=model.everywhere)(params)
  key = jax.device_put(jax.random.key(0), model.everywhere)
  state = TrainState(jax.device_put(jnp.zeros((), jnp.int32), model.everywhere), params, moments, key)
  frozen = Frozen({}, reference.params)
  everywhere = model.everywhere
  placements = (everywhere, everywhere, model.row, model.row)
  compiled = timing.compiled(program, placements, everywhere, (state, frozen, *given), donate_argnums=0)
  states = [state]

  def run() -> jax.Array:
    state, metrics = compiled.run(states.pop(), frozen, *given)
    states.append(state)
    return metrics["loss"]

  return Arm(run, np.asarray(run()).tolist(), compiled.peak_bytes, compiled.compile_seconds, compiled.text)


def canvases(case: Case, rollout: Rollout) -> np.ndarray:
  """[mu, B, L]: what our update masks in its first call."""
  masks = np.full(rollout.completion.shape, case.mask_id, np.int32)
  found = []
  for key in inner_keys(jax.random.key(0), jnp.int32(0), STEPS):
    prompt = mask_prompt(key, rollout.sample_id, rollout.prompt, rollout.prompt_valid, P_MASK_PROMPT, case.mask_id)
    found.append(np.concatenate([np.asarray(prompt), masks], axis=1))
  return np.stack(found)


def torch_arm(case: Case, model: Model, reference: Model, given: Work, parts: int) -> Arm | None:
  """The update in PyTorch; None without it, or where it does not see the GPU that JAX runs on."""
  if importlib.util.find_spec("torch") is None:
    return None
  from benchmarks import torch_reference

  if not torch_reference.sees(jax.default_backend()):
    return None
  rates = [float(optimizer.schedule(ADAMW["learning_rate"], 1, 0, "constant")(step)) for step in range(STEPS)]
  policy = torch_reference.Transformer(model.params, case.size, case.dtype, trained=True)
  adamw = {"betas": (ADAMW["b1"], ADAMW["b2"]), "weight_decay": ADAMW["weight_decay"]}
  step = torch_reference.Update(policy, rates=rates, max_grad_norm=MAX_GRAD_NORM, **adamw)
  run = functools.partial(
    step,
    torch_reference.Transformer(reference.params, case.size, case.dtype),
    canvases(case, given.rollout),
    np.asarray(given.rollout.completion),
    np.asarray(given.advantages),
    parts=parts,
    epsilon=EPSILON,
    beta=BETA,
  )
  losses: list[float] = []
  peak = torch_reference.peak_bytes(lambda: losses.extend(run()))
  return Arm(run, losses, peak)


def check_losses(arms: Mapping[str, Arm], dtype: str) -> None:
  """Stops the benchmark where two ways do not compute the same losses."""
  steps, allowed = STEPS if dtype == "float32" else 1, TOLERANCE[dtype]
  expected = np.array(arms["plain"].losses[:steps])
  for name, arm in arms.items():
    if name == "path":  # another estimate
      continue
    error = float(np.max(np.abs(arm.losses[:steps] / expected - 1)))
    print(json.dumps({"mode": name, "losses": arm.losses, "differ_by": error, "allowed": allowed}), flush=True)
    if not error <= allowed:
      raise SystemExit(f"the losses of {name} and plain differ by {error:.1e}; {allowed} is allowed")


def main() -> None:
  """Measures all ways."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--case", choices=CASES, help="default: mid on a CPU, else llada_4_layers")
  parser.add_argument("--rows", type=int, default=24, help="B")
  parser.add_argument("--parts", type=int, default=4, help="micro-batches a step")
  parser.add_argument("--tile", type=int, default=4096, help="vocabulary ids at a time in `tiled`")
  parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=WAYS, help="beside plain")
  parser.add_argument("--repeats", type=int, default=3, help="rounds")
  parser.add_argument("--devices", type=int, default=1, help="into which a CPU is split")
  parser.add_argument("--profile", type=Path, help="where the trace of `plain` goes")
  options = parser.parse_args()
  multihost.split_cpu(options.devices)
  name = options.case or ("mid" if jax.default_backend() == "cpu" else "llada_4_layers")
  case, devices = CASES[name], jax.devices()
  sizes = {"rows": options.rows, "parts": options.parts, "tile": options.tile, "num_iterations": STEPS}
  print(json.dumps({"case": name, **cases.described(case), **sizes, **timing.machine(len(devices))}), flush=True)
  model, reference = (cases.build(case, devices, seed, stored="float32") for seed in (0, 1))
  given = work(case, model, options.rows)
  own = functools.partial(own_arm, case, model, reference, given, options.parts)
  arms = {"plain": own(None)}
  if "tiled" in options.ways:
    arms["tiled"] = own(options.tile)
  if "path" in options.ways:
    arms["path"] = own(None, path=True)
  if "torch" in options.ways and (other := torch_arm(case, model, reference, given, options.parts)):
    arms["torch"] = other
  check_losses(arms, case.dtype)
  needed = {each: products(case, options.rows, options.parts, STEPS) for each in arms if each != "torch"}
  if "path" in arms:
    needed["path"] = path_products(case, options.rows, options.parts, STEPS)
  limit = ceiling.Ceiling(list(needed.values()), case.dtype, devices)
  seconds = timing.interleaved({each: arm.run for each, arm in arms.items()} | limit.arms, options.repeats)
  rates = limit.rates(seconds)
  for each, arm in arms.items():
    median = statistics.median(seconds[each])
    described = ceiling.described(needed[each], rates) if each in needed else {"ceiling_seconds": None}
    share = described["ceiling_seconds"]
    line = {
      "mode": each,
      "updates_per_second": 1 / median,
      "ratio": statistics.median(seconds["torch"]) / median if "torch" in arms else None,
      "ceiling_share": share / median if share else None,
      "compile_seconds": arm.compile_seconds,
      "peak_bytes": arm.peak_bytes,
      **timing.spread(seconds[each]),
    }
    print(json.dumps(line | described), flush=True)
  if options.profile:
    shares = profiles.shares(arms["plain"].run, arms["plain"].text, options.profile)
    print(json.dumps({"profile": "plain", **shares}), flush=True)


if __name__ == "__main__":
  main()
