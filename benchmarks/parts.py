"""What each optimisation brings on its own, beside the plain way of doing the same: `python -m benchmarks.parts`.

All arms are of the case `mid`, on one device, and take turns. It prints a JSON line about the machine and one an arm:
`part`, `way`, median `milliseconds`, `fastest`, `peak_mib` (temporaries and results that the compiler allots). The ways
of a part compute the same, which is checked first.

- `head`: logits of the whole canvas, or of the active block alone.
- `draw`: a proposal and its confidence for each position of a block, from one cumulative sum and an argmax over the
  vocabulary, or from a search in tiles of it (`d1jax.diffusion.draw`).
- `log_prob`: scores of six rows' completions, and their gradients by the hidden states (`frozen`, what adapters need)
  or by the head too (`trained`), with whole logits or in tiles of the vocabulary (`d1jax.diffusion.vocabulary`).
- `window`: a pass over a block with a cache, its scan over layers rolled or unrolled.
- `products`: an update's forward and backward pass through the MLPs of all layers, products taken of [B, L, D] or of
  [B * L, D] (`d1jax.models.layers.dense`).
"""

import argparse
import dataclasses
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import case as cases
from benchmarks import timing
from benchmarks.case import CASES
from d1jax.diffusion.draw import log_prob, propose
from d1jax.diffusion.vocabulary import tiled_log_prob
from d1jax.models.layers import dense

CASE = CASES["mid"]
ROWS, SCORED, TILES = CASE.batches[0], 6, (2048, 4096, 8192)
LAYERS = CASE.size.layers

Arms = dict[tuple[str, str], tuple[Callable[..., Any], tuple[Any, ...]]]
"""Part and way to a function and its arguments."""


def plainly(logits: jax.Array, uniform: jax.Array, temperature: float) -> jax.Array:
  """The draw by one cumulative sum over the vocabulary, or the argmax at temperature 0."""
  if temperature == 0:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  mass = jnp.exp(logits / temperature - jnp.max(logits / temperature, axis=-1, keepdims=True))
  cumulative = jnp.cumsum(mass, axis=-1)
  return jnp.argmax(cumulative > (uniform * cumulative[..., -1])[..., None], axis=-1).astype(jnp.int32)


def draws(random: np.random.Generator) -> Arms:
  """Proposals with their tempered log-probabilities and confidences."""
  shape = (ROWS, CASE.block)
  logits = jnp.asarray(random.normal(size=(*shape, CASE.size.vocab)), jnp.float32)
  uniform = jnp.asarray(random.random(shape), jnp.float32)
  arms: Arms = {}
  for temperature in (0.9, 0.0):

    def tiled(logits: jax.Array, uniform: jax.Array, t: float = temperature) -> Any:
      tokens, logp = propose(logits, uniform, t)
      return tokens, logp, log_prob(logits, tokens)

    def plain(logits: jax.Array, uniform: jax.Array, t: float = temperature) -> Any:
      tokens = plainly(logits, uniform, t)
      logp = log_prob(logits / t, tokens) if t else jnp.zeros(tokens.shape)
      return tokens, logp, log_prob(logits, tokens)

    arms["draw", f"plain, temperature {temperature:g}"] = plain, (logits, uniform)
    arms["draw", f"in tiles, temperature {temperature:g}"] = tiled, (logits, uniform)
  return arms


def scores(random: np.random.Generator) -> Arms:
  """Log-probabilities of given tokens, and their gradients."""
  rows, vocab = SCORED * CASE.completion, CASE.size.vocab
  hidden = jnp.asarray(random.normal(size=(rows, CASE.size.embed)), jnp.float32)
  head = jnp.asarray(random.normal(size=(CASE.size.embed, vocab)) / CASE.size.embed**0.5, jnp.float32)
  tokens = jnp.asarray(random.integers(0, vocab - 1, rows), jnp.int32)
  forbidden = np.arange(vocab) == CASE.mask_id

  def whole(hidden: jax.Array, head: jax.Array, tokens: jax.Array) -> jax.Array:
    return log_prob(jnp.where(forbidden[None], -jnp.inf, hidden @ head), tokens)

  arms: Arms = {}
  for name, tile in (("whole", None), *((f"tiles of {tile}", tile) for tile in TILES)):

    def score(hidden: jax.Array, head: jax.Array, tokens: jax.Array, tile: int | None = tile) -> jax.Array:
      return tiled_log_prob(hidden, head, tokens, (CASE.mask_id,), tile) if tile else whole(hidden, head, tokens)

    mean = lambda hidden, head, tokens, score=score: jnp.mean(score(hidden, head, tokens))
    arms["log_prob", f"forward, {name}"] = score, (hidden, head, tokens)
    arms["log_prob", f"frozen, {name}"] = jax.value_and_grad(mean), (hidden, head, tokens)
    arms["log_prob", f"trained, {name}"] = jax.value_and_grad(mean, argnums=(0, 1)), (hidden, head, tokens)
  return arms


def products(random: np.random.Generator) -> Arms:
  """Gradients of all layers' MLPs under a scan."""
  embed, mlp = CASE.size.embed, CASE.size.mlp
  draw = lambda *shape: jnp.asarray(random.normal(size=shape) / shape[-2] ** 0.5, jnp.float32)
  weights = (draw(LAYERS, embed, mlp), draw(LAYERS, embed, mlp), draw(LAYERS, mlp, embed))
  x = draw(SCORED, CASE.canvas, embed)
  arms: Arms = {}
  for name, product in (("with two leading axes", jnp.matmul), ("with one", dense)):

    def loss(weights: Any, x: jax.Array, product: Callable[..., jax.Array] = product) -> jax.Array:
      def layer(x: jax.Array, w: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        return x + product(jax.nn.silu(product(x, w[0])) * product(x, w[1]), w[2]), None

      return jnp.mean(jnp.square(jax.lax.scan(layer, x, weights)[0]))

    arms["products", f"gradients, {name}"] = jax.grad(loss), (weights, x)
  return arms


def networks(random: np.random.Generator) -> Arms:
  """The head on the canvas or the block; a window's pass with the scan rolled or unrolled."""
  model = cases.build(CASE, jax.devices()[:1])
  unrolled = cases.build(dataclasses.replace(CASE, unroll=LAYERS), jax.devices()[:1])
  hidden = jnp.asarray(random.normal(size=(ROWS, CASE.canvas, CASE.size.embed)), jnp.float32)
  tokens = jnp.asarray(random.integers(0, CASE.mask_id, (ROWS, CASE.canvas)), jnp.int32)
  block = slice(CASE.prompt, CASE.prompt + CASE.block)
  arms: Arms = {
    ("head", "canvas"): (
      lambda params, hidden: model.denoiser.logits(params, hidden)[:, block],
      (model.params, hidden),
    ),
    ("head", "block"): (lambda params, hidden: model.denoiser.logits(params, hidden[:, block]), (model.params, hidden)),
  }
  for name, each in (("rolled", model), ("unrolled", unrolled)):

    def passes(params: Any, tokens: jax.Array, denoiser: Any = each.denoiser) -> jax.Array:
      """A refresh, and as many window passes as a block of the static schedule takes."""
      cache = denoiser.init_cache(jnp.ones(tokens.shape, bool))
      hidden, cache = denoiser.encode_window(params, tokens, 0, cache)
      steps = CASE.steps * CASE.block // CASE.completion
      again = lambda _, carry: denoiser.encode_window(params, tokens[:, block], CASE.prompt, carry[1])
      return jax.lax.fori_loop(1, steps, again, (hidden[:, block], cache))[0]

    arms["window", f"a block's passes, {name}"] = passes, (model.params, tokens)
  return arms


def check(found: dict[tuple[str, str], Any]) -> None:
  """Stops the benchmark where two ways of a part do not compute the same."""
  first: dict[tuple[str, str], Any] = {}
  for (part, way), result in found.items():
    what = way.rpartition("temperature")[2] if part == "draw" else way.partition(",")[0]
    kind = (part, "" if part == "head" else what)
    for a, b in zip(*(jax.tree.leaves(x) for x in (first.setdefault(kind, result), result)), strict=True):
      if not np.allclose(a, b, rtol=1e-4, atol=1e-4):
        raise SystemExit(f"{part}, {way}: not what the first way computes, by {np.abs(np.asarray(a - b)).max():.1e}")


def main() -> None:
  """Measures all arms in turns."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--repeats", type=int, default=9, help="rounds")
  options = parser.parse_args()
  print(json.dumps({**cases.described(CASE), **timing.machine(1)}), flush=True)
  random = np.random.default_rng(0)
  arms = {**networks(random), **draws(random), **scores(random), **products(random)}
  programs = {}
  for name, (function, arguments) in arms.items():
    placement = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    programs[name] = timing.compiled(function, placement, placement, arguments)
  runs = {name: (lambda name=name: programs[name].run(*arms[name][1])) for name in arms}
  check({name: jax.device_get(run()) for name, run in runs.items()})
  seconds = timing.interleaved(runs, options.repeats)
  for name, program in programs.items():
    spread = timing.spread(seconds[name])
    line = {
      "part": name[0],
      "way": name[1],
      "milliseconds": 1e3 * spread["seconds"],
      "fastest": 1e3 * spread["fastest"],
    }
    print(json.dumps(line | {"peak_mib": (program.peak_bytes or 0) / 2**20}), flush=True)


if __name__ == "__main__":
  main()
