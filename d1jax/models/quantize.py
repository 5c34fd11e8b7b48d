"""Stores a frozen base in 8 or 4 bits per weight; each layer dequantises its weights when it uses them.

Weights are divided into blocks of 64 along their input axis; each block of a column has one scale, its largest
magnitude.
`int8` stores rounded multiples of scale / 127. `nf4` stores the nearest of 16 quantiles of a normal distribution
(QLoRA, arXiv 2305.14314, appendix E), two per byte. Blocks never cross a layer, a column or a device, so that
quantising a matrix shard by shard gives the same as quantising it whole. Embedding, head and norms are not quantised,
as in d1.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from d1jax.models.layers import DropoutKeys, dense, project

BLOCK = 64
"""The number of weights that share a scale."""

KINDS = ("int8", "nf4")

NF4 = np.asarray(
  [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
  ],
  np.float32,
)
"""The sixteen values of NormalFloat4."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
  """A matrix, or a stack of matrices, in few bits.

  Attributes:
    codes: `int8`: int8 [... in/64 64 out]; `nf4`: uint8 [... in/64 32 out], row r of a block in the low four bits of
      byte r, row r + 32 in the high ones.
    scale: the largest magnitude of each block, bfloat16 [... in/64 1 out].
  """

  codes: Any
  scale: Any


def quantize(w: Float[Array, "*layers in out"], kind: str) -> Quantized:
  """Stores a matrix in few bits.

  Args:
    w: the matrix; its input axis is a multiple of 64.
    kind: `int8` or `nf4`.
  """
  if kind not in KINDS:
    raise ValueError(f"quantize={kind!r} is unknown; known: {', '.join(KINDS)}")
  if w.shape[-2] % BLOCK:
    raise ValueError(f"a matrix of shape {w.shape} cannot be quantised: its input axis is no multiple of {BLOCK}")
  blocks = w.astype(jnp.float32).reshape(*w.shape[:-2], -1, BLOCK, w.shape[-1])
  scale = jnp.max(jnp.abs(blocks), axis=-2, keepdims=True).astype(jnp.bfloat16)
  unit = blocks / jnp.where(scale > 0, scale, 1).astype(jnp.float32)
  if kind == "int8":
    return Quantized(jnp.clip(jnp.round(unit * 127), -127, 127).astype(jnp.int8), scale)
  midpoints = (NF4[1:] + NF4[:-1]) / 2
  codes = sum((unit > m).astype(jnp.uint8) for m in midpoints)
  low, high = jnp.split(codes, 2, axis=-2)
  return Quantized(low | (high << 4), scale)


def _nf4_values(codes: UInt8[Array, "*S"]) -> Float[Array, "*S"]:
  """The values of four-bit codes. A tree of selections is used, because a look-up table is a gather, slow on a TPU."""
  values = [jnp.float32(v) for v in NF4]
  for bit in range(4):
    is_set = (codes >> bit) & 1 == 1
    values = [jnp.where(is_set, high, low) for low, high in zip(values[::2], values[1::2], strict=True)]
  return values[0]


def dequantize(w: Quantized, dtype: DTypeLike = jnp.float32) -> Float[Array, "*layers in out"]:
  """The matrix of the codes, computed in float32."""
  if w.codes.dtype == jnp.int8:
    unit = w.codes.astype(jnp.float32) / 127
  else:
    unit = jnp.concatenate([_nf4_values(w.codes & 15), _nf4_values(w.codes >> 4)], axis=-2)
  blocks = (unit * w.scale.astype(jnp.float32)).astype(dtype)
  return blocks.reshape(*blocks.shape[:-3], -1, blocks.shape[-1])


@project.register
def _(w: Quantized, x: jax.Array, dtype: DTypeLike, dropout: DropoutKeys = None) -> jax.Array:
  del dropout
  return dense(x, dequantize(w, dtype))


def axes(named: tuple[str | None, ...]) -> Quantized:
  """The logical axes of the parts of a matrix that has the axes `named`."""
  parts = (*named[:-1], None, named[-1])
  return Quantized(parts, parts)
