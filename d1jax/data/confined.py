"""Tokenizers and chat templates that others wrote, run in a separate process with limits (`confined_process`).

Both are programs: a normalizer of tokenizer.json or a line of a template can compute for years and fill any memory, and
the library `tokenizers` panics on unexpected input. One process serves all tokenizers of this one.
"""

import itertools
import json
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from d1jax.data import characters, chat, hugging_face
from d1jax.errors import RunError
from d1jax.helper import EndedError, Helper

PROGRAM = Path(__file__).with_name("confined_process.py")
"""What the process runs."""


class TokenizerError(RunError, ValueError):
  """A tokenizer or its chat template fails; the message is one line that names its file."""


_helper = Helper(
  PROGRAM, {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "RUST_BACKTRACE": "0"}
)
_numbers = itertools.count()
_gone: list[int] = []  # Numbers of unused tokenizers, which the process may delete.


class ConfinedTokenizer:
  """A `HuggingFaceTokenizer` that lives in the other process; it is built there again where that one had to end.

  Its attributes are those of `HuggingFaceTokenizer`. Each method raises a ValueError if the template fails, the text
  becomes the mask, or either takes too much time or memory.
  """

  def __init__(self, files: Mapping[str, bytes]):
    """Builds a tokenizer and tries it and its chat template.

    Args:
      files: the folder's files by name, see `d1jax.data.folder.read`.

    Raises:
      ValueError: a file is broken, absent or contradicts another, or tokenizer or template do not work within limits.
    """
    self.files: Mapping[str, bytes] = hugging_face.own_files(files)
    self._vocabulary = next(name for name in ("tokenizer.json", "vocab.json", "merges.txt") if name in self.files)
    self._template = (chat.find_template(self.files) or ("", ""))[1]
    self._number = next(_numbers)
    self._told = 0
    weakref.finalize(self, _gone.append, self._number)
    ids = self._ask("ids", self._vocabulary)
    self.vocab, self.mask_id, self.pad_id = (int(ids[name]) for name in ("vocab", "mask_id", "pad_id"))
    self.stop_ids: tuple[int, ...] = tuple(ids["stop_ids"])
    self._unk_id = ids["unk_id"]
    self._unknown = characters.Unknown(self.unknown)
    if self._template:
      self._ask("try_template", self._template)
    self._ask("try_tokenizer", self._vocabulary)

  def prompt(self, messages: Sequence[dict[str, str]], prefill: str) -> list[int]:
    """The ids of a conversation that the model is to continue, the given start of its answer included."""
    names = " and ".join(filter(None, (self._template, self._vocabulary)))
    text = "".join(message["content"] for message in messages) + prefill
    return self._ids("prompt", names, text, [dict(message) for message in messages], prefill)

  def completion(self, text: str) -> list[int]:
    """The ids of an answer: the text, the text that the template writes after an answer, and the end of sequence."""
    return self._ids("completion", self._vocabulary, text, text)

  def written(self, messages: Sequence[dict[str, str]], begin_answer: bool) -> str:
    """A conversation as the chat template writes it; without a template, the contents one after the other."""
    name = self._template or self._vocabulary
    return self._ask("written", name, [dict(message) for message in messages], begin_answer)

  def encode(self, text: str) -> list[int]:
    """The ids that transformers gives a text: special tokens that it spells are special."""
    return self._ids("encode", self._vocabulary, text, text)

  def unknown(self, text: str) -> list[str]:
    """The characters of a text that have no token, each once."""
    return self._ask("unknown", self._vocabulary, text)

  def decode_all(self, rows: Sequence[Sequence[int]]) -> list[str]:
    """The texts of rows of ids; special tokens vanish, as do ids beyond the tokenizer."""
    return self._ask("decode_all", self._vocabulary, [list(map(int, row)) for row in rows])

  def decode_raw(self, rows: Sequence[Sequence[int]]) -> list[str]:
    """The texts of rows of ids with special tokens spelled out; ids beyond the tokenizer vanish."""
    return self._ask("decode_raw", self._vocabulary, [list(map(int, row)) for row in rows])

  def _ids(self, what: str, name: str, text: str, *arguments: Any) -> list[int]:
    """Ids that the other process makes of a text, whose unknown characters are said."""
    ids: list[int] = self._ask(what, name, *arguments)
    if self._unk_id in ids:
      self._unknown.check(text)
    return ids

  def _ask(self, what: str, name: str, *arguments: Any) -> Any:
    """What the other process answers; `name` is the file that is to blame where it ends."""
    with _helper.lock:
      try:
        started = _helper.start()
      except EndedError as error:
        raise TokenizerError(
          f"the process for tokenizers {error}; `python -c 'import d1jax.data.confined_process'` shows what it lacks"
        ) from None
      try:
        while _gone:
          _exchange("forget", _gone.pop(), [])
        if self._told != started:
          files = {file: content.decode("latin-1") for file, content in self.files.items()}
          _exchange("load", self._number, [files])
          self._told = started
        return _exchange(what, self._number, arguments)
      except EndedError as error:
        raise TokenizerError(
          f"{name}: the process that runs it {error}; correct the file, or do not trust this folder"
        ) from None


def _exchange(what: str, number: int, arguments: Sequence[Any]) -> Any:
  answer = json.loads(_helper.ask(json.dumps([what, number, arguments]).encode()))
  if "error" in answer:
    raise TokenizerError(answer["error"])
  return answer["value"]
