"""Who sees whom: attention rules as functions of the indices of a query and of a key.

One description serves every kernel. Plain attention calls a rule on all pairs of a small canvas; a kernel calls it on
the pairs of one tile, so that no [L, L] array exists. A rule is static under jit, a pytree without leaves. It uses
arithmetic alone, so that it takes numpy arrays, JAX arrays, and the index arrays inside a Pallas kernel.
"""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


@runtime_checkable
class Rule(Protocol):
  """An attention mask; None in its place means that attention goes both ways everywhere."""

  def __call__(self, q: Any, k: Any) -> Any:
    """Whether the query at index `q` sees the key at index `k`; the indices are broadcast against each other."""

  def positions(self, start: int | Int[Array, ""], length: int) -> Int[Array, "length"]:
    """The positions, for the rotary embedding, of the indices from `start` on."""


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class BlockCausal:
  """Attention goes both ways inside a block, and backwards across blocks (BD3-LM, arXiv 2503.09573).

  With blocks of 4, position 5 sees 0 to 7. With blocks of 1, attention is causal; with one block over the canvas, full.

  Attributes:
    block: tokens a block; blocks are counted from index 0.
  """

  block: int

  def __call__(self, q: Any, k: Any) -> Any:
    """See `Rule`."""
    return k // self.block <= q // self.block

  def positions(self, start: int | Int[Array, ""], length: int) -> Int[Array, "length"]:
    """See `Rule`."""
    return start + jnp.arange(length)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class TwoStreams:
  """A clean canvas, and behind it a noisy copy of its last part, in one pass (BD3-LM, arXiv 2503.09573, section 3.2).

  A noisy position sees the noisy positions of its own block and the clean ones of earlier blocks: what the sampler
  sees when it completes that block. A clean position sees the clean ones of its own block and of earlier ones, and no
  noisy one. With blocks of 2, a clean canvas `a b c d` and a noisy copy `C D` of its last one, C and D see a, b, C, D;
  c and d see a, b, c, d.

  Attributes:
    block: tokens a block.
    clean: positions of the clean canvas, a multiple of `block`.
    first: the position of the first noisy token, a multiple of `block`.
  """

  block: int
  clean: int
  first: int

  def __post_init__(self) -> None:
    if self.clean % self.block or self.first % self.block:
      raise ValueError(f"clean={self.clean} and first={self.first} must be multiples of the block {self.block}")

  def __call__(self, q: Any, k: Any) -> Any:
    """See `Rule`."""
    q_noisy, k_noisy = q >= self.clean, k >= self.clean
    q_block, k_block = self._block(q, q_noisy), self._block(k, k_noisy)
    earlier, same = k_block < q_block, k_block == q_block
    return (~k_noisy & (earlier | (same & ~q_noisy))) | (k_noisy & q_noisy & same)

  def _block(self, index: Any, noisy: Any) -> Any:
    return (index + noisy * (self.first - self.clean)) // self.block

  def positions(self, start: int | Int[Array, ""], length: int) -> Int[Array, "length"]:
    """See `Rule`."""
    index = start + jnp.arange(length)
    return index + jnp.where(index >= self.clean, self.first - self.clean, 0)
