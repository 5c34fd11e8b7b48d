"""What a traced program holds."""

import math
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


def _dot_flops(jaxpr: Any, branch: Callable[[list[int]], int]) -> int:
  total = 0
  for equation in jaxpr.eqns:
    inner = [_dot_flops(program, branch) for value in equation.params.values() for program in _programs_in(value)]
    name = equation.primitive.name
    if name == "dot_general":
      (contracted, _), _ = equation.params["dimension_numbers"]
      left = equation.invars[0].aval.shape
      total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
    elif name == "scan":
      total += equation.params["length"] * sum(inner)
    elif name == "cond":
      total += branch(inner)
    elif name == "while":
      assert not sum(inner), "nobody knows how often this loop multiplies"
    else:
      total += sum(inner)
  return total


def dot_flops(function: Callable[..., Any], *args: Any, branch: Callable[[list[int]], int] = max) -> int:
  """The FLOPs of all matrix products that a function computes, loops as often as they run; `branch` says what those of
  the branches of a condition come to.
  """
  return _dot_flops(jax.make_jaxpr(function)(*args).jaxpr, branch)
