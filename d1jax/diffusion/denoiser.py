"""The one thing that diffusion and reinforcement learning know of a network."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Params = Any
"""A nested dict of arrays; what is in it is the network's business."""


def predicts_itself(hidden: Float[Array, "B L D"], positions: Int[Array, "W"]) -> Float[Array, "B W D"]:
  """LLaDA's convention: hidden state i predicts token i."""
  return jnp.take(hidden, positions, axis=1)


def predicts_next(hidden: Float[Array, "B L D"], positions: Int[Array, "W"]) -> Float[Array, "B W D"]:
  """The convention of Dream and of every causal start: hidden state i predicts token i + 1."""
  return jnp.take(hidden, positions - 1, axis=1)


@dataclasses.dataclass(frozen=True)
class Denoiser:
  """A mask predictor p(x_0 | x_t) as pure functions.

  Attributes:
    encode: `(params, tokens[B L], valid[B L], dropout=None) -> hidden[B L D]`; `dropout` are keys [B L], one a token,
      of what supervised fine-tuning drops.
    unembed: `(params, hidden[... D]) -> logits[... V]`, float32.
    mask_id: the token that stands for "not yet revealed".
    stop_ids: a completion ends with the first of these.
    forbidden_ids: tokens that are never drawn nor given probability: the mask, and ids beyond the tokenizer.
    vocab: the number of logits.
    hidden_predicting: `(hidden, positions[W]) -> hidden[B W D]`, the states that predict those positions; the only
      place that knows whether a position predicts itself.
  """

  encode: Callable[..., jax.Array]
  unembed: Callable[..., jax.Array]
  mask_id: int
  stop_ids: tuple[int, ...]
  forbidden_ids: tuple[int, ...]
  vocab: int
  hidden_predicting: Callable[..., jax.Array] = predicts_itself

  def __post_init__(self) -> None:
    for name in ("mask_id", "stop_ids", "forbidden_ids"):
      ids = np.atleast_1d(getattr(self, name))
      if ids.size and not (ids.min() >= 0 and ids.max() < self.vocab):
        raise ValueError(f"{name}={getattr(self, name)} lies outside the vocabulary of {self.vocab}")
    if self.mask_id not in self.forbidden_ids:
      raise ValueError(f"forbidden_ids={self.forbidden_ids} lacks the mask {self.mask_id}, which is never a prediction")

  def logits(self, params: Params, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
    """Logits in float32 with the forbidden ids at minus infinity: the one density that is sampled, scored and
    trained.
    """
    forbidden = np.zeros(self.vocab, bool)
    forbidden[list(self.forbidden_ids)] = True
    return jnp.where(forbidden, -jnp.inf, self.unembed(params, hidden).astype(jnp.float32))
