"""The files of a run.

```
WORKDIR/
  config.json          the resolved configuration, the run's identity (identity.py)
  changes.jsonl        fields that decide results and changed on the way, if any
  lock                 while a run is at work here (lock.py)
  tokenizer/           the files of the tokenizer
  splits.json          the number of questions in each split, and a hash of them
  checkpoints/STAGE/   Orbax checkpoints of `sft` and `grpo`
  metrics.jsonl        one record an iteration; metrics.jsonl.damaged has its damaged lines
  samples.jsonl        the answers to a few validation questions, a line a validation
  report.html          the page of the run, drawn at every validation
  run_id               identifies the run for trackers; some of them write to tensorboard/ or wandb/
  rollouts/            dumped rollouts, when asked for
  completions/         every graded completion of the last evaluations
  profile/             a trace of some iterations, when asked for
  results.json         the table, when the run is finished; learning_curves.png beside it
```
"""

import contextlib
import errno
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import secrets
import subprocess
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from etils import epath

from d1jax.errors import RunError, input_checked
from d1jax.files import FileError, read_bytes, read_text

Folder: TypeAlias = Path | epath.Path
"""A path of a folder or a file, on a disk or in a bucket."""

DRAFT = ".tmp"
"""The suffix of files that are being written."""
PACKAGES = (
  *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "sentencepiece", "tokenizers", "numpy"),
  *("scipy", "math-verify", "sympy"),
)


def folder(name: str) -> Folder:
  """Converts a name such as `runs/grpo` into a path; `gs://bucket/run` needs the package gcsfs.

  Raises:
    RunError: the name is empty, for example because a shell variable was not set; the current folder is `.`.
  """
  if not name.strip():
    raise RunError("the configuration names a folder with an empty name: give it one (the current folder is .)")
  return epath.Path(name) if "://" in name else Path(name)


def local(field: str, name: str) -> Path:
  """Converts the name in a field of the configuration into a path that must not be in a bucket.

  Raises:
    RunError: it is in a bucket.
  """
  if "://" in name:
    raise RunError(f"config.{field}={name} is no path of this machine, which {field} must be: copy it, or name another")
  return Path(name)


def is_workdir(path: Folder) -> bool:
  """Whether a run has begun in this folder; the folder's name does not matter."""
  return (path / "config.json").is_file() or (path / "checkpoints").is_dir()


def unwritable(place: Folder, error: OSError) -> RunError | None:
  """The error to raise if a folder can never be written; None for other failures."""
  never = (
    *(errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EISDIR),
    *(errno.ENOENT, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.ENXIO),
  )
  if error.errno not in never:
    return None
  return RunError(f"{place} cannot be written ({error.strerror}); name another folder")


def write_atomically(path: Folder, content: bytes) -> None:
  """Writes a file so that a reader, or a kill, never sees half of it.

  Raises:
    RunError: the path is a folder, or no file can be written there.
  """
  if path.is_dir():
    raise RunError(f"{path} is a folder, expected a file: move it away")
  if not isinstance(path, Path):  # a bucket replaces an object as a whole
    path.write_bytes(content)
    return
  draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}{DRAFT}")
  try:
    with draft.open("xb") as file:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())
    draft.replace(path)
  except OSError as error:
    raise unwritable(path.parent, error) or error from None
  finally:
    with contextlib.suppress(OSError):
      draft.unlink()


def write_json(path: Folder, value: Any) -> None:
  """Writes JSON atomically."""
  write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def run_identity(workdir: Folder) -> str:
  """The text of `run_id`: eight hexadecimal digits, drawn once per run; if it is damaged, it is drawn again."""
  path = workdir / "run_id"
  try:
    found = read_text(path).strip()
    if re.fullmatch("[0-9a-f]{8}", found):
      return found
  except FileError:
    pass
  found = secrets.token_hex(4)
  write_atomically(path, found.encode())
  return found


def read_tokenizer(workdir: Folder, names: Container[str] | None = None) -> dict[str, bytes]:
  """The files of a run's tokenizer by name; if `names` is given, only these.

  Raises:
    RunError: the folder is not the work directory of a run, or a file cannot be read.
  """
  found = workdir / "tokenizer"
  if not found.is_dir():
    raise RunError(f"{found} is missing: a checkpoint is used where its run left it, inside the work directory")
  paths = [path for path in sorted(found.iterdir()) if not path.name.endswith(DRAFT)]
  paths = [path for path in paths if names is None or path.name in names]
  with input_checked():
    if not paths:
      raise FileError(f"{found} is empty: a checkpoint is used where its run left it, with its tokenizer")
    return {path.name: read_bytes(path) for path in paths}


def claim(
  workdir: Folder, config: dict[str, Any], tokenizer_files: Mapping[str, bytes], splits: Mapping[str, Any]
) -> None:
  """Claims the folder for this run. config.json is written last: if it exists, everything else does."""
  home = workdir / "tokenizer"
  if home.exists() and not home.is_dir():
    raise RunError(f"{home} is a file, expected a folder: move it away")
  try:
    home.mkdir(parents=True, exist_ok=True)
    for name, content in tokenizer_files.items():
      write_atomically(home / name, content)
    write_json(workdir / "splits.json", splits)
    write_json(workdir / "config.json", config)
  except OSError as error:
    raise unwritable(workdir, error) or error from None


def versions() -> dict[str, str]:
  """Versions of Python and of the installed packages that affect numbers."""
  found = {"python": platform.python_version()}
  for package in PACKAGES:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      found[package] = importlib.metadata.version(package)
  return found


def revision() -> dict[str, str | None]:
  """Identifies the code: a hash over the package's files, and the commit of its repository, if there is one."""
  package = Path(__file__).parents[1]
  digest = hashlib.sha256()
  for path in sorted(p for p in package.rglob("*") if p.is_file() and p.suffix != ".pyc"):
    digest.update(f"{path.relative_to(package).as_posix()}\n".encode() + path.read_bytes())

  def git(*arguments: str) -> str:
    asked = ["git", "-C", str(package), *arguments]
    return subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

  try:
    git("ls-files", "--error-unmatch", "__init__.py")  # fails if the package only lies inside of another repository
    commit = git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
  except (OSError, subprocess.SubprocessError):
    commit = None
  return {"commit": commit, "source": digest.hexdigest()}
