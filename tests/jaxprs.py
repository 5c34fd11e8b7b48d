"""What a traced program holds."""

from collections.abc import Callable, Iterator
from typing import Any

import jax

from d1jax.telemetry.flops import programs_in


def _shapes(jaxpr: Any) -> Iterator[tuple[int, ...]]:
  for equation in jaxpr.eqns:
    for variable in equation.outvars:
      yield tuple(variable.aval.shape)
    for parameter in equation.params.values():
      for inner in programs_in(parameter):
        yield from _shapes(inner)


def shapes(function: Callable[..., Any], *args: Any) -> set[tuple[int, ...]]:
  """The shapes of all values that a function computes, those inside loops, branches and recomputations included."""
  return set(_shapes(jax.make_jaxpr(function)(*args).jaxpr))
