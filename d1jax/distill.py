"""Rejection sampling in rounds: `--config=configs/distill.py --config.checkpoint=RUN`.

A round samples a checkpoint, keeps right answers, fine-tunes the base on them and goes on with diffu-GRPO, whose result
the next round samples (DeepSeek-R1's third and fourth stage, arXiv 2501.12948, 2.3). Every stage is an ordinary run:

```
WORKDIR/
  answers-1.jsonl   right answers of the first round with their origin, in rows that `sft.data` reads
  sft-1/            the base, fine-tuned on them
  model-1/          its best weights as a model's folder
  grpo-1/           diffu-GRPO from there, which samples answers-2.jsonl
  rounds.json       the table
```
"""

import dataclasses
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from d1jax import export, intervals, recipe
from d1jax.errors import RunError, explained, input_checked, smaller_batches
from d1jax.evaluation import rejection, rollout_answers, subject
from d1jax.evaluation.evaluator import Evaluator
from d1jax.evaluation.subject import Found, Subject
from d1jax.files import FileError, json_lines, read_json, read_text, write_check
from d1jax.run import compiled, fields, limits, parts
from d1jax.run import experiment as experiments
from d1jax.run.checkpoint import is_step
from d1jax.run.experiment import Experiment
from d1jax.run.inputs import NO_TASK
from d1jax.run.interrupts import Interrupts
from d1jax.run.lock import locked
from d1jax.run.workdir import Folder, folder, is_workdir, local, write_atomically, write_json
from d1jax.tasks import split_hash
from d1jax.tasks.common import check_choice
from d1jax.training import configured

log = logging.getLogger(__name__)

OWN = ("checkpoint", "pretrained", "rounds", "output", "distill")
"""The fields that the runs of the stages do not have."""


def run(config: ConfigDict) -> list[dict[str, Any]]:
  """Samples into `config.output`, or runs or resumes all rounds in `config.workdir`; prints a table by round.

  Returns:
    The content of `rounds.json`, one entry a round; with `output`, one entry with the figures of the sampling.

  Raises:
    RunError: an input is wrong, there is no right answer, or the run was stopped; the message has the remedy.
  """
  fields.complete(config)
  with input_checked():
    limits.check(config)
    check_choice("distill.keep", config.distill.keep, rejection.KEEP)
  if config.checkpoint is None and config.pretrained is None:
    raise RunError(
      "nothing samples the first round: set config.checkpoint (a run's work directory) or config.pretrained (a model's"
      " folder)"
    )
  if config.output is None:
    return Rounds(config).run()
  path = local("output", config.output)
  with input_checked():
    if path.exists() or path.is_symlink():
      raise FileError(f"config.output={path} exists; name a new file")
    write_check(path.absolute().parent)
    own = experiments.build(_stage(config, "grpo", path), None)
  with Interrupts() as interrupts:
    figures = _sample(config, own, _Policy(config.checkpoint, config.pretrained), path, interrupts)
  return [figures]


@dataclasses.dataclass(frozen=True)
class _Policy:
  """Who samples: a checkpoint of a run, or a model's folder; with both, the folder is the base of the run."""

  checkpoint: str | None
  pretrained: str | None = None

  @property
  def name(self) -> str:
    """What the user called it."""
    return str(self.checkpoint or self.pretrained)


def _stage(config: ConfigDict, mode: str, workdir: Path, **changes: Any) -> ConfigDict:
  """The configuration of a stage's run, complete.

  Args:
    config: that of the rounds.
    mode: `sft` or `grpo`.
    workdir: of the run.
    changes: `data`, the file of answers, or `pretrained`, the model to start from.
  """
  found = ConfigDict(config.to_dict())
  for name in OWN:
    del found[name]
  found.mode, found.workdir, found.sft.data = mode, str(workdir), changes.get("data")
  if mode == "sft":
    del found["grpo"]
  else:
    found.sft.steps = 0
  if "pretrained" in changes:
    found.model.pretrained = changes["pretrained"]
    found.model.overrides = dict.fromkeys(found.model.overrides)  # the folder has the sizes
  fields.complete(found)
  parts.complete(found)
  return found


def _settings(config: ConfigDict) -> str:
  """A hash of the fields that decide the answers of given weights."""
  sections = ("seed", "task", "rollout", "distill")
  decisive = {name: config.to_dict()[name] for name in sections} | {"buckets": list(config.data.prompt_buckets)}
  return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]


def _check_questions(found: Found, own: Experiment) -> None:
  """Raises a ValueError if a run had another task, or may have been trained on questions that are held out here."""
  now = own.config.task.name
  try:
    was = found.metadata["config"]["task"]["name"]
  except (LookupError, TypeError) as error:
    raise ValueError(f"the configuration in checkpoint {found.home} is not that of a run ({error})") from error
  if was not in (NO_TASK, now):
    raise ValueError(
      f"{found.workdir} was trained on the task {was}, but the questions are of {now}: name a run of {now}, or use the"
      f" preset word of {was}"
    )
  path = found.workdir / "splits.json"
  splits = read_json(path, dict) if path.exists() else {}
  for name in ("test", "validation"):
    records = own.task.records(name)
    expected = {"n": len(records), "sha256": split_hash(records)}
    if splits.get(name, expected) != expected:
      raise ValueError(
        f"the {name} questions of {found.workdir} are not those of this configuration, so that it may have been trained"
        " on questions that are held out here: set seed, task.sizes, task.options and data.root to those of its"
        " config.json"
      )


def _read(config: ConfigDict, policy: _Policy, own: Experiment) -> Subject:
  """The weights that sample, with their network and tokenizer."""
  place = ConfigDict({"pretrained": policy.pretrained, "mesh": config.mesh, "cpu_devices": config.cpu_devices})
  if policy.checkpoint is not None:
    found = subject.find_checkpoint(folder(policy.checkpoint))
    with input_checked():
      _check_questions(found, own)
    return subject.of_run(found, place)
  bare = experiments.of_checkpoint(own.config.to_dict(), place)
  bare.model.update(quantize="none", overrides=dict.fromkeys(bare.model.overrides))
  bare.lora.rank = 0
  with input_checked():
    return subject.of_folder(bare)


def _asker(config: ConfigDict, sampled: Subject, own: Experiment) -> Evaluator:
  """What asks the training questions of the configuration."""
  with input_checked():
    prompts = dataclasses.replace(sampled.experiment, config=own.config, task=own.task).prompts("train")
    sampler = dataclasses.replace(own.sampler, temperature=config.distill.temperature)
    model, count = sampled.experiment.model, config.distill.questions
    return rollout_answers.asking(model, prompts, sampler, count, config.evaluation.batch_size)


def _sample(config: ConfigDict, own: Experiment, policy: _Policy, path: Path, interrupts: Interrupts) -> dict[str, Any]:
  """Samples answers, and writes those that are kept; returns the figures of the sampling."""

  def pause() -> None:
    if interrupts.pending():
      raise interrupts.error(f"the start of {path.name}, none of whose answers was written")

  began, section, remedy = time.perf_counter(), config.distill, ("evaluation.batch_size", config.evaluation.batch_size)
  with explained("sampling", smaller_batches(*remedy)):
    sampled = _read(config, policy, own)
    asker = _asker(config, sampled, own)
    asked = len(asker.prompts.records)
    print(f"{path}: {section.samples} answers to each of {asked} questions, of {sampled.name}", flush=True)
    answers = rollout_answers.sample(asker, sampled.params(), samples=section.samples, seed=config.seed, pause=pause)
    made = {
      "by": policy.name,
      "checkpoint": sampled.name,
      "weights": sampled.fingerprint,
      "config": _settings(config),
      "seed": config.seed,
      "task": config.task.name,
      "questions": asked,
    }
    rows = rejection.rows(asker.prompts, answers, keep=section.keep, most=section.most, made=made)
  if not rows:
    raise RunError(
      f"none of {asked} questions got a right answer: raise distill.samples={section.samples} or"
      f" distill.questions={section.questions}, or sample a policy that solves some"
    )
  write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
  figures = _figures(rows) | {"seconds": {"sampling": round(time.perf_counter() - began, 2)}}
  print(
    f"{path}: {figures['kept']} right answers kept, of {asked - figures['none_right']} questions;"
    f" {figures['none_right']} got none; {figures['seconds']['sampling']:.0f} s"
  )
  return figures


def _figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
  """What a file of answers says of its sampling."""
  made = [row["made"] for row in rows]
  return {
    "by": made[0]["by"],
    "questions": made[0]["questions"],
    "none_right": made[0]["questions"] - len({one["question"] for one in made}),
    "kept": len(rows),
    "length": sum(one["length"] for one in made) / len(rows),
  }


class Rounds:
  """The rounds of one work directory."""

  def __init__(self, config: ConfigDict):
    """Checks everything that may be wrong before anything is sampled.

    Raises:
      RunError: a field is wrong, or the work directory holds something else.
    """
    self.config, self.workdir = config, local("workdir", config.workdir).absolute()
    if is_workdir(self.workdir):
      raise RunError(f"{config.workdir} holds a run, expected rounds: use --config.workdir=... for a new folder")
    if config.sft.steps < 1:
      raise RunError("sft.steps=0 fine-tunes on no answer: let it be at least 1, for example --config.sft.steps=1000")
    with input_checked():
      for mode in ("sft", "grpo"):
        self._own = _checked(_stage(config, mode, self.workdir / f"{mode}-1"))
    self._first = _Policy(config.checkpoint, config.pretrained)
    self.rounds: list[dict[str, Any]] = []

  def run(self) -> list[dict[str, Any]]:
    """Runs or resumes all rounds; returns the content of `rounds.json`."""
    with locked(self.workdir):
      known = self._known()
      for number in range(1, self.config.rounds + 1):
        self.rounds.append({"round": number})
        policy = self._first if number == 1 else _Policy(str(self.workdir / f"grpo-{number - 1}"))
        for figures in self._round(number, policy, known.get(number, {})):
          self.rounds[-1] |= figures
          later = [one for round, one in known.items() if round > number]
          write_json(self.workdir / "rounds.json", {"rounds": self.rounds + later})
        print(f"\n{self.table()}\n", flush=True)
    return self.rounds

  def _known(self) -> dict[int, dict[str, Any]]:
    """The table of an earlier attempt, by round; only its seconds of sampling are in no other file."""
    path = self.workdir / "rounds.json"
    try:
      found = read_json(path, dict).get("rounds", []) if path.exists() else []
      return {one["round"]: one for one in found}
    except (FileError, LookupError, TypeError) as error:
      log.warning("%s is damaged (%s); it is written anew", path, error)
      return {}

  def _round(self, number: int, policy: _Policy, known: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Runs what is left of a round; yields its figures stage by stage."""
    config, home = self.config, self.workdir
    answers, model = home / f"answers-{number}.jsonl", home / f"model-{number}"
    if found := self._sampled(answers, policy):
      found["seconds"] = {"sampling": known.get("seconds", {}).get("sampling")}
    else:
      with compiled.kept(answers), Interrupts() as interrupts:
        found = _sample(config, self._own, policy, answers, interrupts)
    seconds = found["seconds"]
    yield found

    def trained(mode: str, **changes: Any) -> dict[str, Any]:
      results = recipe.run(_stage(config, mode, home / f"{mode}-{number}", **changes))
      seconds[mode] = results["seconds"][mode]
      return {mode: {name: results["after"][name] for name in ("solved", "solved_interval", "n")}, "seconds": seconds}

    yield trained("sft", data=str(answers))
    if not model.exists():
      self._export(number, model)
    yield trained("grpo", pretrained=str(model))
    yield self._gain(number)

  def _sampled(self, path: Path, policy: _Policy) -> dict[str, Any]:
    """The figures of an earlier attempt's sampling; empty if there was none.

    Raises:
      RunError: it had other settings, or its file is damaged.
    """
    if not path.exists():
      return {}
    with input_checked():
      try:
        rows = [row for _, _, row in json_lines(read_text(path), path)]
        found, (was, config) = _figures(rows), (rows[0]["made"][name] for name in ("by", "config"))
      except (LookupError, TypeError) as error:
        raise FileError(f"{path} is damaged ({error}); delete it to sample it again") from error
      now = policy.name if path.name == "answers-1.jsonl" else was
      if (was, config) != (now, _settings(self.config)):
        raise FileError(
          f"{path} was sampled by {was} with the configuration {config}, now {now} and {_settings(self.config)}:"
          " restore checkpoint, seed, task, rollout, distill and data.prompt_buckets, or use --config.workdir=... for"
          " new rounds"
        )
    return found

  def _export(self, number: int, model: Path) -> None:
    """Writes the best fine-tuned weights as a model's folder, which is there only as a whole."""
    draft = self.workdir / ".draft"
    shutil.rmtree(draft, ignore_errors=True)
    section = {
      "checkpoint": str(self.workdir / f"sft-{number}"),
      "adapter": None,
      "pretrained": None,
      "output": str(draft / model.name),
      "form": "model",
      "push_to_hub": None,
      "private": True,
      "mesh": self.config.mesh,
      "cpu_devices": self.config.cpu_devices,
    }
    export.run(ConfigDict(section)).rename(model)
    draft.rmdir()

  def _gain(self, number: int) -> dict[str, Any]:
    """What the round solved more than the one before, or than the run that was sampled first, question by question."""
    before: Folder = self.workdir / f"grpo-{number - 1}"
    if number == 1:
      if self._first.checkpoint is None or is_step(folder(self._first.checkpoint).name):
        return {}
      before = folder(self._first.checkpoint)
    found = [_solved(place / "completions" / "after.jsonl") for place in (before, self.workdir / f"grpo-{number}")]
    if not all(found) or [record for record, _ in found[0]] != [record for record, _ in found[1]]:
      return {}
    clusters = [self._own.task.cluster(record) for record, _ in found[0]]
    first, second = ([share for _, share in one] for one in found)
    gain = intervals.paired_difference(first, second, clusters)
    return {"gain": {"value": gain.difference, "interval": [gain.low, gain.high]}}

  def table(self) -> str:
    """The rounds as a table in Markdown."""
    lines = [
      "| round | questions | none right | kept | tokens each | sampling s | SFT solved | SFT s | diffu-GRPO solved"
      " | diffu-GRPO s | gain in points |",
      "|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    percent = lambda value, low, high: f"{100 * value:.1f}% [{100 * low:.1f}, {100 * high:.1f}]"
    for one in self.rounds:
      seconds = {stage: "" if value is None else f"{value:.0f}" for stage, value in one["seconds"].items()}
      cells = [one["round"], one["questions"], one["none_right"], one["kept"], f"{one['length']:.1f}"]
      cells += [seconds["sampling"]]
      for stage in ("sft", "grpo"):
        cells += [percent(one[stage]["solved"], *one[stage]["solved_interval"]), seconds[stage]]
      gain = one.get("gain")
      cells += [percent(gain["value"], *gain["interval"]).replace("%", "") if gain else ""]
      lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _checked(config: ConfigDict) -> Experiment:
  """The experiment of a stage, after what `recipe.run` would check later."""
  experiment = experiments.build(config, None, trains=True)
  experiments.check_batches(config, experiment.model.ways)
  experiments.check_lengths(config, experiment.model.length_ways)
  experiments.check_start(config)
  if config.mode == "sft":
    configured.fine_tuning(config).check(experiment.model.denoiser.block)
  else:
    optimizer = experiment.optimizer(config.grpo, config.grpo.steps)
    configured.lengths(experiment, optimizer, configured.programs(experiment, optimizer))
  return experiment


def _solved(path: Folder) -> list[tuple[dict[str, Any], float]]:
  """The record and the share of each graded completion of a file; empty if it cannot be read."""
  try:
    rows = [row for _, _, row in json_lines(read_text(path), path)] if path.exists() else []
    return [(row["record"], row["metrics"]["solved"][0] / row["metrics"]["solved"][1]) for row in rows]
  except (FileError, LookupError, TypeError, ZeroDivisionError):
    return []
