"""Accuracy of completions on a split, with intervals, and a line for every completion."""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from d1jax import keys
from d1jax.data.pipeline import pad_left
from d1jax.diffusion.rollout import SamplerSpec
from d1jax.diffusion.sampler import sample
from d1jax.errors import RunError, input_checked
from d1jax.intervals import Share, clustered
from d1jax.parallel.mesh import place
from d1jax.rl.grading import Graded, grade
from d1jax.state import Frozen, merge_for_rollout
from d1jax.tasks import Record, Task
from d1jax.training.checkpoint import Checkpoints
from d1jax.training.experiment import Experiment, Texts, build, of_checkpoint
from d1jax.training.weights import check_base
from d1jax.training.workdir import read_tokenizer, versions, write_atomically, write_json


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """Graded completions of one split.

  Attributes:
    records: one a completion.
    graded: texts and grades.
    clusters: what is not independent.
  """

  records: Sequence[Record]
  graded: Graded
  clusters: Sequence[str]

  def share(self, metric: str) -> Share:
    """One metric pooled over the split, with its interval."""
    pairs = [g.metrics[metric] for g in self.graded.grades]
    return clustered([p[0] for p in pairs], [p[1] for p in pairs], self.clusters)

  def summary(self) -> dict[str, Any]:
    """All metrics as JSON: `NAME`, `NAME_interval`, and `n`."""
    names = self.graded.grades[0].metrics
    shares = {name: self.share(name) for name in names}
    summary: dict[str, Any] = {}
    for name, share in shares.items():
      summary |= {name: share.value, f"{name}_interval": [share.low, share.high]}
    return summary | {"n": len(self.records)}

  def write(self, path: Path) -> None:
    """One JSON line a completion."""
    lines = [
      json.dumps({"record": dict(record), "text": text, "reward": g.reward, "metrics": dict(g.metrics)})
      for record, text, g in zip(self.records, self.graded.texts, self.graded.grades, strict=True)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, ("\n".join(lines) + "\n").encode())


def baseline(task: Task, records: Sequence[Record], style: str) -> Evaluation:
  """What a completion without a model earns: the task's constant answer."""
  texts = [task.baseline(record, style) for record in records]
  grades = [task.grade(text, record) for text, record in zip(texts, records, strict=True)]
  rewards = np.asarray([g.reward for g in grades], np.float32)
  return Evaluation(records, Graded(texts, grades, rewards), [task.cluster(r) for r in records])


class Evaluator:
  """Completes and grades a fixed list of prompts under any weights, with one compiled program."""

  def __init__(
    self,
    experiment: Experiment,
    texts: Texts,
    sampler: SamplerSpec,
    batch_size: int,
    *,
    seed: int = 0,
  ):
    """Prepares the batches.

    Args:
      experiment: network, task and mesh.
      texts: the split.
      sampler: how to complete; temperature 0 is greedy.
      batch_size: rows a batch; the last one is filled up with repeats that are not graded.
      seed: of the draws at temperatures above 0.
    """
    self._experiment, self._texts = experiment, texts
    rows, ways = len(texts.prompts), experiment.ways
    self._batch_size = min(-(-batch_size // ways), -(-rows // ways)) * ways
    count = -(-rows // self._batch_size)
    order = np.arange(count * self._batch_size, dtype=np.int32)
    # Every batch has the width of the largest bucket in use, so that one program serves all.
    longest = max(len(p) for p in texts.prompts)
    width = min(b for b in experiment.config.evaluation.prompt_buckets if b >= longest)
    tokens, valid = pad_left([texts.prompts[i % rows] for i in order], width, experiment.tokenizer.pad_id)
    by_batch = lambda x: x.reshape(count, self._batch_size, *x.shape[1:])
    self._batches = [
      place(batch, experiment.by_row) for batch in zip(*map(by_batch, (tokens, valid, order)), strict=True)
    ]
    self._sample = jax.jit(
      functools.partial(_sample, experiment, sampler, seed),
      in_shardings=(
        experiment.weights.trainable_placement,
        experiment.weights.frozen_placement(),
        experiment.by_row,
        experiment.by_row,
        experiment.by_row,
      ),
      out_shardings=experiment.by_row,
    )

  def __call__(self, trainable: Any, frozen: Frozen) -> Evaluation:
    """Evaluates these weights; the same weights always give the same completions."""
    outputs = [self._sample(trainable, frozen, *batch) for batch in self._batches]
    rows = len(self._texts.records)
    completion, mask = (np.concatenate(x)[:rows] for x in zip(*map(jax.device_get, outputs), strict=True))
    experiment, records = self._experiment, self._texts.records
    graded = grade(experiment.task, experiment.tokenizer, records, self._texts.prefills, completion, mask)
    return Evaluation(records, graded, [experiment.task.cluster(r) for r in records])


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
  """Shares in percent with their 95% intervals, one row an arm."""
  metrics = [name for name in ("solved", "cell_accuracy", "well_formed") if name in next(iter(rows.values()))]
  head = f"{'':<18}" + "".join(f"{name.replace('_', ' '):>14}{'95% interval':>17}" for name in metrics) + f"{'n':>7}"
  lines = [head, "-" * len(head)]
  for name, row in rows.items():
    cells = ""
    for metric in metrics:
      low, high = row[f"{metric}_interval"]
      cells += f"{100 * row[metric]:>13.1f}%" + f"[{100 * low:.1f}, {100 * high:.1f}]".rjust(17)
    lines.append(f"{name:<18}{cells}{row['n']:>7}")
  return "\n".join(lines)


def find_checkpoint(path: Path) -> Path:
  """The folder of one checkpoint: `path` itself, or the best of the last stage of the work directory `path`.

  Raises:
    RunError: there is none.
  """
  if path.name.isdigit() and path.is_dir():
    return path
  for stage in ("grpo", "sft"):
    folder = path / "checkpoints" / stage
    if folder.is_dir() and (best := Checkpoints(folder).best_step()) is not None:
      return folder / str(best)
  raise RunError(
    f"no checkpoint in {path}: give a work directory of a run, or a folder like WORKDIR/checkpoints/grpo/400"
  )


def run(config: ConfigDict) -> dict[str, Any]:
  """Evaluates a checkpoint at each temperature; prints a table, writes every completion and `results.json`."""
  if config.checkpoint is None:
    raise RunError("config.checkpoint is not set; give a work directory or a checkpoint's folder")
  folder = find_checkpoint(Path(config.checkpoint))
  checkpoints = Checkpoints(folder.parent)
  metadata = checkpoints.metadata(int(folder.name))
  trained = of_checkpoint(metadata["config"], config)
  with input_checked():
    experiment = build(trained, read_tokenizer(folder.parent.parent.parent))
    texts = experiment.texts(config.split)
    samplers = {t: dataclasses.replace(experiment.sampler, temperature=t) for t in config.temperatures}
  stage = folder.parent.name
  section = trained[stage]
  optimizer = experiment.optimizer(section, section.steps)
  abstract = experiment.weights.abstract_state(optimizer)
  trainable = checkpoints.restore(int(folder.name), abstract).state.trainable
  with input_checked():
    check_base(experiment.weights, metadata)
  frozen = experiment.weights.frozen
  output = Path(config.output) if config.output else folder.parent.parent.parent / "eval"
  rows = {"constant answer": baseline(experiment.task, texts.records, trained.task.style).summary()}
  for temperature, sampler in samplers.items():
    found = Evaluator(experiment, texts, sampler, config.batch_size, seed=config.seed)(trainable, frozen)
    name = "greedy" if temperature == 0 else f"temperature {temperature:g}"
    found.write(output / f"{config.split}_{name.replace(' ', '_')}.jsonl")
    rows[name] = found.summary()
  results = {
    "checkpoint": str(folder),
    "split": config.split,
    "results": rows,
    "versions": versions(),
  }
  write_json(output / "results.json", results)
  print(f"{folder} on {trained.task.name} {config.split}:\n\n{table(rows)}\n\nCompletions: {output}")
  return results


def _sample(
  experiment: Experiment,
  sampler: SamplerSpec,
  seed: int,
  trainable: Any,
  frozen: Frozen,
  prompt: jax.Array,
  valid: jax.Array,
  sample_id: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  key = keys.purpose_key(jax.random.key(seed), keys.Purpose.EVALUATION)
  params = merge_for_rollout(trainable, frozen)
  rollout = sample(experiment.denoiser, params, prompt, valid, sample_id, sample_id, key, spec=sampler)
  return rollout.completion, rollout.completion_mask
