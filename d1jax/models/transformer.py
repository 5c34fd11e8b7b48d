"""The mask predictor p(x_0 | x_t), a transformer over the canvas (Nie et al. 2025, arXiv 2502.09992).

The layers are one stacked block under `jax.lax.scan`, so that compile time does not grow with depth. Flax NNX modules
define the network; all other code uses pure functions of a nested dict of arrays.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key

from d1jax.models.cache import Cache, empty, renewed
from d1jax.models.layers import (
  Attention,
  Block,
  Constrain,
  DropoutKeys,
  RMSNorm,
  TransformerSize,
  Visible,
  fold_tokens,
  look_up,
  no_constraint,
  plain_attention,
  project,
  project_by_row,
  weight,
)
from d1jax.models.visibility import Rule

Params = dict[str, Any]


Start = int | Int[Array, ""] | Int[Array, "B"]
"""The position of a window, or one for each row of a batch."""


def _positions(rule: Rule | None, start: Start, length: int) -> Int[Array, "*B length"]:
  if not isinstance(start, int) and start.ndim:
    return jax.vmap(lambda own: _positions(rule, own, length))(start)
  return start + jnp.arange(length) if rule is None else rule.positions(start, length)


class Transformer(nnx.Module):
  """The mask predictor. `encode` and the head are separate, so that logits are computed only where they are needed."""

  def __init__(
    self,
    size: TransformerSize,
    *,
    dtype: DTypeLike,
    remat: bool,
    unroll: int,
    constrain: Constrain,
    attention: Attention,
    cut_length: bool,
    rngs: nnx.Rngs,
  ):
    self.dtype, self.remat, self.unroll, self.layers = dtype, remat, unroll, size.layers
    self.constrain, self.attention = constrain, attention
    table = nnx.initializers.normal(0.02)
    self.embedding = weight(rngs.params(), table, (size.vocab, size.embed), ("vocab", "embed"))

    @nnx.split_rngs(splits=size.layers)
    @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: "layers"})
    def stacked(rngs: nnx.Rngs) -> Block:
      return Block(size, dtype=dtype, project=project_by_row if cut_length else project, rngs=rngs)

    self.blocks = stacked(rngs)
    self.final_norm = RMSNorm(size.embed, eps=size.norm_eps, rngs=rngs)
    self.tied = size.tied
    if not size.tied:
      self.head = weight(rngs.params(), table, (size.embed, size.vocab), ("embed", "vocab"))

  def encode(
    self,
    tokens: Int[Array, "B L"],
    valid: Bool[Array, "B L"],
    dropout: DropoutKeys = None,
    rule: Rule | None = None,
    segment: Int[Array, "B L"] | None = None,
  ) -> Float[Array, "B L D"]:
    """The last hidden states after the final norm; see `Network`."""
    visible = Visible(valid, rule, segment=segment)

    def attend(kept: None, layer: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
      del layer
      return self.attention(q, k, v, visible), kept

    return self._layers(tokens, _positions(rule, 0, tokens.shape[1]), attend, None, dropout)[0]

  def encode_window(
    self,
    tokens: Int[Array, "B W"],
    start: Start,
    cache: Cache,
    rule: Rule | None = None,
  ) -> tuple[Float[Array, "B W D"], Cache]:
    """The last hidden states of a window; its keys and values are updated in the cache.

    Args:
      tokens: the tokens of the window.
      start: the position of the window, or one for each row; it is clipped to 0 .. L - W.
      cache: the old cache, which must not be used afterwards.
      rule: who sees whom on the canvas, see `Network`.
    """
    last = cache.valid.shape[1] - tokens.shape[1]
    start = min(max(start, 0), last) if isinstance(start, int) else jnp.clip(start, 0, last)

    def attend(cache: Cache, layer: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Cache]:
      cache, k, v = renewed(cache, layer, start, k, v, self.constrain)
      return self.attention(q, k, v, Visible(cache.valid, rule, start)), cache

    return self._layers(tokens, _positions(rule, start, tokens.shape[1]), attend, cache)

  def _layers(
    self,
    tokens: jax.Array,
    positions: jax.Array,
    attend: Callable[..., tuple[jax.Array, Any]],
    kept: Any,
    dropout: DropoutKeys = None,
  ) -> tuple[jax.Array, Any]:
    """Embedding, blocks, final norm; `attend(kept, layer, q, k, v)` passes `kept` from layer to layer."""
    residual = ("batch", "length", None)
    x = self.constrain(look_up(self.embedding[...], tokens, self.dtype, self.constrain), residual)
    block, weights = nnx.split(self.blocks)

    def body(carry: tuple[jax.Array, Any], layer: tuple[nnx.State, jax.Array]) -> tuple[tuple[jax.Array, Any], None]:
      (x, kept), (weights, index) = carry, layer
      mix = functools.partial(attend, kept, index)
      x, kept = nnx.merge(block, weights)(x, positions, mix, fold_tokens(dropout, index))
      return (self.constrain(x, residual), kept), None

    if self.remat:  # prevent_cse=False is correct only inside a scan
      body = jax.checkpoint(body, prevent_cse=False)
    (x, kept), _ = jax.lax.scan(body, (x, kept), (weights, jnp.arange(self.layers)), unroll=self.unroll)
    return self.final_norm(x), kept

  def unembedding(self) -> Float[Array, "D V"]:
    """The head's weight."""
    return self.embedding[...].T if self.tied else self.head[...]


class Network(NamedTuple):
  """A transformer as pure functions of its parameters, a nested dict.

  The leaves are arrays; the weight of a block's product may also be `Quantized` or `Adapted`.

  Attributes:
    init: `key -> params`, all float32.
    encode: `(params, tokens[B L], valid[B L], dropout=None, rule=None, segment=None) -> hidden[B L D]`; `dropout` holds
      one key per token; `rule` says who sees whom (`d1jax.models.visibility`), and which position each token has;
      `segment[B L]` is the document of each token of a packed row.
    head: `params -> weight[D V]` in its stored dtype; logits are `hidden @ head`.
    init_cache: `valid[B L] -> cache`, an empty cache: the first window must cover the canvas.
    encode_window: `(params, tokens[B W], start, cache, rule=None) -> (hidden[B W D], cache)` computes W positions from
      `start` on, a number, or an array [B] that has one for each row. First their keys and values are updated in the
      cache, then they attend to the cache. A start beyond L - W becomes L - W. For a window that covers the canvas, the
      result equals `encode`. `rule` is the canvas's.
    axes: the tree of logical axes, with one tuple of names per parameter.
    size: the sizes.
  """

  init: Any
  encode: Any
  head: Any
  init_cache: Any
  encode_window: Any
  axes: Params
  size: TransformerSize


def build(
  size: TransformerSize,
  *,
  dtype: DTypeLike = jnp.float32,
  remat: bool = False,
  unroll: int = 1,
  constrain: Constrain = no_constraint,
  attention: Attention = plain_attention,
  cut_length: bool = False,
) -> Network:
  """Builds the pure functions of a transformer without touching memory.

  Args:
    size: the sizes, e.g. `families.PRESETS["tiny"]`.
    dtype: the dtype of matrix products; weights, norms, softmax and logits are always float32.
    remat: whether the backward pass recomputes each block instead of storing its activations.
    unroll: how many layers the scan unrolls; this helps small models on a CPU.
    constrain: sets the placement of activations (see `d1jax.parallel.mesh`).
    attention: the attention kernel.
    cut_length: whether `constrain` shards activations along their length.
  """

  def module(key: Key[Array, ""]) -> Transformer:
    return Transformer(
      size,
      dtype=dtype,
      remat=remat,
      unroll=unroll,
      constrain=constrain,
      attention=attention,
      cut_length=cut_length,
      rngs=nnx.Rngs(key),
    )

  graph, abstract = nnx.split(nnx.eval_shape(lambda: module(jax.random.key(0))))
  axes = jax.tree.map(
    lambda v: tuple(v.get_metadata()["out_sharding"]),
    abstract,
    is_leaf=lambda v: isinstance(v, nnx.Variable),
  )

  def init(key: Key[Array, ""]) -> Params:
    return nnx.to_pure_dict(nnx.state(module(key)))

  def encode(
    params: Params,
    tokens: Int[Array, "B L"],
    valid: Bool[Array, "B L"],
    dropout: DropoutKeys = None,
    rule: Rule | None = None,
    segment: Int[Array, "B L"] | None = None,
  ) -> Float[Array, "B L D"]:
    return nnx.merge(graph, params).encode(tokens, valid, dropout, rule, segment)

  def head(params: Params) -> Float[Array, "D V"]:
    return nnx.merge(graph, params).unembedding()

  def init_cache(valid: Bool[Array, "B L"]) -> Cache:
    return empty(valid, size.layers, size.key_value_heads, size.head_size, dtype, constrain)

  def encode_window(
    params: Params,
    tokens: Int[Array, "B W"],
    start: Start,
    cache: Cache,
    rule: Rule | None = None,
  ) -> tuple[Float[Array, "B W D"], Cache]:
    return nnx.merge(graph, params).encode_window(tokens, start, cache, rule)

  return Network(init, encode, head, init_cache, encode_window, nnx.to_pure_dict(axes), size)


def shaken(params: Params, row: int, key: Key[Array, ""], size: Float[Array, ""]) -> Params:
  """Parameters with Gaussian noise in one row of the embedding, such as the mask's.

  A row of zeros, which no training has touched, gives hidden states that a norm divides by almost nothing: gradients
  may explode (LLaDA2.0, arXiv 2512.15745). A little noise prevents this.
  `size` is the noise's standard deviation, as a share of the root mean square of all embeddings.
  """
  table = params["embedding"]
  scale = size * jax.lax.stop_gradient(jnp.sqrt(jnp.mean(jnp.square(table.astype(jnp.float32)))))
  noise = (scale * jax.random.normal(key, table.shape[1:])).astype(table.dtype)
  is_row = jnp.arange(table.shape[0])[:, None] == row
  return {**params, "embedding": jnp.where(is_row, table + noise[None, :], table)}


def parameter_count(network: Network) -> int:
  """The number of parameters, from a trace that allocates no memory."""
  return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(network.init, jax.random.key(0))))
