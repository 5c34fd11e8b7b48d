"""A hash of arrays that does not depend on their placement."""

import functools
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

from d1jax.parallel import multihost


def _mix(x: UInt32[Array, "*S"]) -> UInt32[Array, "*S"]:
  """A 32-bit finaliser (MurmurHash3's): every input bit reaches every output bit."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)


def _words(x: jax.Array) -> UInt32[Array, "*S"]:
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    x = jax.random.key_data(x)
  size = x.dtype.itemsize
  if x.dtype == jnp.bool_ or size < 4:
    bits = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(x, f"uint{8 * size}")
    return bits.astype(jnp.uint32)
  return jax.lax.bitcast_convert_type(x, jnp.uint32)


@functools.partial(jax.jit, static_argnames="lanes")
def _checksums(leaves: list[jax.Array], lanes: int = 2) -> UInt32[Array, "leaf lane"]:
  """Position-dependent sums modulo 2^32; integer sums do not depend on the order, so any sharding gives the same."""

  def one(x: jax.Array) -> UInt32[Array, "lane"]:
    words = _words(x)
    position = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
      position = position * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    salted = [_mix(words + _mix(position + jnp.uint32(0x9E3779B9 * (lane + 1) % 2**32))) for lane in range(lanes)]
    return jnp.stack([jnp.sum(s, dtype=jnp.uint32) for s in salted])

  return jnp.stack([one(x) for x in leaves])


def fingerprint(tree: Any) -> str:
  """SHA-256 over the names, shapes, types and bits of a tree of arrays; the same on any mesh and number of
  processes.
  """
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  sums = multihost.fetch(_checksums([leaf if isinstance(leaf, jax.Array) else np.asarray(leaf) for _, leaf in leaves]))
  digest = hashlib.sha256()
  for (path, leaf), words in zip(leaves, sums, strict=True):
    digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype} {words.tolist()}\n".encode())
  return digest.hexdigest()
