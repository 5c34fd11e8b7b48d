"""The Hugging Face hub: `owner/name` becomes a folder of the hub's cache, and a folder is pushed.

Weights, JSON, tokenizers and tables are fetched, never code. `HF_TOKEN`, `HF_ENDPOINT`, `HF_HUB_CACHE`, `HF_HOME` and
`HF_HUB_OFFLINE` mean what they mean to the package `huggingface_hub`, which is imported only when a name is used.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from d1jax import errors

PREFIX = "hf:"
"""Begins a name that is of the hub in any case."""

FILES = {
  "model": ("*.safetensors", "*.json", "merges.txt", "tokenizer.model", "chat_template.jinja"),
  "dataset": ("*.parquet", "*.jsonl", "*.json", "*.csv", "README.md"),
}
"""The files that are fetched, by the kind of repository. README.md of a data set names its configurations."""

_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
_REPOSITORY = re.compile(f"{_PART}/{_PART}")
_NAME = re.compile(rf"({_PART}/{_PART})(?:@([A-Za-z0-9][A-Za-z0-9._/-]*))?")
_COMMIT = re.compile("[0-9a-f]{40}")


class HubError(ValueError):
  """Something is not on the hub, or the hub cannot be reached; the message is one line with the remedy."""


class Snapshot(NamedTuple):
  """A repository of the hub at one commit.

  Attributes:
    repository: `owner/name`.
    commit: 40 hexadecimal digits.
    revision: the name under which it was found; None: the newest.
    kind: `model` or `dataset`.
  """

  repository: str
  commit: str
  revision: str | None = None
  kind: str = "model"


def parse(name: str) -> tuple[str, str | None] | None:
  """The repository and the revision that a name stands for; None if it is a path of this machine.

  `hf:owner/name` and `hf:owner/name@revision` are of the hub in any case. `owner/name` is of the hub if here is neither
  this path nor a file or folder `owner`: a mistyped `runs/grpo` must not be asked of strangers.

  Raises:
    HubError: a name begins with `hf:`, but does not go on like one.
  """
  found = _NAME.fullmatch(name.removeprefix(PREFIX))
  if name.startswith(PREFIX):
    if found is None:
      raise HubError(f"{name!r} is no name on the hub: write hf:OWNER/NAME or hf:OWNER/NAME@REVISION")
  elif found is None or os.path.lexists(name) or os.path.lexists(name.partition("/")[0]):
    return None
  return found[1], found[2]


def find(name: str, kind: str = "model", *, cached: bool = False) -> Snapshot | None:
  """The snapshot that a name stands for at present; None if the name is a path. Nothing is downloaded.

  If the hub cannot be reached, what the cache has of it is taken.

  Args:
    name: see `parse`.
    kind: `model` or `dataset`.
    cached: whether the hub is not asked, because somebody else chose the name.

  Raises:
    HubError: there is no such repository or revision, a model has no weights that can be read, or the hub cannot be
      reached and the cache has nothing.
  """
  parsed = parse(name)
  if parsed is None:
    return None
  repository, revision = parsed
  if not cached:
    with _explained(repository, revision, kind), _unreachable_is_fine():
      info = _api().repo_info(repository, revision=revision, repo_type=kind, files_metadata=False)
      held = {file.rfilename for file in info.siblings or ()}
      if kind == "model" and not any(path.endswith(".safetensors") for path in held):
        raise HubError(f"{repository} has no file .safetensors; other weights are not read: name another model")
      return Snapshot(repository, str(info.sha), revision, kind)
  try:
    return Snapshot(repository, _download(repository, revision, kind, cached=True).name, revision, kind)
  except Exception as error:
    reason = "the hub was not asked, as the name comes from a checkpoint" if cached else "the hub cannot be reached"
    option = "" if kind == "model" else f"--repo-type={kind} "
    raise HubError(
      f"{repository} is no folder here and not in the hub's cache, and {reason}: fetch it with"
      f" `hf download {option}{repository}`"
    ) from error


def download(snapshot: Snapshot) -> Path:
  """The folder of a snapshot in the cache, after what is missing was downloaded.

  A download that was cut goes on where it stopped. Of several processes of a machine one downloads a file, the others
  wait for it: the cache has a lock for each file.

  Raises:
    HubError: the hub did not give a file.
  """
  repository, commit, revision, kind = snapshot
  with _explained(repository, revision, kind):
    found = _download(repository, revision, kind)  # by its name, under which the cache keeps it too
    return found if found.name == commit else _download(repository, commit, kind)


def folder(name: str, kind: str = "model") -> Path:
  """The folder that a name stands for: the path itself, or that of a snapshot, which is downloaded.

  Raises:
    HubError: see `find` and `download`.
  """
  found = find(name, kind)
  return Path(name) if found is None else download(found)


def origin(folder: Path) -> Snapshot | None:
  """The snapshot that a folder of the hub's cache holds; None for any other folder."""
  kind, _, name = folder.absolute().parent.parent.name.partition("--")
  if folder.absolute().parent.name != "snapshots" or not _COMMIT.fullmatch(folder.name) or kind != "models":
    return None
  return Snapshot(name.replace("--", "/", 1), folder.name)


def check_push(repository: str) -> None:
  """Checks that a folder can be pushed, before hours are spent on the folder.

  Raises:
    HubError: the name is not `owner/name`, there is no token, or the token may not write there.
  """
  if not _REPOSITORY.fullmatch(repository):
    raise HubError(f"push_to_hub={repository!r} is no name on the hub: write OWNER/NAME")
  import huggingface_hub

  if huggingface_hub.get_token() is None:
    raise HubError(
      f"push_to_hub={repository} needs a token that may write: set HF_TOKEN to it, or run `hf auth login` first"
    )
  with _explained(repository, None, "model"):
    who = _api().whoami()
  owner, owners = repository.partition("/")[0], [who["name"], *(one["name"] for one in who.get("orgs", []))]
  if owner not in owners:
    raise HubError(f"push_to_hub={repository}: the token is of {who['name']}, who writes to {', '.join(owners)} alone")


def push(folder: Path, repository: str, *, private: bool) -> str:
  """Adds the files of a folder to a model of the hub, as one commit; returns the model's address.

  The repository, `owner/name`, is made if it does not exist, and is then private if `private` is true.

  Raises:
    HubError: the hub refused.
  """
  with _explained(repository, None, "model", f"push {folder} with `hf upload {repository} {folder}`"):
    _api().create_repo(repository, private=private, exist_ok=True)
    _api().upload_folder(repo_id=repository, folder_path=folder, commit_message="Export of d1jax")
  return f"{_endpoint()}/{repository}"


def _endpoint() -> str:
  return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def _api() -> Any:
  import huggingface_hub

  return huggingface_hub.HfApi(endpoint=_endpoint(), library_name="d1jax")


def _download(repository: str, revision: str | None, kind: str, *, cached: bool = False) -> Path:
  import huggingface_hub

  return Path(
    huggingface_hub.snapshot_download(
      repository,
      repo_type=kind,
      revision=revision,
      cache_dir=os.environ.get("HF_HUB_CACHE"),
      endpoint=_endpoint(),
      library_name="d1jax",
      local_files_only=cached,
      allow_patterns=list(FILES[kind]),
      ignore_patterns=["*/*"] if kind == "model" else None,
    )
  )


@contextlib.contextmanager
def _unreachable_is_fine() -> Iterator[None]:
  """Drops errors of the network and of a hub that is out of order, but no answer of the hub."""
  from huggingface_hub.errors import HfHubHTTPError

  try:
    yield
  except HubError:
    raise
  except HfHubHTTPError as error:
    if error.response is not None and error.response.status_code < 500:
      raise
  except Exception as error:
    if errors.is_storage_failure(error):
      raise


@contextlib.contextmanager
def _explained(
  repository: str, revision: str | None, kind: str, remedy: str = "run the same command again"
) -> Iterator[None]:
  """Turns what `huggingface_hub` raises into a HubError; a full disk stays what it is."""
  from huggingface_hub import errors as theirs

  try:
    yield
  except HubError:
    raise
  except theirs.GatedRepoError as error:
    raise HubError(
      f"{repository} is gated: accept its terms at {_endpoint()}/{repository}, and set HF_TOKEN to a token that may"
      " read it"
    ) from error
  except theirs.RevisionNotFoundError as error:
    raise HubError(f"{repository} has no revision {revision} on the hub: name another, or leave it out") from error
  except theirs.RepositoryNotFoundError as error:
    raise HubError(
      f"{repository} is no folder here, and {_endpoint()} has no {kind} of this name that you may read: correct the"
      " name, or set HF_TOKEN if it is private"
    ) from error
  except Exception as error:
    if errors.is_storage_failure(error):
      raise
    reason = f"{type(error).__name__}: {errors.line_of(error)}"
    raise HubError(f"{repository}: the hub failed ({reason}); {remedy}") from error
