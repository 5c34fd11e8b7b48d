"""Accuracy of completions on a split, with intervals, and a line for every completion."""

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from d1jax import keys
from d1jax.data.pipeline import pad_left
from d1jax.diffusion.rollout import SamplerSpec
from d1jax.diffusion.sampler import sample
from d1jax.intervals import Share, clustered
from d1jax.parallel.mesh import place
from d1jax.rl.grading import Graded, grade
from d1jax.tasks import Record, Task
from d1jax.training.experiment import Experiment, Texts
from d1jax.training.workdir import write_atomically


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

  def __init__(self, experiment: Experiment, texts: Texts, sampler: SamplerSpec, batch_size: int):
    """Prepares the batches.

    Args:
      experiment: network, task and mesh.
      texts: the split.
      sampler: how to complete; temperature 0 is greedy.
      batch_size: rows a batch; the last one is filled up with repeats that are not graded.
    """
    self._experiment, self._texts, self._batch_size = experiment, texts, min(batch_size, len(texts.records))
    rows = len(texts.prompts)
    count = -(-rows // self._batch_size)
    order = np.arange(count * self._batch_size, dtype=np.int32)
    # Every batch has the width of the largest bucket in use, so that one program serves all.
    longest = max(len(p) for p in texts.prompts)
    width = min(b for b in experiment.buckets if b >= longest)
    tokens, valid = pad_left([texts.prompts[i % rows] for i in order], width, experiment.tokenizer.pad_id)
    by_batch = lambda x: x.reshape(count, self._batch_size, *x.shape[1:])
    self._batches = [
      place(batch, experiment.by_row) for batch in zip(*map(by_batch, (tokens, valid, order)), strict=True)
    ]
    self._sample = jax.jit(
      functools.partial(_sample, experiment, sampler),
      in_shardings=(experiment.params_placement, experiment.by_row, experiment.by_row, experiment.by_row),
      out_shardings=experiment.by_row,
    )

  def __call__(self, params: Any) -> Evaluation:
    """Evaluates these weights; the same weights always give the same completions."""
    outputs = [self._sample(params, *batch) for batch in self._batches]
    rows = len(self._texts.records)
    completion, mask = (np.concatenate(x)[:rows] for x in zip(*map(jax.device_get, outputs), strict=True))
    experiment, records = self._experiment, self._texts.records
    graded = grade(experiment.task, experiment.tokenizer, records, self._texts.prefills, completion, mask)
    return Evaluation(records, graded, [experiment.task.cluster(r) for r in records])


def _sample(
  experiment: Experiment, sampler: SamplerSpec, params: Any, prompt: jax.Array, valid: jax.Array, sample_id: jax.Array
) -> tuple[jax.Array, jax.Array]:
  key = keys.purpose_key(experiment.key, keys.Purpose.EVALUATION)
  rollout = sample(experiment.denoiser, params, prompt, valid, sample_id, sample_id, key, spec=sampler)
  return rollout.completion, rollout.completion_mask
