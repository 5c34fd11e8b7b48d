"""Exact draws from a tempered softmax, one uniform a draw, in float32."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

TILE = 64
"""Vocabulary ids whose mass is summed together. Draws depend on it, so it never changes; the vocabularies of LLaDA
(126,464) and Dream (152,064) are cut over 2, 4 and 8 devices at its multiples."""


def log_prob(logits: Float[Array, "*B V"], tokens: Int[Array, "*B"]) -> Float[Array, "*B"]:
  """Log softmax(logits) at the given tokens, in float32."""
  logits = logits.astype(jnp.float32)
  return _at(logits, tokens) - jax.nn.logsumexp(logits, axis=-1)


def _first_true(flags: Bool[Array, "*B N"]) -> Int[Array, "*B"]:
  """The index of the first true entry of the last axis, the last one where there is none; faster than an argmax on a
  CPU.
  """
  index = jax.lax.broadcasted_iota(jnp.int32, flags.shape, flags.ndim - 1)
  return jnp.min(jnp.where(flags, index, flags.shape[-1] - 1), axis=-1)


def _search(mass: Float[Array, "*B N"], cumulative: Float[Array, "*B N"], target: Float[Array, "*B"]) -> jax.Array:
  """The first entry of positive mass whose cumulative mass exceeds `target`; where rounding leaves none, the last of
  positive mass.
  """
  # `target` is uniform * total, rounded: it may equal the total, and then no cumulative mass exceeds it. A float32 sum
  # may also grow over an entry of mass 0, when a parallel sum adds in another order. Hence both conditions, and the
  # last entry of positive mass as an answer: of masses [1, 2, 0] and target 3, that is entry 1, not entry 2.
  possible = mass > 0
  beyond = possible & (cumulative > target[..., None])
  last = mass.shape[-1] - 1 - _first_true(possible[..., ::-1])
  return jnp.where(jnp.any(beyond, axis=-1), _first_true(beyond), last)


def inverse_cdf(logits: Float[Array, "*B V"], uniform: Float[Array, "*B"]) -> Int[Array, "*B"]:
  """Draws from softmax(logits) by inverting its distribution function: the first token whose cumulative mass exceeds
  `uniform`.

  Two searches: for the tile of `TILE` ids, in the cumulative sum over tiles, then for the token inside it. The
  vocabulary may be sharded at the tiles' bounds without changing a draw. A token of probability zero is never drawn,
  whatever the rounding of the cumulative sums.

  Args:
    logits: minus infinity forbids a token.
    uniform: in [0, 1).
  """
  if logits.shape[-1] > TILE:
    return _through_tiles(logits, uniform, lambda x: x)[0]
  mass = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
  cumulative = jnp.cumsum(mass, axis=-1)
  return _search(mass, cumulative, uniform * cumulative[..., -1])


def _through_tiles(
  logits: Float[Array, "*B V"], uniform: Float[Array, "*B"], temper: Callable[[jax.Array], jax.Array]
) -> tuple[Int[Array, "*B"], Float[Array, "*B"]]:
  """Draws from softmax(temper(logits)); returns the tokens and the logarithm of the softmax's denominator."""
  # With tiles of 2 ids for an example: masses [1, 2 | 3, 4] have tile masses [3, 7], cumulative [3, 10]. The uniform
  # 0.5 has the target 5. The first tile beyond 5 is tile 1; 3 lie before it, so that the target inside it is 2. Its
  # masses [3, 4] are cumulative [3, 7], the first beyond 2 is entry 0: the draw is token 1 * 2 + 0 = 2, as it is in the
  # cumulative sum of all, [1, 3, 6, 10]. Two short sums replace one of V entries, and a device that holds whole tiles
  # computes the same sums as one that holds all of them.
  top = temper(jnp.max(logits, axis=-1))  # the confidence needs the maximum of the raw logits too: one pass less
  mass = jnp.exp(temper(logits) - top[..., None])
  mass = jnp.pad(mass, [(0, 0)] * (mass.ndim - 1) + [(0, -mass.shape[-1] % TILE)])
  tiles = mass.reshape(*mass.shape[:-1], -1, TILE)
  tile_mass = jnp.sum(tiles, axis=-1)
  cumulative = jnp.cumsum(tile_mass, axis=-1)
  total = cumulative[..., -1]
  target = uniform * total
  tile = _search(tile_mass, cumulative, target)
  before = jnp.where(tile > 0, _at(cumulative, tile - 1), 0.0)
  inside = jnp.take_along_axis(tiles, tile[..., None, None], axis=-2)[..., 0, :]
  token = tile * TILE + _search(inside, jnp.cumsum(inside, axis=-1), target - before)
  return token, jnp.log(total) + top


def _at(x: Float[Array, "*B N"], index: Int[Array, "*B"]) -> Float[Array, "*B"]:
  return jnp.take_along_axis(x, index[..., None], axis=-1)[..., 0]


def propose_each(
  logits: Float[Array, "*B V"], uniform: Float[Array, "*B"], temperature: Float[Array, "*B"]
) -> tuple[Int[Array, "*B"], Float[Array, "*B"]]:
  """`propose` with a temperature for each position, an argument of the compiled program."""
  # A compiler turns a division by a constant into a product with its reciprocal, which rounds otherwise than a
  # division: the product here gives the bits of `propose`, whose temperature is a constant.
  warm = temperature > 0
  reciprocal = 1 / jnp.where(warm, temperature, 1.0)
  drawn, logp = _drawn(logits, uniform, lambda x: x * jnp.expand_dims(reciprocal, range(temperature.ndim, x.ndim)))
  return jnp.where(warm, drawn, _most_probable(logits)), jnp.where(warm, logp, 0.0)


def propose(
  logits: Float[Array, "*B V"], uniform: Float[Array, "*B"], temperature: float
) -> tuple[Int[Array, "*B"], Float[Array, "*B"]]:
  """Proposes a token a position: a draw from softmax(logits / temperature), or the argmax at temperature 0.

  Returns:
    The tokens, and the log-probability that the tempered distribution gives them (0 at temperature 0).
  """
  if temperature == 0:
    tokens = _most_probable(logits)
    return tokens, jnp.zeros(tokens.shape, jnp.float32)
  return _drawn(logits, uniform, lambda x: x / temperature)


def _most_probable(logits: Float[Array, "*B V"]) -> Int[Array, "*B"]:
  return _first_true(logits == jnp.max(logits, axis=-1, keepdims=True))


def _drawn(
  logits: Float[Array, "*B V"], uniform: Float[Array, "*B"], temper: Callable[[jax.Array], jax.Array]
) -> tuple[Int[Array, "*B"], Float[Array, "*B"]]:
  """Draws from softmax(temper(logits)), and the log-probabilities of the draws; `temper` also takes [*B]."""
  if logits.shape[-1] > TILE:
    tokens, log_total = _through_tiles(logits, uniform, temper)
    return tokens, temper(_at(logits, tokens)) - log_total
  tempered = temper(logits)
  tokens = inverse_cdf(tempered, uniform)
  return tokens, log_prob(tempered, tokens)
