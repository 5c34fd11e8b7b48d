"""What a run leaves on disk, and whether a folder belongs to this run.

```
WORKDIR/
  config.json          the resolved configuration, the run's identity
  tokenizer/           the files of the tokenizer
  splits.json          how many questions each split has, and a hash of them
  checkpoints/STAGE/   Orbax checkpoints of `sft` and `grpo`
  metrics.jsonl        one record an iteration; tensorboard/ holds the same
  rollouts/            dumped rollouts, when asked for
  completions/         every graded completion of the last evaluations
  profile/             a trace of some iterations, when asked for
  results.json         the table, when the run is finished; learning_curves.png beside it
```
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from etils import epath

from d1jax.errors import RunError

Folder: TypeAlias = Path | epath.Path
"""A path on a disk or in a bucket; of a folder or of a file in one."""

CHANGEABLE = (
  "workdir",
  "mesh",
  "cpu_devices",
  "distributed",
  "rules",
  "rollout_rules",
  "profile_steps",
  "sft.steps",
  "grpo.steps",
  "grpo.dump_every",
  "grpo.grading_workers",
)
"""Fields that may differ when a run goes on: placement, totals, logging. Anything else makes another run."""

PACKAGES = (
  *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "sentencepiece", "tokenizers", "numpy"),
  *("scipy", "math-verify", "sympy"),
)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  """Nested dictionaries as one with dotted names."""
  flat: dict[str, Any] = {}
  for name, value in tree.items():
    flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
  return flat


def may_change(name: str) -> bool:
  """Whether a field (dotted) may differ on a resume."""
  return any(name == allowed or name.startswith(allowed + ".") for allowed in CHANGEABLE)


def folder(name: str) -> Folder:
  """The path of a name such as `runs/grpo`, or `gs://bucket/run`, for which gcsfs must be installed."""
  return epath.Path(name) if "://" in name else Path(name)


def write_atomically(path: Folder, content: bytes) -> None:
  """Writes a file so that a reader, or a kill, never sees half of it."""
  if not isinstance(path, Path):  # buckets hold whole objects
    path.write_bytes(content)
    return
  draft = path.with_name(path.name + ".tmp")
  with draft.open("wb") as file:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())
  draft.replace(path)


def write_json(path: Folder, value: Any) -> None:
  """Writes JSON atomically."""
  write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def holds_run(workdir: Folder, config: dict[str, Any]) -> bool:
  """Whether the folder holds this run already; nothing is written.

  Raises:
    RunError: it holds a run of another configuration; the message names the fields that differ.
  """
  path = workdir / "config.json"
  if not path.exists():
    return False
  old = flatten(json.loads(path.read_text(encoding="utf-8")))
  new = flatten(json.loads(json.dumps(config)))
  # The start of diffu-GRPO is fixed once it has begun.
  settled = {"sft.steps"} if (workdir / "checkpoints" / "grpo").exists() else set()
  differing = sorted(
    k for k in old.keys() | new.keys() if old.get(k) != new.get(k) and (k in settled or not may_change(k))
  )
  if differing:
    shown = ", ".join(f"{k} was {old.get(k)!r}, now {new.get(k)!r}" for k in differing[:3])
    raise RunError(
      f"{workdir} holds a run of another config ({shown}{', ...' if len(differing) > 3 else ''});"
      f" use --config.workdir=... for a new run. May change on a resume: {', '.join(CHANGEABLE)}"
    )
  return True


def read_tokenizer(workdir: Folder) -> dict[str, bytes]:
  """The files of a run's tokenizer.

  Raises:
    RunError: the folder is not the work directory of a run.
  """
  found = workdir / "tokenizer"
  if not found.is_dir():
    raise RunError(f"{found} is missing: a checkpoint is used where its run left it, inside the work directory")
  return {path.name: path.read_bytes() for path in sorted(found.iterdir())}


def check_splits(workdir: Folder, splits: Mapping[str, Any]) -> None:
  """Raises a RunError when a run that goes on would meet other questions than it began with."""
  path = workdir / "splits.json"
  if not path.exists():
    return
  old = json.loads(path.read_text(encoding="utf-8"))
  differing = [name for name in splits if old.get(name, splits[name]) != splits[name]]
  if differing:
    raise RunError(
      f"the questions of {', '.join(differing)} are not those that {workdir} began with (did a file under data.root"
      " change?); restore them, or use --config.workdir=... for a new run"
    )


def claim(
  workdir: Folder, config: dict[str, Any], tokenizer_files: Mapping[str, bytes], splits: Mapping[str, Any]
) -> None:
  """Makes the folder this run's own. The configuration comes last: where it is, the rest is."""
  try:
    (workdir / "tokenizer").mkdir(parents=True, exist_ok=True)
    for name, content in tokenizer_files.items():
      write_atomically(workdir / "tokenizer" / name, content)
    write_json(workdir / "splits.json", splits)
    write_json(workdir / "config.json", config)
  except (NotADirectoryError, FileExistsError, PermissionError) as error:
    raise RunError(
      f"workdir {workdir} cannot be written ({error.strerror}); choose another with --config.workdir=..."
    ) from None


def versions() -> dict[str, str]:
  """Versions of Python and of the packages that decide numbers."""
  return {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in PACKAGES}


def revision() -> dict[str, str | None]:
  """Which code ran: a hash over the package's files, and the commit of its repository (None outside of one)."""
  package = Path(__file__).parents[1]
  digest = hashlib.sha256()
  for path in sorted(p for p in package.rglob("*") if p.is_file() and p.suffix != ".pyc"):
    digest.update(f"{path.relative_to(package).as_posix()}\n".encode() + path.read_bytes())

  def git(*arguments: str) -> str:
    asked = ["git", "-C", str(package), *arguments]
    return subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

  try:
    git("ls-files", "--error-unmatch", "__init__.py")  # fails where another repository happens to hold the package
    commit = git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
  except (OSError, subprocess.SubprocessError):
    commit = None
  return {"commit": commit, "source": digest.hexdigest()}
