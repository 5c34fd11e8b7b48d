"""What a traced program holds."""

from collections.abc import Callable, Iterator
from typing import Any

import jax


def _programs_in(value: Any) -> Iterator[Any]:
  if hasattr(value, "jaxpr"):
    yield value.jaxpr
  elif hasattr(value, "eqns"):
    yield value
  elif isinstance(value, (tuple, list)):
    for item in value:
      yield from _programs_in(item)


def _shapes(jaxpr: Any) -> Iterator[tuple[int, ...]]:
  for equation in jaxpr.eqns:
    for variable in equation.outvars:
      yield tuple(variable.aval.shape)
    for parameter in equation.params.values():
      for inner in _programs_in(parameter):
        yield from _shapes(inner)


def shapes(function: Callable[..., Any], *args: Any) -> set[tuple[int, ...]]:
  """The shapes of all values that a function computes, those inside loops, branches and recomputations included."""
  return set(_shapes(jax.make_jaxpr(function)(*args).jaxpr))
