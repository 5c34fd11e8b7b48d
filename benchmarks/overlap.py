"""How much of grading hides behind the rollouts: an iteration's rollout and grading, three ways.

`python -m benchmarks.overlap --data ROOT` lets a batch arrive in chunks and grades it in this process after the last
one (`sequence`), in this process while the next chunk is computed (`overlapped`), or in worker processes (`pool`).
`rollout` is the time without grades. The chunks are those of the tiny network on the devices that there are, and, as
`elsewhere`, those of an accelerator that leaves this machine's cores alone: one every `SECONDS`, and nothing else.

Graded are 192 texts: published answers to MATH-500 (`math`, from `ROOT/generations`; left out without `--data`),
expanded products that only `math-verify` can tell (`products`), right and wrong grids (`sudoku`). It prints a JSON line
for each load and device with the medians of interleaved rounds. No verdict is remembered from round to round.
"""

import argparse
import functools
import gc
import gzip
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from d1jax import tasks
from d1jax.data import pipeline
from d1jax.parallel import multihost
from d1jax.rl.grading import Grader, decode
from d1jax.run import experiment as experiments
from d1jax.training import configured

ROWS, CHUNKS, GROUP = 192, 4, 4
WARM = 32
"""Further texts, with which processes start."""

SECONDS = 0.5
"""Between two chunks of an accelerator that is elsewhere."""

ARMS = ("rollout", "sequence", "overlapped", "pool")


class Load(NamedTuple):
  """A grader and `ROWS + WARM` texts for it."""

  name: str
  task: tasks.Task
  texts: list[str]
  records: list[tasks.Record]


class Here:
  """Rollouts of the tiny network on the devices that there are."""

  def __init__(self) -> None:
    """Compiles; weights are those of a run's start."""
    spec = importlib.util.spec_from_file_location("grpo", Path(__file__).parent.parent / "configs" / "grpo.py")
    if spec is None or spec.loader is None:
      raise ImportError("configs/grpo.py is missing")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config("tiny")
    config.task.sizes.train = ROWS // GROUP
    config.rollout.update(completion_length=64, block_length=32, diffusion_steps=8)
    config.grpo.update(prompts_per_iteration=ROWS // GROUP, num_generations=GROUP, rollout_chunks=CHUNKS)
    self.name = jax.devices()[0].device_kind
    self._experiment = experiments.build(config, None)
    optimizer = self._experiment.optimizer(self._experiment.config.grpo, 1)
    self._programs = configured.programs(self._experiment, optimizer)
    self._programs.compile()
    width = config.data.prompt_buckets[0]
    state = self._experiment.model.weights.fresh_state(optimizer)
    self._params, self._key = self._programs.publish(state, self._experiment.model.weights.frozen), state.key
    prompts = self._experiment.prompts("train").ids
    batch = pipeline.prompt_batch(prompts, range(ROWS // GROUP), 0, GROUP, (width,), self._experiment.tokenizer.pad_id)
    self._placed = self._programs.place(batch, 0)

  def start(self) -> list[Callable[[], Any]]:
    """Begins a rollout; returns for each chunk what waits for it, fetches and decodes it."""
    prompts, iteration = self._placed
    chunks = self._programs.rollout(self._params, prompts, self._key, iteration)
    return [functools.partial(self._fetch, chunk) for chunk in chunks]

  def _fetch(self, chunk: Any) -> None:
    host = jax.device_get(chunk)
    decode(self._experiment.tokenizer, host.completion, host.completion_mask)


class Elsewhere:
  """Chunks that arrive by the clock."""

  name = "elsewhere"

  def start(self) -> list[Callable[[], Any]]:
    """Begins a rollout; returns for each chunk what waits for it."""
    began = time.perf_counter()
    due = [began + SECONDS * (chunk + 1) for chunk in range(CHUNKS)]
    return [functools.partial(self._wait, at) for at in due]

  def _wait(self, at: float) -> None:
    time.sleep(max(at - time.perf_counter(), 0))


def run(device: Here | Elsewhere, arm: str, grader: Grader, load: Load) -> float:
  """The seconds of one iteration."""
  began = time.perf_counter()
  chunks = device.start()
  if arm in ("rollout", "sequence"):
    for wait in chunks:
      wait()
  pending = []
  if arm != "rollout":
    for chunk, wait in enumerate(chunks):
      if arm != "sequence":
        wait()
      rows = slice(chunk * ROWS // CHUNKS, (chunk + 1) * ROWS // CHUNKS)
      pending.append(grader.submit(load.texts[rows], load.records[rows], "strict"))
  for grades in pending:
    grades()
  return time.perf_counter() - began


def forget() -> None:
  """Empties what the graders of this process remember; new workers remember nothing."""
  for found in gc.get_objects():
    if isinstance(found, functools._lru_cache_wrapper) and str(found.__module__).startswith("d1jax.tasks"):
      found.cache_clear()


def loads(data: str | None) -> Iterator[Load]:
  """What is graded."""
  count, math, sudoku = ROWS + WARM, tasks.build("math"), tasks.build("sudoku", sizes={"train": ROWS + WARM})
  if data is not None:
    with gzip.open(Path(data) / "generations" / "math500_128.jsonl.gz", "rt", encoding="utf-8") as file:
      rows = [json.loads(line) for line in file][:count]
    texts = [row["generations"].split("<|eot_id|>")[0] for row in rows]
    yield Load("math", math, texts, [_record(row["question"], row["ground_truth"]) for row in rows])
  products = [_record("What is it?", f"x^2-x-{i * (i + 1)}") for i in range(1, count + 1)]
  yield Load("products", math, [f"\\boxed{{(x+{i})(x-{i + 1})}}" for i in range(1, count + 1)], products)
  grids = list(sudoku.records("train"))
  answers = [sudoku.demonstration(r, "d1") if i % 2 else sudoku.baseline(r, "d1") for i, r in enumerate(grids)]
  yield Load("sudoku", sudoku, answers, grids)


def _record(problem: str, answer: str) -> tasks.Record:
  return {"problem": problem, "solution": f"\\boxed{{{answer}}}", "answer": answer}


def main() -> None:
  """Measures all loads on both devices."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--data", help="the folder with generations/")
  parser.add_argument("--workers", type=int, default=2)
  parser.add_argument("--rounds", type=int, default=3)
  arguments = parser.parse_args()
  multihost.split_cpu(1)
  here = Here()
  for load in loads(arguments.data):
    for device in (here, Elsewhere()):
      seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
      for _ in range(arguments.rounds):
        for arm in ARMS:
          with Grader(load.task, arguments.workers if arm == "pool" else 0) as grader:
            grader.submit(load.texts[ROWS:], load.records[ROWS:], "strict")()
            forget()
            seconds[arm].append(run(device, arm, grader, load))
      medians = {arm: round(statistics.median(values), 3) for arm, values in seconds.items()}
      line = {"load": load.name, "device": device.name, "rows": ROWS, "chunks": CHUNKS, "workers": arguments.workers}
      print(json.dumps(line | {"seconds": medians}), flush=True)


if __name__ == "__main__":
  main()
