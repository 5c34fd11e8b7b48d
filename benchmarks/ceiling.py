"""What the matrix products of a program cost alone: the ceiling that the benchmarks measure against.

A program's products are a list of shapes and counts. Each shape is timed in the same process, in turns with the
programs; their sum is the time that no program with these products can beat without faster products.
"""

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from benchmarks import case as cases
from benchmarks import timing
from d1jax.models.transformer import TransformerSize
from d1jax.parallel import mesh as meshes

WORK = {"cpu": 1e10, "gpu": 1e13}
"""Floating-point operations of one timing on each platform: tens of milliseconds."""

OPERAND_BYTES = 2**28
"""Of the right-hand sides that one timing goes through, at most; eight of them, as in the layers of a network."""


class Product(NamedTuple):
  """`batch` products [m, k] @ [k, n]."""

  batch: int
  m: int
  k: int
  n: int

  @property
  def flops(self) -> int:
    """A multiplication and an addition each."""
    return 2 * self.batch * self.m * self.k * self.n


Products = Counter[Product]
"""How often a program computes each product."""


def forward(size: TransformerSize, rows: int, window: int, canvas: int, predicted: int) -> Products:
  """The products of one forward pass.

  Args:
    size: of the network.
    rows: B.
    window: positions that are encoded.
    canvas: positions that they attend to.
    predicted: positions whose logits are computed.
  """
  tokens, layers, head = rows * window, size.layers, size.head_size
  products: Products = Counter()
  products[Product(1, tokens, size.embed, size.heads * head)] += layers  # queries
  products[Product(1, tokens, size.embed, size.key_value_heads * head)] += 2 * layers  # keys, values
  products[Product(rows * size.heads, window, head, canvas)] += layers  # scores
  products[Product(rows * size.heads, window, canvas, head)] += layers  # mixing
  products[Product(1, tokens, size.heads * head, size.embed)] += layers  # attention's output
  products[Product(1, tokens, size.embed, size.mlp)] += 2 * layers  # gate, up
  products[Product(1, tokens, size.mlp, size.embed)] += layers  # down
  if predicted:
    products[Product(1, rows * predicted, size.embed, size.vocab)] += 1
  return products


def backward(products: Products) -> Products:
  """The products of the derivatives by both sides: of each `x @ w`, `dy @ w^T` and `x^T @ dy`."""
  found: Products = Counter()
  for (batch, m, k, n), count in products.items():
    found[Product(batch, m, n, k)] += count
    found[Product(batch, k, m, n)] += count
  return found


def times(products: Products, count: int) -> Products:
  """`count` times these products."""
  return Counter({product: count * number for product, number in products.items()})


class Ceiling:
  """Times products, each on one device with all its threads and with its rows shared over all devices."""

  def __init__(self, products: Sequence[Products], dtype: DTypeLike, devices: Sequence[Any]):
    """Compiles one program a shape and way."""
    self._calls: dict[tuple[Product, int], int] = {}
    self.arms: dict[tuple[Product, int], Callable[[], Any]] = {}
    for product in sorted({product for each in products for product in each}):
      for ways in sorted({1, len(devices)}):
        if (product.batch if product.batch > 1 else product.m) % ways == 0:
          self._add(product, jnp.dtype(dtype), devices[:ways])

  def _add(self, product: Product, dtype: Any, devices: Sequence[Any]) -> None:
    ways, (batch, m, k, n) = len(devices), product
    mesh = cases.data_mesh(devices)
    row, everywhere = meshes.sharding(mesh, meshes.RULES, "batch"), meshes.sharding(mesh, meshes.RULES)
    left, right = ((batch, m, k), (batch, k, n)) if batch > 1 else ((ways, m // ways, k), (k, n))
    side = row if batch > 1 else everywhere
    copies = int(min(8, max(1, OPERAND_BYTES // (batch * k * n * dtype.itemsize))))
    rounds = max(1, round(WORK.get(devices[0].platform, 1e12) / (product.flops * copies)))

    def operands(key: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
      keys = jax.random.split(key, copies + 1)
      x = jax.random.normal(keys[0], left, dtype)
      return x, tuple(jax.random.normal(each, right, dtype) / k**0.5 for each in keys[1:])

    def repeat(x: jax.Array, ws: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
      def body(_: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x, y = carry
        for w in ws:
          y = x @ w
          x = x.at[:, 0, 0].set(y[:, 0, 0])  # the next product waits for this one
        return x, y

      return jax.lax.fori_loop(0, rounds, body, (x, jnp.zeros((*left[:2], n), dtype)))

    x, ws = jax.jit(operands, out_shardings=(row, side))(jax.random.key(0))
    program = timing.compiled(repeat, (row, side), row, (x, ws))
    self._calls[product, ways] = rounds * copies
    self.arms[product, ways] = lambda: program.run(x, ws)
    jax.block_until_ready(program.run(x, ws))

  def rates(self, seconds: Mapping[Any, list[float]]) -> dict[Product, float]:
    """Seconds of each product: the median, the faster way."""
    found: dict[Product, float] = {}
    for (product, ways), calls in self._calls.items():
      each = statistics.median(seconds[product, ways]) / calls
      found[product] = min(each, found.get(product, each))
    return found


def described(products: Products, rates: Mapping[Product, float]) -> dict[str, Any]:
  """Of one program: the seconds of its products, their rate, and the list [batch, m, k, n, count, GFLOP/s]."""
  seconds = sum(count * rates[product] for product, count in products.items())
  flops = sum(count * product.flops for product, count in products.items())
  listed = [[*p, count, round(p.flops / rates[p] / 1e9)] for p, count in sorted(products.items())]
  return {"ceiling_seconds": seconds, "gigaflops": flops / 1e9, "rate": flops / seconds / 1e9, "products": listed}
