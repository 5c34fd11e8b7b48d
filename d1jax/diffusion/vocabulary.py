"""Log-probabilities of given tokens in tiles of the vocabulary: no array of logits grows with it."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

REPEATED = "rematted_computation"
"""The scope of what a backward pass computes again, as `jax.checkpoint` names it."""


def tiled_log_prob(
  hidden: Float[Array, "*B D"],
  head: Float[Array, "D V"],
  tokens: Int[Array, "*B"],
  forbidden_ids: tuple[int, ...],
  tile: int,
  shards: int = 1,
) -> Float[Array, "*B"]:
  """Log softmax(hidden @ head) at the given tokens, in float32; equal to `log_prob(denoiser.logits(...), tokens)`.

  Forward, a loop over tiles keeps a running maximum, a running sum of exponentials and the chosen token's logit (the
  online softmax, arXiv 1805.02867). Backward, each tile's logits are computed again and turned into
  `d = (onehot - softmax) * g` (as in cut cross-entropy, arXiv 2411.09009); the head's gradient is written tile by tile
  where it stays, and is dropped by the compiler when nobody asks for it. Beside it, memory in both directions is
  [*B, tile] and [D, tile], whatever V is. Products take their factors in the dtype of `hidden` and accumulate in
  float32.

  A forbidden token has log-probability minus infinity; its gradient is that of minus logsumexp, which is finite.

  Args:
    hidden: states that predict `tokens`.
    head: the weight as it is stored; each tile of it is cast to the dtype of `hidden` when it is used.
    tokens: ids.
    forbidden_ids: ids without probability.
    tile: vocabulary ids at a time.
    shards: over how many devices the head's columns are sharded. A tile takes some columns of each shard, so that no
      device needs columns of another. With a smaller number the head would be gathered; with a larger one, a TPU would
      copy it.

  Raises:
    ValueError: a tile has fewer ids than there are shards, or the shards are not of equal size.
  """
  vocab = head.shape[1]
  if tile < shards or vocab % shards:
    raise ValueError(
      f"tiles of {tile} ids do not fit a vocabulary of {vocab} that is sharded over {shards} devices: a tile must have"
      " at least one id a device, and the devices must divide the vocabulary"
    )
  width = min(tile, vocab) // shards
  logps = _log_prob(hidden.reshape(-1, hidden.shape[-1]), head, tokens.reshape(-1), forbidden_ids, shards, width)
  return logps.reshape(tokens.shape)


class _Tile(NamedTuple):
  """Some columns of every shard; the last tile starts early enough to be as wide as the others.

  With V = 10, one shard and tiles of 4, the tiles are columns 0-3, 4-7 and 6-9; columns 6 and 7 of the last are not
  fresh. With V = 8 in two shards and tiles of 4 (two columns a shard), the first tile is columns 0, 1 and 4, 5.

  Attributes:
    start: its first column.
    weight: of these columns, in the dtype of the hidden states.
    logits: minus infinity where forbidden.
    chosen: where a row's token is.
    allowed: columns that are not forbidden.
    fresh: columns that no earlier tile had.
  """

  start: Int[Array, ""]
  weight: Float[Array, "D S W"]
  logits: Float[Array, "N S W"]
  chosen: Bool[Array, "N S W"]
  allowed: Bool[Array, "1 S W"]
  fresh: Bool[Array, "1 1 W"]


def _cut(
  index: Int[Array, ""],
  hidden: Float[Array, "N D"],
  head: Float[Array, "D V"],
  tokens: Int[Array, "N"],
  forbidden_ids: tuple[int, ...],
  shards: int,
  width: int,
) -> _Tile:
  length = head.shape[1] // shards
  allowed = np.ones(head.shape[1], bool)
  allowed[list(forbidden_ids)] = False
  start = jnp.minimum(index * width, length - width)
  columns = start + jnp.arange(width)
  # The head is reshaped to shards inside the loop: outside of it, XLA might choose another layout, and copy the head.
  columns_of = lambda x: jax.lax.dynamic_slice_in_dim(x.reshape(-1, shards, length), start, width, axis=2)
  weight = columns_of(head).astype(hidden.dtype)
  permitted = columns_of(jnp.asarray(allowed))
  logits = jnp.einsum("nd,dsw->nsw", hidden, weight, preferred_element_type=jnp.float32)
  ids = length * jnp.arange(shards)[:, None] + columns[None]
  return _Tile(
    start=start,
    weight=weight,
    logits=jnp.where(permitted, logits, -jnp.inf),
    chosen=ids[None] == tokens[:, None, None],
    allowed=permitted,
    fresh=(columns >= index * width)[None, None],
  )


class _Residuals(NamedTuple):
  """What the forward pass keeps for the backward pass: softmax = exp(logits - peak - log_mass)."""

  hidden: Float[Array, "N D"]
  head: Float[Array, "D V"]
  tokens: Int[Array, "N"]
  peak: Float[Array, "N"]
  log_mass: Float[Array, "N"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _log_prob(
  hidden: Float[Array, "N D"],
  head: Float[Array, "D V"],
  tokens: Int[Array, "N"],
  forbidden_ids: tuple[int, ...],
  shards: int,
  width: int,
) -> Float[Array, "N"]:
  return _forward(hidden, head, tokens, forbidden_ids, shards, width)[0]


def _forward(
  hidden: Float[Array, "N D"],
  head: Float[Array, "D V"],
  tokens: Int[Array, "N"],
  forbidden_ids: tuple[int, ...],
  shards: int,
  width: int,
) -> tuple[Float[Array, "N"], _Residuals]:
  # The online softmax. For logits [1, 3 | 2, 4] in two tiles: after the first, the maximum is 3 and the mass
  # e^(1-3) + 1. The second has a higher maximum, 4: the mass so far is scaled by e^(3-4), which makes it e^(1-4) +
  # e^(3-4), and e^(2-4) + 1 are added. So the mass always belongs to the present maximum, and nothing overflows.
  # Each shard has its own maximum, mass and chosen logit, so that devices communicate only at the end.
  by_share = (hidden.shape[0], shards)
  lowest = jnp.full(by_share, jnp.finfo(jnp.float32).min)  # finite: a whole tile may be forbidden

  def step(index: Int[Array, ""], carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    top, mass, chosen = carry
    tile = _cut(index, hidden, head, tokens, forbidden_ids, shards, width)
    logits = jnp.where(tile.fresh, tile.logits, -jnp.inf)
    higher = jnp.maximum(top, jnp.max(logits, axis=-1))
    mass = mass * jnp.exp(top - higher) + jnp.sum(jnp.exp(logits - higher[..., None]), axis=-1)
    chosen_here = jnp.max(jnp.where(tile.chosen, tile.logits, -jnp.inf), axis=-1)
    return higher, mass, jnp.maximum(chosen, chosen_here)

  start = (lowest, jnp.zeros(by_share), jnp.full(by_share, -jnp.inf))
  top, mass, chosen = jax.lax.fori_loop(0, -(-head.shape[1] // (shards * width)), step, start)
  peak = jnp.max(top, axis=1)
  log_mass = jnp.log(jnp.sum(mass * jnp.exp(top - peak[:, None]), axis=1))
  logp = jnp.max(chosen, axis=1) - peak - log_mass
  return logp, _Residuals(hidden, head, tokens, peak, log_mass)


def _backward(
  forbidden_ids: tuple[int, ...], shards: int, width: int, residuals: _Residuals, cotangent: Float[Array, "N"]
) -> tuple[Float[Array, "N D"], Float[Array, "D V"], None]:
  hidden, head, tokens, peak, log_mass = residuals
  spread = lambda x: x[:, None, None]

  def step(index: Int[Array, ""], carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    by_hidden, by_head = carry
    with jax.named_scope(REPEATED):
      tile = _cut(index, hidden, head, tokens, forbidden_ids, shards, width)
    softmax = jnp.exp(tile.logits - spread(peak) - spread(log_mass))
    by_logits = spread(cotangent) * ((tile.chosen & tile.allowed) - softmax)
    by_logits = by_logits.astype(hidden.dtype)
    # The columns are one axis here, not two: some versions of XLA cannot multiply three axes in bfloat16 on CPUs.
    flat = by_logits.reshape(len(by_logits), -1)
    by_tile = jnp.einsum("nd,nw->dw", hidden, flat, preferred_element_type=jnp.float32).reshape(tile.weight.shape)
    shares = by_head.reshape(len(head), shards, -1)
    shares = jax.lax.dynamic_update_slice_in_dim(shares, by_tile.astype(head.dtype), tile.start, axis=2)
    # The gradient of a column is written, and a column of two tiles is written twice with the same value. The gradient
    # of the hidden states is a sum, so that a column of two tiles must count once.
    once = jnp.where(tile.fresh, by_logits, 0)
    by_hidden = by_hidden + jnp.einsum("nsw,dsw->nd", once, tile.weight, preferred_element_type=jnp.float32)
    return by_hidden, shares.reshape(head.shape)

  start = (jnp.zeros(hidden.shape), jnp.zeros_like(head))
  by_hidden, by_head = jax.lax.fori_loop(0, -(-head.shape[1] // (shards * width)), step, start)
  return by_hidden.astype(hidden.dtype), by_head, None


_log_prob.defvjp(_forward, _backward)
