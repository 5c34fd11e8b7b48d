"""The pieces of a LLaDA block: RMSNorm, rotary embedding, attention, gated MLP.

Shapes: B batch, L length, D embed, N heads, H head size, F MLP width. Weights are stored [in, out] in float32, each
with its logical axes beside it; they are cast to the compute dtype where they are used.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

Constrain = Callable[[jax.Array, tuple[str | None, ...]], jax.Array]
"""States where an activation with these logical axes lives; the identity without a mesh."""

Attention = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
"""`(q[B L N H], k[B L N H], v[B L N H], valid[B L]) -> [B L N H]`, attending both ways to valid keys."""


def no_constraint(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
  """The constraint of a model without a mesh: none."""
  del axes
  return x


def plain_attention(
  q: Float[Array, "B L N H"],
  k: Float[Array, "B L N H"],
  v: Float[Array, "B L N H"],
  valid: Bool[Array, "B L"],
) -> Float[Array, "B L N H"]:
  """Full bidirectional attention, softmax in float32, padding keys masked."""
  return jax.nn.dot_product_attention(q, k, v, mask=valid[:, None, None, :])


def weight(key: jax.Array, init: Any, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
  """A float32 weight that carries its logical axes and no placement."""
  return nnx.Param(init(key, shape, jnp.float32), out_sharding=axes, eager_sharding=False)


def rotary(x: Float[Array, "B L N H"], theta: float) -> Float[Array, "B L N H"]:
  """Rotary position embedding, half-split form, in float32 (Su et al. 2021; Llama's convention).

  Coordinate i of the first half is rotated with coordinate i of the second by the angle `position * theta^(-2i/H)`.
  """
  half = x.shape[-1] // 2
  frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle = jnp.arange(x.shape[1], dtype=jnp.float32)[None, :, None, None] * frequency[None, None, None]
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class RMSNorm(nnx.Module):
  """Root-mean-square normalisation in float32, scaled after the cast back (Zhang and Sennrich 2019)."""

  def __init__(self, embed: int, *, eps: float, rngs: nnx.Rngs):
    self.eps = eps
    self.scale = weight(rngs.params(), nnx.initializers.ones, (embed,), ("norm",))

  def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """Normalises the last axis."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
    return y.astype(x.dtype) * self.scale[...].astype(x.dtype)


class GatedMlp(nnx.Module):
  """SwiGLU: `down(silu(gate(x)) * up(x))`, no biases."""

  def __init__(self, embed: int, mlp: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
    init = nnx.initializers.lecun_normal()
    self.dtype = dtype
    self.gate = weight(rngs.params(), init, (embed, mlp), ("embed", "mlp"))
    self.up = weight(rngs.params(), init, (embed, mlp), ("embed", "mlp"))
    self.down = weight(rngs.params(), init, (mlp, embed), ("mlp", "embed"))

  def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
    """Applies the layer at every position."""
    gate, up, down = (w[...].astype(self.dtype) for w in (self.gate, self.up, self.down))
    return (jax.nn.silu(x @ gate) * (x @ up)) @ down


class SelfAttention(nnx.Module):
  """Multi-head attention in both directions with rotary positions, no biases."""

  def __init__(self, embed: int, heads: int, *, theta: float, dtype: DTypeLike, rngs: nnx.Rngs):
    init = nnx.initializers.lecun_normal()
    self.heads, self.theta, self.dtype = heads, theta, dtype
    self.query = weight(rngs.params(), init, (embed, embed), ("embed", "heads"))
    self.key = weight(rngs.params(), init, (embed, embed), ("embed", "heads"))
    self.value = weight(rngs.params(), init, (embed, embed), ("embed", "heads"))
    self.out = weight(rngs.params(), init, (embed, embed), ("heads", "embed"))

  def __call__(
    self, x: Float[Array, "B L D"], valid: Bool[Array, "B L"], attention: Attention
  ) -> Float[Array, "B L D"]:
    """Attends to the valid positions."""

    def project(w: nnx.Param) -> Float[Array, "B L N H"]:
      return (x @ w[...].astype(self.dtype)).reshape(*x.shape[:2], self.heads, -1)

    q, k = rotary(project(self.query), self.theta), rotary(project(self.key), self.theta)
    mixed = attention(q, k, project(self.value), valid)
    return mixed.reshape(x.shape) @ self.out[...].astype(self.dtype)


class Block(nnx.Module):
  """One pre-norm block: attention, then the gated MLP, each added to the residual stream."""

  def __init__(
    self,
    embed: int,
    heads: int,
    mlp: int,
    *,
    theta: float,
    eps: float,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
  ):
    self.attention_norm = RMSNorm(embed, eps=eps, rngs=rngs)
    self.attention = SelfAttention(embed, heads, theta=theta, dtype=dtype, rngs=rngs)
    self.mlp_norm = RMSNorm(embed, eps=eps, rngs=rngs)
    self.mlp = GatedMlp(embed, mlp, dtype=dtype, rngs=rngs)

  def __call__(
    self, x: Float[Array, "B L D"], valid: Bool[Array, "B L"], attention: Attention
  ) -> Float[Array, "B L D"]:
    """Maps the residual stream to the residual stream."""
    x = x + self.attention(self.attention_norm(x), valid, attention)
    return x + self.mlp(self.mlp_norm(x))
