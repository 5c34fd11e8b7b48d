"""The weights of a run: which of them are trained, how they are placed, and how they start."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from d1jax import keys, state
from d1jax.fingerprint import fingerprint
from d1jax.models import load, lora
from d1jax.models.lora import LoraSpec
from d1jax.models.transformer import Network, Params
from d1jax.parallel import mesh as meshes
from d1jax.parallel.sides import check_apart
from d1jax.source import Source
from d1jax.state import Frozen, TrainState


@dataclasses.dataclass(frozen=True)
class Weights:
  """The weights of a model: all trained in float32, or adapters on a frozen base, or only a quantised base.

  Attributes:
    network: the pure functions of the model.
    mesh: the devices.
    rules: maps logical axes to mesh axes in updates.
    rollout_rules: the same in rollouts.
    seed: the seed of random weights.
    source: the folder of the weights; None: they are drawn.
    lora: the adapters; None: everything is trained.
    quantized: the storage of the base: `int8`, `nf4` or None. If quantised and without adapters, nothing is trained.
    base_dtype: the dtype of the network's products, of a base that is not quantised, and of its other leaves.
    rollout_mesh: the devices of rollouts; None: `mesh`.
  """

  network: Network
  mesh: Mesh
  rules: meshes.Rules
  rollout_rules: meshes.Rules
  seed: int
  source: Source | None = None
  lora: LoraSpec | None = None
  quantized: str | None = None
  base_dtype: Any = jnp.float32
  rollout_mesh: Mesh | None = None

  @property
  def sampling_mesh(self) -> Mesh:
    """The devices of rollouts."""
    return self.mesh if self.rollout_mesh is None else self.rollout_mesh

  @property
  def apart(self) -> bool:
    """Whether rollouts have devices of their own."""
    return self.sampling_mesh != self.mesh

  @property
  def has_base(self) -> bool:
    """Whether there is a frozen base."""
    return self.lora is not None or self.quantized is not None

  @property
  def key(self) -> jax.Array:
    """The run's key, in a new buffer each time, because a state that contains it is donated."""
    return keys.seeded(self.seed)

  @property
  def replicated(self) -> NamedSharding:
    """The placement of scalars."""
    return meshes.sharding(self.mesh, self.rules)

  @functools.cached_property
  def trainable_axes(self) -> Params:
    """The logical axes of the trained weights."""
    if self.lora:
      return lora.axes(self.lora, self.network.axes)
    return {} if self.has_base else self.network.axes

  @functools.cached_property
  def trainable_placement(self) -> Params:
    """The placements of the trained weights."""
    return meshes.shardings(self.mesh, self.rules, self.trainable_axes)

  @functools.cached_property
  def base_placement(self) -> Params:
    """The placements of the frozen base; empty if everything is trained."""
    if not self.has_base:
      return {}
    axes = lora.quantized_axes(self.network.axes) if self.quantized else self.network.axes
    return meshes.shardings(self.mesh, self.rules, axes)

  def check(self) -> None:
    """Raises a ValueError if meshes overlap or do not divide a weight or a head, or if the folder lacks a weight."""
    check_apart(self.mesh, self.sampling_mesh)
    if self.source is not None:
      load.check(self.source.folder, self.network)
    meshes.check_divides(self._initial, self.trainable_placement)
    if self.has_base:
      meshes.check_divides(load.abstract(self.network, self.base_dtype, self.quantized), self.base_placement)
    self._check_heads()

  def _check_heads(self) -> None:
    """Checks that no head is split: its device would need the rest of the head from others in every layer."""
    sides = (("rules", self.mesh, self.rules), ("rollout_rules", self.sampling_mesh, self.rollout_rules))
    for field, mesh, rules in sides:
      sizes = {"heads": self.network.size.heads, "kv_heads": self.network.size.key_value_heads}
      for axis, size in sizes.items():
        devices = meshes.ways(mesh, rules, axis)
        if size % devices:
          raise ValueError(
            f"{field} cut {axis} over {devices} devices, but the network has {size}: change {field}.{axis} or the mesh"
            f" so that they divide {size}"
          )

  def frozen_placement(self, *, with_reference: bool = False) -> Frozen:
    """The placements of the frozen weights; a separate reference exists only in full fine-tuning."""
    return Frozen(self.base_placement, self.trainable_placement if with_reference and not self.has_base else {})

  def abstract_frozen(self, *, with_reference: bool = False) -> Frozen:
    """Shapes, types and placements of the frozen weights; no memory is allocated."""
    base: Params = {}
    if self.has_base:
      base = load.abstract(self.network, self.base_dtype, self.quantized)
    reference = self._shapes if with_reference and not self.has_base else {}
    return meshes.with_placements(Frozen(base, reference), self.frozen_placement(with_reference=with_reference))

  @functools.cached_property
  def frozen(self) -> Frozen:
    """The base, read or drawn; empty if everything is trained."""
    if not self.has_base:
      return Frozen({}, {})
    if self.source is not None:
      return Frozen(self._read(self.base_dtype, self.base_placement, self.quantized), {})

    def draw(key: jax.Array) -> Params:
      params = jax.tree.map(lambda w: w.astype(self.base_dtype), self.network.init(key))
      return lora.quantized(params, self.quantized) if self.quantized else params

    make = jax.jit(draw, in_shardings=self.replicated, out_shardings=self.base_placement)
    return Frozen(make(self._purpose_key(keys.Purpose.INITIALISATION)), {})

  @functools.cached_property
  def base_fingerprint(self) -> str | None:
    """The fingerprint of the base to which adapters belong; None if everything is trained."""
    return fingerprint(self.frozen.base) if self.has_base else None

  @property
  def merges(self) -> bool:
    """Whether adapters are added into their base for rollouts."""
    return self.lora is not None and self.quantized is None

  @functools.cached_property
  def _shapes(self) -> Params:
    return jax.eval_shape(self.network.init, self.key)

  @functools.cached_property
  def _initial(self) -> Params:
    """Shapes and types of the trained weights."""
    return jax.eval_shape(self._init, self.key)

  @functools.cached_property
  def _abstract_states(self) -> dict[optax.GradientTransformation, TrainState]:
    """A cache for `abstract_state`, because tracing a network takes time."""
    return {}

  def _purpose_key(self, purpose: keys.Purpose) -> jax.Array:
    return meshes.place(keys.purpose_key(self.key, purpose), self.replicated)

  def _read(self, dtype: Any, placement: Params, quantized: str | None) -> Params:
    if self.source is None:
      raise ValueError("the weights come from no folder")
    return load.read(self.source.folder, self.network, dtype, placement, quantized=quantized)

  def _init(self, key: jax.Array) -> Params:
    """Draws the first trained weights; not used for weights that are read."""
    if self.lora:
      return lora.init(key, self.lora, self._shapes)
    return {} if self.has_base else self.network.init(key)

  def state_placement(self, optimizer: optax.GradientTransformation) -> Any:
    """The placements of a TrainState, as a TrainState."""
    return jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state(optimizer))

  @functools.cached_property
  def abstract_trainable(self) -> Params:
    """Shapes, types and placements of the trained weights; no memory is allocated."""
    return meshes.with_placements(self._initial, self.trainable_placement)

  def abstract_state(self, optimizer: optax.GradientTransformation) -> TrainState:
    """Shapes, types and placements of a TrainState; no memory is allocated."""
    if optimizer not in self._abstract_states:
      begin = lambda trainable, key: state.create(lambda _: trainable, optimizer, key, key)
      abstract = jax.eval_shape(begin, self._initial, self.key)
      placement = meshes.state_shardings(self.mesh, self.rules, self.trainable_axes, self._initial, optimizer)
      self._abstract_states[optimizer] = meshes.with_placements(abstract, placement)
    return self._abstract_states[optimizer]

  def start(self, dtype: Any = jnp.float32) -> Params:
    """The first trained weights: read from the folder, drawn, or new adapters.

    Training needs float32; a whole model that is only evaluated may be read in another dtype.
    """
    if self.source is not None and not self.has_base:
      return self._read(dtype, self.trainable_placement, None)
    purpose = keys.Purpose.ADAPTER if self.lora else keys.Purpose.INITIALISATION
    make = jax.jit(self._init, in_shardings=self.replicated, out_shardings=self.trainable_placement)
    return make(self._purpose_key(purpose))

  def fresh_state(self, optimizer: optax.GradientTransformation) -> TrainState:
    """A state at step 0 that starts from `start()`."""
    return self.state_from(self.start(), optimizer, donate=True)

  def state_from(
    self, trainable: Params, optimizer: optax.GradientTransformation, *, donate: bool = False
  ) -> TrainState:
    """A state at step 0 with given weights, which are copied unless they are donated.

    Raises:
      ValueError: no weights are trained.
    """
    if self.has_base and not self.lora:
      raise ValueError(
        f"quantised weights ({self.quantized}) are not trained: give adapters, such as lora=Lora(64, 128)"
      )

    def begin(trainable: Params, key: jax.Array) -> TrainState:
      return state.create(lambda _: jax.tree.map(jnp.copy, trainable), optimizer, key, key)

    return jax.jit(
      begin,
      in_shardings=(self.trainable_placement, self.replicated),
      out_shardings=self.state_placement(optimizer),
      donate_argnums=0 if donate else (),
    )(trainable, meshes.place(self.key, self.replicated))


def check_base(weights: Weights, metadata: Mapping[str, Any]) -> None:
  """Raises a ValueError if a checkpoint's adapters belong to another base than that of `weights`."""
  if metadata.get("base") != weights.base_fingerprint:
    where = weights.source.folder if weights.source else "the random base of this seed"
    raise ValueError(f"the checkpoint's adapters were trained on other weights than {where}: give model.pretrained")
