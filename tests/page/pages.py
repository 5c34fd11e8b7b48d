"""Work directories that nobody trained, for the tests of their pages."""

import functools
import json
import math
from pathlib import Path

from d1jax.page import samples
from d1jax.page.samples import Sample, Validated

STEPS = {"sft": 60, "grpo": 100}


def record(stage: str, iteration: int, every: int = 20) -> dict:
  """The record of an iteration; every so many have a validation."""
  part = iteration / STEPS[stage]
  common = {
    "stage": stage,
    "iteration": iteration,
    "loss": 9 * math.exp(-4 * part) if stage == "sft" else 0.01 * math.sin(iteration),
    "grad_norm": 1 + part,
    "learning_rate": 1e-3 * (1 - part),
    "seconds": 0.5,
    "tokens_per_second": 1000.0,
    "elapsed": 0.5 * iteration,
    "cost/devices": 2,
    "cost/seconds/update": 0.4,
    "cost/flops/update": 1e9,
    "cost/tokens/update": 500.0,
  }
  if stage == "grpo":
    common |= {
      "reward": 1.5 * part,
      "reward_std": 0.2,
      "reward/solved": part,
      "no_signal": 0.95 if iteration > 50 else 0.5 + 0.3 * part,
      "entropy": 1 - 0.9 * part,
      "kl": 0.0,
      "completion_length": 16 + part,
      "solved": 0.6 * part,
    }
    if iteration > 80:
      common["alarms"] = ["no_signal"]
  if iteration % every == 0:
    common["validation"] = 0.2 * part if stage == "sft" else 0.2 + 0.4 * part
  return common


def answer(text: str, solved: bool, question: str = "12+3") -> Sample:
  """An answer whose tokens are its characters, unmasked from right to left."""
  fields = {"question": question, "answer": "15"}
  return Sample(fields, text, float(solved), solved, [*text, "∎"], [*range(len(text), 0, -1), 0])


def config(mode: str = "grpo", **fields) -> dict:
  """A configuration as a run records it."""
  stages = {"sft": {"steps": STEPS["sft"], "patience": None}, "grpo": {"steps": STEPS["grpo"], "patience": None}}
  own = {"mode": mode, "workdir": "x", "seed": 0, "task": {"name": "sums"}, "model": {"size": "tiny"}}
  return own | {stage: stages[stage] for stage in (("sft", "grpo") if mode == "grpo" else ("sft",))} | fields


def results(of: dict, n: int = 88) -> dict:
  """The results of a finished run."""
  row = lambda share: {"solved": share, "solved_interval": [share / 2, (1 + share) / 2], "n": n}
  return {"baseline": row(0.0), "before": row(0.2), "after": row(0.6), "device": "2 x cpu", "config": of}


@functools.cache
def _metrics(mode: str) -> str:
  stages = ("sft", "grpo") if mode == "grpo" else ("sft",)
  return "".join(json.dumps(record(stage, i + 1)) + "\n" for stage in stages for i in range(STEPS[stage]))


def keep(workdir: Path, validated: list[Validated]) -> None:
  """Writes `samples.jsonl`."""
  lines = [one._asdict() | {"samples": [sample._asdict() for sample in one.samples]} for one in validated]
  (workdir / samples.NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))


def write(
  workdir: Path, *, mode: str = "grpo", finished: bool = True, answers: tuple[str, ...] = ("15", "16"), **fields
) -> Path:
  """Writes the files of a run; `answers` are what it says to as many questions."""
  workdir.mkdir(parents=True, exist_ok=True)
  own = config(mode, **fields)
  (workdir / "config.json").write_text(json.dumps(own))
  (workdir / "splits.json").write_text(json.dumps({"validation": {"n": 400, "sha256": ""}}))
  (workdir / "metrics.jsonl").write_text(_metrics(mode))
  said = [answer(text, text == "15", f"question {number}") for number, text in enumerate(answers)]
  places = [(stage, i) for stage in STEPS if stage in own for i in range(20, STEPS[stage] + 1, 20)]
  shares = [record(stage, i)["validation"] for stage, i in places]
  validated = [Validated(*at, (x, x / 2, x + 0.1), said) for at, x in zip(places, shares, strict=True)]
  keep(workdir, validated)
  if finished:
    (workdir / "results.json").write_text(json.dumps(results(own)))
  return workdir
