"""The pieces of a LLaDA block: RMSNorm, rotary embedding, attention, gated MLP.

Shapes: B batch, L length, T queries, S keys, D embed, N heads, K key-value heads, H head size, F MLP width. Weights are
stored [in, out], each with its logical axes; they are cast to the compute dtype where they are used. Instead of an
array, the weight of a product may be quantised (`d1jax.models.quantize`) or have a low-rank addition
(`d1jax.models.lora`); only `project` distinguishes these forms.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key

from d1jax.models.visibility import Rule

Constrain = Callable[[jax.Array, tuple[str | None, ...]], jax.Array]
"""Sets the placement of an activation with these logical axes; without a mesh, it is the identity."""


class Visible(NamedTuple):
  """The attention mask: a query sees a key if the key is valid, the rule allows it, and both are of one segment.

  A query that sees no key gets a finite result without meaning.

  Attributes:
    valid: false at padding.
    rule: see `d1jax.models.visibility`; None: attention goes both ways.
    start: the index of the first query among the keys: 0, or where the window of a cache begins; an array [B] has one
      for each row.
    segment: the document of each key of a packed row, of which queries are `segment[start : start + T]`; None: each row
      is one document.
  """

  valid: Bool[Array, "B S"]
  rule: Rule | None = None
  start: int | Int[Array, ""] | Int[Array, "B"] = 0
  segment: Int[Array, "B S"] | None = None

  @property
  def by_row(self) -> bool:
    """Whether each row has a start of its own."""
    return not isinstance(self.start, int) and self.start.ndim > 0

  def seen(self, queries: int) -> Bool[Array, "#B 1 #T S"]:
    """The mask as an array, for `queries` queries."""
    seen = self.valid[:, None, None, :]
    if self.rule is not None:
      start = jnp.reshape(self.start, (-1, 1, 1, 1)) if self.by_row else self.start
      seen = seen & self.rule(start + jnp.arange(queries)[:, None], jnp.arange(self.valid.shape[1])[None, :])
    if self.segment is not None:
      own = jax.lax.dynamic_slice_in_dim(self.segment, self.start, queries, axis=1)
      seen = seen & (own[:, None, :, None] == self.segment[:, None, None, :])
    return seen


Attention = Callable[[jax.Array, jax.Array, jax.Array, Visible], jax.Array]
"""`(q[B T N H], k[B S K H], v[B S K H], visible) -> [B T N H]`: every query attends to the keys it sees; T <= S."""

Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]
"""`(q[B L N H], k[B L K H], v[B L K H]) -> (mixed[B L N H], kept)`: the attention of a layer on the queries, keys and
values of its input. `kept` is the updated KV cache, or None."""

DropoutKeys = Key[Array, "B L"] | None
"""One key per token; or None without dropout, as wherever log-probabilities are compared."""

Project = Callable[..., jax.Array]
"""`project`, or `project_by_row`."""


def no_constraint(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
  """The constraint of a model without a mesh: returns `x`."""
  del axes
  return x


def plain_attention(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K H"],
  visible: Visible,
) -> Float[Array, "B T N H"]:
  """Attention with an explicit mask and a softmax in float32; N / K query heads share a key-value head."""
  return jax.nn.dot_product_attention(q, k, v, mask=visible.seen(q.shape[1]))


def weight(key: jax.Array, init: Any, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
  """A float32 weight with its logical axes, but without a placement."""
  return nnx.Param(init(key, shape, jnp.float32), out_sharding=axes, eager_sharding=False)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def look_up(
  table: Float[Array, "V D"], tokens: Int[Array, "B L"], dtype: DTypeLike, constrain: Constrain
) -> Float[Array, "B L D"]:
  """The rows of a table, cast to `dtype`; the gradient of a row is summed in the table's own type.

  Half of all positions may hold one id, the mask. Its gradient is then a sum of thousands of rows, and a sum in
  bfloat16 stops growing once it is 256 times as large as each addend: in bfloat16, the sum of 4,096 ones is 256.

  Args:
    table: the embedding as it is stored.
    tokens: the indices of the rows.
    dtype: the dtype of the result.
    constrain: sets the placement of the table and its gradient.
  """
  # The table is gathered over its embed axis first; otherwise XLA would replicate the result of the look-up.
  return constrain(table.astype(dtype), ("vocab", None))[tokens]


def _look_up(
  table: jax.Array, tokens: jax.Array, dtype: DTypeLike, constrain: Constrain
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return look_up(table, tokens, dtype, constrain), (table, tokens)


def _look_up_back(
  dtype: DTypeLike, constrain: Constrain, kept: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, None]:
  """Sums the gradients of each row.

  Before the sum, devices exchange gradients in the dtype of the activations: each device ends up with all positions,
  but only the columns of its part of the table. If eight devices share the batch and the columns, each one receives 7/8
  of [B / 8, L, D] numbers. To sum whole tables across devices instead, each would receive twice [V, D] numbers. For
  LLaDA-8B at d1's lengths that is 40 MB instead of 2 GB.
  """
  del dtype
  table, tokens = kept
  rows = constrain(gradient, ("batch", "length", "embed")).astype(table.dtype)
  zeros = constrain(jnp.zeros_like(table), ("vocab", "embed"))
  return constrain(zeros.at[tokens].add(rows), ("vocab", "embed")), None


look_up.defvjp(_look_up, _look_up_back)


@functools.singledispatch
def project(w: Any, x: jax.Array, dtype: DTypeLike, dropout: DropoutKeys = None) -> jax.Array:
  """`x[B L in] @ w[in out]` in `dtype`; each form of a weight registers its own version, and this one is for arrays.

  Args:
    w: the weight.
    x: activations.
    dtype: the dtype of the product.
    dropout: keys for dropout in training, if the form of the weight has it; arrays have none.
  """
  del dropout
  return dense(x, w.astype(dtype))


def project_by_row(w: Any, x: jax.Array, dtype: DTypeLike, dropout: DropoutKeys = None) -> jax.Array:
  """Like `project`, for activations that are sharded by position: folding batch and positions into one axis, as
  `project` does, would gather them.
  """
  if dropout is None:
    return jax.vmap(lambda x: project(w, x[None], dtype)[0])(x)
  return jax.vmap(lambda x, keys: project(w, x[None], dtype, keys[None])[0])(x, dropout)


def dense(x: Float[Array, "*B in"], w: Float[Array, "in out"]) -> Float[Array, "*B out"]:
  """`x @ w` as one product of two matrices.

  With two or more leading axes, XLA for CPUs transposes the cotangents to compute the gradient of `w`. With one axis it
  does not, and the backward pass of a network is a quarter faster.
  """
  return (x.reshape(-1, x.shape[-1]) @ w).reshape(*x.shape[:-1], -1)


def fold_tokens(keys: DropoutKeys, counter: Any) -> DropoutKeys:
  """Folds a counter into the key of each token; None stays None."""
  return None if keys is None else jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, counter)))(keys)


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """Llama 3's scaling of the rotary frequencies (transformers' `rope_type: llama3`).

  Attributes:
    factor: the factor by which the longest wavelengths are stretched.
    low_freq_factor: wavelengths above `original_length / low_freq_factor` positions are stretched by the whole factor.
    high_freq_factor: wavelengths below `original_length / high_freq_factor` are unchanged; between, it is linear.
    original_length: the context length before scaling.
  """

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_length: int


def rotary_frequencies(half: int, theta: float, scaling: RopeScaling | None = None) -> Float[Array, "half"]:
  """Radians per position for each pair of coordinates: `theta^(-i / half)`, with `scaling`."""
  frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  if scaling is None:
    return frequency
  turns = scaling.original_length * frequency / (2 * math.pi)
  kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
  kept = jnp.clip(kept, 0.0, 1.0)
  return kept * frequency + (1 - kept) * frequency / scaling.factor


def rotary(
  x: Float[Array, "B L N H"], frequency: Float[Array, "half"], positions: Int[Array, "*B L"]
) -> Float[Array, "B L N H"]:
  """Rotary position embedding, half-split form, in float32 (Su et al. 2021; Llama's convention).

  Coordinate i of the first half is rotated with coordinate i of the second by the angle `position * frequency[i]`.

  Args:
    x: queries or keys.
    frequency: radians per position.
    positions: of the tokens, [L], or [B L] where each row has its own.
  """
  places = positions.astype(jnp.float32)
  places = places[None, :, None, None] if places.ndim == 1 else places[:, :, None, None]
  angle = places * frequency[None, None, None]
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
  """SwiGLU: `down(silu(gate(x)) * up(x))`, without biases."""

  def __init__(self, embed: int, mlp: int, *, dtype: DTypeLike, project: Project = project, rngs: nnx.Rngs):
    init = nnx.initializers.lecun_normal()
    self.dtype, self.project = dtype, project
    self.gate = weight(rngs.params(), init, (embed, mlp), ("embed", "mlp"))
    self.up = weight(rngs.params(), init, (embed, mlp), ("embed", "mlp"))
    self.down = weight(rngs.params(), init, (mlp, embed), ("mlp", "embed"))

  def __call__(self, x: Float[Array, "B L D"], dropout: DropoutKeys = None) -> Float[Array, "B L D"]:
    """Applies the layer at every position."""

    def apply(index: int, w: nnx.Param, x: jax.Array) -> jax.Array:
      return self.project(w.get_value(), x, self.dtype, fold_tokens(dropout, index))

    return apply(2, self.down, jax.nn.silu(apply(0, self.gate, x)) * apply(1, self.up, x))


class SelfAttention(nnx.Module):
  """Multi-head attention with rotary positions; N / K query heads share a key-value head."""

  def __init__(self, size: "TransformerSize", *, dtype: DTypeLike, project: Project = project, rngs: nnx.Rngs):
    init = nnx.initializers.lecun_normal()
    self.head_dim, self.theta, self.scaling = size.head_size, size.rope_theta, size.rope_scaling
    self.dtype, self.project, self.bias = dtype, project, size.qkv_bias
    embed, inner, shared = size.embed, size.heads * size.head_size, size.key_value_heads * size.head_size
    self.query = weight(rngs.params(), init, (embed, inner), ("embed", "heads"))
    self.key = weight(rngs.params(), init, (embed, shared), ("embed", "kv_heads"))
    self.value = weight(rngs.params(), init, (embed, shared), ("embed", "kv_heads"))
    self.out = weight(rngs.params(), init, (inner, embed), ("heads", "embed"))
    if self.bias:
      zeros = nnx.initializers.zeros
      self.query_bias = weight(rngs.params(), zeros, (inner,), ("heads",))
      self.key_bias = weight(rngs.params(), zeros, (shared,), ("kv_heads",))
      self.value_bias = weight(rngs.params(), zeros, (shared,), ("kv_heads",))

  def before_rotary(self, name: str, heads: Float[Array, "B L N H"]) -> Float[Array, "B L N H"]:
    """The heads of `query` or `key` before the rotary embedding; a family's own layer may change them."""
    del name
    return heads

  def __call__(
    self, x: Float[Array, "B L D"], positions: Int[Array, "*B L"], attend: Attend, dropout: DropoutKeys = None
  ) -> tuple[Float[Array, "B L D"], Any]:
    """Applies attention over positions.

    Args:
      x: the input.
      positions: of its tokens, see `rotary`.
      attend: the attention, see `Attend`.
      dropout: keys for the projections' dropout.

    Returns:
      The output, and the `kept` of `attend`.
    """

    def heads(index: int, name: str) -> jax.Array:
      y = self.project(getattr(self, name).get_value(), x, self.dtype, fold_tokens(dropout, index))
      if self.bias:
        y = y + getattr(self, f"{name}_bias")[...].astype(self.dtype)
      return y.reshape(*x.shape[:2], -1, self.head_dim)

    frequency = rotary_frequencies(self.head_dim // 2, self.theta, self.scaling)
    q, k = (
      rotary(self.before_rotary(name, heads(index, name)), frequency, positions)
      for index, name in enumerate(("query", "key"))
    )
    mixed, kept = attend(q, k, heads(2, "value"))
    out = self.project(self.out.get_value(), mixed.reshape(*x.shape[:2], -1), self.dtype, fold_tokens(dropout, 3))
    return out, kept


@dataclasses.dataclass(frozen=True)
class TransformerSize:
  """The sizes of a network and the kind of its layers; `d1jax.models.families.PRESETS` has some by name.

  Attributes:
    vocab: the rows of the embedding.
    embed: D.
    heads: N.
    mlp: F.
    layers: the number of blocks.
    rope_theta: the base of the rotary wavelengths.
    norm_eps: the epsilon of the norms.
    kv_heads: K, a divisor of N; None means N.
    head_dim: H; None means D / N.
    qkv_bias: whether q, k and v have biases (Qwen2).
    tied: whether the head is the transposed embedding.
    rope_scaling: Llama 3's scaling of the rotary frequencies; None: no scaling.
    attention_layer: `SelfAttention`, or a family's own subclass.
  """

  vocab: int
  embed: int
  heads: int
  mlp: int
  layers: int
  rope_theta: float = 5e5
  norm_eps: float = 1e-5
  kv_heads: int | None = None
  head_dim: int | None = None
  qkv_bias: bool = False
  tied: bool = False
  rope_scaling: RopeScaling | None = None
  attention_layer: type[SelfAttention] = SelfAttention

  def __post_init__(self) -> None:
    if self.head_dim is None and self.embed % (2 * self.heads):
      raise ValueError(
        f"embed={self.embed} is not a multiple of 2 * heads={2 * self.heads}: rotary halves need an even head size"
      )
    if self.head_size % 2:
      raise ValueError(f"head_dim={self.head_dim} is odd: rotary halves need an even head size")
    if self.heads % self.key_value_heads:
      raise ValueError(f"kv_heads={self.kv_heads} does not divide heads={self.heads}")

  @property
  def key_value_heads(self) -> int:
    """K."""
    return self.heads if self.kv_heads is None else self.kv_heads

  @property
  def head_size(self) -> int:
    """H."""
    return self.embed // self.heads if self.head_dim is None else self.head_dim


class Block(nnx.Module):
  """One pre-norm block: attention, then the gated MLP, each added to the residual stream."""

  def __init__(self, size: TransformerSize, *, dtype: DTypeLike, project: Project = project, rngs: nnx.Rngs):
    self.attention_norm = RMSNorm(size.embed, eps=size.norm_eps, rngs=rngs)
    self.attention = size.attention_layer(size, dtype=dtype, project=project, rngs=rngs)
    self.mlp_norm = RMSNorm(size.embed, eps=size.norm_eps, rngs=rngs)
    self.mlp = GatedMlp(size.embed, size.mlp, dtype=dtype, project=project, rngs=rngs)

  def __call__(
    self, x: Float[Array, "B L D"], positions: Int[Array, "*B L"], attend: Attend, dropout: DropoutKeys = None
  ) -> tuple[Float[Array, "B L D"], Any]:
    """Maps the residual stream to the residual stream; arguments and results are those of `SelfAttention`."""
    mixed, kept = self.attention(self.attention_norm(x), positions, attend, fold_tokens(dropout, 0))
    x = x + mixed
    return x + self.mlp(self.mlp_norm(x), fold_tokens(dropout, 1)), kept
