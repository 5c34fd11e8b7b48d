"""Counter-based randomness: every key is a fold of what the draw is for, never of where it is computed.

A key is `fold_in` of (run seed, purpose, step, sample id, ...). Nothing depends on a batch position, a canvas position,
a device or a process, so that prompts, masks and uniforms are bit-identical on any mesh. The functions rely on JAX's
partitionable threefry (the default), under which element i of a draw depends on the key and on i alone.
"""

import enum

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt32


class Purpose(enum.IntEnum):
  """What a draw is for; the second counter of every key. Numbers are part of a run's identity: never reuse one."""

  INITIALISATION = 0
  CORRUPTION = 1
  ROLLOUT = 2
  PROMPT_MASK = 3
  EVALUATION = 4
  SFT_PROMPT_MASK = 5
  DROPOUT = 6
  ADAPTER = 7


def purpose_key(key: Key[Array, ""], purpose: Purpose, step: Int[Array, ""] | int = 0) -> Key[Array, ""]:
  """The key of one purpose at one step of the run whose key is given."""
  return jax.random.fold_in(jax.random.fold_in(key, int(purpose)), step)


def sample_keys(key: Key[Array, ""], sample_id: Int[Array, "B"]) -> Key[Array, "B"]:
  """One key a sample, a function of its id alone."""
  return jax.vmap(lambda i: jax.random.fold_in(key, i))(sample_id)


def fold(keys: Key[Array, "B"], counter: Int[Array, ""] | int) -> Key[Array, "B"]:
  """Folds one counter into each of a batch of keys."""
  return jax.vmap(lambda k: jax.random.fold_in(k, counter))(keys)


def token_keys(key: Key[Array, ""], sample_id: Int[Array, "B"], place: UInt32[Array, "L"]) -> Key[Array, "B L"]:
  """One key a token, a function of its sample's id and its place alone."""
  one = lambda sample_key: jax.vmap(lambda i: jax.random.fold_in(sample_key, i))(place)
  return jax.vmap(one)(sample_keys(key, sample_id))


def uniforms(keys: Key[Array, "B"], length: int) -> Float[Array, "B length"]:
  """Uniforms in [0, 1): element (b, i) depends on `keys[b]` and i alone, whatever the length."""
  return jax.vmap(lambda k: jax.random.uniform(k, (length,), jnp.float32))(keys)
