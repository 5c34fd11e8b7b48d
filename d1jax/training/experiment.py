"""From a configuration to the things that the stages work with: task, tokenizer, network, mesh, placements."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from d1jax import keys, state, tasks
from d1jax.data import tokenizer as tokenizers
from d1jax.diffusion.denoiser import Denoiser
from d1jax.diffusion.rollout import SamplerSpec
from d1jax.models import transformer
from d1jax.parallel import mesh as meshes
from d1jax.state import TrainState
from d1jax.tasks import Record, Task
from d1jax.training import optimizer as optimizers
from d1jax.training.checkpoint import with_placements

TOKENIZER_SAMPLE = 2000
"""Records whose texts train the tokenizer."""


@dataclasses.dataclass(frozen=True)
class Texts:
  """Records of one split with their tokenised prompts and the given starts of their answers, which end the prompts."""

  records: list[Record]
  prompts: list[list[int]]
  prefills: list[str]


@dataclasses.dataclass(frozen=True)
class Experiment:
  """Everything that a stage, an evaluation or a benchmark needs, built once from the configuration.

  Attributes:
    config: the resolved configuration.
    task: the problems and their grader.
    tokenizer: text to ids.
    network: the pure functions of the model.
    denoiser: the same as diffusion sees it.
    mesh: the devices.
    rules: where logical axes live on them.
    sampler: how rollouts are drawn.
  """

  config: ConfigDict
  task: Task
  tokenizer: tokenizers.SentencePieceTokenizer
  network: transformer.Network
  denoiser: Denoiser
  mesh: Mesh
  rules: dict[str, Any]
  sampler: SamplerSpec

  @property
  def buckets(self) -> tuple[int, ...]:
    """The prompt lengths that are compiled."""
    return tuple(self.config.data.prompt_buckets)

  @property
  def key(self) -> jax.Array:
    """The run's key, in a buffer of its own: a state that holds it is donated."""
    return jax.random.key(self.config.seed)

  @property
  def ways(self) -> int:
    """Over how many devices a batch is split."""
    return meshes.batch_ways(self.mesh, self.rules)

  @property
  def replicated(self) -> NamedSharding:
    """The placement of scalars."""
    return meshes.sharding(self.mesh, self.rules)

  @property
  def by_row(self) -> NamedSharding:
    """The placement of a batch: rows over the batch axis."""
    return meshes.sharding(self.mesh, self.rules, "batch")

  @functools.cached_property
  def params_placement(self) -> Any:
    """The placement of the parameters."""
    return meshes.shardings(self.mesh, self.rules, self.network.axes)

  def texts(self, split: str) -> Texts:
    """The records of a split whose prompts fit a bucket; the others are left out and counted."""
    records = list(self.task.records(split))
    style = self.config.task.style
    asked = [self.task.prompt(r, style) for r in records]
    prompts = [self.tokenizer.prompt(messages, prefill) for messages, prefill in asked]
    keep = [i for i, ids in enumerate(prompts) if len(ids) <= max(self.buckets)]
    if len(keep) < len(records):
      print(
        f"{split}: left out {len(records) - len(keep)} of {len(records)} prompts longer than {max(self.buckets)} tokens"
      )
    if not keep:
      raise ValueError(
        f"every {split} prompt is longer than prompt_buckets={self.buckets}: raise config.data.prompt_buckets"
      )
    return Texts([records[i] for i in keep], [prompts[i] for i in keep], [asked[i][1] for i in keep])

  def optimizer(self, stage: ConfigDict, steps: int) -> optax.GradientTransformation:
    """The optimiser of a stage that takes `steps` steps."""
    return optimizers.build(
      learning_rate=stage.learning_rate,
      steps=steps,
      warmup_steps=stage.warmup_steps,
      decay=stage.decay,
      b1=stage.b1,
      b2=stage.b2,
      weight_decay=stage.weight_decay,
      max_grad_norm=stage.max_grad_norm,
    )

  def state_placement(self, optimizer: optax.GradientTransformation) -> Any:
    """The placements of a TrainState, as a TrainState."""
    abstract = jax.eval_shape(self.network.init, self.key)
    return meshes.state_shardings(self.mesh, self.rules, self.network.axes, abstract, optimizer)

  def abstract_state(self, optimizer: optax.GradientTransformation) -> TrainState:
    """Shapes, types and placements of a TrainState, without memory."""
    abstract = jax.eval_shape(self._fresh(optimizer), self.key)
    return with_placements(abstract, self.state_placement(optimizer))

  def fresh_state(self, optimizer: optax.GradientTransformation) -> TrainState:
    """A state with random weights, made where it will live."""
    return jax.jit(
      self._fresh(optimizer),
      in_shardings=self.replicated,
      out_shardings=self.state_placement(optimizer),
    )(jax.device_put(self.key, self.replicated))

  def state_from(self, params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """A state at step 0 that starts from a copy of given weights."""

    def start(params: Any, key: jax.Array) -> TrainState:
      return state.create(lambda _: jax.tree.map(jnp.copy, params), optimizer, key, key)

    return jax.jit(
      start,
      in_shardings=(self.params_placement, self.replicated),
      out_shardings=self.state_placement(optimizer),
    )(params, jax.device_put(self.key, self.replicated))

  def _fresh(self, optimizer: optax.GradientTransformation) -> Any:
    def fresh(key: jax.Array) -> TrainState:
      return state.create(self.network.init, optimizer, key, keys.purpose_key(key, keys.Purpose.INITIALISATION))

    return fresh


def train_tokenizer(task: Task, style: str, *, model_type: str, vocab_size: int) -> bytes:
  """Trains the tokenizer on prompts and answers of training records."""
  texts: list[str] = []
  for split in ("demonstrations", "train"):
    for record in task.records(split)[:TOKENIZER_SAMPLE]:
      messages, prefill = task.prompt(record, style)
      texts += [m["content"] for m in messages] + [prefill, task.demonstration(record, style)]
  return tokenizers.train_sentencepiece(filter(None, texts), model_type=model_type, vocab_size=vocab_size)


def build_task(config: ConfigDict) -> Task:
  """The task that the configuration names."""
  options = config.task.options.to_dict()
  return tasks.build(
    config.task.name,
    seed=config.seed,
    root=config.data.root,
    sizes=config.task.sizes.to_dict(),
    **options,
  )


def compute_dtype(name: str) -> Any:
  """The dtype of matrix products; `auto` is bfloat16 on accelerators and float32 on CPUs."""
  if name == "auto":
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
  if name not in ("float32", "bfloat16"):
    raise ValueError(f"model.dtype={name!r} is unknown; known: auto, float32, bfloat16")
  return jnp.dtype(name)


def check_batches(config: ConfigDict, ways: int) -> None:
  """Raises a ValueError when a batch does not divide into parts over the devices that share it, or a stage is empty."""
  batches = [("sft.batch_size", config.sft.batch_size, "sft.accumulation", config.sft.accumulation)]
  if "grpo" in config:
    rows = config.grpo.prompts_per_iteration * config.grpo.num_generations
    for part in ("accumulation", "rollout_chunks"):
      batches.append(("grpo.prompts_per_iteration x num_generations", rows, f"grpo.{part}", config.grpo[part]))
  for name, rows, part, parts in batches:
    if rows < 1 or parts < 1 or rows % (parts * ways):
      raise ValueError(
        f"{name} is {rows}, which does not divide into {part}={parts} parts over {ways} devices:"
        f" use a multiple of {max(parts, 1) * ways}"
      )
  for stage in ("sft", "grpo"):
    for field in ("steps", "validate_every"):
      if stage in config and config[stage][field] < 1:
        raise ValueError(f"{stage}.{field} is {config[stage][field]}; it must be at least 1")


def build(config: ConfigDict, tokenizer_model: bytes | None) -> Experiment:
  """Builds an experiment; nothing is written.

  Args:
    config: resolved.
    tokenizer_model: a serialised SentencePiece model; None trains one on the task's texts.
  """
  task = build_task(config)
  if tokenizer_model is None:
    tokenizer_model = train_tokenizer(task, config.task.style, **config.tokenizer)
  tokenizer = tokenizers.SentencePieceTokenizer(tokenizer_model)
  mesh, rules = meshes.make_mesh(config.mesh.to_dict()), config.rules.to_dict()
  if config.model.size not in transformer.PRESETS:
    raise ValueError(f"model.size={config.model.size!r} is unknown; known: {', '.join(transformer.PRESETS)}")
  sizes = dataclasses.asdict(transformer.PRESETS[config.model.size])
  overrides = {k: v for k, v in config.model.overrides.items() if v is not None}
  # The preset's vocabulary, or more where the tokenizer needs it, rounded up so that a tensor axis divides it; ids
  # beyond the tokenizer are forbidden.
  sizes |= {"vocab": max(sizes["vocab"], -(-tokenizer.vocab // 8) * 8)} | overrides
  network = transformer.build(
    transformer.TransformerSize(**sizes),
    dtype=compute_dtype(config.model.dtype),
    remat=config.model.remat,
    unroll=config.model.unroll,
    constrain=meshes.constrainer(mesh, rules),
  )
  denoiser = Denoiser(
    encode=network.encode,
    unembed=network.unembed,
    mask_id=tokenizer.mask_id,
    stop_ids=tokenizer.stop_ids,
    forbidden_ids=(tokenizer.mask_id, *range(tokenizer.vocab, network.size.vocab)),
    vocab=network.size.vocab,
  )
  sampler = SamplerSpec(**config.rollout)
  return Experiment(config, task, tokenizer, network, denoiser, mesh, rules, sampler)
