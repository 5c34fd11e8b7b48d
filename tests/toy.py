"""A network small enough to be written down twice: position-weighted averaging, a dense layer, a head."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from d1jax.diffusion.denoiser import Denoiser
from d1jax.diffusion.rollout import Rollout, SamplerSpec, up_to_stop

VOCAB, EMBED = 13, 8
MASK, STOP = 11, 2
FORBIDDEN = (MASK, 12)
SPEC = SamplerSpec(completion_length=6, diffusion_steps=3, block_length=6)


def params(seed: int = 0, scale: float = 1.5) -> dict[str, jax.Array]:
  rng = np.random.default_rng(seed)
  shapes = {"table": (VOCAB, EMBED), "mix": (EMBED, EMBED), "head": (EMBED, VOCAB)}
  return {n: jnp.asarray(scale * rng.normal(size=s), jnp.float32) for n, s in shapes.items()}


class Cache(NamedTuple):
  """What the two layers mix: each token's embedding, and what the first layer makes of it, which goes stale."""

  inputs: tuple[jax.Array, ...]
  valid: jax.Array


def init_cache(valid: jax.Array) -> Cache:
  empty = jnp.zeros((*valid.shape, EMBED), jnp.float32)
  return Cache((empty, empty), valid)


def encode_window(params: Any, tokens: jax.Array, start: Any, cache: Cache) -> tuple[jax.Array, Cache]:
  """Hidden i, twice: its own and an average of all valid ones, weighted by their distance, unlike to both sides."""
  x, inputs = params["table"][tokens], []
  distance = (start + jnp.arange(tokens.shape[1]))[:, None] - jnp.arange(cache.valid.shape[1])[None, :]
  kernel = jnp.exp(-0.4 * jnp.abs(distance) + 0.05 * distance)
  share = kernel[None] * cache.valid[:, None, :]
  share = share / jnp.sum(share, axis=-1, keepdims=True)
  for stale in cache.inputs:
    inputs.append(jax.lax.dynamic_update_slice_in_dim(stale, x, start, axis=1))
    x = jnp.tanh(x + jnp.einsum("bij,bjd->bid", share, inputs[-1]) @ params["mix"])
  return x, Cache(tuple(inputs), cache.valid)


def encode(params: Any, tokens: jax.Array, valid: jax.Array) -> jax.Array:
  return encode_window(params, tokens, 0, init_cache(valid))[0]


def head(params: Any) -> jax.Array:
  return params["head"]


DENOISER = Denoiser(encode, head, MASK, (STOP,), FORBIDDEN, VOCAB, 0, init_cache, encode_window)


def prompts(widths: list[int], length: int, seed: int = 1) -> tuple[jax.Array, jax.Array]:
  """(prompt, prompt_valid): left-padded prompts of these widths; ids depend on row and seed, not on `length`."""
  rows, valid = np.zeros((len(widths), length), np.int32), np.zeros((len(widths), length), bool)
  for row, width in enumerate(widths):
    rows[row, length - width :] = np.random.default_rng((seed, row)).integers(3, MASK, width)
    valid[row, length - width :] = True
  return jnp.asarray(rows), jnp.asarray(valid)


def rollout(batch: int = 4, prompt_length: int = 5, completion_length: int = 6, seed: int = 3) -> Rollout:
  """A made-up rollout with ragged prompts and some stop ids."""
  rng = np.random.default_rng(seed)
  prompt, valid = prompts([1 + (2 * i) % prompt_length for i in range(batch)], prompt_length, seed)
  completion = jnp.asarray(rng.integers(0, MASK, (batch, completion_length)), jnp.int32)
  completion = completion.at[0, 3].set(STOP)
  zeros = jnp.zeros(completion.shape)
  ids = jnp.arange(batch, dtype=jnp.int32)
  mask = up_to_stop(completion, (STOP,))
  return Rollout(100 + ids, ids // 2, prompt, valid, completion, mask, zeros.astype(jnp.int32), zeros)


def log_softmax(logits: np.ndarray) -> np.ndarray:
  """In float64, for the naive versions."""
  logits = np.asarray(logits, np.float64)
  shifted = logits - logits.max(-1, keepdims=True)
  return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def allowed(logits: np.ndarray) -> np.ndarray:
  """Float64 logits with the forbidden ids at minus infinity."""
  logits = np.array(logits, np.float64)
  logits[..., list(FORBIDDEN)] = -np.inf
  return logits
