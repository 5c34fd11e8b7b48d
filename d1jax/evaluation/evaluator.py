"""Completes and grades a fixed list of prompts under given weights."""

import dataclasses
import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from d1jax import columns, keys
from d1jax.completer import Completer
from d1jax.data.pipeline import bucket_for, pad_left
from d1jax.data.tokenizer import Tokenizer
from d1jax.diffusion.rollout import SamplerSpec
from d1jax.intervals import Share, clustered
from d1jax.model import Model
from d1jax.parallel import multihost
from d1jax.parallel.mesh import place
from d1jax.rl.grading import Graded, decode
from d1jax.rl.prompts import Prompts
from d1jax.run.workdir import Folder, write_atomically
from d1jax.state import Params
from d1jax.tasks import Record, Task, TaskError, checked
from d1jax.tasks.base import Grade


class Completed(NamedTuple):
  """The rows of one batch of completions that belong to this process, on the host.

  Attributes:
    rows: the index in the list of prompts of each row; repeats that only fill the batch are removed.
    completion: token ids.
    mask: true up to and including the first stop id.
    reveal_step: the denoising step, from 0, that unmasked each token.
    forward_passes: the network's forward passes for the batch, over the whole canvas or a window of it.
    seconds: the time of the compiled program.
  """

  rows: Int[np.ndarray, "B"]
  completion: Int[np.ndarray, "B C"]
  mask: Bool[np.ndarray, "B C"]
  reveal_step: Int[np.ndarray, "B C"]
  forward_passes: int
  seconds: float


class Trace(NamedTuple):
  """The tokens of one completion and how they came about.

  Attributes:
    tokens: the ids up to and including the first stop id.
    reveal_step: the denoising step, from 0, that unmasked each of them.
  """

  tokens: list[int]
  reveal_step: list[int]


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """Graded completions of one split.

  Attributes:
    records: one record per completion.
    graded: texts and grades.
    clusters: one per completion; completions of the same cluster are not independent.
    traces: the completions that the evaluator was asked to trace, by their index.
  """

  records: Sequence[Record]
  graded: Graded
  clusters: Sequence[str]
  traces: Mapping[int, Trace] = dataclasses.field(default_factory=dict)

  def share(self, metric: str) -> Share:
    """One metric pooled over the split, with its interval; completions without the metric are left out."""
    found = [
      (*g.metrics[metric], c) for g, c in zip(self.graded.grades, self.clusters, strict=True) if metric in g.metrics
    ]
    return clustered(*zip(*found, strict=True))

  def summary(self) -> dict[str, Any]:
    """All metrics as JSON: `NAME`, `NAME_interval` and `n`; also `NAME_n` if not all completions count."""
    summary: dict[str, Any] = {}
    for name in dict.fromkeys(name for grade in self.graded.grades for name in grade.metrics):
      share = self.share(name)
      summary |= {name: share.value, f"{name}_interval": [float(share.low), float(share.high)]}
      if share.n < len(self.records):
        summary[f"{name}_n"] = share.n
    return summary | {"n": len(self.records)}

  def write(self, path: Folder) -> None:
    """Writes one JSON line per completion."""
    lines = [
      json.dumps({"record": dict(record), "text": text, "reward": g.reward, "metrics": dict(g.metrics)})
      for record, text, g in zip(self.records, self.graded.texts, self.graded.grades, strict=True)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, ("\n".join(lines) + "\n").encode())


def evaluation(task: Task, records: Sequence[Record], texts: list[str], grades: list[Grade]) -> Evaluation:
  """Graded completions with their clusters."""
  rewards = np.asarray([grade.reward for grade in grades], np.float32)
  return Evaluation(records, Graded(texts, grades, rewards), [task.cluster(record) for record in records])


def baseline(task: Task, records: Sequence[Record], style: str, protocol: str = "strict") -> Evaluation:
  """The grades of the task's constant answer, which needs no model."""
  texts = [task.baseline(record, style) for record in records]
  return evaluation(
    task, records, texts, [checked.grade(task, t, r, protocol) for t, r in zip(texts, records, strict=True)]
  )


def grade_completions(
  task: Task,
  tokenizer: Tokenizer,
  records: Sequence[Record],
  prefills: Sequence[str],
  completion: Int[np.ndarray, "B C"],
  mask: Bool[np.ndarray, "B C"],
  protocol: str,
) -> tuple[list[str], list[Grade]]:
  """Grades completions; returns the texts that were graded and their grades.

  `strict` reads the prefill and the text up to the first stop id. `d1` reads all tokens, also special ones as text,
  without the prefill, like d1's evaluation; its grades also have the metrics of `strict`. All processes must call this
  together, each with its own rows.

  Raises:
    TaskError: the task breaks its contract on some process; the error is raised on all.
  """
  shown = [a + b for a, b in zip(prefills, decode(tokenizer, completion, mask), strict=True)]
  texts = shown if protocol == "strict" else tokenizer.decode_raw([row.tolist() for row in completion])
  failure, grades = "", []
  try:
    grades = [grade_text(task, *row, protocol) for row in zip(records, shown, texts, strict=True)]
  except TaskError as error:
    failure = str(error)
  for failed in multihost.gather(failure):
    if failed:
      raise TaskError(failed)
  return texts, grades


def grade_text(task: Task, record: Record, shown: str, raw: str, protocol: str) -> Grade:
  """The grade of one completion; with a protocol other than `strict`, it also has the metrics of `strict`.

  `shown` is the text that `strict` reads, which is the prefill and the text up to the stop, and `raw` the text that
  other protocols read.
  """
  strict = checked.grade(task, shown, record)
  if protocol == "strict":
    return strict
  other = checked.grade(task, raw, record, protocol)
  return dataclasses.replace(other, metrics={**other.metrics, **strict.metrics}, answer=strict.answer)


class Evaluator:
  """Completes and grades a fixed list of prompts under given weights."""

  def __init__(
    self,
    completer: Completer,
    prompts: Prompts,
    sampler: SamplerSpec,
    batch_size: int,
    traced: Collection[int] = (),
  ):
    """Prepares the batches.

    Args:
      completer: the compiled programs, which evaluators of one model share.
      prompts: the split.
      sampler: the sampler; temperature 0 is greedy.
      batch_size: the rows of a batch. Prompts of one bucket share batches; the last batch of a bucket is filled up with
        repeats that are not graded. `batches` lists the prompt indices of each batch.
      traced: the indices of the prompts whose completions are traced.
    """
    self._completer, self.prompts, self._sampler, self._traced = completer, prompts, sampler, frozenset(traced)
    self._model = completer.model
    members: dict[int, list[int]] = {}
    for row, prompt in enumerate(prompts.ids):
      width = bucket_for(len(prompt), prompts.buckets)
      if width is None:
        raise ValueError(
          f"a prompt has {len(prompt)} tokens, evaluation.prompt_buckets={prompts.buckets} hold fewer: raise it"
        )
      members.setdefault(width, []).append(row)
    ways = self._model.rollout_ways
    self._width: list[int] = []
    self.batches: list[list[int]] = []
    self._size: list[int] = []
    for width, rows in sorted(members.items()):
      size = min(-(-batch_size // ways), -(-len(rows) // ways)) * ways
      parts = [rows[first : first + size] for first in range(0, len(rows), size)]
      self.batches += parts
      self._width += [width] * len(parts)
      self._size += [size] * len(parts)

  def compile(self) -> None:
    """Compiles everything that an evaluation needs."""
    for rows, width in zip(self._size, self._width, strict=True):
      self._completer.program(self._sampler, rows, width)

  def complete(self, batch: int, params: Params, *, seed: int = 0, sample: int = 0) -> Completed:
    """Completes one batch under published weights; a row's draws depend on seed, sample and its prompt's index."""
    own, model, ids = self.batches[batch], self._model, self.prompts.ids
    asked = [own[i % len(own)] for i in range(self._size[batch])]
    tokens, valid = pad_left([ids[i] for i in asked], self._width[batch], self.prompts.tokenizer.pad_id)
    places = np.asarray(asked, np.int32)
    placed = place((tokens, valid, places, places), model.rollout_by_row)
    key, step = place((keys.seeded(seed), np.int32(sample)), model.rollout_replicated)
    self._completer.program(
      self._sampler, self._size[batch], self._width[batch]
    )  # compilation is not measured as sampling
    began = time.perf_counter()
    rollout = self._completer(self._sampler, params, placed, key, step)
    rows, local = multihost.local_rows((rollout.completion, rollout.completion_mask, rollout.reveal_step))
    passes = self._sampler.forward_passes(multihost.fetch(rollout.reveal_step))
    seconds = time.perf_counter() - began
    keep, length = rows < len(own), self._sampler.completion_length
    completion, mask, reveal_step = (x[keep, :length] for x in local)
    return Completed(np.asarray(own)[rows[keep]], completion, mask, reveal_step, passes, seconds)

  def __call__(self, params: Params, pause: Callable[[], None] | None = None) -> Evaluation:
    """Evaluates published weights with the protocol `strict`; equal weights always give equal completions.

    Args:
      params: the weights, from `Model.publish` or `Model.params`.
      pause: a function that is called between two batches, and may raise an exception to stop.
    """
    task, records = self.prompts.task, self.prompts.records
    places, found = [], []
    for batch in range(len(self.batches)):
      if pause is not None:
        pause()
      done = self.complete(batch, params)
      own, prefills = [records[i] for i in done.rows], [self.prompts.prefills[i] for i in done.rows]
      tokenizer = self.prompts.tokenizer
      graded = grade_completions(task, tokenizer, own, prefills, done.completion, done.mask, "strict")
      places.append(done.rows)
      traces = [self._trace(done, row) for row in range(len(own))]
      found += [(text, dataclasses.asdict(grade), trace) for text, grade, trace in zip(*graded, traces, strict=True)]
    everyone = multihost.gather_rows(np.concatenate(places), found)
    grades = [Grade(**fields) for _, fields, _ in everyone]
    traced = {i: Trace(*trace) for i, (_, _, trace) in enumerate(everyone) if trace}
    return dataclasses.replace(evaluation(task, records, [text for text, *_ in everyone], grades), traces=traced)

  def _trace(self, done: Completed, row: int) -> Trace | None:
    """The trace of one row, if its prompt is traced."""
    if int(done.rows[row]) not in self._traced:
      return None
    return Trace(*(x[row][done.mask[row]].tolist() for x in (done.completion, done.reveal_step)))


def evaluate(
  model: Model,
  prompts: Prompts,
  sampler: SamplerSpec,
  *,
  params: Params | None = None,
  batch_size: int = 64,
) -> Evaluation:
  """Completes and grades a split under a model's weights, in the same way as a run.

  Args:
    model: network and mesh.
    prompts: the split, from `Prompts.of(task, model.tokenizer, "test")`.
    sampler: the sampler; `sampler.greedy()` takes the most probable tokens.
    params: the weights, from `Model.publish`; None: the weights with which the model starts.
    batch_size: the number of completions per batch.

  Returns:
    The graded completions; `.share("solved")` is a metric with its 95% interval, `.summary()` has all metrics.

  Raises:
    TaskError: the task breaks its contract.
  """
  completer = Completer.of(model, keys.Purpose.EVALUATION)
  return Evaluator(completer, prompts, sampler, batch_size)(model.params if params is None else params)


def tables(rows: Mapping[str, Mapping[str, Any]]) -> str:
  """The shares of a task in percent with their 95% intervals, one row per arm; of a mix, a table for each task."""
  first = next(iter(rows.values()))
  tasks = dict.fromkeys(name.rpartition("/")[0] for name in first if "/" in name)
  if not tasks:
    return _shares(rows)
  found = []
  for task in tasks:
    own = {
      name: {k.removeprefix(f"{task}/"): v for k, v in row.items() if k.startswith(f"{task}/")}
      for name, row in rows.items()
    }
    found.append(f"{task}:\n" + _shares({name: row | {"n": row["solved_n"]} for name, row in own.items()}))
  return "\n\n".join(found)


def _shares(rows: Mapping[str, Mapping[str, Any]]) -> str:
  """The table of one task."""
  first = next(iter(rows.values()))
  metrics = [name for name in ("solved", "cell_accuracy", "well_formed") if name in first]
  cells = []
  for name, row in rows.items():
    ends = [row[f"{metric}_interval"] for metric in metrics]
    shares = [
      f"{100 * row[metric]:.1f}% [{100 * low:.1f}, {100 * high:.1f}]"
      for metric, (low, high) in zip(metrics, ends, strict=True)
    ]
    cells.append([name, *shares])
  return columns.table([f"n = {first['n']}", *(name.replace("_", " ") for name in metrics)], cells)
