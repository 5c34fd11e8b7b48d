"""Small jobs for the end-to-end tests: every stage in seconds, in this process, in its own, or in several."""

import functools
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from d1jax.run import fields, parts
from tests import QUICK_TO_COMPILE
from tests.forks import Fork

ROOT = Path(__file__).parent.parent
SMALL = {
  "model.overrides.embed": 32,
  "model.overrides.heads": 2,
  "model.overrides.mlp": 64,
  "model.overrides.layers": 1,
  "task.sizes.demonstrations": 16,
  "task.sizes.train": 64,
  "task.sizes.validation": 16,
  "task.sizes.test": 24,
  # Long enough to learn the format: without well-formed answers there is no reward and nothing to update.
  "sft.steps": 120,
  "sft.batch_size": 16,
  "sft.learning_rate": 1e-2,
  "sft.validate_every": 40,
  "grpo.steps": 6,
  "grpo.validate_every": 2,
  "grpo.prompts_per_iteration": 4,
  "grpo.num_generations": 4,
  "grpo.accumulation": 1,
  "grpo.rollout_chunks": 2,
  "evaluation.batch_size": 16,
}

START = ROOT / "tests" / "start"
"""A folder that can write answers (`tests/make_start.py`)."""
STARTED = {
  "model__overrides__embed": None,
  "model__overrides__heads": None,
  "model__overrides__mlp": None,
  "model__overrides__layers": None,
  "model__pretrained": str(START),
  "data__prompt_buckets": (56,),
  "evaluation__prompt_buckets": (56,),
  "rollout__temperature": 1.0,  # at a higher one it does not write digits alone
  "sft__prompt_buckets": (56,),
  "sft__steps": 0,
}

BRIEF = STARTED | {
  "sft__steps": 40,
  "sft__validate_every": 20,
  "rollout__early_exit": True,
  "rollout__block_length": 6,
  "rollout__diffusion_steps": 6,
  "grpo__rollout_slots": 4,
  "grpo__curriculum": True,
}
"""Both stages, from the start, for tests that stop and kill processes; rollouts are in slots, and prompts are drawn by
what a checkpoint holds."""


def untimed(record: dict) -> dict:
  """A record of `metrics.jsonl` without what a clock says."""
  timed = (
    "seconds",
    "compiled_share",
    "tokens_per_second",
    "elapsed",
    "cost/seconds/",
    "cost/grading_overlapped",
    "async/queue",
  )
  timed += ("async/idle/",)
  return {name: value for name, value in record.items() if not name.startswith(timed)}


def load(name: str, words: str = "") -> ConfigDict:
  """`configs/NAME.py:WORDS`."""
  spec = importlib.util.spec_from_file_location(f"config_{name}", ROOT / "configs" / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config(words) if words else module.get_config()
  fields.complete(config)
  return config


def small(workdir: Path, name: str = "grpo", **changes) -> ConfigDict:
  """A job of a few seconds; `changes` are dotted fields with `__` for the dot."""
  config = load(name, "smoke")
  given = SMALL | {key.replace("__", "."): value for key, value in changes.items()} | {"workdir": str(workdir)}
  for field, value in given.items():
    flags, _ = parts.take_flags([f"--config.{field}={value}"])
    if field in fields.OPEN:
      fields.choose(config, [(field, str(value))])
    elif flags:
      parts.choose(config.grpo, flags)
    elif field.split(".")[0] in config:
      config.update_from_flattened_dict({field: value})
  config.lock()
  return config


def started(workdir: Path, name: str = "grpo", **changes) -> ConfigDict:
  """A job that starts from `START`, so that diffu-GRPO has rewards without supervised fine-tuning before."""
  return small(workdir, name, **(STARTED | changes))


def flags(workdir: Path, **changes) -> list[str]:
  """The same job as command line flags; a field that is None is the configuration's."""
  given = SMALL | {key.replace("__", "."): value for key, value in changes.items()} | {"workdir": workdir}
  return [
    "--config=configs/grpo.py:smoke",
    *(f"--config.{field}={value}" for field, value in given.items() if value is not None),
  ]


def start(
  *arguments: str,
  largest_file_kib: int | None = None,
  module: str = "d1jax.main",
  optimised: bool = False,
  kept_from: float = 0.0,
  forked: bool = True,
) -> subprocess.Popen:
  """Starts `python -m d1jax.main` on two CPU devices, as on a person's machine; no file may grow beyond a limit.

  Large jobs ask that it is optimised. What took at least `kept_from` seconds to compile is kept for the jobs that come
  after: they start the same programs. Where something reads its command line in /proc, it is not forked.
  """
  environment = os.environ | {"XLA_FLAGS": "" if optimised else QUICK_TO_COMPILE}
  environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = str(kept_from)
  kind = functools.partial(Fork, largest_file_kib=largest_file_kib) if forked else subprocess.Popen
  return kind(
    [sys.executable, "-m", module, *arguments],
    cwd=ROOT,
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def start_processes(
  count: int,
  *arguments: str,
  devices: int = 1,
  timeout: int = 60,
  each: Sequence[Sequence[str]] | None = None,
  **more,
) -> list[subprocess.Popen]:
  """Starts one job as several processes; the one of place i is process i.

  Args:
    count: how many.
    arguments: of all.
    devices: CPU devices of each.
    timeout: `distributed.timeout`.
    each: further arguments, process by process.
    more: for `start`.
  """
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  own = [
    f"--config.cpu_devices={devices}",
    f"--config.distributed.timeout={timeout}",
    f"--config.distributed.coordinator=127.0.0.1:{port}",
    f"--config.distributed.processes={count}",
  ]
  further = each or [()] * count
  more["kept_from"] = 0.2  # what one of them has half written another one would read, and warn
  return [start(*arguments, *own, f"--config.distributed.process={i}", *further[i], **more) for i in range(count)]


def finish_processes(processes: list[subprocess.Popen], timeout: float = 300) -> list[tuple[int, str, str]]:
  """(exit code, standard output, standard error) of each; none is left running."""
  try:
    return [finish(process, timeout) for process in processes]
  finally:
    for process in processes:
      process.kill()


def finish(process: subprocess.Popen, timeout: float = 300) -> tuple[int, str, str]:
  """(exit code, standard output, standard error) of a started job."""
  out, err = process.communicate(timeout=timeout)
  return process.returncode, out, err


def written(workdir: Path) -> int:
  """When a job last wrote a record, in nanoseconds; 0 where it never did."""
  path = workdir / "metrics.jsonl"
  return path.stat().st_mtime_ns if path.exists() else 0


def wait_for(
  workdir: Path, stage: str, iteration: int, process: subprocess.Popen, timeout: float = 300, stale: int = 0
) -> None:
  """Returns when the job has recorded an iteration of a stage; `stale` is what was `written` before it was started."""
  path = workdir / "metrics.jsonl"
  end = time.monotonic() + timeout
  while time.monotonic() < end:
    lines = path.read_text().splitlines() if written(workdir) > stale else []
    for line in lines:
      if line.endswith("}") and (record := json.loads(line))["stage"] == stage and record["iteration"] >= iteration:
        return
    assert process.poll() is None, f"the job ended early: {finish(process)}"
    time.sleep(0.01)
  raise AssertionError(f"{stage} iteration {iteration} never came")


def interrupt(process: subprocess.Popen, number: signal.Signals) -> tuple[int, str, str]:
  """Sends a signal and waits for the end."""
  process.send_signal(number)
  return finish(process)
