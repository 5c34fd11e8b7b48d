"""Logits of the active block, from a forward pass over the canvas or over a window of it with a cache.

A cache holds the keys and values of the whole canvas. A pass over the canvas renews it (a refresh); a pass over a
window around the block renews the window's entries alone and leaves the rest as stale as it is. In a block-causal
network the rest is exact: no token before the active block can change any more, and nothing behind it is seen.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from d1jax.diffusion.denoiser import Denoiser, Params
from d1jax.diffusion.rollout import SamplerSpec

Caches = tuple[Any, ...]
"""A cache for each pass of a step, of which guidance makes two; None stands for no cache."""

NO_CACHES: Caches = (None, None)

Place = Int[Array, ""] | Int[Array, "B"] | int
"""A number of a column, a block or a step: the same for all rows of a batch, or an array that has one for each row."""

NEXT_BLOCK = "d1jax.next_block"
"""The scope of the logits of a block's first token, which the last token of the block before predicts."""


class Window(NamedTuple):
  """The rows of the canvas that a pass computes: `width` of them from `first` on."""

  first: Place
  width: int


def columns(x: Shaped[Array, "B L"], first: Place, width: int) -> Shaped[Array, "B W"]:
  """`width` columns from `first` on."""
  if isinstance(first, int) or not first.ndim:
    return jax.lax.dynamic_slice_in_dim(x, first, width, axis=1)
  return jax.vmap(lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, width))(x, first)


def with_columns(x: Shaped[Array, "B L"], new: Shaped[Array, "B W"], first: Place) -> Shaped[Array, "B L"]:
  """The array with other columns from `first` on."""
  if isinstance(first, int) or not first.ndim:
    return jax.lax.dynamic_update_slice_in_dim(x, new, first, axis=1)
  return jax.vmap(lambda row, new, start: jax.lax.dynamic_update_slice_in_dim(row, new, start, axis=0))(x, new, first)


def pass_over(width: int) -> str:
  """The scope of a pass that computes `width` positions a row, with the logits of its block."""
  return f"d1jax.pass_over_{width}"


def write_over(width: int) -> str:
  """The scope of a pass that writes the keys and values of `width` positions a row, and predicts nothing."""
  return f"d1jax.write_over_{width}"


def check(denoiser: Denoiser, spec: SamplerSpec, *, length: str = "completion_length") -> None:
  """Raises a ValueError if the denoiser cannot do what the spec says; `length` is the user's word for that of
  completions.
  """
  if denoiser.block is None:
    if spec.cache != "none" and (denoiser.init_cache is None or denoiser.encode_window is None):
      raise ValueError(
        f"cache={spec.cache!r} needs a denoiser with init_cache and encode_window, which this one lacks: use"
        " cache='none'"
      )
    return
  block = denoiser.block
  if spec.cfg_scale:
    raise ValueError(
      f"cfg_scale={spec.cfg_scale} masks the prompt in a second pass, which the exact cache of a block-causal network"
      " does not have: use cfg_scale=0"
    )
  if spec.cache != "none":
    raise ValueError(
      f"cache={spec.cache!r} is an approximation for full attention; the cache of a block-causal network is exact and"
      " always used: use cache='none'"
    )
  if spec.block_length > block or block % spec.block_length:
    raise ValueError(
      f"block_length={spec.block_length} does not divide the network's block of {block} tokens, inside which it attends"
      f" both ways: use block_length={block}"
    )
  if spec.completion_length % block:
    raise ValueError(
      f"{length}={spec.completion_length} is not a multiple of the network's block of {block} tokens: use"
      f" {length}={-(-spec.completion_length // block) * block}"
    )


def init_caches(denoiser: Denoiser, valid: Bool[Array, "B L"], spec: SamplerSpec) -> Caches:
  """Empty caches, to be refreshed before their first use; `NO_CACHES` in exact mode with full attention."""
  if denoiser.init_cache is None or (spec.cache == "none" and denoiser.block is None):
    return NO_CACHES
  return denoiser.init_cache(valid), denoiser.init_cache(valid) if spec.cfg_scale else None


def window_of(spec: SamplerSpec, start: Place, length: int, shift: int) -> Window:
  """The window of a cached mode for the block that starts at `start` on a canvas of `length`.

  It holds the block and the rows that predict it, which begin `shift` rows earlier. The window of the mode `window` has
  always the same width, and is moved inwards at the ends of the canvas. That of `prefix` reaches to the end of the
  canvas, so that its width depends on `start`, which must be a Python number.
  """
  if spec.cache == "prefix":
    first = start - shift
    return Window(first, length - int(first))
  if spec.cache == "dual":
    return Window(start - shift, spec.block_length + shift)
  width = min(spec.look_behind + shift + spec.block_length + spec.look_ahead, length)
  return Window(jnp.clip(start - shift - spec.look_behind, 0, length - width), width)


def block_logits(
  denoiser: Denoiser,
  params: Params,
  tokens: Int[Array, "B L"],
  valid: Bool[Array, "B L"],
  caches: Caches,
  start: Place,
  *,
  spec: SamplerSpec,
  window: Window | None = None,
) -> tuple[Float[Array, "B W V"], Caches]:
  """Logits of one block alone, guided when `spec.cfg_scale` is positive: l_un + (w + 1)(l_cond - l_un), the prompt
  masked for l_un.

  Args:
    denoiser: the mask predictor.
    params: its parameters.
    tokens: the canvas, prompt and completion.
    valid: false at padding.
    caches: of `init_caches`; `NO_CACHES` for a pass that keeps nothing.
    start: the block's first position.
    spec: the sampler.
    window: the rows to compute; None: the whole canvas, which is a refresh if there are caches.

  Returns:
    The logits, and the renewed caches.
  """
  length = tokens.shape[1]
  first, width = window or Window(0, length)
  relative, place = jnp.asarray(start - first), jnp.arange(spec.block_length)
  relative = relative + place if relative.ndim == 0 else relative[:, None] + place[None, :]
  if denoiser.block is not None:  # the first token of a window is never masked if the one before it predicts it
    relative = jnp.maximum(relative, denoiser.shift)

  @jax.named_scope(pass_over(width))
  def forward(tokens: Int[Array, "B L"], cache: Any) -> tuple[Float[Array, "B W V"], Any]:
    if cache is None or denoiser.encode_window is None:
      hidden = denoiser.encode(params, tokens, valid)
    else:
      hidden, cache = denoiser.encode_window(params, columns(tokens, first, width), first, cache)
    return denoiser.logits(params, denoiser.hidden_predicting(hidden, relative)), cache

  logits, cache = forward(tokens, caches[0])
  if not spec.cfg_scale:
    return logits, (cache, None)
  unguided, blind_cache = forward(without_prompt(tokens, denoiser, spec), caches[1])
  return guided(logits, unguided, spec.cfg_scale), (cache, blind_cache)


def without_prompt(tokens: Int[Array, "B L"], denoiser: Denoiser, spec: SamplerSpec) -> Int[Array, "B L"]:
  """The canvas of the unguided logits: its prompt is masked."""
  return tokens.at[:, : tokens.shape[1] - spec.completion_length].set(denoiser.mask_id)


def guided(logits: Float[Array, "*B V"], unguided: Float[Array, "*B V"], cfg_scale: float) -> Float[Array, "*B V"]:
  """Classifier-free guidance, l_un + (w + 1)(l_cond - l_un)."""
  # The forbidden ids are at minus infinity in both, where the difference is not a number.
  return jnp.where(jnp.isneginf(logits), logits, unguided + (cfg_scale + 1) * (logits - unguided))
