"""Publishes weights: one compiled program merges, casts and moves the trained weights for rollouts."""

from typing import Any

import jax

from d1jax import state
from d1jax.models import lora
from d1jax.models.quantize import Quantized
from d1jax.models.transformer import Params
from d1jax.parallel import mesh as meshes
from d1jax.parallel.sides import across
from d1jax.state import Frozen
from d1jax.weights import Weights


class Publisher:
  """Converts the weights of updates into those of rollouts; only this class knows both placements.

  Adapters are added into a float base, and stay separate from a quantised one. Every leaf is cast to the dtype of the
  network's products, which would otherwise cast it in every forward pass. Both happen on the placement of updates,
  before anything moves: a merged bfloat16 leaf has half the bytes of the float32 one, and no adapters move with it.
  A leaf that rollouts take unchanged costs nothing, unless rollouts have devices of their own, to which every leaf is
  copied. All other leaves move each time, also those of a frozen base: a
  second copy of it would need memory during updates.

  Attributes:
    placement: the placements of published weights.
    abstract: their shapes, types and placements.
    received_bytes: the bytes that a device receives in a publication; the largest number of any device.
  """

  def __init__(self, weights: Weights, trainable: Params):
    """Defines the program; nothing is compiled yet.

    `trainable` has shapes, types and placements of the trained weights.

    Raises:
      ValueError: the mesh does not divide a weight or the heads under `rollout_rules`.
    """
    self._weights = weights
    axes = weights.network.axes
    if weights.quantized:
      axes = lora.overlay(lora.quantized_axes(axes), weights.trainable_axes)
    self._arguments = trainable, weights.abstract_frozen().base
    shapes = jax.eval_shape(self._merged, *self._arguments)
    before = meshes.shardings(weights.mesh, weights.rules, axes)
    after = meshes.shardings(weights.sampling_mesh, weights.rollout_rules, axes)
    meshes.check_divides(shapes, after)
    self.received_bytes = meshes.received_bytes(shapes, before, after)
    self._before = before
    same = lambda x, old, new: old if new.is_equivalent_to(old, x.ndim) else new
    self.placement = jax.tree.map(same, shapes, before, after)
    self.abstract = meshes.with_placements(shapes, self.placement)
    # The program runs on the devices of updates. If rollouts have others, it leaves the weights as updates place them.
    self._made_at = before if weights.apart else self.placement

    # An argument that is returned unchanged is one variable of the trace, input and output: `_kept` holds its place
    # among the inputs, so that the array itself can be returned. With inputs (a, b, c) and outputs (a, cast(b), c),
    # `_kept` is [0, None, 2], and the compiled program computes only cast(b).
    traced = jax.make_jaxpr(self._publish)(*self._arguments).jaxpr
    places = {id(variable): place for place, variable in enumerate(traced.invars)}
    self._kept = [places.get(id(variable)) for variable in traced.outvars]
    self._program = jax.jit(
      self._made,
      in_shardings=jax.tree.map(lambda x: x.sharding, self._arguments),
      out_shardings=self._new(self._made_at),
    )
    self._compiled: Any = None

  def _merged(self, trainable: Params, base: Params) -> Params:
    params = state.merge_for_rollout(trainable, Frozen(base, {}))
    few_bits = lambda leaf: isinstance(leaf, Quantized)
    cast = lambda leaf: leaf if few_bits(leaf) else leaf.astype(self._weights.base_dtype)
    return jax.tree.map(cast, params, is_leaf=few_bits)

  def _publish(self, trainable: Params, base: Params) -> Params:
    return meshes.moved(self._merged(trainable, base), self._before, self._made_at)

  def _new(self, tree: Any) -> list[Any]:
    """The published leaves that are computed. The others are arguments, which XLA would copy if it returned them."""
    return [leaf for leaf, place in zip(jax.tree.leaves(tree), self._kept, strict=True) if place is None]

  def _made(self, trainable: Params, base: Params) -> list[jax.Array]:
    return self._new(self._publish(trainable, base))

  def trace(self) -> jax.stages.Traced:
    """The traced program, from shapes alone."""
    return self._program.trace(*self._arguments)

  def compile(self) -> None:
    """Compiles the program, once."""
    if self._compiled is None:
      self._compiled = self.trace().lower().compile()

  def __call__(self, trainable: Params, base: Params) -> Params:
    """The published weights; some of the arrays may be arguments themselves."""
    self.compile()
    given, made = jax.tree.leaves((trainable, base)), iter(self._compiled(trainable, base))
    leaves = [next(made) if place is None else given[place] for place in self._kept]
    published = jax.tree.unflatten(jax.tree.structure(self.abstract), leaves)
    return across(published, self.placement) if self._weights.apart else published
