"""Characters that a tokenizer cannot read: halves of surrogate pairs, and those that become its unknown token."""

import logging
from collections.abc import Callable, Sequence

_log = logging.getLogger(__name__)

MOST_UNKNOWN = 0.5
"""The share of a text's characters that may be unknown; with more, the text is almost empty for the model."""


def check_unicode(text: str) -> None:
  """Raises a ValueError if a text holds half of a surrogate pair, which no tokenizer reads."""
  if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
    raise ValueError(f"the text {text[:80]!r} is not Unicode (half a surrogate pair?); correct it")


def check_no_mask(text: str, ids: Sequence[int], mask_id: int) -> None:
  """Raises a ValueError if the ids of a text hold the mask."""
  if mask_id in ids:
    raise ValueError(
      f"the text {text[:80]!r} becomes the mask (id {mask_id}), which the sampler would fill; change the text,"
      " or the mask_token_id of config.json if it is an ordinary token"
    )


def is_read(char: str, decoded: str) -> bool:
  """Whether a tokenizer knows a character: decoding its tokens gives it back.

  SentencePiece writes U+2047 for a character without a token.
  """
  decoded = decoded.strip()
  return decoded == char or (decoded != "" and "\u2047" not in decoded) or (decoded == "" and char.isspace())


class Unknown:
  """Says which characters a tokenizer does not know, each once, and refuses texts that consist of them."""

  def __init__(self, find: Callable[[str], list[str]]):
    """Knows nothing yet.

    Args:
      find: gives the unknown characters of a text.
    """
    self._find = find
    self._said: set[str] = set()

  def check(self, text: str) -> None:
    """Warns of unknown characters; for texts whose ids hold the unknown token.

    Raises:
      ValueError: more than `MOST_UNKNOWN` of the text is unknown.
    """
    unknown = self._find(text)
    listed = ", ".join(map(repr, unknown[:20])) + (", ..." if len(unknown) > 20 else "")
    if sum(map(text.count, unknown)) > MOST_UNKNOWN * len(text):
      raise ValueError(
        f"the tokenizer does not know most of the text {text[:80]!r} (unknown: {listed}); use a tokenizer that was"
        " trained on such texts"
      )
    if not self._said.issuperset(unknown):
      self._said.update(unknown)
      _log.warning("the tokenizer does not know %s; the model reads them as one and the same unknown token", listed)
