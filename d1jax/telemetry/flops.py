"""FLOPs of a program's matrix products, counted in its trace; a multiply-add counts as two.

No part declares its cost: a new network, estimator or loss is counted from its trace. (XLA's own count takes the body
of a loop only once.)

- The body of a `scan` counts as often as it runs; of a `cond`, the most expensive branch counts.
- A trace does not say how often a `while_loop` runs, so its body counts once. The body of a sampler's loop has a named
  scope (see `d1jax.diffusion.blocks.pass_over`), so that its count can be multiplied by the measured passes.
- Work that the backward pass repeats to save memory is counted separately. JAX names its scope `rematted_computation`,
  and so do our hand-written backward passes.
- Products whose result is not used do not count, because the compiler drops them.
- Norms, softmax, the rotary embedding, the look-up of embeddings and inner products of vectors are not matrix products,
  and do not count.
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
"""Kernels by primitive, and how many times the FLOPs stated by their scope count: cuDNN's backward pass is one
kernel, splash attention's are two."""


class Products(NamedTuple):
  """The matrix products of a program, on all devices together.

  Attributes:
    flops: the model's FLOPs.
    repeated: further FLOPs, which the backward pass computes again.
    passes: forward passes of a row, without those repeated in the backward pass.
  """

  flops: int = 0
  repeated: int = 0
  passes: int = 0


Counted = Mapping[frozenset[str], Products]
"""The products inside each set of scopes named `d1jax....`; the empty set has those outside of all scopes."""


def count(traced: jax.stages.Traced) -> Counted:
  """The products of a traced program by their scopes."""
  jaxpr = traced.jaxpr.jaxpr
  needed, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
  found = +_count(needed, frozenset(), False)
  return {
    scopes: Products(*(found[scopes, kind] for kind in Products._fields)) for scopes in {scopes for scopes, _ in found}
  }


def total(parts: Iterable[Products]) -> Products:
  """The sum of some products."""
  return Products(*map(sum, zip(*parts, strict=True)))


_Found = Counter[tuple[frozenset[str], str]]


def _count(jaxpr: Any, scopes: frozenset[str], repeated: bool) -> _Found:
  found: _Found = Counter()
  for equation in jaxpr.eqns:
    stack = str(equation.source_info.name_stack)  # inside a loop's body, the stack begins at the loop
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
    flops = _KERNELS[name] * min(int(scope.removeprefix(KERNEL)) for scope in stated)
  else:
    inner = [_count(program, scopes, repeated) for value in params.values() for program in programs_in(value)]
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
  """How often the programs inside an equation run, on all devices together."""
  if name == "scan":
    return params["length"]
  if name == "pallas_call":
    return math.prod(params["grid_mapping"].grid)
  if name == "shard_map":  # each device has a part of the inputs and outputs
    axes = _axes(params["in_specs"]) & _axes(params["out_specs"])
    return math.prod(params["mesh"].shape[axis] for axis in axes)
  return 1


def _axes(specs: Iterable[Any]) -> set[str]:
  """The mesh axes over which arrays with these specs are sharded."""
  entries = [entry for spec in specs for entry in spec if entry is not None]
  return {axis for entry in entries for axis in ((entry,) if isinstance(entry, str) else entry)}


def programs_in(value: Any) -> Iterator[Any]:
  """The programs in a parameter of an equation: the body of a loop, the branches of a condition, a called function."""
  if hasattr(value, "jaxpr"):
    yield value.jaxpr
  elif hasattr(value, "eqns"):
    yield value
  elif isinstance(value, (tuple, list)):
    for item in value:
      yield from programs_in(item)
