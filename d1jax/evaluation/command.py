"""`--config=configs/eval.py`: completes and grades (or resumes), and writes items, numbers and a report."""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from d1jax import keys, tasks
from d1jax.completer import Completer
from d1jax.diffusion.blocks import check
from d1jax.diffusion.rollout import SamplerSpec
from d1jax.errors import explained, harmless, input_checked, smaller_batches
from d1jax.evaluation import generations, output, perplexity, subject
from d1jax.evaluation.evaluator import Evaluator, grade_completions
from d1jax.evaluation.items import Item, append, parse, question_id
from d1jax.evaluation.subject import Subject
from d1jax.parallel import multihost
from d1jax.rl.prompts import Prompts
from d1jax.run import inputs, limits
from d1jax.run import workdir as workdirs
from d1jax.run.inputs import NO_TASK
from d1jax.run.interrupts import Interrupts
from d1jax.run.workdir import Folder
from d1jax.tasks import Task
from d1jax.tasks.common import check_choice

ELSEWHERE = (
  *("checkpoint", "pretrained", "chosen_beforehand", "output", "compare"),
  *("mesh", "cpu_devices", "distributed", "batch_size", "perplexity", "window", "mc_num"),
)
"""Fields that affect neither completions nor grades, or whose content the fingerprints identify."""


@dataclasses.dataclass(frozen=True)
class Arm:
  """One row of the table: a task with one length and temperature.

  Attributes:
    name: the name of its file of items.
    prompts: the questions.
    style: the prompt style.
    sampler: the sampler.
    draws: (seed, sample) pairs; a greedy arm has one.
  """

  name: str
  prompts: Prompts
  style: str
  sampler: SamplerSpec
  draws: tuple[tuple[int, int], ...]


def run(config: ConfigDict) -> dict[str, Any]:
  """Evaluates a model, or grades `config.generations`; prints a table and JSON lines, and writes the output folder.

  With `config.perplexity` it scores a file of text, and writes nothing.

  Returns:
    The content of `results.json`, or of the line about the perplexity; see docs/evaluation.md.
  """
  with input_checked():
    limits.check(config)
  if config.perplexity is not None:
    return perplexity.run(config)
  with input_checked():
    check_choice("protocol", config.protocol, tasks.PROTOCOLS)
    multihost.from_main(lambda: output.compared_with(config))  # an error here comes before any computation
    if config.generations is not None:
      return multihost.from_main(lambda: generations.run(config))
    if config.protocol == "d1" and config.early_exit:
      raise ValueError("early_exit ends completions at their stop id, but the protocol d1 reads on: leave it out")
  with explained("evaluation", "more devices"):
    found = subject.load(config)
    with input_checked():
      arms = list(_arms(config, found))
    identity = _identity(config, found, arms)
    multihost.check_same("the evaluation", identity)
    asked = workdirs.folder(config.output) if config.output else None
    folder = workdirs.folder(multihost.from_main(lambda: str(output.claim(asked, found.home, identity))))
    smaller = smaller_batches("batch_size", _batch_size(config, found))
    with Interrupts() as interrupts, explained("evaluation", smaller):
      _complete(config, found, arms, folder, interrupts)
    return multihost.from_main(lambda: output.finish(config, folder, identity, [_row(arm, folder) for arm in arms]))


def _batch_size(config: ConfigDict, found: Subject) -> int:
  return int(config.batch_size or found.experiment.config.evaluation.batch_size)


def _row(arm: Arm, folder: Folder) -> output.Row:
  return output.Row(
    name=arm.name,
    task=arm.prompts.task,
    records=arm.prompts.records,
    style=arm.style,
    sampler=arm.sampler,
    length=arm.sampler.completion_length,
    temperature=arm.sampler.temperature,
    items=output.read_items(folder, arm.name),
  )


def _complete(config: ConfigDict, found: Subject, arms: Sequence[Arm], folder: Folder, interrupts: Interrupts) -> None:
  """Runs every batch with missing items; each process grades its rows, and process 0 writes all items."""
  completer = Completer.of(found.experiment.model, keys.Purpose.EVALUATION)
  completer.announce = subject.saying
  with subject.saying("publishing the weights"):
    params = found.params()
  for arm in arms:
    places = lambda arm=arm: [(item.seed, item.sample, item.index) for item in output.read_items(folder, arm.name)]
    done = set(map(tuple, multihost.from_main(places)))
    evaluator = Evaluator(completer, arm.prompts, arm.sampler, _batch_size(config, found))
    for seed, sample in arm.draws:
      for batch, rows in enumerate(evaluator.batches):
        if all((seed, sample, row) in done for row in rows):
          continue
        completed = evaluator.complete(batch, params, seed=seed, sample=sample)
        records = [arm.prompts.records[i] for i in completed.rows]
        prefills = [arm.prompts.prefills[i] for i in completed.rows]
        task = arm.prompts.task
        texts, grades = grade_completions(
          task,
          arm.prompts.tokenizer,
          records,
          prefills,
          completed.completion,
          completed.mask,
          config.protocol,
        )
        tokens = completed.mask.sum(axis=1)
        lines = [
          Item(
            task=task.name,
            length=arm.sampler.completion_length,
            temperature=arm.sampler.temperature,
            seed=seed,
            sample=sample,
            index=int(row),
            question=question_id(record),
            cluster=task.cluster(record),
            record=record,
            text=text,
            answer=grade.answer,
            reward=grade.reward,
            metrics=grade.metrics,
            tokens=int(count),
            forward_passes=completed.forward_passes,
            seconds=completed.seconds / len(rows),
          ).line()
          for row, record, text, grade, count in zip(completed.rows, records, texts, grades, tokens, strict=True)
        ]
        everyone = multihost.gather_rows(completed.rows, lines)
        if multihost.is_main():
          new = [item for item in map(parse, everyone) if (seed, sample, item.index) not in done]
          append(output.items_path(folder, arm.name), new)
        print(f"{arm.name}  seed {seed}  sample {sample}  batch {batch + 1}/{len(evaluator.batches)}", flush=True)
        if interrupts.pending():
          raise interrupts.error(f"{arm.name} batch {batch + 1}")


def _arms(config: ConfigDict, found: Subject) -> Iterator[Arm]:
  """Yields one arm for each task, length and temperature."""
  trained = found.experiment.config
  for task in _tasks(config, trained):
    own = ConfigDict(trained.to_dict())
    own.task.style = config.style or trained.task.style
    own.evaluation.prompt_buckets = tuple(config.prompt_buckets) or trained.evaluation.prompt_buckets
    if isinstance(task, tasks.Custom):
      task.try_out(own.task.style, config.protocol)
    experiment = dataclasses.replace(found.experiment, config=own, task=task)
    prompts = experiment.prompts(config.split, config.prefill)
    output.check_accuracy(task, prompts.records[0], own.task.style, config.protocol)
    for sampler in samplers(config, found.experiment.sampler):
      check(experiment.model.rollout_denoiser, sampler, length="lengths")
      greedy = sampler.temperature == 0 and sampler.remasking != "random"
      draws = tuple((seed, sample) for seed in config.seeds for sample in range(config.samples))
      name = f"{task.name}_{sampler.completion_length}_t{sampler.temperature:g}"
      yield Arm(name, prompts, own.task.style, sampler, draws[:1] if greedy else draws)


def samplers(config: ConfigDict, trained: SamplerSpec) -> Iterator[SamplerSpec]:
  """The samplers of the lengths and temperatures; fields that are not set are those of the rollouts, `trained`."""
  early_exit = config.protocol == "strict" if config.early_exit is None else config.early_exit
  trained = trained.with_cache(config.cache or trained.cache)
  for length in config.lengths or (trained.completion_length,):
    block = config.block_length or trained.block_length
    per_step = config.tokens_per_step or trained.completion_length / trained.diffusion_steps
    steps = length // block * max(1, round(block / per_step))  # the same number of tokens per step for every length
    if config.tokens_per_step and block % config.tokens_per_step:
      steps = length // config.tokens_per_step
    if length % block == 0 and steps % (length // block):
      raise ValueError(
        f"tokens_per_step={per_step:g} gives {steps} steps to {length} tokens, which the {length // block} blocks of"
        f" block_length={block} do not share evenly: let it divide the block"
      )
    for temperature in config.temperatures:
      yield dataclasses.replace(
        trained,
        completion_length=length,
        diffusion_steps=steps,
        block_length=block,
        temperature=float(temperature),
        cfg_scale=trained.cfg_scale if config.cfg_scale is None else config.cfg_scale,
        remasking=config.remasking or trained.remasking,
        early_exit=early_exit,
        schedule=config.schedule or trained.schedule,
      )


def _tasks(config: ConfigDict, trained: ConfigDict) -> Iterator[Task]:
  """The tasks in the configuration, or else the checkpoint's tasks with their sizes and options."""
  section, options = trained.task, trained.task.options.to_dict()
  root = config.data_root or trained.data.root
  if root is not None and config.data_root is None and multihost.is_main():
    print(harmless(f"reading data of {root}, which the checkpoint names"), file=sys.stderr)
  root = inputs.data_root(root, cached=config.data_root is None)
  own = {name: options.get(name, {}) for name in section.mix} or {section.name: options}
  asked: list[tuple[str, str | None]] = [(name, None) for name in config.tasks]
  if config.module is not None:
    asked.append(("", config.module))
  if not asked and section.module is not None:
    raise ValueError(
      f"the checkpoint's task is the Python file {section.module}: its code is run only if you name it yourself, with"
      f" --config.module={section.module}"
    )
  if not asked and section.name == NO_TASK:
    raise ValueError("the checkpoint's run has no task: name one, for example --config=configs/eval.py:gsm8k")
  for name, module in asked or [(name, None) for name in own]:
    is_own = name in own if module is None else module == section.module
    sizes = section.sizes.to_dict() if is_own else {}
    if config.questions is not None:
      sizes[config.split] = config.questions
    yield tasks.build(
      name,
      module=module,
      seed=trained.seed if config.data_seed is None else config.data_seed,
      root=root,
      sizes=sizes,
      **(own.get(name, options) if is_own else {}),
    )


def _identity(config: ConfigDict, found: Subject, arms: Sequence[Arm]) -> dict[str, Any]:
  """Everything that affects completions and grades."""
  fields = {name: value for name, value in config.to_dict().items() if name not in ELSEWHERE}
  return {
    "subject": found.name,
    "params_fingerprint": found.fingerprint,
    "base_fingerprint": found.experiment.model.weights.base_fingerprint,
    "questions": {arm.name: question_hashes(arm) for arm in arms},
    "device": jax.devices()[0].device_kind,
    "config": json.loads(json.dumps(fields)),
  }


def question_hashes(arm: Arm) -> Mapping[str, Any]:
  """The number of an arm's questions, and hashes over their records, prompts (token ids) and prefills."""
  prompts = arm.prompts
  asked = json.dumps([prompts.ids, prompts.prefills])
  return {
    "n": len(prompts.records),
    "left_out": prompts.left_out,
    "records_sha256": tasks.split_hash(prompts.records),
    "prompts_sha256": hashlib.sha256(asked.encode()).hexdigest(),
    "sampler": dataclasses.asdict(arm.sampler),
    "style": arm.style,
  }
