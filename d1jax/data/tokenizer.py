"""Text to token ids and back, with SentencePiece."""

import io
from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

import sentencepiece

MASK_PIECE = "<mask>"
MODEL_TYPES = ("char", "unigram", "bpe")


@runtime_checkable
class Tokenizer(Protocol):
  """What the rest of the package needs of a tokenizer."""

  vocab: int
  mask_id: int
  stop_ids: tuple[int, ...]
  pad_id: int

  def prompt(self, messages: Sequence[dict[str, str]], prefill: str) -> list[int]:
    """The ids of a conversation that the model is to continue, the given start of its answer included."""
    ...

  def completion(self, text: str) -> list[int]:
    """The ids of an answer, its stop id included."""
    ...

  def decode_all(self, rows: Sequence[Sequence[int]]) -> list[str]:
    """The texts of rows of ids, without special tokens."""
    ...


def train_sentencepiece(texts: Iterable[str], *, model_type: str, vocab_size: int) -> bytes:
  """Trains a SentencePiece model and returns its serialised form.

  Text is kept as it is (no normalisation, no added space), newlines included. The same texts give the same bytes.

  Args:
    texts: the training text; every character in it gets a piece.
    model_type: `char`, `unigram` or `bpe`. Characters suit small models: every digit is one token.
    vocab_size: the most pieces; `char` takes what the text needs.
  """
  if model_type not in MODEL_TYPES:
    raise ValueError(f"tokenizer.model_type={model_type!r} is unknown; known: {', '.join(MODEL_TYPES)}")
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(texts),
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
    user_defined_symbols=["\n"],
    pad_id=-1,
    unk_id=0,
    bos_id=1,
    eos_id=2,
    num_threads=1,
    minloglevel=2,
  )
  return model.getvalue()


class SentencePieceTokenizer:
  """A SentencePiece model with a mask piece; a prompt is a start token and the text of the turns.

  A completion ends with the end-of-sequence token, which is also its padding.
  """

  def __init__(self, model: bytes):
    self.model = model
    self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    self.vocab = self._processor.vocab_size()
    self.mask_id = self._processor.piece_to_id(MASK_PIECE)
    if self.mask_id == self._processor.unk_id():
      raise ValueError(f"the SentencePiece model has no piece {MASK_PIECE!r}: train it with d1jax.data.tokenizer")
    self.bos_id, self.pad_id = self._processor.bos_id(), self._processor.eos_id()
    self.stop_ids: tuple[int, ...] = (self.pad_id,)

  def prompt(self, messages: Sequence[dict[str, str]], prefill: str) -> list[int]:
    """A start token, the contents of the messages one after the other, and the prefill."""
    return [self.bos_id, *self._processor.encode("".join(m["content"] for m in messages) + prefill)]

  def completion(self, text: str) -> list[int]:
    """The text and the end-of-sequence token."""
    return [*self._processor.encode(text), self.pad_id]

  def decode_all(self, rows: Sequence[Sequence[int]]) -> list[str]:
    """The texts of rows of ids; control tokens, the mask among them, vanish, as do ids beyond the model."""
    known = [[i for i in row if i < self.vocab] for row in rows]
    return self._processor.decode(known) if known else []  # SentencePiece takes no rows for one empty row
