"""Text to token ids and back: the protocol, folders of tokenizer files, and SentencePiece."""

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import sentencepiece

from d1jax.data import characters, chat, folder
from d1jax.data.confined import ConfinedTokenizer
from d1jax.errors import reworded

MASK_PIECE = "<mask>"
MODEL_TYPES = ("char", "unigram", "bpe")

_USUAL_LENGTH = 4192
"""Bytes of the longest text that SentencePiece trains on when it is told nothing."""


@runtime_checkable
class Tokenizer(Protocol):
  """What the rest of the package needs of a tokenizer.

  Attributes:
    vocab: ids from 0 to `vocab - 1` have a meaning, the mask included.
    mask_id: the id of the mask; no text is encoded to it.
    stop_ids: each ends a completion; the first is the end of sequence.
    pad_id: the id of padding.
    files: names and contents of files; `load` makes the same tokenizer from a folder that holds just these.
  """

  vocab: int
  mask_id: int
  stop_ids: tuple[int, ...]
  pad_id: int
  files: Mapping[str, bytes]

  def prompt(self, messages: Sequence[dict[str, str]], prefill: str) -> list[int]:
    """The ids of a conversation that the model is to continue, the given start of its answer included."""
    ...

  def completion(self, text: str) -> list[int]:
    """The ids of an answer, the end of the assistant's turn and the end of sequence included."""
    ...

  def written(self, messages: Sequence[dict[str, str]], begin_answer: bool) -> str:
    """A conversation as text, with or without the start of an assistant's turn at the end."""
    ...

  def encode(self, text: str) -> list[int]:
    """The ids of a text as it stands, behind the start token: `written` becomes the ids of `prompt`."""
    ...

  def unknown(self, text: str) -> list[str]:
    """The characters of a text that have no token, each once."""
    ...

  def decode_all(self, rows: Sequence[Sequence[int]]) -> list[str]:
    """The texts of rows of ids, without special tokens and ids beyond the tokenizer; never raises."""
    ...

  def decode_raw(self, rows: Sequence[Sequence[int]]) -> list[str]:
    """The texts of rows of ids with special tokens spelled out, as d1's evaluation reads them; never raises."""
    ...


def prefix(tokenizer: Tokenizer) -> list[int]:
  """What stands before a text without a context: the start token, or the end of sequence if there is none."""
  return tokenizer.encode("") or [tokenizer.stop_ids[0]]


def body(tokenizer: Tokenizer, text: str) -> list[int]:
  """The ids of a text without the start token."""
  ids, start = tokenizer.encode(text), tokenizer.encode("")
  return ids[len(start) :] if start and ids[: len(start)] == start else ids


def load(path: Path) -> Tokenizer | None:
  """Makes the tokenizer of a folder in the form of Hugging Face; nothing is fetched and no code of it is run.

  See `from_files` for what is read.

  Returns:
    None if the folder has no tokenizer file at all.

  Raises:
    ValueError: files are broken, incomplete or contradict each other; the message names the folder and the file.
  """
  files = folder.read(path)
  if not any(name in files for name in (*folder.CORE, *folder.EXTRAS)):
    return None
  with reworded(f"{path}: "):
    return from_files(files)


def from_files(files: Mapping[str, bytes]) -> Tokenizer:
  """Makes a tokenizer from the contents of its files.

  The first of these makes it: tokenizer.json; vocab.json with merges.txt (Qwen2's byte-level BPE); tokenizer.model
  (SentencePiece).

  Args:
    files: contents by name; `d1jax.data.folder` lists the names that are read.
  """
  if any(name in files for name in folder.CORE[:-1]):
    return ConfinedTokenizer(files)
  if "tokenizer.model" not in files:
    raise ValueError(
      f"there is {', '.join(sorted(files)) or 'nothing'}, but no tokenizer.json, no vocab.json with merges.txt and no"
      " tokenizer.model; fetch one of them"
    )
  return SentencePieceTokenizer(files["tokenizer.model"], files)


def train_sentencepiece(
  texts: Iterable[str], *, model_type: str, vocab_size: int, symbols: Sequence[str] = ()
) -> bytes:
  """Trains a SentencePiece model and returns its serialised form.

  Text is kept as it is (no normalisation, no added space), newlines included. The same texts give the same bytes.

  Args:
    texts: the training text; every character in it gets a piece.
    model_type: `char`, `unigram` or `bpe`. Characters suit small models: every digit is one token.
    vocab_size: the most pieces; `char` takes what the text needs.
    symbols: texts that are one piece each wherever they occur, such as the tags of an answer.

  Raises:
    ValueError: there is no text, it is not Unicode, or it does not fit the number of pieces.
  """
  if model_type not in MODEL_TYPES:
    raise ValueError(f"tokenizer.model_type={model_type!r} is unknown; known: {', '.join(MODEL_TYPES)}")
  all_texts = list(texts)
  for text in all_texts:
    characters.check_unicode(text)
  longest = max((len(text.encode()) for text in all_texts), default=0)
  if not longest:
    raise ValueError("there is no text to train a tokenizer on: the task's records are empty")
  # SentencePiece would leave out longer texts without a word. The model holds the limit, so it is set where it matters.
  limits: dict[str, Any] = {} if longest <= _USUAL_LENGTH else {"max_sentence_length": longest}
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(all_texts),
      model_writer=model,
      model_type=model_type,
      vocab_size=vocab_size,
      hard_vocab_limit=False,
      character_coverage=1.0,
      normalization_rule_name="identity",
      add_dummy_prefix=False,
      remove_extra_whitespaces=False,
      split_digits=True,
      control_symbols=[MASK_PIECE],  # no text encodes to it
      user_defined_symbols=["\n", *symbols],
      pad_id=-1,
      unk_id=0,
      bos_id=1,
      eos_id=2,
      num_threads=1,
      minloglevel=2,
      **limits,
    )
  except RuntimeError as error:
    reason = " ".join(str(error).split())[:200]
    raise ValueError(
      f"SentencePiece trains no tokenizer.model_type={model_type!r} of tokenizer.vocab_size={vocab_size} ({reason});"
      " give another size, or the type char"
    ) from None
  return model.getvalue()


class SentencePieceTokenizer:
  """A SentencePiece model; a prompt is a start token and the text of the turns.

  A completion ends with the end-of-sequence token. In the models that we train it is the padding too, and the mask is
  a control piece, which no text encodes to. A model without such a piece has its mask behind its own ids, unless
  config.json names one.
  """

  def __init__(self, model: bytes, files: Mapping[str, bytes] | None = None):
    """Builds a tokenizer.

    Args:
      model: a serialised SentencePiece model.
      files: the other files of its folder; config.json and generation_config.json may name special ids.

    Raises:
      ValueError: the model does not parse, the special ids do not fit, or there is a chat template.
    """
    others = files or {}
    if chat.find_template(others):
      raise ValueError(
        "a chat template beside tokenizer.model is not supported: SentencePiece reads no special tokens from text;"
        " save the tokenizer with transformers, which writes tokenizer.json"
      )
    if not model:
      raise ValueError("tokenizer.model is empty; fetch the file again")
    self.model = model
    try:
      self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    except (RuntimeError, TypeError) as error:
      raise ValueError(f"tokenizer.model is not a SentencePiece model ({error}); fetch the file again") from None
    self._size = self._processor.vocab_size()
    piece = self._processor.piece_to_id(MASK_PIECE)
    own = {
      "mask_token_id": None if piece == self._processor.unk_id() else piece,
      "bos_token_id": self._processor.bos_id(),
      "eos_token_id": self._processor.eos_id(),
      "pad_token_id": self._processor.pad_id(),
    }
    ids = folder.special_ids(others, {key: i if i != -1 else None for key, i in own.items()}, size=self._size)
    self.vocab, self.mask_id, self.stop_ids, self.pad_id = ids.vocab, ids.mask_id, ids.stop_ids, ids.pad_id
    self.bos_id = ids.bos_id
    named = [name for name in folder.MODEL if any(key in folder.parse(others, name) for key in own)]
    self.files: Mapping[str, bytes] = {"tokenizer.model": model} | {name: others[name] for name in named}
    self._unknown = characters.Unknown(self.unknown)
    self._silent = {self.mask_id, self.pad_id, *self.stop_ids}

  def prompt(self, messages: Sequence[dict[str, str]], prefill: str) -> list[int]:
    """A start token if the model has one, the contents of the messages one after the other, and the prefill."""
    start = [] if self.bos_id is None else [self.bos_id]
    return [*start, *self._encode("".join(m["content"] for m in messages) + prefill)]

  def completion(self, text: str) -> list[int]:
    """The text and the end-of-sequence token."""
    return [*self._encode(text), self.stop_ids[0]]

  def written(self, messages: Sequence[dict[str, str]], begin_answer: bool) -> str:
    """The contents of the messages one after the other."""
    del begin_answer
    return "".join(message["content"] for message in messages)

  def encode(self, text: str) -> list[int]:
    """The ids of a text behind the start token if the model has one."""
    return self.prompt([{"role": "user", "content": text}], "")

  def unknown(self, text: str) -> list[str]:
    """The characters of a text that have no token, each once."""
    characters.check_unicode(text)
    return [char for char in dict.fromkeys(text) if self._processor.unk_id() in self._processor.encode(char)]

  def decode_all(self, rows: Sequence[Sequence[int]]) -> list[str]:
    """The texts of rows of ids; control tokens, the mask among them, vanish, as do ids beyond the model."""
    known = [[i for i in row if 0 <= i < self._size and i not in self._silent] for row in rows]
    return self._processor.decode(known) if known else []  # SentencePiece takes no rows for one empty row

  def decode_raw(self, rows: Sequence[Sequence[int]]) -> list[str]:
    """The same as `decode_all`: a SentencePiece model spells out no special token."""
    return self.decode_all(rows)

  def _encode(self, text: str) -> list[int]:
    characters.check_unicode(text)
    ids: list[int] = self._processor.encode(text)
    if self._processor.unk_id() in ids:
      self._unknown.check(text)
    characters.check_no_mask(text, ids, self.mask_id)
    return ids
