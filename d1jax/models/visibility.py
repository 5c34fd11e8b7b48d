"""Who sees whom: attention rules as functions of the indices of a query and of a key.

One description serves every kernel. Plain attention calls a rule on all pairs of a small canvas; a kernel calls it on
the pairs of one tile, so that no [L, L] array exists. A rule is static under jit, a pytree without leaves. It uses
arithmetic alone, so that it takes numpy arrays, JAX arrays, and the index arrays inside a Pallas kernel.
"""

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int


class Rule(abc.ABC):
  """An attention mask; None in its place means that attention goes both ways everywhere.

  A chip has no instruction that divides integers, and a kernel would divide for each pair. So a rule divides in `end`,
  which a kernel gets once a query, and only compares and adds in `sees`.
  """

  block: int

  def __call__(self, q: Any, k: Any) -> Any:
    """Whether the query at index `q` sees the key at index `k`; the indices are broadcast against each other."""
    return self.sees(self.end(q), k)

  def end(self, q: Any) -> Any:
    """The first index behind the block of the query at index `q`."""
    return (q // self.block + 1) * self.block

  @abc.abstractmethod
  def sees(self, end: Any, k: Any) -> Any:
    """Whether a query whose block ends before index `end` sees the key at index `k`."""

  def positions(self, start: int | Int[Array, ""], length: int) -> Int[Array, "length"]:
    """The positions, for the rotary embedding, of the indices from `start` on."""
    return start + jnp.arange(length)

  def pairs(self, start: int, queries: int, keys: int) -> int:
    """How many pairs of a query at `start`, `start + 1`, ... and a key at 0, 1, ... see each other."""
    ends, times = np.unique(self.end(start + np.arange(queries)), return_counts=True)
    seen = [np.count_nonzero(self.sees(end, np.arange(keys))) for end in ends]
    return int(np.dot(seen, times))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class BlockCausal(Rule):
  """Attention goes both ways inside a block, and backwards across blocks (BD3-LM, arXiv 2503.09573).

  With blocks of 4, position 5 sees 0 to 7. With blocks of 1, attention is causal; with one block over the canvas, full.

  Attributes:
    block: tokens a block; blocks are counted from index 0.
  """

  block: int

  def sees(self, end: Any, k: Any) -> Any:
    """See `Rule`."""
    return k < end


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class TwoStreams(Rule):
  """A clean canvas, and behind it noisy copies of its last part, in one pass (BD3-LM, arXiv 2503.09573, section 3.2).

  A noisy position sees the noisy positions of its own block and the clean ones of earlier blocks: what the sampler
  sees when it completes that block. A clean position sees the clean ones of its own block and of earlier ones, and no
  noisy one. With blocks of 2, a clean canvas `a b c d` and a noisy copy `C D` of its last one, C and D see a, b, C, D;
  c and d see a, b, c, d. Several copies stand one behind the other and do not see each other: each is its own state of
  the completion, and all of them share the clean canvas.

  Attributes:
    block: tokens a block.
    clean: positions of the clean canvas, a multiple of `block`.
    first: the position of the first noisy token, a multiple of `block`, at most `clean`.
    copies: of the positions from `first` on.
  """

  block: int
  clean: int
  first: int
  copies: int = 1

  def __post_init__(self) -> None:
    if self.clean % self.block or self.first % self.block:
      raise ValueError(f"clean={self.clean} and first={self.first} must be multiples of the block {self.block}")
    if self.first > self.clean:
      raise ValueError(
        f"first={self.first} must be at most clean={self.clean}: the noisy copy is one of the clean canvas"
      )

  def sees(self, end: Any, k: Any) -> Any:
    """See `Rule`; a noisy copy begins with a block, so that no block lies in two of them."""
    clean_query = end <= self.clean
    own_block = k >= end - self.block
    width = self.clean - self.first
    behind = end - self.block - width  # where the clean copy of a noisy query's block begins
    for copy in range(1, self.copies):
      behind -= width * (end > self.clean + copy * width)
    return (k < end) & (clean_query | own_block | (k < behind))

  def positions(self, start: int | Int[Array, ""], length: int) -> Int[Array, "length"]:
    """See `Rule`."""
    index, width = start + jnp.arange(length), self.clean - self.first
    return index - width * jnp.clip((index - self.first) // max(width, 1), 0, self.copies)
