"""Gradient accumulation: a batch as a sum over micro-batches."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def split_rows(tree: Any, parts: int) -> Any:
  """[B, ...] -> [parts, B / parts, ...]; part m has rows m, m + parts, ..., so each device has a share of each part."""

  def split(x: jax.Array) -> jax.Array:
    if x.shape[0] % parts:
      raise ValueError(f"{parts} micro-batches do not divide a batch of {x.shape[0]} rows")
    return jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)

  return jax.tree.map(split, tree)


def sum_over_parts(function: Callable[[Any], Any], parts: Any) -> Any:
  """The sum of `function` over the leading axis of `parts`, with one part in memory at a time."""
  first = jax.tree.map(lambda x: x[0], parts)
  if jax.tree.leaves(parts)[0].shape[0] == 1:
    return function(first)
  zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(function, first))
  return jax.lax.scan(lambda total, part: (jax.tree.map(jnp.add, total, function(part)), None), zeros, parts)[0]
