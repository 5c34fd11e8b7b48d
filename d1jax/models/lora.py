"""Low-rank adapters on the projections of a frozen network (LoRA, arXiv 2106.09685).

A projection with an adapter computes `x @ w + scale * (x @ a) @ b` with scale = alpha / rank. `b` starts at zero, so a
new adapter changes nothing; the network without its adapter is the reference policy.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Key

from d1jax.models import quantize
from d1jax.models.layers import DropoutKeys, dense, project
from d1jax.models.quantize import Quantized

Params = Any

PROJECTIONS: Mapping[str, tuple[str, str]] = {
  "q_proj": ("attention", "query"),
  "k_proj": ("attention", "key"),
  "v_proj": ("attention", "value"),
  "o_proj": ("attention", "out"),
  "gate_proj": ("mlp", "gate"),
  "up_proj": ("mlp", "up"),
  "down_proj": ("mlp", "down"),
}
"""The projections of a block by Llama's names, and their paths in a block's parameters."""


@dataclasses.dataclass(frozen=True)
class LoraSpec:
  """The settings of adapters.

  Attributes:
    rank: r.
    alpha: the addition is scaled by alpha / rank.
    dropout: the share of an adapter's inputs that supervised fine-tuning drops.
    targets: names in `PROJECTIONS`.
    rslora: True scales by alpha / sqrt(rank) instead, so that a large rank learns as fast as a small one
      (rank-stabilised LoRA, arXiv 2312.03732).
  """

  rank: int
  alpha: float
  dropout: float = 0.0
  targets: tuple[str, ...] = tuple(PROJECTIONS)
  rslora: bool = False

  @property
  def scale(self) -> float:
    """The factor of the addition."""
    return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

  def __post_init__(self) -> None:
    if self.rank < 1 or not self.alpha > 0 or not 0 <= self.dropout < 1:
      raise ValueError(
        f"lora rank={self.rank}, alpha={self.alpha}, dropout={self.dropout}:"
        " rank is at least 1, alpha positive, dropout in [0, 1)"
      )
    unmatched = [name for name in self.targets if name not in PROJECTIONS]
    if unmatched:
      raise ValueError(f"lora targets {', '.join(unmatched)} match no projection; known: {', '.join(PROJECTIONS)}")
    if not self.targets or len(set(self.targets)) < len(self.targets):
      raise ValueError(f"lora targets {self.targets} are empty or name a projection twice")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapter:
  """The addition to one projection of every layer.

  Attributes:
    a: the down projection to the rank, float32 [layers in rank].
    b: the up projection, float32 [layers rank out].
    scale: the factor of the addition, see `LoraSpec`.
    dropout: the share of the inputs that supervised fine-tuning drops.
  """

  a: Any
  b: Any
  scale: float = dataclasses.field(metadata={"static": True})
  dropout: float = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted:
  """A weight (an array or `Quantized`) and its adapter."""

  base: Any
  adapter: Adapter


@project.register
def _(w: Adapted, x: jax.Array, dtype: DTypeLike, dropout: DropoutKeys = None) -> jax.Array:
  adapter, y = w.adapter, project(w.base, x, dtype)
  if dropout is not None and adapter.dropout > 0:
    draw = lambda key: jax.random.bernoulli(key, 1 - adapter.dropout, x.shape[-1:])
    x = jnp.where(jax.vmap(jax.vmap(draw))(dropout), x / (1 - adapter.dropout), 0).astype(x.dtype)
  return y + dense(dense(x, adapter.a.astype(dtype)), adapter.b.astype(dtype)) * adapter.scale


def _each_target(spec: LoraSpec, blocks: Params, make: Callable[[Any, int], Adapter]) -> Params:
  """`{"blocks": {part: {weight: make(leaf of the block, index)}}}` for the targets."""
  made: dict[str, dict[str, Adapter]] = {}
  for index, (name, (part, weight)) in enumerate(PROJECTIONS.items()):
    if name in spec.targets:
      made.setdefault(part, {})[weight] = make(blocks[part][weight], index)
  return {"blocks": made}


def init(key: Key[Array, ""], spec: LoraSpec, shapes: Params) -> Params:
  """Draws a new adapter tree: `a` is uniform in +-1/sqrt(in) as in PEFT, `b` is zero.

  `shapes` are the network's parameters or their shapes; every leaf is dense.
  """

  def make(w: Any, index: int) -> Adapter:
    layers, inner, outer = w.shape
    bound = inner**-0.5
    draw = jax.random.uniform(jax.random.fold_in(key, index), (layers, inner, spec.rank), jnp.float32, -bound, bound)
    return Adapter(draw, jnp.zeros((layers, spec.rank, outer)), spec.scale, spec.dropout)

  return _each_target(spec, shapes["blocks"], make)


def axes(spec: LoraSpec, network_axes: Params) -> Params:
  """The logical axes of an adapter tree: `a` and `b` are sharded along their long axis, `embed` or `adapter`."""

  def make(named: tuple[str, str, str], _: int) -> Adapter:
    layers, inner, outer = (name if name in ("layers", "embed") else "adapter" for name in named)
    return Adapter((layers, inner, None), (layers, None, outer), spec.scale, spec.dropout)

  return _each_target(spec, network_axes["blocks"], make)


def overlay(params: Params, adapter: Params) -> Params:
  """The parameters with each adapter beside its weight; products are computed unmerged.

  Raises:
    ValueError: the adapter tree has a path that the parameters lack.
  """
  if isinstance(adapter, Adapter) and not isinstance(params, Mapping):
    return Adapted(params, adapter)
  known = params.keys() if isinstance(params, Mapping) else {"a weight"}
  if not isinstance(adapter, Mapping) or not adapter.keys() <= known:
    has = ", ".join(adapter) if isinstance(adapter, Mapping) else type(adapter).__name__
    raise ValueError(f"the adapter has {has} where the parameters have {', '.join(known)}")
  return {name: overlay(leaf, adapter[name]) if name in adapter else leaf for name, leaf in params.items()}


def merged(params: Params) -> Params:
  """Adds the adapters of `overlay` to their weights in float32 and casts once; a quantised base stays unmerged."""

  def one(leaf: Any) -> Any:
    if not isinstance(leaf, Adapted) or isinstance(leaf.base, Quantized):
      return leaf
    addition = jnp.einsum("lir,lro->lio", leaf.adapter.a, leaf.adapter.b, precision="highest")
    return (leaf.base.astype(jnp.float32) + leaf.adapter.scale * addition).astype(leaf.base.dtype)

  return jax.tree.map(one, params, is_leaf=lambda leaf: isinstance(leaf, Adapted))


def quantized(params: Params, kind: str) -> Params:
  """The parameters with every projection stored in few bits; other leaves are unchanged."""
  return _replace_projections(params, lambda w: quantize.quantize(w, kind))


def quantized_axes(network_axes: Params) -> Params:
  """The logical axes of `quantized` parameters."""
  return _replace_projections(network_axes, quantize.axes)


def _replace_projections(params: Params, change: Callable[[Any], Any]) -> Params:
  blocks = {name: dict(part) for name, part in params["blocks"].items()}
  for part, weight in PROJECTIONS.values():
    blocks[part][weight] = change(blocks[part][weight])
  return {**params, "blocks": blocks}
