"""A diffusion language model without a configuration: `from_pretrained(folder)`, `from_scratch(size, tokenizer)`."""

import dataclasses
import functools
from os import PathLike
from typing import Any

import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key

from d1jax.data.tokenizer import Tokenizer
from d1jax.diffusion.denoiser import Denoiser
from d1jax.models import load, transformer
from d1jax.models.families import PRESETS
from d1jax.models.lora import LoraSpec
from d1jax.models.transformer import Network, Params, TransformerSize
from d1jax.models.visibility import BlockCausal, TwoStreams
from d1jax.parallel import mesh as meshes
from d1jax.parallel.attention import attention
from d1jax.publish import Publisher
from d1jax.source import Source, fetch, inspect
from d1jax.state import Frozen, TrainState
from d1jax.weights import Weights


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
  """A denoiser, its tokenizer and its weights on a mesh; the weights are read when they are first used.

  Attributes:
    denoiser: pure functions of the parameters, for the placements of updates.
    rollout_denoiser: the same for the placements of rollouts; `denoiser` itself if these are equal.
    tokenizer: text to ids; None if the folder has none.
    weights: the trained and the frozen weights, and their placements.
    programs: the programs compiled for this model (`Completer.of`); they are freed with it.
  """

  denoiser: Denoiser
  rollout_denoiser: Denoiser
  tokenizer: Tokenizer | None
  weights: Weights
  programs: dict[Any, Any] = dataclasses.field(init=False, repr=False, default_factory=dict)

  @property
  def network(self) -> Network:
    """The pure functions of the transformer, and its sizes."""
    return self.weights.network

  @property
  def ways(self) -> int:
    """The number of devices over which a batch is split."""
    return meshes.batch_ways(self.weights.mesh, self.weights.rules)

  @property
  def rollout_ways(self) -> int:
    """The number of devices over which a batch is split in rollouts."""
    return meshes.batch_ways(self.weights.sampling_mesh, self.weights.rollout_rules)

  @property
  def length_ways(self) -> int:
    """The number of devices over which the positions of a canvas are split."""
    return meshes.ways(self.weights.mesh, self.weights.rules, "length")

  @property
  def replicated(self) -> NamedSharding:
    """The placement of scalars."""
    return self.weights.replicated

  @property
  def rollout_replicated(self) -> NamedSharding:
    """The placement of scalars in rollouts."""
    return meshes.sharding(self.weights.sampling_mesh, self.weights.rollout_rules)

  @property
  def by_row(self) -> NamedSharding:
    """The placement of a batch: rows are split over the batch axis."""
    return meshes.sharding(self.weights.mesh, self.weights.rules, "batch")

  @property
  def rollout_by_row(self) -> NamedSharding:
    """The placement of a batch in rollouts."""
    return meshes.sharding(self.weights.sampling_mesh, self.weights.rollout_rules, "batch")

  @functools.cached_property
  def publisher(self) -> Publisher:
    """Converts trained weights into the form that rollouts take."""
    return Publisher(self.weights, self.weights.abstract_trainable)

  @functools.cached_property
  def params(self) -> Params:
    """The weights with which the model starts, ready for sampling; read or drawn at the first use, and kept."""
    weights = self.weights
    if weights.source is not None and not weights.has_base:  # read in the dtype of sampling, without a float32 copy
      return load.read(weights.source.folder, weights.network, weights.base_dtype, self.publisher.placement)
    return self.publisher(weights.start(), weights.frozen.base)

  @property
  def frozen(self) -> Frozen:
    """The weights that no update changes: the base under adapters; empty if everything is trained.

    A loss that needs the reference policy takes it from here. With adapters it is the base; without adapters, pass
    `model.frozen._replace(reference=model.weights.start())`.
    """
    return self.weights.frozen

  def train_state(self, optimizer: optax.GradientTransformation, trainable: Params | None = None) -> TrainState:
    """A state at step 0, in float32.

    Args:
      optimizer: the optimiser of the updates.
      trainable: weights to start from, which are copied; None: the weights of the folder, or drawn ones.

    Raises:
      ValueError: the weights are quantised and there are no adapters to train.
    """
    if trainable is None:
      return self.weights.fresh_state(optimizer)
    return self.weights.state_from(trainable, optimizer)

  def publish(self, state: TrainState) -> Params:
    """The weights of a state in the form that rollouts take: merged, cast, and on the placements of rollouts.

    Arrays that need no change are shared with the state, which an update donates: publish again after each update.
    """
    return self.publisher(state.trainable, self.frozen.base)


def compute_dtype(name: str, platform: str) -> Any:
  """The dtype of matrix products and of a frozen base; `auto` is bfloat16 on accelerators and float32 on CPUs."""
  if name == "auto":
    return jnp.float32 if platform == "cpu" else jnp.bfloat16
  if name not in ("float32", "bfloat16"):
    raise ValueError(f"model.dtype={name!r} is unknown; known: auto, float32, bfloat16")
  return jnp.dtype(name)


def build_denoiser(
  network: Network,
  *,
  mask_id: int,
  stop_ids: tuple[int, ...],
  known_ids: int,
  shift: int = 0,
  block: int | None = None,
  vocab_shards: int = 1,
) -> Denoiser:
  """The denoiser of a network; ids beyond `known_ids` have no meaning and are never drawn.

  `known_ids` is the number of ids that the tokenizer has, `shift` that of `families.Description`, and `block` the
  length inside which attention of a block-causal network goes both ways (None: full attention). The others are
  attributes of `Denoiser`.
  """
  denoiser = Denoiser(
    encode=network.encode,
    head=network.head,
    mask_id=mask_id,
    stop_ids=stop_ids,
    forbidden_ids=tuple({mask_id: None} | dict.fromkeys(range(known_ids, network.size.vocab))),
    vocab=network.size.vocab,
    shift=shift,
    init_cache=network.init_cache,
    encode_window=network.encode_window,
    vocab_shards=vocab_shards,
  )
  return denoiser if block is None else with_blocks(denoiser, network, block)


def with_blocks(denoiser: Denoiser, network: Network, block: int) -> Denoiser:
  """The denoiser of a network, with attention that goes both ways inside blocks of this length."""
  rule = BlockCausal(block)
  return dataclasses.replace(
    denoiser,
    encode=functools.partial(network.encode, rule=rule),
    encode_window=functools.partial(network.encode_window, rule=rule),
    encode_streams=functools.partial(streams, network, block),
    block=block,
  )


def streams(
  network: Network,
  block: int,
  params: Params,
  clean: Int[Array, "B L"],
  noisy: Int[Array, "B A"],
  valid: Bool[Array, "B L"],
  first: int,
  dropout: Key[Array, "B N"] | None = None,
  segment: Int[Array, "B L"] | None = None,
) -> tuple[Float[Array, "B L D"], Float[Array, "B A D"]]:
  """`Denoiser.encode_streams` of a network with blocks of this length."""
  length = clean.shape[1]
  copies = noisy.shape[1] // (length - first)
  behind = lambda x: jnp.concatenate([x, *[x[:, first:]] * copies], axis=1)
  hidden = network.encode(
    params,
    jnp.concatenate([clean, noisy], axis=1),
    behind(valid),
    dropout,
    TwoStreams(block, length, first, copies),
    None if segment is None else behind(segment),
  )
  return hidden[:, :length], hidden[:, length:]


def build(
  size: TransformerSize,
  tokenizer: Tokenizer | None,
  source: Source | None,
  *,
  mesh: Mesh,
  rollout_mesh: Mesh | None = None,
  rules: meshes.Rules = meshes.RULES,
  rollout_rules: meshes.Rules | None = None,
  dtype: DTypeLike,
  seed: int = 0,
  lora: LoraSpec | None = None,
  quantize: str | None = None,
  block: int | None = None,
  remat: bool = False,
  unroll: int = 1,
) -> Model:
  """Builds a model from the sizes of its network.

  `source` is the folder of the weights; without it they are drawn. Without a tokenizer, the ids that `source` names are
  used. `dtype` is that of matrix products and of a frozen base, and `unroll` the number of layers that are compiled one
  after the other, instead of as a loop. `rollout_mesh` has other devices for rollouts
  (`d1jax.parallel.sides.sub_meshes`). The other arguments are those of `from_pretrained`.

  Raises:
    ValueError: the mesh does not divide a weight, or the folder lacks one.
  """
  ids = tokenizer if tokenizer is not None else source and source.ids
  if ids is None:
    raise ValueError("there is no tokenizer, and no folder that names the ids of the mask and of the end")
  rollout_rules = rules if rollout_rules is None else rollout_rules

  def on(mesh: Mesh, rules: meshes.Rules) -> tuple[Network, Denoiser]:
    network = transformer.build(
      size,
      dtype=dtype,
      remat=remat,
      unroll=unroll,
      constrain=meshes.constrainer(mesh, rules),
      attention=attention(mesh, rules),
      cut_length=meshes.ways(mesh, rules, "length") > 1,
    )
    return network, build_denoiser(
      network,
      mask_id=ids.mask_id,
      stop_ids=ids.stop_ids,
      known_ids=ids.vocab,
      shift=source.description.shift if source else 0,
      block=block,
      vocab_shards=meshes.ways(mesh, rules, "vocab"),
    )

  network, denoiser = on(mesh, rules)
  weights = Weights(network, mesh, rules, rollout_rules, seed, source, lora, quantize, dtype, rollout_mesh)
  alike = rollout_rules == rules and not weights.apart
  rollout_denoiser = denoiser if alike else on(weights.sampling_mesh, rollout_rules)[1]
  weights.check()
  return Model(denoiser, rollout_denoiser, tokenizer, weights)


def _defaults(mesh: Mesh | None, dtype: DTypeLike | None) -> tuple[Mesh, DTypeLike]:
  """The default mesh, the first device, and the dtype in which it is fast."""
  if mesh is None:
    mesh = meshes.make_mesh(dict.fromkeys(meshes.MESH_AXES, 1), meshes.first_device())
  return mesh, compute_dtype("auto", mesh.devices.flat[0].platform) if dtype is None else dtype


def from_pretrained(
  folder: str | PathLike[str],
  dtype: DTypeLike | None = None,
  *,
  lora: LoraSpec | None = None,
  quantize: str | None = None,
  block: int | None = None,
  mesh: Mesh | None = None,
  rules: meshes.Rules = meshes.RULES,
  rollout_rules: meshes.Rules | None = None,
  remat: bool = False,
  seed: int = 0,
) -> Model:
  """Loads a downloaded diffusion model (docs/pretrained.md has the families), or a causal one as the start of one.

  A causal model gets bidirectional attention, shifted logits and, if it has none, a mask token whose embedding is the
  mean of the others. The weights are read when they are first used.

  Args:
    folder: a folder with config.json, safetensors and usually a tokenizer; or a model of the Hugging Face hub,
      `owner/name` or `hf:owner/name@revision`, which is downloaded into the hub's cache.
    dtype: the dtype of sampling weights and of matrix products; None: bfloat16, or float32 on a CPU. Trained weights
      are always float32.
    lora: the adapters to train, such as `Lora(rank=64, alpha=128)`; None: a `train_state` holds all weights.
    quantize: `int8` or `nf4` stores the projections in few bits, for sampling or under adapters.
    block: the length of the blocks inside which attention goes both ways; across them it goes backwards. None: that of
      config.json, or full attention if it has none. Another length than config.json's grows the model to that one.
    mesh: the devices over which the weights are sharded; None: the first device.
    rules: maps logical axes to mesh axes.
    rollout_rules: the same in rollouts; None: `rules`.
    remat: whether the backward pass recomputes the activations of each layer, which saves memory.
    seed: the seed of all draws.

  Raises:
    ValueError: a file, a tensor or a value of the configuration is missing, wrong or not supported, or the hub does not
      have the model; the message names it.
  """
  source = inspect(fetch(folder))
  mesh, dtype = _defaults(mesh, dtype)
  return build(
    source.size,
    source.tokenizer,
    source,
    mesh=mesh,
    rules=rules,
    rollout_rules=rollout_rules,
    dtype=dtype,
    seed=seed,
    lora=lora,
    quantize=quantize,
    block=source.block_of(block),
    remat=remat,
  )


def from_scratch(
  size: TransformerSize | str,
  tokenizer: Tokenizer,
  *,
  dtype: DTypeLike | None = None,
  block: int | None = None,
  mesh: Mesh | None = None,
  rules: meshes.Rules = meshes.RULES,
  rollout_rules: meshes.Rules | None = None,
  remat: bool = False,
  seed: int = 0,
) -> Model:
  """Makes a model with random weights.

  `size` has the sizes of the network, or is the name of a preset, such as `tiny`; the vocabulary grows to the size of
  the tokenizer. The other arguments are those of `from_pretrained`; `seed` is that of the weights too.

  Raises:
    ValueError: the size is unknown, or the mesh does not divide a weight.
  """
  mesh, dtype = _defaults(mesh, dtype)
  return build(
    scaled_to(size, tokenizer.vocab),
    tokenizer,
    None,
    mesh=mesh,
    rules=rules,
    rollout_rules=rollout_rules,
    dtype=dtype,
    seed=seed,
    block=block,
    remat=remat,
  )


def scaled_to(size: TransformerSize | str, known_ids: int, **changes: Any) -> TransformerSize:
  """Sizes whose vocabulary holds the tokenizer's ids, rounded up to a multiple of 8 so that a tensor axis divides it.

  Raises:
    ValueError: no preset has this name.
  """
  if isinstance(size, str):
    if size not in PRESETS:
      raise ValueError(f"model.size={size!r} is unknown; known: {', '.join(PRESETS)}")
    size = PRESETS[size]
  return dataclasses.replace(size, **({"vocab": max(size.vocab, -(-known_ids // 8) * 8)} | changes))
