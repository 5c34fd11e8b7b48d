"""What storing a frozen base in few bits costs and saves: bytes, and the error of the logits.

`python -m benchmarks.quantization` draws a transformer of LLaDA's block shape, scaled down, and compares its logits on
random tokens with those of the same weights in float32, once for each storage: bfloat16, int8 and nf4. Products are
computed in float32, so that the error is that of the storage alone. Random weights have no outliers and no structure:
the errors say how the formats compare, not how a trained model will do. It prints a JSON line a storage, then a
Markdown table on the standard error.
"""

import argparse
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from d1jax.models import lora, transformer
from d1jax.models.lora import PROJECTIONS
from d1jax.models.transformer import Network, Params, TransformerSize

STORAGES = ("bfloat16", "int8", "nf4")


def stored(params: Params, storage: str) -> Params:
  """Float32 weights as a run keeps them: everything in bfloat16, the projections in fewer bits."""
  base = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
  return base if storage == "bfloat16" else lora.quantized(base, storage)


def bytes_of(tree: Any) -> int:
  """The bytes of the arrays of a tree."""
  return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def projections(params: Params) -> list[Any]:
  """The weights of a tree that storage in few bits changes."""
  return [params["blocks"][part][name] for part, name in PROJECTIONS.values()]


def errors(logits: np.ndarray, exact: np.ndarray) -> dict[str, float]:
  """How far logits [..., V] are from the exact ones.

  Returns:
    `mean_error` and `max_error` in standard deviations of the exact logits, `argmax_agreement`, the share of positions
    whose most likely token is the same, and `kl_nats`, the mean of KL(exact || stored).
  """
  exact, logits = exact.astype(np.float64), logits.astype(np.float64)
  spread = float(exact.std())
  difference = np.abs(logits - exact)
  log_p, log_q = (x - _log_sum_exp(x) for x in (exact, logits))
  return {
    "mean_error": float(difference.mean()) / spread,
    "max_error": float(difference.max()) / spread,
    "argmax_agreement": float(np.mean(logits.argmax(-1) == exact.argmax(-1))),
    "kl_nats": float(np.mean(np.sum(np.exp(log_p) * (log_p - log_q), axis=-1))),
  }


def _log_sum_exp(x: np.ndarray) -> np.ndarray:
  top = x.max(-1, keepdims=True)
  return top + np.log(np.exp(x - top).sum(-1, keepdims=True))


def draw(network: Network, seed: int) -> Params:
  """Random weights; a head of variance 1 / D, so that the logits are of order 1 as a trained model's are."""
  params = jax.jit(network.init)(jax.random.key(seed))
  return {**params, "head": params["head"] / (0.02 * network.size.embed**0.5)}


def measure(network: Network, seed: int, batch: int, length: int) -> list[dict[str, Any]]:
  """One line a storage.

  Args:
    network: its products are in float32.
    seed: of weights and tokens.
    batch: rows of random tokens.
    length: tokens of a row.
  """
  params = draw(network, seed)
  tokens = jax.random.randint(jax.random.key(seed + 1), (batch, length), 0, network.size.vocab)
  valid = jnp.ones(tokens.shape, bool)
  logits = jax.jit(lambda p: network.encode(p, tokens, valid) @ network.head(p).astype(jnp.float32))
  exact = np.asarray(logits(params))
  counts = {"projections": sum(w.size for w in projections(params)), "network": transformer.parameter_count(network)}
  lines = []
  for storage in STORAGES:
    kept = jax.jit(stored, static_argnums=1)(params, storage)
    line = {"storage": storage, "seed": seed, "parameters": counts["network"], "logits_std": float(exact.std())}
    line["bytes_per_projection_parameter"] = bytes_of(projections(kept)) / counts["projections"]
    line["bytes_per_parameter"] = bytes_of(kept) / counts["network"]
    line["bytes"] = bytes_of(kept)
    lines.append(line | errors(np.asarray(logits(kept)), exact))
  return lines


def table(lines: list[dict[str, Any]]) -> str:
  """The lines in Markdown."""
  rows = [
    "| storage | bytes a projection parameter | bytes a parameter | mean error | max error | same argmax | KL, nats |",
    "|---|--:|--:|--:|--:|--:|--:|",
  ]
  rows += [
    f"| {x['storage']} | {x['bytes_per_projection_parameter']:.4f} | {x['bytes_per_parameter']:.3f}"
    f" | {x['mean_error']:.4f} | {x['max_error']:.3f} | {100 * x['argmax_agreement']:.1f}% | {x['kl_nats']:.2e} |"
    for x in lines
  ]
  return "\n".join([*rows, "", "Errors in standard deviations of the float32 logits."])


def main() -> None:
  """Measures every storage."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument(
    "--embed", type=int, default=1024, help="heads have 128 coordinates, the MLP is three times as wide"
  )
  parser.add_argument("--layers", type=int, default=8)
  parser.add_argument("--vocab", type=int, default=8192)
  parser.add_argument("--batch", type=int, default=4, help="rows of random tokens")
  parser.add_argument("--length", type=int, default=64)
  parser.add_argument("--seed", type=int, default=0)
  options = parser.parse_args()
  size = TransformerSize(
    vocab=options.vocab,
    embed=options.embed,
    heads=max(1, options.embed // 128),
    mlp=3 * options.embed,
    layers=options.layers,
  )
  lines = measure(transformer.build(size), options.seed, options.batch, options.length)
  for line in lines:
    print(json.dumps(line), flush=True)
  print(table(lines), file=sys.stderr)


if __name__ == "__main__":
  main()
