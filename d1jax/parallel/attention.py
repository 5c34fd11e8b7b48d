"""The attention kernel of a mesh's platform, run by each device on its rows and heads.

On TPUs: splash attention (`jax.experimental.pallas.ops.tpu.splash_attention`). On NVIDIA GPUs since Ampere: cuDNN's.
Neither keeps the logits [B N T S] (Dao 2023, arXiv 2307.08691). On other platforms, and if a kernel cannot be used, as
where there is a rule of who sees whom, attention is plain.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import Mesh
from jaxtyping import Array, Float

from d1jax.models.layers import Attention, Visible, plain_attention
from d1jax.parallel import mesh as meshes

LANES = 128
"""Positions come to a TPU's kernel in multiples of this."""

BLOCK = 512
"""Positions that a TPU's kernel holds at a time, at most."""

KERNEL = "d1jax.kernel_flops_"
"""The scope of a kernel, whose products no trace shows: this, and the FLOPs of its forward pass."""


def attention(mesh: Mesh, rules: meshes.Rules) -> Attention:
  """The attention that a model on this mesh takes; see `d1jax.models.layers.Attention`.

  Plain attention also serves where the mesh does not divide the batch, the key-value heads or the queries: XLA may cut
  these unevenly, a kernel's call may not.

  Args:
    mesh: the devices.
    rules: placement of `batch`, `length` and `heads`.
  """
  kernel = of_device(mesh.devices.flat[0])
  alone = kernel is plain_attention and meshes.ways(mesh, rules, "length") == 1  # XLA knows as well what to cut
  return kernel if alone else per_device(kernel, mesh, rules)


def of_device(device: Any) -> Attention:
  """The attention of one device."""
  if device.platform == "tpu":
    return splash_attention
  capability = str(getattr(device, "compute_capability", ""))  # "9.0"; AMD's are "gfx90a" and have no cuDNN
  return cudnn_attention if capability[:1].isdigit() and float(capability) >= 8 else plain_attention


def per_device(kernel: Attention, mesh: Mesh, rules: meshes.Rules) -> Attention:
  """An attention that each device computes for its own rows, heads and queries; keys and values come to it whole."""
  queries, keys, row = ("batch", "length", "heads", None), ("batch", None, "heads", None), ("batch", None)
  cut = meshes.ways(mesh, rules, "length") > 1

  def attend(q: jax.Array, k: jax.Array, v: jax.Array, visible: Visible) -> jax.Array:
    sizes = (("batch", k.shape[0]), ("heads", k.shape[2]), ("length", q.shape[1]))
    if any(size % meshes.ways(mesh, rules, axis) for axis, size in sizes):
      return plain_attention(q, k, v, visible)
    arrays = [x for x in (visible.valid, visible.segment) if x is not None]
    ruled = visible.rule is not None or visible.segment is not None
    # A kernel wants to know the first query when it is compiled; a traced one goes to the devices as an argument.
    moves = ruled and (cut or not isinstance(visible.start, int))

    def part(q: jax.Array, k: jax.Array, v: jax.Array, *given: jax.Array) -> jax.Array:
      start: Any = visible.start if ruled else 0
      if moves:
        start, given = given[0], given[1:]
        start = start + meshes.part_index(rules, "length") * q.shape[1] if cut else start
      return kernel(q, k, v, Visible(given[0], visible.rule, start, *given[1:]))

    if moves:
      arrays = [jnp.asarray(visible.start), *arrays]
    axes = [row if x.ndim else () for x in arrays]
    return meshes.per_device(part, mesh, rules, (queries, keys, keys, *axes), queries)(q, k, v, *arrays)

  return attend


def splash_attention(
  q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"], visible: Visible
) -> Float[Array, "B T N H"]:
  """Splash attention, softmax in float32; padding keys are a segment that no query belongs to.

  Plain attention serves rules, head sizes that are no multiple of 8 or beyond 128, and fewer than 128 queries: the
  kernel's backward pass takes 128 at a time, and in a short window of a cache the kernel's transpose of all keys and
  values [B S K H -> B K S H] moves more bytes than the logits that it saves.
  """
  if not _served_by_splash(q) or visible.rule is not None or visible.segment is not None:
    return plain_attention(q, k, v, visible)
  (block_q, rows), (block_kv, columns) = _blocks(q.shape[1]), _blocks(k.shape[1])
  kernel = splash.make_splash_mha(
    splash.MultiHeadMask([splash.FullMask((rows, columns))] * q.shape[2]),
    head_shards=1,
    q_seq_shards=1,
    block_sizes=splash.BlockSizes(
      block_q=block_q,
      block_kv=block_kv,
      block_q_dkv=block_q,
      block_kv_dkv=block_kv,
      block_q_dq=block_q,
      block_kv_dq=block_kv,
    ),
  )
  scaled = (q.astype(jnp.float32) * q.shape[3] ** -0.5).astype(q.dtype)
  heads_first = [_pad(x, n).swapaxes(1, 2) for x, n in ((scaled, rows), (k, columns), (v, columns))]
  segments = splash.SegmentIds(jnp.ones((q.shape[0], rows), jnp.int32), _pad(visible.valid, columns).astype(jnp.int32))
  attend = jax.named_scope(_scope(q, k))(jax.vmap(kernel))
  return attend(*heads_first, segments).swapaxes(1, 2)[:, : q.shape[1]]


def cudnn_attention(
  q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"], visible: Visible
) -> Float[Array, "B T N H"]:
  """The fused attention of cuDNN, softmax in float32.

  A window of a cache passes its mask and is not differentiated. Where all positions are queries, valid keys are moved
  to the front and their number is passed: a mask is a bias [B 1 T S] to cuDNN, whose own gradient is costly.

  Plain attention serves rules, float32, odd lengths, and head sizes that are no multiple of 8 or beyond 128.
  """
  if not _served_by_cudnn(k) or visible.rule is not None or visible.segment is not None:
    return plain_attention(q, k, v, visible)
  valid = visible.valid
  attend = jax.named_scope(_scope(q, k))(functools.partial(jax.nn.dot_product_attention, implementation="cudnn"))
  if q.shape[1] < k.shape[1]:
    return attend(q, k, v, mask=jnp.broadcast_to(valid[:, None, None], (len(q), 1, q.shape[1], k.shape[1])))
  order = jnp.argsort(~valid, axis=1, stable=True)
  front = jax.vmap(lambda x, order: x.at[order].get(unique_indices=True, mode="promise_in_bounds"))
  # After the last valid key, the kernel may leave any values in the gradients; `where` drops them.
  moved = [front(jnp.where(valid[:, :, None, None], x, 0), order) for x in (k, v)]
  count = jnp.maximum(1, valid.sum(axis=1, dtype=jnp.int32))  # a row without valid keys stays finite
  return attend(q, *moved, key_value_seq_lengths=count)


def _scope(q: jax.Array, k: jax.Array) -> str:
  """Of the kernel's two products, without what it pads."""
  return f"{KERNEL}{4 * q.size * k.shape[1]}"


def _served_by_splash(q: jax.Array) -> bool:
  return q.shape[1] >= LANES and q.shape[3] % 8 == 0 and q.shape[3] <= 128


def _served_by_cudnn(k: jax.Array) -> bool:
  return k.dtype.itemsize == 2 and k.shape[1] % 2 == 0 and k.shape[3] % 8 == 0 and k.shape[3] <= 128


def _blocks(length: int) -> tuple[int, int]:
  """Positions of a block, and of all blocks: the fewest blocks of at most `BLOCK`, each a multiple of `LANES`."""
  count = -(-length // BLOCK)
  block = -(-length // (count * LANES)) * LANES
  return block, count * block


def _pad(x: jax.Array, length: int) -> jax.Array:
  return jnp.pad(x, ((0, 0), (0, length - x.shape[1])) + ((0, 0),) * (x.ndim - 2))
