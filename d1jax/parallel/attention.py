"""The attention kernel of a mesh's platform, run by each device on its rows and heads.

On TPUs: splash attention (`jax.experimental.pallas.ops.tpu.splash_attention`), also under a rule of who sees whom. On
NVIDIA GPUs since Ampere: cuDNN's, and `in_chunks` under a rule. None keeps the logits [B N T S] (Dao 2023, arXiv
2307.08691), or the rule as an array [T S]. On other platforms, and if a kernel cannot be used, attention is plain.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import Mesh
from jaxtyping import Array, Float

from d1jax.models.layers import Attention, Visible, plain_attention
from d1jax.models.visibility import Rule
from d1jax.parallel import mesh as meshes

LANES = 128
"""Positions come to a TPU's kernel in multiples of this."""

BLOCK = 512
"""Positions that a TPU's kernel holds at a time, at most."""

CHUNK = 256
"""Queries whose logits `in_chunks` holds at a time, at most."""

KERNEL = "d1jax.kernel_flops_"
"""The scope of a kernel, whose products no trace shows: this, and the FLOPs of its forward pass. Of two such scopes,
one around the other, the one with fewer FLOPs is right."""


def attention(mesh: Mesh, rules: meshes.Rules) -> Attention:
  """The attention that a model on this mesh takes; see `d1jax.models.layers.Attention`.

  Plain attention also serves where the mesh does not divide the batch, the key-value heads or the queries: XLA may cut
  these unevenly, a kernel's call may not.
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
  parts = meshes.ways(mesh, rules, "length")

  def attend(q: jax.Array, k: jax.Array, v: jax.Array, visible: Visible) -> jax.Array:
    sizes = (("batch", k.shape[0]), ("heads", k.shape[2]), ("length", q.shape[1]))
    if any(size % meshes.ways(mesh, rules, axis) for axis, size in sizes):
      return in_chunks(q, k, v, visible)
    arrays = [x for x in (visible.valid, visible.segment) if x is not None]
    # A kernel wants to know the first query when it is compiled; a traced one goes to the devices as an argument.
    moves = _ruled(visible) and (parts > 1 or not isinstance(visible.start, int))

    def part(q: jax.Array, k: jax.Array, v: jax.Array, *given: jax.Array) -> jax.Array:
      start: Any = visible.start if _ruled(visible) else 0
      if moves:
        start, given = given[0], given[1:]
        start = start + meshes.part_index(rules, "length") * q.shape[1] if parts > 1 else start
      with jax.named_scope(_scope(q, k, visible, parts)):
        return kernel(q, k, v, Visible(given[0], visible.rule, start, *given[1:]))

    if moves:
      arrays = [jnp.asarray(visible.start), *arrays]
    axes = [row[: x.ndim] for x in arrays]
    return meshes.per_device(part, mesh, rules, (queries, keys, keys, *axes), queries)(q, k, v, *arrays)

  return attend


def splash_attention(
  q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"], visible: Visible
) -> Float[Array, "B T N H"]:
  """Splash attention, softmax in float32; padding keys are a segment that no query belongs to.

  The kernel applies a rule to the indices of a tile, and leaves out tiles in which no query sees a key. If the first
  query is traced, as where devices share the positions, it computes all tiles: under the rules that we have, the device
  with the last queries needs nearly all of them, and the others would only wait for it.

  `in_chunks` serves a start for each row, head sizes that are no multiple of 8 or beyond 128, and fewer than 128
  queries: the kernel's
  backward pass takes 128 at a time, and in a short window of a cache the kernel's transpose of all keys and values
  [B S K H -> B K S H] moves more bytes than the logits that it saves.
  """
  if visible.by_row or not _served_by_splash(q):
    return in_chunks(q, k, v, visible)
  (block_q, rows), (block_kv, columns) = _blocks(q.shape[1]), _blocks(k.shape[1])
  kernel = splash.make_splash_mha(
    splash.MultiHeadMask([_mask(visible, q.shape[1], (rows, columns))] * q.shape[2]),
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
  if visible.rule is not None and not isinstance(visible.start, int):
    ends = _ends(visible.rule, visible.start, q.shape[1], rows)
    infos = (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info)
    kernel = type(kernel)(*(info._replace(q_sequence=ends) for info in infos), **kernel.kwargs)
  scaled = (q.astype(jnp.float32) * q.shape[3] ** -0.5).astype(q.dtype)
  heads_first = [_pad(x, n).swapaxes(1, 2) for x, n in ((scaled, rows), (k, columns), (v, columns))]
  attend = jax.named_scope(_scope(q, k, visible))(jax.vmap(kernel))
  return attend(*heads_first, _segments(visible, q.shape[1], rows, columns)).swapaxes(1, 2)[:, : q.shape[1]]


@dataclasses.dataclass(frozen=True)
class _RuleMask(splash.Mask):
  """A rule for splash attention, which reads `q_sequence` and `mask_function` of a mask that its kernel computes.

  A number of `q_sequence` is the end of a query's block instead of the index of the query: see `Rule`.

  Attributes:
    rule: who sees whom.
    start: the index of the first query; None: the kernel gets `q_sequence` later.
    queries: how many there are; the rows behind them are padding.
    size: rows and columns, with padding.
  """

  rule: Rule
  start: int | None
  queries: int
  size: tuple[int, int]

  @property
  def shape(self) -> tuple[int, ...]:
    return self.size

  @property
  def q_sequence(self) -> np.ndarray:
    return np.asarray(_ends(self.rule, self.start or 0, self.queries, self.size[0]))

  @property
  def mask_function(self) -> Any:
    return self.rule.sees

  def __getitem__(self, tile: Any) -> np.ndarray:
    rows, columns = (np.arange(size, dtype=np.int32)[part] for size, part in zip(self.size, tile, strict=True))
    if self.start is None:
      return np.ones((len(rows), len(columns)), bool)
    return np.asarray(self.rule.sees(self.q_sequence[rows, None], columns[None]))


def _mask(visible: Visible, queries: int, size: tuple[int, int]) -> splash.Mask:
  if visible.rule is None:
    return splash.FullMask(size)
  return _RuleMask(visible.rule, visible.start if isinstance(visible.start, int) else None, queries, size)


def _ends(rule: Rule, start: Any, queries: int, rows: int) -> Any:
  """Where the block of each query ends; rows of padding repeat the last query, so that they see what it sees."""
  return rule.end(start + np.minimum(np.arange(rows, dtype=np.int32), queries - 1))


def _segments(visible: Visible, queries: int, rows: int, columns: int) -> splash.SegmentIds:
  valid, segment = visible.valid, visible.segment
  if segment is None:
    return splash.SegmentIds(jnp.ones((len(valid), rows), jnp.int32), _pad(valid, columns).astype(jnp.int32))
  own = jax.lax.dynamic_slice_in_dim(segment, visible.start, queries, axis=1)
  # Documents count from 0 or 1, so that -1 is the segment of no query.
  return splash.SegmentIds(_pad(own, rows), _pad(jnp.where(valid, segment, -1) + 1, columns) - 1)


def cudnn_attention(
  q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"], visible: Visible
) -> Float[Array, "B T N H"]:
  """The fused attention of cuDNN, softmax in float32.

  A window of a cache passes its mask and is not differentiated. Where all positions are queries, valid keys are moved
  to the front and their number is passed: a mask is a bias [B 1 T S] to cuDNN, whose own gradient is costly.

  For the same reason `in_chunks` serves rules and segments, except in a short window of a cache. It also serves
  float32, odd lengths, and head sizes that are no multiple of 8 or beyond 128.
  """
  short = q.shape[1] < min(LANES, k.shape[1]) and q.shape[1] % 2 == 0
  if not _served_by_cudnn(k) or (_ruled(visible) and not short):
    return in_chunks(q, k, v, visible)
  valid = visible.valid
  scope = jax.named_scope(_scope(q, k, visible))
  attend = scope(functools.partial(jax.nn.dot_product_attention, implementation="cudnn"))
  if q.shape[1] < k.shape[1]:
    mask = visible.seen(q.shape[1])
    return attend(q, k, v, mask=jnp.broadcast_to(mask, (len(q), 1, q.shape[1], k.shape[1])))
  order = jnp.argsort(~valid, axis=1, stable=True)
  front = jax.vmap(lambda x, order: x.at[order].get(unique_indices=True, mode="promise_in_bounds"))
  # After the last valid key, the kernel may leave any values in the gradients; `where` drops them.
  moved = [front(jnp.where(valid[:, :, None, None], x, 0), order) for x in (k, v)]
  count = jnp.maximum(1, valid.sum(axis=1, dtype=jnp.int32))  # a row without valid keys stays finite
  return attend(q, *moved, key_value_seq_lengths=count)


def in_chunks(
  q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"], visible: Visible
) -> Float[Array, "B T N H"]:
  """Plain attention that under a rule, or within segments, computes `CHUNK` queries at a time, with the keys they see.

  No array [T S] exists: the backward pass computes the logits of a chunk again. With blocks of 4, the second chunk is
  queries 256 to 511 and keys 0 to 511; in two streams, a chunk of noisy queries takes the clean keys before it and its
  own, so that L clean and L noisy positions have about L^2 logits instead of 4 L^2. If the first query is traced, each
  chunk takes all keys.
  """
  queries, keys = q.shape[1], k.shape[1]
  if queries <= CHUNK or not _ruled(visible):
    return plain_attention(q, k, v, visible)

  def attend(first: int, spans: list[Any], q: jax.Array, k: jax.Array, v: jax.Array, visible: Visible) -> jax.Array:
    def taken(x: jax.Array, axis: int) -> jax.Array:
      return jnp.concatenate([jax.lax.slice_in_dim(x, start, stop, axis=axis) for start, stop in spans], axis)

    seen = visible._replace(start=visible.start + first).seen(q.shape[1])
    return jax.nn.dot_product_attention(q, taken(k, 1), taken(v, 1), mask=taken(seen, 3))

  parts = []
  for first in range(0, queries, CHUNK):
    chunk = q[:, first : first + CHUNK]
    spans = [(0, keys)]
    if visible.rule is not None and isinstance(visible.start, int):
      spans = _spans(visible.rule, visible.start + first, chunk.shape[1], keys)
    parts.append(jax.checkpoint(functools.partial(attend, first, spans))(chunk, k, v, visible))
  return jnp.concatenate(parts, axis=1)


def _spans(rule: Rule, start: int, queries: int, keys: int) -> list[Any]:
  """The keys that one of these queries sees, as (first, behind the last) of each run of them."""
  seen = rule(start + np.arange(queries)[:, None], np.arange(keys)[None]).any(axis=0)
  return np.flatnonzero(np.diff(seen, prepend=False, append=False)).reshape(-1, 2).tolist()


def _ruled(visible: Visible) -> bool:
  return visible.rule is not None or visible.segment is not None


def _scope(q: jax.Array, k: jax.Array, visible: Visible, parts: int = 1) -> str:
  """Of the kernel's two products, on the pairs that the rule allows, without what it pads.

  A rule whose first query is traced allows all pairs here.
  `visible` is from the first query of all `parts`: so many devices have as many queries, and each of them counts as the
  mean.
  """
  queries, keys = parts * q.shape[1], k.shape[1]
  pairs = queries * keys
  if visible.rule is not None and isinstance(visible.start, int):
    pairs = visible.rule.pairs(visible.start, queries, keys)
  return f"{KERNEL}{4 * q.size * pairs // queries}"


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
