"""Counter-based randomness: every key depends on the purpose of its draw, never on where the draw is computed.

A key is `fold_in` of (run seed, purpose, step, sample id, ...). Nothing depends on a batch position, a canvas position,
a device or a process, so that prompts, masks and uniforms are bit-identical on any mesh. `seeded` names the generator,
JAX's partitionable threefry: element i of a draw depends only on the key and on i. Environment variables that choose
another generator have no effect.
"""

import enum

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt32


class Purpose(enum.IntEnum):
  """The purpose of a draw, the second counter of every key. Numbers are part of a run's identity: never reuse one."""

  INITIALISATION = 0
  CORRUPTION = 1
  ROLLOUT = 2
  PROMPT_MASK = 3
  EVALUATION = 4
  SFT_PROMPT_MASK = 5
  DROPOUT = 6
  ADAPTER = 7
  MASK_EMBEDDING = 8
  LIKELIHOOD = 9
  PREFERENCE = 10


def seeded(seed: int) -> Key[Array, ""]:
  """The key of a seed, from which all other keys are folded.

  Raises:
    ValueError: JAX would drop a part of the seed, or draws would depend on how arrays are sharded.
  """
  if not -(2**31) <= seed < 2**32:
    raise ValueError(f"the seed {seed} has more than 32 bits, of which the rest would be dropped: give a smaller one")
  if not jax.threefry_partitionable.value:
    raise ValueError("draws need jax_threefry_partitionable=True, JAX's default: unset JAX_THREEFRY_PARTITIONABLE")
  return jax.random.key(seed, impl="threefry2x32")


def purpose_key(key: Key[Array, ""], purpose: Purpose, step: Int[Array, ""] | int = 0) -> Key[Array, ""]:
  """The key of one purpose at one step; `key` is the run's key."""
  return jax.random.fold_in(jax.random.fold_in(key, int(purpose)), step)


def sample_keys(key: Key[Array, ""] | Key[Array, "B"], sample_id: Int[Array, "B"]) -> Key[Array, "B"]:
  """One key per sample; it depends only on the sample's id, and on its own key where `key` has one for each sample."""
  if key.ndim:
    return fold(key, sample_id)
  return jax.vmap(lambda i: jax.random.fold_in(key, i))(sample_id)


def fold(keys: Key[Array, "B"], counter: Int[Array, ""] | Int[Array, "B"] | int) -> Key[Array, "B"]:
  """Folds a counter into each of a batch of keys: the same one, or an array that has one for each of them."""
  if not isinstance(counter, int) and counter.ndim:
    return jax.vmap(jax.random.fold_in)(keys, counter)
  return jax.vmap(lambda k: jax.random.fold_in(k, counter))(keys)


def token_keys(key: Key[Array, ""], sample_id: Int[Array, "B"], place: UInt32[Array, "L"]) -> Key[Array, "B L"]:
  """One key per token; it depends only on the sample's id and the token's place."""
  one = lambda sample_key: jax.vmap(lambda i: jax.random.fold_in(sample_key, i))(place)
  return jax.vmap(one)(sample_keys(key, sample_id))


def uniforms(keys: Key[Array, "B"], length: int) -> Float[Array, "B length"]:
  """Uniforms in [0, 1): element (b, i) depends only on `keys[b]` and i, not on the length."""
  return jax.vmap(lambda k: jax.random.uniform(k, (length,), jnp.float32))(keys)
