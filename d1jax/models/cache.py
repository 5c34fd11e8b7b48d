"""The KV cache: keys and values of every layer and position, kept from one forward pass of a rollout to the next.

Two successive denoising steps differ in only a few tokens. So only a window of the canvas is computed again; it attends
to the keys and values that the other positions had when they were last computed (the dual cache of Fast-dLLM,
arXiv 2505.22618). The cache is carried through loops and written in place.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from d1jax.models.layers import Constrain

AXES = ("layers", "batch", None, "kv_heads", None)
"""The logical axes of keys and values. The canvas is never sharded, because a window may start anywhere."""

_EACH_ROW = jax.lax.ScatterDimensionNumbers(
  update_window_dims=(1, 2, 3),
  inserted_window_dims=(0,),
  scatter_dims_to_operand_dims=(0, 2),
  operand_batching_dims=(1,),
  scatter_indices_batching_dims=(0,),
)
"""Each row of the batch writes a window [W K H] at its own layer and position."""


class Cache(NamedTuple):
  """The keys and values to which a window attends. Shapes: B batch, L canvas, K key-value heads, H head size.

  Attributes:
    key: keys after the rotary embedding, in the compute dtype.
    value: values, in the compute dtype.
    valid: false at padding.
  """

  key: Float[Array, "layers B L K H"]
  value: Float[Array, "layers B L K H"]
  valid: Bool[Array, "B L"]


def empty(
  valid: Bool[Array, "B L"], layers: int, kv_heads: int, head_size: int, dtype: DTypeLike, constrain: Constrain
) -> Cache:
  """A cache of zeros; the first window must cover the canvas.

  `valid` is false at padding, `dtype` is the compute dtype, and `constrain` sets the placement of the cache.
  """
  zeros = jnp.zeros((layers, *valid.shape, kv_heads, head_size), dtype)
  return Cache(constrain(zeros, AXES), constrain(zeros, AXES), constrain(valid, ("batch", None)))


def renewed(
  cache: Cache,
  layer: Int[Array, ""],
  start: int | Int[Array, ""] | Int[Array, "B"],
  k: Float[Array, "B W K H"],
  v: Float[Array, "B W K H"],
  constrain: Constrain,
) -> tuple[Cache, Float[Array, "B L K H"], Float[Array, "B L K H"]]:
  """Writes the window of one layer into the cache, and reads that layer.

  Args:
    cache: the old cache, which must not be used afterwards.
    layer: the index of the layer.
    start: the position of the window's first row, at most L - W; an array [B] has one for each row of the batch.
    k: the keys of the window.
    v: the values of the window.
    constrain: sets the placement of the cache.

  Returns:
    The cache, and the layer's keys and values of the whole canvas.
  """

  def write(stack: jax.Array, new: jax.Array) -> jax.Array:
    if isinstance(start, int) or not start.ndim:
      return constrain(jax.lax.dynamic_update_slice(stack, new[None], (layer, 0, start, 0, 0)), AXES)
    # `vmap` of an update would move the axis of the batch to the front and back: two copies of the whole stack.
    places = jnp.stack([jnp.broadcast_to(layer, start.shape), start], axis=1)
    return constrain(jax.lax.scatter(stack, places, new, _EACH_ROW, unique_indices=True, mode="clip"), AXES)

  cache = cache._replace(key=write(cache.key, k), value=write(cache.value, v))
  if k.shape[1] == cache.valid.shape[1]:  # a refresh: the window is the whole canvas, so nothing else must be read
    return cache, k, v
  read = lambda stack: jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False)
  return cache, read(cache.key), read(cache.value)
