"""The tokenizer of a run: it comes from the model folder or is trained on the task's texts, and a copy is kept.

Weights are useless without the tokenizer of their training, so every checkpoint records the hashes of its files. If the
copy in the work directory is damaged, the tokenizer is made again, and must have the same hashes.
"""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from d1jax import tasks
from d1jax.data import folder as folders
from d1jax.data import tokenizer as tokenizers
from d1jax.data.tokenizer import Tokenizer
from d1jax.errors import RunError
from d1jax.files import FileError, read_bytes
from d1jax.parallel import multihost
from d1jax.run.checkpoint import Checkpoints
from d1jax.run.identity import STAGES
from d1jax.run.workdir import Folder, read_tokenizer
from d1jax.tasks import Task

log = logging.getLogger(__name__)

SAMPLE = 2000
"""The number of records of each task and split whose texts train the tokenizer."""


class Kept(NamedTuple):
  """The tokenizer that a run with checkpoints keeps in its work directory.

  Attributes:
    workdir: the work directory of the run.
    hashes: the hashes of its files by name, from a checkpoint; None if it has none, as in older releases.
  """

  workdir: Folder
  hashes: Mapping[str, str] | None

  def files(self) -> dict[str, bytes]:
    """The contents of its files by name.

    Raises:
      RunError, FileError: a file is missing, cannot be read, or is not the one that the run wrote.
    """
    found = read_tokenizer(self.workdir, self.hashes)
    now = hashes(found)
    for name, told in (self.hashes or {}).items():
      if now.get(name) != told:
        wrong = "is damaged: it is not what the run wrote" if name in now else "is missing"
        raise FileError(f"{self.workdir / 'tokenizer' / name} {wrong}")
    return found


def hashes(files: Mapping[str, bytes]) -> dict[str, str]:
  """The SHA-256 of each file."""
  return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


def kept(workdir: Folder, metadata: Mapping[str, Any]) -> Kept:
  """The tokenizer of a run, with the hashes in the metadata of one of its checkpoints."""
  said = metadata.get("tokenizer")
  known = isinstance(said, dict) and said and all(isinstance(value, str) for value in said.values())
  return Kept(workdir, said if known else None)


def _told(workdir: Folder) -> list[Any] | None:
  """A list with the hashes in the newest checkpoint of a run; None if there is no checkpoint."""
  for stage in STAGES:
    metadata = Checkpoints(workdir / "checkpoints" / stage).newest_metadata()
    if metadata is not None:
      return [kept(workdir, metadata).hashes]
  return None


def kept_in(workdir: Folder) -> Kept | None:
  """The tokenizer of the run in a work directory; None without a checkpoint, so that any tokenizer is allowed."""
  told = multihost.from_main(lambda: _told(workdir))
  return None if told is None else Kept(workdir, told[0])


def is_whole(workdir: Folder) -> bool:
  """Whether no damage of a run's tokenizer files is known, as far as this process sees."""
  told = _told(workdir)
  try:
    return not told or not told[0] or bool(Kept(workdir, told[0]).files())
  except (RunError, FileError):
    return False


def train(
  task: Task, style: str = "d1", *, model_type: str = "char", vocab_size: int = 64, symbols: Sequence[str] = ()
) -> Tokenizer:
  """Trains a tokenizer on prompts and answers of training records."""
  texts: list[str] = []
  for one in task.tasks.values() if isinstance(task, tasks.Mixture) else [task]:
    for split in ("demonstrations", "train"):
      for record in one.records(split)[:SAMPLE]:
        messages, prefill = one.prompt(record, style)
        texts += [m["content"] for m in messages] + [prefill, one.demonstration(record, style)]
  model = tokenizers.train_sentencepiece(
    filter(None, texts), model_type=model_type, vocab_size=vocab_size, symbols=symbols
  )
  return tokenizers.SentencePieceTokenizer(model)


def read_or_make(run: Kept, make: Callable[[], Tokenizer] | None, origin: str) -> Tokenizer:
  """The tokenizer of a run with checkpoints. It is made again if its files are damaged; nothing is written.

  Args:
    run: the kept tokenizer.
    make: makes the tokenizer as the run did when it began; None if only the run itself may do so.
    origin: what messages call the source of `make`.

  Raises:
    ValueError: the files are intact, but cannot be read as a tokenizer here.
    RunError: the files are damaged, and the same tokenizer cannot be made.
  """
  try:
    files = run.files()
    try:
      return tokenizers.from_files(files)
    except ValueError as error:
      if run.hashes is not None:
        raise ValueError(f"in the folder tokenizer of the run: {error}") from error
      raise FileError(str(error).removesuffix("; fetch the file again")) from error
  except (RunError, FileError) as error:
    wrong = f"the tokenizer of the run in {run.workdir} is damaged ({error})"
  remedy = f"put {run.workdir / 'tokenizer'} back from a copy, or begin a new run with --config.workdir=..."
  if run.hashes is None:
    raise RunError(f"{wrong}, and its checkpoints do not say which one it was: {remedy}")
  if make is None:
    raise RunError(f"{wrong}: run the command that trained it again, which makes the tokenizer anew; or {remedy}")
  made = _of_its_day(make(), run)
  if hashes(made.files) != run.hashes:
    raise RunError(f"{wrong}, and {origin} gives another one now: {remedy}")
  log.warning("%s; that of %s has the same hashes, and serves", wrong, origin)
  return made


def _of_its_day(made: Tokenizer, run: Kept) -> Tokenizer:
  """The tokenizer with the date that its chat template uses as today: the day on which the run began."""
  told = (run.hashes or {}).get(folders.DATE)
  path = run.workdir / "tokenizer" / folders.DATE
  try:
    day = {folders.DATE: read_bytes(path)} if told else {}
  except FileError:
    return made
  return tokenizers.from_files({**made.files, **day}) if hashes(day) == {folders.DATE: told} else made
