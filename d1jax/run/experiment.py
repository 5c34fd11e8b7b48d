"""Builds the objects that a configuration describes: task, tokenizer, denoiser, weights."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import optax
from ml_collections import ConfigDict

from d1jax import hub, tasks
from d1jax import model as models
from d1jax import optimizer as optimizers
from d1jax.data.tokenizer import Tokenizer
from d1jax.diffusion import blocks
from d1jax.diffusion.rollout import SamplerSpec
from d1jax.errors import reworded
from d1jax.model import Model, scaled_to
from d1jax.models.lora import LoraSpec
from d1jax.models.quantize import KINDS
from d1jax.models.transformer import TransformerSize
from d1jax.parallel import mesh as meshes
from d1jax.parallel.sides import sub_meshes
from d1jax.rl.prompts import Prompts
from d1jax.run import fields, inputs, limits, run_tokenizer
from d1jax.run.inputs import NO_TASK
from d1jax.run.run_tokenizer import Kept
from d1jax.source import Source
from d1jax.tasks import Task
from d1jax.tasks.common import check_choice


@dataclasses.dataclass(frozen=True)
class Experiment:
  """The objects of a configuration, built once for all stages, evaluations and benchmarks.

  Attributes:
    config: the resolved configuration.
    task: the problems and their grader.
    model: network, tokenizer, weights and mesh.
    sampler: how rollouts are drawn.
  """

  config: ConfigDict
  task: Task
  model: Model
  sampler: SamplerSpec

  @property
  def tokenizer(self) -> Tokenizer:
    """The model's tokenizer; an experiment always has one."""
    return cast(Tokenizer, self.model.tokenizer)

  @property
  def has_task(self) -> bool:
    """Whether there is a task that asks and grades."""
    return not isinstance(self.task, inputs.NoTask)

  def metadata(self) -> dict[str, Any]:
    """The metadata of every checkpoint: configuration, fingerprint of the base, hashes of the tokenizer's files."""
    tokenizer = run_tokenizer.hashes(self.tokenizer.files)
    return {"config": self.config.to_dict(), "base": self.model.weights.base_fingerprint, "tokenizer": tokenizer}

  def buckets(self, split: str) -> tuple[str, tuple[int, ...]]:
    """The prompt lengths that are compiled for a split, and the name of the field that sets them."""
    if split == "train":
      return "data.prompt_buckets", tuple(self.config.data.prompt_buckets)
    if split == "demonstrations":
      return "sft.prompt_buckets", tuple(self.config.sft.prompt_buckets)
    return "evaluation.prompt_buckets", tuple(self.config.evaluation.prompt_buckets)

  def prompts(self, split: str, prefill: str | None = None) -> Prompts:
    """The records of a split whose prompts fit a bucket; the number of the others is logged.

    Answers start with `prefill`; None: with the prefill of the prompt style.
    """
    if not self.task.records(split):
      raise ValueError(f"the split {split} holds no question: let task.sizes.{split} be at least 1")
    field, buckets = self.buckets(split)
    try:
      found = Prompts.of(
        self.task, self.tokenizer, split, style=self.config.task.style, buckets=buckets, prefill=prefill
      )
    except ValueError as error:
      raise ValueError(str(error).replace("than buckets=", f"than {field}=")) from error
    if found.left_out:
      count = found.left_out + len(found.records)
      print(f"{split}: left out {found.left_out} of {count} prompts longer than {max(buckets)} tokens")
    if isinstance(self.task, tasks.Mixture):
      self.task.parts(found.records)  # raises an error if a task of a mix has no records
    return found

  def optimizer(self, stage: ConfigDict, steps: int) -> optax.GradientTransformation:
    """The optimiser of a stage that takes `steps` steps."""
    if stage.optimizer not in optimizers.OPTIMIZERS:
      raise ValueError(f"optimizer={stage.optimizer!r} is unknown; known: {', '.join(optimizers.OPTIMIZERS)}")
    return optimizers.OPTIMIZERS[stage.optimizer](
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


def of_checkpoint(trained: Mapping[str, Any], config: ConfigDict) -> ConfigDict:
  """A checkpoint's configuration, with the devices and the pretrained folder of `config`."""
  restored = ConfigDict(trained)
  restored.update(mesh=config.mesh, cpu_devices=config.cpu_devices)
  # This is for sampling, not training, so `rules` are those of rollouts; runs of 0.1 have no `rollout_rules`.
  rules = meshes.changed(meshes.RULES, trained["rules"])
  restored.rules, restored.rollout_rules = meshes.changed(rules, trained.get("rollout_rules", {})), {}
  restored.rollout_mesh = {}
  # Fields that runs of 0.1 did not have.
  restored.task = {"module": None, "mix": {}, **restored.task.to_dict()}
  restored.lora = {"rslora": False, **restored.lora.to_dict()}
  for stage in {"sft", "dpo", "grpo"} & set(restored):
    restored[stage] = {"ema_decay": None, **restored[stage].to_dict()}
  if config.pretrained is not None:
    restored.model.pretrained = config.pretrained
  return restored


def _batches(config: ConfigDict) -> list[tuple[str, int, str, int]]:
  """Of each training batch: its name, its rows, and the field that divides it into how many parts."""
  batches: list[tuple[str, int, str, int]] = []
  for stage in ("sft", "dpo"):
    if stage in config and (stage == config.mode or config[stage].steps):
      section = config[stage]
      batches.append((f"{stage}.batch_size", section.batch_size, f"{stage}.accumulation", section.accumulation))
  if "grpo" in config:
    rows = config.grpo.prompts_per_iteration * config.grpo.num_generations
    name = "grpo.prompts_per_iteration x num_generations"
    batches.append((name, rows, "grpo.accumulation", config.grpo.accumulation))
    if not config.grpo.partial_age:  # its rollouts have one part
      batches.append((name, rows * config.grpo.oversample, "grpo.rollout_chunks", config.grpo.rollout_chunks))
  return batches


def smaller_parts(config: ConfigDict, stage: str, ways: int) -> str:
  """Advice for a stage that does not fit: fields that the same folder may change, with values that are allowed."""
  tried = []
  for _, rows, part, parts in _batches(config):
    more = next((n for n in range(parts + 1, rows // ways + 1) if rows % (n * ways) == 0), None)
    if part.startswith(f"{stage}.") and more:
      tried.append(f"--config.{part}={more}")
  if not tried and not config.model.remat:
    tried.append("--config.model.remat=True")
  return f"smaller parts: {' '.join(tried)}" if tried else "more devices"


def check_batches(config: ConfigDict, ways: int) -> None:
  """Raises a ValueError if parts of a batch do not divide over the devices that share it, or if a stage is empty."""
  if "grpo" in config and config.grpo.oversample < 1:
    raise ValueError(f"grpo.oversample is {config.grpo.oversample}; it must be at least 1")
  for name, rows, part, parts in _batches(config):
    if rows < 1 or parts < 1 or rows % (parts * ways):
      raise ValueError(
        f"{name} is {rows}, which does not divide into {part}={parts} parts over {ways} devices:"
        f" use a multiple of {max(parts, 1) * ways}"
      )
  for stage in ("sft", "dpo", "grpo"):
    for field in ("steps", "validate_every"):
      least = 0 if field == "steps" and stage != config.mode else 1
      if stage in config and config[stage][field] < least:
        raise ValueError(f"{stage}.{field} is {config[stage][field]}; it must be at least {least}")
  if config.mode == "grpo" and config.sft.steps and config.lora.rank:
    raise ValueError(
      f"sft.steps={config.sft.steps} with adapters: the adapters of supervised fine-tuning would not be part of the"
      " reference. Run configs/sft.py, export it, and start from there with model.pretrained and sft.steps=0"
    )


def check_lengths(config: ConfigDict, ways: int) -> None:
  """Raises a ValueError if the canvas of some bucket does not divide over the devices that share its positions."""
  found = []
  if config.mode == "grpo" or ("pairs" in config and not config.pairs.file):
    rollouts = [("rollout.completion_length", config.rollout.completion_length)]
    if config.mode == "grpo":
      rollouts += [("grpo.length_curriculum", length) for length in config.grpo.length_curriculum[:-1]]
    found += [("data.prompt_buckets", prompt, *each) for prompt in config.data.prompt_buckets for each in rollouts]
  for stage in ("sft", "dpo"):
    if stage in config and config[stage].steps:
      names = [f"{stage}.{name}" for name in ("prompt_buckets", "completion_buckets")]
      lengths = itertools.product(config[stage].prompt_buckets, config[stage].completion_buckets)
      found += [(names[0], prompt, names[1], completion) for prompt, completion in lengths]
  for prompts, prompt, completions, completion in found:
    if (prompt + completion) % ways:
      raise ValueError(
        f"a canvas of {prompt} ({prompts}) + {completion} ({completions}) tokens does not divide over {ways} devices of"
        f" mesh.sequence: let both be multiples of {ways}"
      )


def check_start(config: ConfigDict) -> None:
  """Raises a ValueError if nothing can be learned: from a large random network, or from groups of equal answers."""
  samples = config.mode == "grpo" or ("pairs" in config and not config.pairs.file)
  if samples and config.rollout.temperature == 0 and config.rollout.remasking != "random":
    raise ValueError(
      "rollout.temperature=0 gives every prompt the same answer each time, so that the rewards of a group are equal and"
      " nothing is learned: let it be above 0"
    )


def check_data(config: ConfigDict) -> None:
  """Raises a ValueError if a run without a task lacks what a task would give it."""
  if config.task.name != NO_TASK or config.task.module is not None:
    return
  alone = f"task.name={NO_TASK} neither asks nor grades"
  if config.mode != "sft":
    raise ValueError(f"{alone}, which diffu-GRPO needs: name a task, for example --config.task.name=gsm8k")
  if not config.sft.data:
    raise ValueError(
      f"{alone}, and sft.data names nothing to learn from: give --config.sft.data=FILE, JSON lines of `messages`, of"
      " `prompt` and `response`, or of `text`"
    )
  if config.model.pretrained is None:
    raise ValueError(
      f"{alone}, and has no texts for a tokenizer: name the folder of a model with --config.model.pretrained=FOLDER"
    )
  if not config.sft.held_out:
    raise ValueError(f"{alone}, and sft.held_out=0 leaves nothing to validate with: use --config.sft.held_out=64")


def _size(config: ConfigDict, source: Source | None, known_ids: int) -> TransformerSize:
  """The network's sizes: from the folder, or from the preset with the overrides."""
  overrides = {k: v for k, v in config.model.overrides.items() if v is not None}
  if source is None:
    return scaled_to(config.model.size, known_ids, **overrides)
  if overrides:
    raise ValueError(f"model.overrides {', '.join(overrides)} cannot change the sizes of {source.folder}")
  return source.size


def _tokenizer(config: ConfigDict, run: Kept | None, source: Source | None, task: Task | None) -> Tokenizer:
  """The tokenizer that a run keeps, or one from the model folder, or one trained on the task's texts."""

  def make() -> Tokenizer:
    if source is not None and source.tokenizer is None:
      raise ValueError(f"{source.folder} holds no tokenizer; put tokenizer.json, or its parts, beside config.json")
    if source is not None and source.tokenizer is not None:
      return source.tokenizer
    return run_tokenizer.train(cast(Task, task), config.task.style, **config.tokenizer)

  if run is None:
    return make()
  is_makeable = source is not None or task is not None
  return run_tokenizer.read_or_make(run, make if is_makeable else None, str(source.folder) if source else "the task")


def build(
  config: ConfigDict,
  tokenizer: Tokenizer | Kept | None,
  devices: Sequence[Any] | None = None,
  *,
  with_task: bool = True,
  trains: bool = False,
) -> Experiment:
  """Builds an experiment; no weights are read. A model of the hub is downloaded, nothing else is written.

  Args:
    config: a resolved configuration.
    tokenizer: the one that a run keeps, or a tokenizer; None: the one of the pretrained folder, or one trained on the
      task's texts.
    devices: the devices; None: all.
    with_task: False leaves the task out, so that `config.task.module` of somebody else is not run.
    trains: whether the weights are trained on the task, so that weights and questions must be there.

  Raises:
    ValueError: a field or a file is wrong.
    RunError: a path must not lie in a bucket, but does.
  """
  config = ConfigDict(config.to_dict())
  fields.complete(config)
  limits.check(config)
  chosen, located = inputs.find_inputs(config, with_task=with_task, trains=trains)
  task = cast(Task, inputs.NoTask()) if chosen is None else chosen
  check_choice("protocol", config.task.protocol, tasks.PROTOCOLS)
  if isinstance(task, tasks.Custom):
    task.try_out(config.task.style, config.task.protocol)
  sampler = SamplerSpec(**config.rollout)
  if sampler.early_exit and config.task.protocol == "d1":
    raise ValueError(
      "rollout.early_exit ends completions at their stop id, but task.protocol=d1 reads on: turn one off"
    )
  source = inputs.downloaded(located) if isinstance(located, hub.Snapshot) else located
  if tokenizer is None or isinstance(tokenizer, Kept):
    tokenizer = _tokenizer(config, tokenizer, source, task if with_task else None)
  lora = config.lora
  spec = LoraSpec(lora.rank, lora.alpha, lora.dropout, tuple(lora.targets), lora.rslora) if lora.rank else None
  check_choice("model.quantize", config.model.quantize, ("none", *KINDS))
  quantized = None if config.model.quantize == "none" else config.model.quantize
  if quantized and spec is None:
    raise ValueError(f"model.quantize={quantized!r} stores a frozen base: set lora.rank to train adapters")
  devices = jax.devices() if devices is None else devices
  rules = meshes.changed(meshes.RULES, config.rules.to_dict())
  mesh, rollout_mesh = sub_meshes(config.mesh.to_dict(), ConfigDict(config.get("rollout_mesh", {})).to_dict(), devices)
  model = models.build(
    _size(config, source, tokenizer.vocab),
    tokenizer,
    source,
    mesh=mesh,
    rollout_mesh=rollout_mesh,
    rules=rules,
    rollout_rules=meshes.changed(rules, config.rollout_rules.to_dict()),
    dtype=models.compute_dtype(config.model.dtype, devices[0].platform),
    seed=config.seed,
    lora=spec,
    quantize=quantized,
    block=config.model.block if source is None else source.block_of(config.model.block),
    remat=config.model.remat,
    unroll=config.model.unroll,
  )
  if config.get("mode") == "sft" or (config.get("mode") == "dpo" and config.pairs.file):  # which only validates with it
    sampler = sampler.for_block(model.denoiser.block)
  elif config.get("mode") in ("dpo", "grpo"):
    with reworded("rollout."):
      blocks.check(model.denoiser, sampler)
  return Experiment(config, task, model, sampler)
