"""Decides whether a folder holds this run, from the kind of each field that differs and from the questions."""

import json
import logging
import time
from collections.abc import Mapping
from typing import Any

from d1jax.errors import RunError, input_checked
from d1jax.files import FileError, read_json, read_text
from d1jax.run.checkpoint import Checkpoints
from d1jax.run.parts import renewed
from d1jax.run.workdir import Folder, write_atomically

log = logging.getLogger(__name__)

STAGES = ("dpo", "grpo", "sft")
"""The stages of a run, the last ones first."""
PAIRS = ("pairs.questions", "pairs.samples", "pairs.held_out")
"""Fields that determine the pairs; they are fixed once preference tuning has begun."""

KINDS: Mapping[str, tuple[str, ...]] = {
  # Devices and sizes of parts: results differ only by rounding.
  "placement": (
    *("mesh", "rollout_mesh", "cpu_devices", "distributed", "rules", "rollout_rules"),
    *(f"{stage}.{name}" for stage in STAGES for name in ("accumulation", "logits_tile")),
    *("grpo.rollout_chunks", "grpo.rollout_slots", "grpo.grading_workers"),
    *("evaluation.batch_size", "model.remat", "model.unroll"),
  ),
  # Output besides the weights.
  "logging": (
    *("profile_steps", "trackers", "report.compare", "grpo.dump_every", "sft.samples"),
    *(f"{stage}.save_every" for stage in STAGES),
  ),
  # The length of a stage, and conditions that end it earlier.
  "total": tuple(
    f"{stage}.{name}" for stage in STAGES for name in ("steps", "patience", "seconds", "max_skipped_steps")
  ),
  # Paths: fingerprints tell whether the content is the same.
  "place": ("workdir", "data.root", "sft.data", "pairs.file", "model.pretrained"),
  # Fields that a user may have to change so that a run can continue; changes.jsonl records each change.
  "recorded": (
    *(f"{stage}.{name}" for stage in STAGES for name in ("learning_rate", "max_grad_norm")),
    *PAIRS,
  ),
}
"""The fields of each kind. Every other field is part of the run's identity: another value makes it another run."""
CHANGEABLE = tuple(name for names in KINDS.values() for name in names)
SETTLED = ("sft.steps", "sft.patience", "sft.seconds", "sft.learning_rate", "sft.max_grad_norm")
"""Fields that determine the start of the stage after SFT; they are fixed once it has begun."""
FREE = ("task.options", "task.mix", "grpo.reward_weights", "grpo.estimator", "grpo.loss", "grpo.advantage")
"""Sections without a fixed set of fields: a field that is not in them has no value."""


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  """Nested dictionaries as one dictionary with dotted names."""
  flat: dict[str, Any] = {}
  for name, value in tree.items():
    flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
  return flat


def _is_of(name: str, group: tuple[str, ...]) -> bool:
  return any(name == one or name.startswith(one + ".") for one in group)


def kind(name: str) -> str:
  """The kind of a field (dotted name): a key of `KINDS`, or `identity`."""
  return next((kind for kind, names in KINDS.items() if _is_of(name, names)), "identity")


def _stored(workdir: Folder) -> tuple[dict[str, Any] | None, str | None]:
  """The configuration of the run in a folder, None if there is none; and the error of its file, None if it is sound.

  Every checkpoint holds a copy, which is used if config.json is missing or damaged.
  """
  path, wrong = workdir / "config.json", None
  try:
    if path.exists():
      found = read_json(path, dict)
      if "mode" not in found:
        raise FileError(f"{path} holds no configuration")
      return renewed(found), None
  except FileError as error:
    wrong = str(error)
  for stage in STAGES:
    checkpoints = Checkpoints(workdir / "checkpoints" / stage)
    if steps := checkpoints.steps():
      return renewed(checkpoints.metadata(max(steps))["config"]), wrong or f"{path} is missing"
  if wrong is not None:
    raise RunError(f"{wrong}, and no checkpoint holds a copy of it: delete it to begin this run anew")
  return None, None


def _differences(workdir: Folder, old: dict[str, Any], config: dict[str, Any]) -> dict[str, tuple[str, Any, Any]]:
  """{name: (kind, old, new)} of each field that differs; the kind is `added` if the old run did not have the field."""
  was, now = flatten(old), flatten(json.loads(json.dumps(config)))
  has_begun = lambda stage: (workdir / "checkpoints" / stage).exists()
  settled = SETTLED if has_begun("grpo") else (*SETTLED, *PAIRS) if has_begun("dpo") else ()
  if now.get("grpo.partial_age"):
    settled = (*settled, "grpo.rollout_slots")  # they decide how much of a completion the next weights draw
  found = {}
  for name in sorted(was.keys() | now.keys()):
    if was.get(name) != now.get(name):
      what = "identity" if name in settled else kind(name)
      if what == "identity" and name not in was and not _is_of(name, FREE):
        what = "added"
      found[name] = (what, was.get(name), now.get(name))
  return found


@input_checked()
def holds_run(workdir: Folder, config: dict[str, Any]) -> bool:
  """Whether the folder already holds this run; nothing is written.

  A field that an older release did not have keeps its new value: the run continues as if it had always had it.

  Raises:
    RunError: it holds a run of another configuration; the message names the fields that differ.
  """
  old, _ = _stored(workdir)
  if old is None:
    return False
  differences = _differences(workdir, old, config)
  other = [name for name, (what, _, _) in differences.items() if what == "identity"]
  if "model.pretrained" in differences:
    _, was, now = differences["model.pretrained"]
    if was is None or now is None or not flatten(old).get("lora.rank"):
      other.append("model.pretrained")  # only a base under adapters has a fingerprint to compare
  if other:
    other.sort(key=lambda name: not name.startswith(("task.", "model.")))  # what tells two runs apart first
    shown = ", ".join(f"{name} was {differences[name][1]!r}, now {differences[name][2]!r}" for name in other[:3])
    raise RunError(
      f"{workdir} holds a run of another config ({shown}{', ...' if len(other) > 3 else ''});"
      f" use --config.workdir=... for a new run. May change on a resume: {', '.join(CHANGEABLE)}"
    )
  return True


@input_checked()
def check_splits(workdir: Folder, config: dict[str, Any], splits: Mapping[str, Any]) -> None:
  """Raises a RunError if a resumed run would get other questions than it began with."""
  path, moved = workdir / "splits.json", _moved(workdir, config)
  old: dict[str, Any] = {}
  if path.exists():
    try:
      old = read_json(path, dict)
    except FileError as error:
      raise RunError(f"{error}; delete it to go on without a look at whether the questions are the same") from error
  differing = [name for name in splits if old.get(name, splits[name]) != splits[name]]
  if differing:
    raise RunError(
      f"the questions of {', '.join(differing)} are not those that {workdir} began with (did a file under data.root"
      " change?); restore them, or use --config.workdir=... for a new run"
    )
  unknown = [name for name in splits if name not in old]
  if moved and unknown:
    raise RunError(
      f"{', '.join(moved)} changed, and {path} does not say what {', '.join(unknown)} held, so that nothing tells"
      " whether it is the same: put the files back where they were"
    )


def _moved(workdir: Folder, config: dict[str, Any]) -> list[str]:
  old, _ = _stored(workdir)
  changed = _differences(workdir, old, config) if old else ()
  return [name for name in changed if name in ("data.root", "sft.data", "pairs.file")]


@input_checked()
def record_changes(workdir: Folder, config: dict[str, Any]) -> None:
  """Logs and records changed fields that affect results; call it before the new configuration is written."""
  old, wrong = _stored(workdir)
  if wrong:
    log.warning("%s; a checkpoint holds a copy, and the file is written anew", wrong)
  if old is None:
    return
  steps = {stage: Checkpoints(workdir / "checkpoints" / stage).steps() for stage in STAGES}
  after = {stage: max(found) for stage, found in steps.items() if found}
  reached = ", ".join(f"{stage} iteration {step}" for stage, step in after.items()) or "the start"
  path, lines = workdir / "changes.jsonl", []
  for name, (what, was, now) in _differences(workdir, old, config).items():
    if what == "recorded":
      log.warning("%s was %r, and is %r after %s (see %s)", name, was, now, reached, path)
    elif what == "added":
      log.warning("%s is new since this run began; it goes on with %r (see %s)", name, now, path)
    else:
      continue
    said = {"field": name, "was": was, "now": now, "after": after, "time": time.strftime("%Y-%m-%dT%H:%M:%S")}
    lines.append(json.dumps(said) + "\n")
  if lines:
    before = read_text(path) if path.exists() else ""
    write_atomically(path, (before + "".join(lines)).encode())
