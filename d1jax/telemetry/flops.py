"""FLOPs of a program's matrix products, counted in its trace: a multiplication and an addition count one each.

Nothing states what it costs: a new network, estimator or loss is counted as it was traced. (XLA's own count takes the
body of a loop once.)

- A `scan` counts as often as it runs, and the costliest branch of a `cond` counts.
- Nobody knows from a trace how often a `while_loop` runs, and its body counts once. What a sampler repeats stands in a
  scope (see `d1jax.diffusion.blocks.pass_over`), so that it can be multiplied by the passes that were measured.
- What the backward pass computes again to save memory is counted apart: JAX names that scope `rematted_computation`,
  and so does a backward pass that is written by hand.
- Products that no result needs do not count: the compiler drops them.
- Norms, softmax, rotary turns and the look-up of embeddings are no matrix products, and neither is an inner product of
  vectors.
"""

import functools
import math
import operator
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
from jax.interpreters import partial_eval

from d1jax.diffusion.denoiser import FORWARD_PASS
from d1jax.diffusion.vocabulary import REPEATED
from d1jax.parallel.attention import KERNEL

_SCOPE = re.compile(r"d1jax\.\w+")

_KERNELS = {"pallas_call": 1, "dot_product_attention_fwd_wrapper": 1, "dot_product_attention_bwd_wrapper": 2}
"""Kernels by their primitives, and how often the FLOPs that their scope states count: cuDNN's backward pass is one
kernel, splash attention's are two."""


class Products(NamedTuple):
  """What a program computes, on all devices together.

  Attributes:
    flops: of the model.
    repeated: FLOPs beyond the model's, which the backward pass computes again.
    passes: forward passes of a row; those that the backward pass repeats are not counted.
  """

  flops: int = 0
  repeated: int = 0
  passes: int = 0


Counted = Mapping[frozenset[str], Products]
"""What stands in each set of scopes named `d1jax....`; the empty set has what stands in none."""


def count(traced: jax.stages.Traced) -> Counted:
  """The products of a traced program by the scopes that they stand in."""
  jaxpr = traced.jaxpr.jaxpr
  needed, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
  found = +_count(needed, frozenset(), False)
  return {
    scopes: Products(*(found[scopes, kind] for kind in Products._fields)) for scopes in {scopes for scopes, _ in found}
  }


def total(parts: Iterable[Products]) -> Products:
  """The sum."""
  return Products(*map(sum, zip(*parts, strict=True)))


_Found = Counter[tuple[frozenset[str], str]]


def _count(jaxpr: Any, scopes: frozenset[str], repeated: bool) -> _Found:
  found: _Found = Counter()
  for equation in jaxpr.eqns:
    stack = str(equation.source_info.name_stack)  # of a loop's body: from the loop on
    found.update(_equation(equation, scopes.union(_SCOPE.findall(stack)), repeated or REPEATED in stack))
  return found


def _equation(equation: Any, scopes: frozenset[str], repeated: bool) -> _Found:
  name, params = equation.primitive.name, equation.params
  stated = {scope for scope in scopes if scope.startswith(KERNEL)}
  key = lambda kind: (scopes - stated, kind)
  if name == "name" and params["name"] == FORWARD_PASS:
    return Counter() if repeated else Counter({key("passes"): equation.invars[0].aval.shape[0]})
  flops = 0
  if name == "dot_general":
    flops = _dot(equation)
  elif name == "conv_general_dilated":
    weight, channels = equation.invars[1].aval.shape, params["dimension_numbers"].rhs_spec[0]
    flops = 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(weight) // weight[channels]
  elif name in _KERNELS and stated:
    flops = _KERNELS[name] * int(next(iter(stated)).removeprefix(KERNEL))
  else:
    inner = [_count(program, scopes, repeated) for value in params.values() for program in _programs_in(value)]
    found: _Found = functools.reduce(operator.or_ if name == "cond" else operator.add, inner, Counter())
    times = _times(name, params)
    return Counter({each: times * number for each, number in found.items()})
  return Counter({key("repeated" if repeated else "flops"): flops})


def _dot(equation: Any) -> int:
  (contracted, _), (batch, _) = equation.params["dimension_numbers"]
  left, right = (variable.aval.shape for variable in equation.invars)
  if len(left) == len(right) == len(contracted) + len(batch):
    return 0  # inner products of vectors
  return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _times(name: str, params: Mapping[str, Any]) -> int:
  """How often the programs in an equation run, on all devices together."""
  if name == "scan":
    return params["length"]
  if name == "pallas_call":
    return math.prod(params["grid_mapping"].grid)
  if name == "shard_map":  # each device has a part of what comes in and of what goes out
    axes = _axes(params["in_specs"]) & _axes(params["out_specs"])
    return math.prod(params["mesh"].shape[axis] for axis in axes)
  return 1


def _axes(specs: Iterable[Any]) -> set[str]:
  """The axes of a mesh that arrays with these specs are cut over."""
  entries = [entry for spec in specs for entry in spec if entry is not None]
  return {axis for entry in entries for axis in ((entry,) if isinstance(entry, str) else entry)}


def _programs_in(value: Any) -> Iterator[Any]:
  if hasattr(value, "jaxpr"):
    yield value.jaxpr
  elif hasattr(value, "eqns"):
    yield value
  elif isinstance(value, (tuple, list)):
    for item in value:
      yield from _programs_in(item)
