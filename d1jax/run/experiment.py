"""From a configuration to the things that the stages work with: task, tokenizer, denoiser, weights."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from d1jax import optimizer as optimizers
from d1jax import tasks
from d1jax.data.tokenizer import Tokenizer
from d1jax.diffusion.denoiser import Denoiser
from d1jax.diffusion.rollout import SamplerSpec
from d1jax.model import Source, build_denoiser, inspect
from d1jax.models import transformer
from d1jax.models.families import PRESETS
from d1jax.models.lora import LoraSpec
from d1jax.models.quantize import KINDS
from d1jax.parallel import mesh as meshes
from d1jax.parallel.attention import attention
from d1jax.run import limits, run_tokenizer
from d1jax.run.run_tokenizer import Kept
from d1jax.tasks import Record, Task
from d1jax.tasks.common import check_choice
from d1jax.weights import Weights


@dataclasses.dataclass(frozen=True)
class Texts:
  """Records of one split with their tokenised prompts and the given starts of their answers, which end the prompts.

  `left_out` counts those whose prompts fit no bucket.
  """

  records: list[Record]
  prompts: list[list[int]]
  prefills: list[str]
  left_out: int = 0


@dataclasses.dataclass(frozen=True)
class Experiment:
  """Everything that a stage, an evaluation or a benchmark needs, built once from the configuration.

  Attributes:
    config: the resolved configuration.
    task: the problems and their grader.
    tokenizer: text to ids.
    denoiser: the network as diffusion sees it.
    weights: which are trained, which are not, and where they live.
    sampler: how rollouts are drawn.
    rollout_denoiser: the network on the placements of `rollout_rules`; `denoiser` itself where there are none.
  """

  config: ConfigDict
  task: Task
  tokenizer: Tokenizer
  denoiser: Denoiser
  weights: Weights
  sampler: SamplerSpec
  rollout_denoiser: Denoiser

  @property
  def ways(self) -> int:
    """Over how many devices a batch is split."""
    return meshes.batch_ways(self.weights.mesh, self.weights.rules)

  @property
  def rollout_ways(self) -> int:
    """The same in rollouts."""
    return meshes.batch_ways(self.weights.mesh, self.weights.rollout_rules)

  @property
  def length_ways(self) -> int:
    """Over how many devices the positions of a canvas are split."""
    return meshes.ways(self.weights.mesh, self.weights.rules, "length")

  @property
  def replicated(self) -> NamedSharding:
    """The placement of scalars."""
    return self.weights.replicated

  @property
  def by_row(self) -> NamedSharding:
    """The placement of a batch: rows over the batch axis."""
    return meshes.sharding(self.weights.mesh, self.weights.rules, "batch")

  @property
  def rollout_by_row(self) -> NamedSharding:
    """The same in rollouts."""
    return meshes.sharding(self.weights.mesh, self.weights.rollout_rules, "batch")

  def metadata(self) -> dict[str, Any]:
    """What every checkpoint says of its run: configuration, fingerprint of the base, hashes of the tokenizer."""
    tokenizer = run_tokenizer.hashes(self.tokenizer.files)
    return {"config": self.config.to_dict(), "base": self.weights.base_fingerprint, "tokenizer": tokenizer}

  def buckets(self, split: str) -> tuple[str, tuple[int, ...]]:
    """The prompt lengths that are compiled for a split, and the field that says so."""
    if split == "train":
      return "data.prompt_buckets", tuple(self.config.data.prompt_buckets)
    if split == "demonstrations":
      return "sft.prompt_buckets", tuple(self.config.sft.prompt_buckets)
    return "evaluation.prompt_buckets", tuple(self.config.evaluation.prompt_buckets)

  def texts(self, split: str, start: str | None = None) -> Texts:
    """The records of a split whose prompts fit a bucket; the others are left out and counted.

    Answers start as the style of the prompts has it, or with `start`.
    """
    records = list(self.task.records(split))
    if not records:
      raise ValueError(f"the split {split} holds no question: let task.sizes.{split} be at least 1")
    style = self.config.task.style
    asked = [self.task.prompt(r, style) for r in records]
    prefills = [prefill if start is None else start for _, prefill in asked]
    prompts = [self.tokenizer.prompt(turns, start) for (turns, _), start in zip(asked, prefills, strict=True)]
    field, buckets = self.buckets(split)
    keep = [i for i, ids in enumerate(prompts) if len(ids) <= max(buckets)]
    if len(keep) < len(records):
      print(f"{split}: left out {len(records) - len(keep)} of {len(records)} prompts longer than {max(buckets)} tokens")
    if not keep:
      shortest = min(map(len, prompts), default=0)
      raise ValueError(f"every {split} prompt is longer than {field}={buckets}, the shortest {shortest}: raise it")
    if isinstance(self.task, tasks.Mixture):
      self.task.parts([records[i] for i in keep])  # each has some
    left_out = len(records) - len(keep)
    return Texts([records[i] for i in keep], [prompts[i] for i in keep], [prefills[i] for i in keep], left_out)

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
      ema_decay=stage.ema_decay,
    )


def build_task(config: ConfigDict) -> Task:
  """The task that the configuration names, or its mix of tasks."""
  section, weights = config.task, config.task.mix.to_dict()
  sizes, options = section.sizes.to_dict(), section.options.to_dict()
  if not weights:
    return tasks.build(
      section.name, seed=config.seed, root=config.data.root, sizes=sizes, module=section.module, **options
    )
  mixed = tasks.build_mix(weights, seed=config.seed, root=config.data.root, sizes=sizes, options=options)
  if section.name != mixed.name or section.module is not None:
    raise ValueError(
      f"task.mix is of {mixed.name}, but task.name={section.name} and task.module={section.module}: a mix has the"
      " sorted names of its tasks, joined by +, and no module"
    )
  return mixed


def compute_dtype(name: str, platform: str) -> Any:
  """The dtype of matrix products and of a frozen base; `auto` is bfloat16 on accelerators and float32 on CPUs."""
  if name == "auto":
    return jnp.float32 if platform == "cpu" else jnp.bfloat16
  if name not in ("float32", "bfloat16"):
    raise ValueError(f"model.dtype={name!r} is unknown; known: auto, float32, bfloat16")
  return jnp.dtype(name)


def of_checkpoint(trained: Mapping[str, Any], config: ConfigDict) -> ConfigDict:
  """A checkpoint's configuration, with the devices and the place of the pretrained folder that `config` names."""
  restored = ConfigDict(trained)
  restored.update(mesh=config.mesh, cpu_devices=config.cpu_devices)
  # Whoever starts from a checkpoint samples and does not train; runs of 0.1 have no `rollout_rules`.
  restored.rules, restored.rollout_rules = meshes.changed(trained["rules"], trained.get("rollout_rules", {})), {}
  # What runs of 0.1 could not say yet.
  restored.task = {"module": None, "mix": {}, **restored.task.to_dict()}
  restored.lora = {"rslora": False, **restored.lora.to_dict()}
  for stage in {"sft", "grpo"} & set(restored):
    restored[stage] = {"ema_decay": None, **restored[stage].to_dict()}
  if config.pretrained is not None:
    restored.model.pretrained = config.pretrained
  return restored


def _batches(config: ConfigDict) -> list[tuple[str, int, str, int]]:
  """Name and rows of each batch that is trained on, and into how many parts which field divides it."""
  batches: list[tuple[str, int, str, int]] = []
  if config.mode != "grpo" or config.sft.steps:
    batches.append(("sft.batch_size", config.sft.batch_size, "sft.accumulation", config.sft.accumulation))
  if "grpo" in config:
    rows = config.grpo.prompts_per_iteration * config.grpo.num_generations
    name = "grpo.prompts_per_iteration x num_generations"
    batches.append((name, rows, "grpo.accumulation", config.grpo.accumulation))
    batches.append((name, rows * config.grpo.oversample, "grpo.rollout_chunks", config.grpo.rollout_chunks))
  return batches


def smaller_parts(config: ConfigDict, stage: str, ways: int) -> str:
  """What to try when a stage does not fit: fields with values that `check_batches` allows, in the same folder too."""
  tried = []
  for _, rows, part, parts in _batches(config):
    more = next((n for n in range(parts + 1, rows // ways + 1) if rows % (n * ways) == 0), None)
    if part.startswith(f"{stage}.") and more:
      tried.append(f"--config.{part}={more}")
  if not tried and not config.model.remat:
    tried.append("--config.model.remat=True")
  return f"smaller parts: {' '.join(tried)}" if tried else "more devices"


def check_batches(config: ConfigDict, ways: int) -> None:
  """Raises a ValueError when a batch does not divide into parts over the devices that share it, or a stage is empty."""
  if "grpo" in config and config.grpo.oversample < 1:
    raise ValueError(f"grpo.oversample is {config.grpo.oversample}; it must be at least 1")
  for name, rows, part, parts in _batches(config):
    if rows < 1 or parts < 1 or rows % (parts * ways):
      raise ValueError(
        f"{name} is {rows}, which does not divide into {part}={parts} parts over {ways} devices:"
        f" use a multiple of {max(parts, 1) * ways}"
      )
  for stage in ("sft", "grpo"):
    for field in ("steps", "validate_every"):
      least = 0 if (stage, field, config.mode) == ("sft", "steps", "grpo") else 1
      if stage in config and config[stage][field] < least:
        raise ValueError(f"{stage}.{field} is {config[stage][field]}; it must be at least {least}")
  if config.mode == "grpo" and config.sft.steps and config.lora.rank:
    raise ValueError(
      f"sft.steps={config.sft.steps} with adapters: the adapters of supervised fine-tuning would not be part of the"
      " reference. Run configs/sft.py, export it, and start from there with model.pretrained and sft.steps=0"
    )


def check_lengths(config: ConfigDict, ways: int) -> None:
  """Raises a ValueError when devices that share the positions of a canvas cannot share those of some bucket evenly."""
  found = []
  if config.mode == "grpo":
    completion = ("rollout.completion_length", config.rollout.completion_length)
    found += [("data.prompt_buckets", prompt, *completion) for prompt in config.data.prompt_buckets]
  if config.sft.steps:
    lengths = itertools.product(config.sft.prompt_buckets, config.sft.completion_buckets)
    found += [("sft.prompt_buckets", prompt, "sft.completion_buckets", completion) for prompt, completion in lengths]
  for prompts, prompt, completions, completion in found:
    if (prompt + completion) % ways:
      raise ValueError(
        f"a canvas of {prompt} ({prompts}) + {completion} ({completions}) tokens does not divide over {ways} devices of"
        f" mesh.sequence: let both be multiples of {ways}"
      )


def check_start(config: ConfigDict) -> None:
  """Raises a ValueError when nothing could be learned, surely by oversight: from a large network of random weights, or
  from groups of equal answers.
  """
  if config.mode == "grpo" and config.rollout.temperature == 0 and config.rollout.remasking != "random":
    raise ValueError(
      "rollout.temperature=0 gives every prompt the same answer each time, so that the rewards of a group are equal and"
      " nothing is learned: let it be above 0"
    )
  if config.model.pretrained is None and config.model.size != "tiny":
    raise ValueError(
      f"model.size={config.model.size} has no weights: name the folder of a downloaded model with"
      " --config.model.pretrained=FOLDER"
    )


def _lora_spec(config: ConfigDict) -> LoraSpec | None:
  if not config.lora.rank:
    return None
  targets = tuple(config.lora.targets)
  return LoraSpec(config.lora.rank, config.lora.alpha, config.lora.dropout, targets, config.lora.rslora)


def _size(config: ConfigDict, source: Source | None, known_ids: int) -> transformer.TransformerSize:
  """The network's sizes: those of the folder, or the preset's with the overrides."""
  overrides = {k: v for k, v in config.model.overrides.items() if v is not None}
  if source is not None:
    if overrides:
      raise ValueError(f"model.overrides {', '.join(overrides)} cannot change the sizes of {source.folder}")
    return source.size
  if config.model.size not in PRESETS:
    raise ValueError(f"model.size={config.model.size!r} is unknown; known: {', '.join(PRESETS)}")
  preset = PRESETS[config.model.size]
  # The preset's vocabulary, or more where the tokenizer needs it, rounded up so that a tensor axis divides it.
  return dataclasses.replace(preset, **({"vocab": max(preset.vocab, -(-known_ids // 8) * 8)} | overrides))


def _tokenizer(config: ConfigDict, run: Kept | None, source: Source | None, task: Task | None) -> Tokenizer:
  """The tokenizer that a run keeps, or that its model's folder or its task gives; without a task none is trained."""

  def make() -> Tokenizer:
    if source is not None and source.tokenizer is None:
      raise ValueError(f"{source.folder} holds no tokenizer; put tokenizer.json, or its parts, beside config.json")
    if source is not None and source.tokenizer is not None:
      return source.tokenizer
    return run_tokenizer.train(cast(Task, task), config.task.style, **config.tokenizer)

  if run is None:
    return make()
  is_makeable = source is not None or task is not None
  return run_tokenizer.read(run, make if is_makeable else None, str(source.folder) if source else "the task")


class _NoTask:
  """Stands for the task of a checkpoint, which may be a Python file of its author: nothing of it is run."""

  name, splits = "none", ()

  def _refuse(self, *arguments: Any) -> Any:
    raise RuntimeError(f"the experiment was built without its task, which was asked for {arguments!r}")

  records = prompt = demonstration = baseline = cluster = grade = _refuse


def build(
  config: ConfigDict,
  tokenizer: Tokenizer | Kept | None,
  devices: Sequence[Any] | None = None,
  *,
  with_task: bool = True,
) -> Experiment:
  """Builds an experiment; nothing is written and no weights are read.

  Args:
    config: resolved.
    tokenizer: what a run keeps of it, or one at hand; None takes that of the pretrained folder, or trains one on the
      task's texts.
    devices: default: all of them.
    with_task: False leaves the task out, for what somebody else may have written: `config.task.module` is not run.

  Raises:
    ValueError: a field or a file is wrong.
    RunError: a path lies in a bucket and cannot.
  """
  limits.check(config)
  task = build_task(config) if with_task else cast(Task, _NoTask())
  check_choice("protocol", config.task.protocol, tasks.PROTOCOLS)
  if isinstance(task, tasks.Custom):
    task.try_out(config.task.style, config.task.protocol)
  sampler = SamplerSpec(**config.rollout)
  if sampler.early_exit and config.task.protocol == "d1":
    raise ValueError(
      "rollout.early_exit ends completions at their stop id, but task.protocol=d1 reads on: turn one off"
    )
  source = inspect(Path(config.model.pretrained)) if config.model.pretrained else None
  if tokenizer is None or isinstance(tokenizer, Kept):
    tokenizer = _tokenizer(config, tokenizer, source, task if with_task else None)
  spec = _lora_spec(config)
  check_choice("model.quantize", config.model.quantize, ("none", *KINDS))
  quantized = None if config.model.quantize == "none" else config.model.quantize
  if quantized and spec is None:
    raise ValueError(f"model.quantize={quantized!r} stores a frozen base: set lora.rank to train adapters")
  devices = jax.devices() if devices is None else devices
  mesh, rules = meshes.make_mesh(config.mesh.to_dict(), devices), config.rules.to_dict()
  rollout_rules = meshes.changed(rules, config.rollout_rules.to_dict())
  dtype = compute_dtype(config.model.dtype, devices[0].platform)
  size = _size(config, source, tokenizer.vocab)

  def on(rules: meshes.Rules) -> tuple[transformer.Network, Denoiser]:
    network = transformer.build(
      size,
      dtype=dtype,
      remat=config.model.remat,
      unroll=config.model.unroll,
      constrain=meshes.constrainer(mesh, rules),
      attention=attention(mesh, rules),
      cut_length=meshes.ways(mesh, rules, "length") > 1,
    )
    return network, build_denoiser(
      network,
      mask_id=tokenizer.mask_id,
      stop_ids=tokenizer.stop_ids,
      known_ids=tokenizer.vocab,
      shift=source.description.shift if source else 0,
      vocab_shards=meshes.ways(mesh, rules, "vocab"),
    )

  network, denoiser = on(rules)
  rollout_denoiser = denoiser if rollout_rules == rules else on(rollout_rules)[1]
  weights = Weights(network, mesh, rules, rollout_rules, config.seed, source, spec, quantized, dtype)
  weights.check()
  return Experiment(config, task, tokenizer, denoiser, weights, sampler, rollout_denoiser)
