"""FLOPs of the matrix products of a network, by formula: a multiplication and an addition count one each.

Norms, rotary turns, softmax and the look-up of embeddings are left out.
"""

from typing import NamedTuple

from d1jax.models.lora import LoraSpec
from d1jax.models.transformer import TransformerSize


class Products(NamedTuple):
  """FLOPs of one forward pass, by what is multiplied.

  Attributes:
    projections: with the weights of the blocks.
    attention: scores and mixing, two products of activations.
    head: logits.
    adapters: with both sides of each adapter that stays beside its weight.
  """

  projections: int
  attention: int
  head: int
  adapters: int = 0


def projections(size: TransformerSize) -> dict[str, tuple[int, int]]:
  """(rows, columns) of each weight of a block, by the names that Llama gave them."""
  inner, shared = size.heads * size.head_size, size.key_value_heads * size.head_size
  return {
    "q_proj": (size.embed, inner),
    "k_proj": (size.embed, shared),
    "v_proj": (size.embed, shared),
    "o_proj": (inner, size.embed),
    "gate_proj": (size.embed, size.mlp),
    "up_proj": (size.embed, size.mlp),
    "down_proj": (size.mlp, size.embed),
  }


def products(
  size: TransformerSize, rows: int, window: int, canvas: int, predicted: int, lora: LoraSpec | None = None
) -> Products:
  """FLOPs of one forward pass.

  With T = rows x window: projections 2 T layers (2 D N H + 2 D K H + 3 D F), attention 4 T layers canvas N H, head
  2 rows predicted D V, adapters 2 T layers rank (in + out) summed over their targets.

  Args:
    size: of the network.
    rows: B.
    window: positions that are encoded; the canvas, but for a cached pass.
    canvas: positions that they attend to, padding included.
    predicted: positions of a row whose logits are computed.
    lora: adapters that are applied unmerged.
  """
  weights, tokens = projections(size), rows * window
  each = 2 * tokens * size.layers
  narrow = sum(sum(weights[name]) for name in lora.targets) * lora.rank if lora else 0
  return Products(
    projections=each * sum(inner * outer for inner, outer in weights.values()),
    attention=2 * each * canvas * size.heads * size.head_size,
    head=2 * rows * predicted * size.embed * size.vocab,
    adapters=each * narrow,
  )


def forward(size: TransformerSize, rows: int, window: int, canvas: int, predicted: int) -> int:
  """FLOPs of one forward pass of the network without adapters; the arguments are those of `products`.

  A training step of every weight is three times that: the backward pass multiplies twice for each product. With
  rematerialised blocks the hardware computes close to four times.
  """
  return sum(products(size, rows, window, canvas, predicted))


def backward(passed: Products) -> int:
  """FLOPs of the backward pass behind a forward pass.

  Each product has a derivative by either side, of the same size as itself. Where adapters are trained, those by the
  weights of blocks and head are not wanted: these have one.
  """
  once = passed.projections + passed.head
  return 2 * (passed.attention + passed.adapters) + (once if passed.adapters else 2 * once)
