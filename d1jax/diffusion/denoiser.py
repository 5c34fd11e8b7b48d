"""The interface through which diffusion and reinforcement learning use a network."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

Params = Any
"""A nested dict of arrays; only the network knows what is in it."""

FORWARD_PASS = "d1jax.forward_pass"
"""The name of a forward pass's hidden states in a trace, by which `d1jax.telemetry.flops` counts the passes."""


@dataclasses.dataclass(frozen=True)
class Denoiser:
  """A mask predictor p(x_0 | x_t) as pure functions.

  Attributes:
    encode: `(params, tokens[B L], valid[B L], dropout=None, segment=None) -> hidden[B L D]`; `dropout` are keys [B L],
      one a token, of what supervised fine-tuning drops; `segment[B L]` is the document of each token of a packed row,
      which sees the tokens of its own document.
    head: `params -> weight[D V]`, as it is stored: logits are the product of the last hidden states and its columns.
    mask_id: the token that stands for "not yet revealed".
    stop_ids: a completion ends with the first of these.
    forbidden_ids: tokens that are never drawn nor given probability: the mask, and ids beyond the tokenizer.
    vocab: the number of logits.
    shift: 0 if hidden state i predicts token i (LLaDA), 1 if it predicts token i + 1 (Dream, causal starts). It is read
      by `hidden_predicting`, and by the code that chooses windows, which start `shift` rows earlier.
    init_cache: `valid[B L] -> cache`, an empty cache; None if the network has no cached form.
    encode_window: `(params, tokens[B W], start, cache) -> (hidden[B W D], cache)`: encodes the positions from `start`
      on, which attend to the cache with their own entries renewed. The window that covers the canvas is a refresh and
      equals `encode`. `start` is a number, or an array [B] that has one for each row.
    block: the length inside which attention of a block-causal network goes both ways. Blocks are counted from the first
      position of the canvas; in `encode` and `encode_window` a position sees its own block and all before it. None:
      attention goes both ways everywhere.
    encode_streams: `(params, clean[B L], noisy[B A], valid[B L], first, dropout=None, segment=None) -> (hidden[B L D],
      hidden[B A D])` of a block-causal network: one pass over a canvas and over noisy copies of its positions from
      `first` on, of which A holds one or more (`d1jax.models.visibility.TwoStreams`); `dropout` are keys [B L + A].
    vocab_shards: over how many devices the head's columns are sharded; a tile of the vocabulary takes some columns of
      each shard.
  """

  encode: Callable[..., jax.Array]
  head: Callable[[Params], jax.Array]
  mask_id: int
  stop_ids: tuple[int, ...]
  forbidden_ids: tuple[int, ...]
  vocab: int
  shift: int = 0
  init_cache: Callable[..., Any] | None = None
  encode_window: Callable[..., tuple[jax.Array, Any]] | None = None
  block: int | None = None
  encode_streams: Callable[..., tuple[jax.Array, jax.Array]] | None = None
  vocab_shards: int = 1

  def __post_init__(self) -> None:
    for name in ("mask_id", "stop_ids", "forbidden_ids"):
      ids = np.atleast_1d(getattr(self, name))
      if ids.size and not (ids.min() >= 0 and ids.max() < self.vocab):
        raise ValueError(f"{name}={getattr(self, name)} lies outside the vocabulary of {self.vocab}")
    if self.mask_id not in self.forbidden_ids:
      raise ValueError(
        f"forbidden_ids={self.forbidden_ids} must hold the mask {self.mask_id}, which is never a prediction: add it"
      )
    if self.block is not None and self.block < 1:
      raise ValueError(f"block={self.block} must be at least 1, or None for attention both ways")
    if self.block is not None and (
      self.encode_streams is None or self.init_cache is None or self.encode_window is None
    ):
      raise ValueError(f"block={self.block} needs encode_streams, init_cache and encode_window")

  def hidden_predicting(
    self, hidden: Float[Array, "B L D"], positions: Int[Array, "W"] | Int[Array, "B W"]
  ) -> Float[Array, "B W D"]:
    """The hidden states that predict these positions, of all rows or of each row; the only place that knows whether a
    position predicts itself.

    It is called once a forward pass, with all that the pass has encoded.
    """
    hidden, predicting = checkpoint_name(hidden, FORWARD_PASS), positions - self.shift
    if predicting.ndim == 1:
      return jnp.take(hidden, predicting, axis=1)
    return jnp.take_along_axis(hidden, predicting[..., None], axis=1)

  def logits(self, params: Params, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
    """Logits in float32 with the forbidden ids at minus infinity: the one density that is sampled, scored and
    trained.
    """
    forbidden = np.zeros(self.vocab, bool)
    forbidden[list(self.forbidden_ids)] = True
    head = self.head(params).astype(hidden.dtype)
    rows = hidden.reshape(-1, hidden.shape[-1])  # with two axes the gradient of the head is one product, on CPUs too
    logits = jnp.matmul(rows, head, preferred_element_type=jnp.float32).reshape(*hidden.shape[:-1], self.vocab)
    return jnp.where(forbidden, -jnp.inf, logits)
