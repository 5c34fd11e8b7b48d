"""A downloaded folder before its weights are read: the description of its network and of its tokens."""

from pathlib import Path
from typing import NamedTuple

from d1jax.data import folder as folders
from d1jax.data import tokenizer as tokenizers
from d1jax.data.tokenizer import Tokenizer
from d1jax.models import families, load, transformer
from d1jax.models.families import Description


class Source(NamedTuple):
  """The result of `inspect`.

  Attributes:
    folder: a folder in Hugging Face's format.
    description: the description of its network.
    tokenizer: text to ids; None if the folder has none.
    ids: the ids of mask, stop and padding tokens.
  """

  folder: Path
  description: Description
  tokenizer: Tokenizer | None
  ids: folders.SpecialIds

  @property
  def size(self) -> transformer.TransformerSize:
    """The network's sizes, with one more row of the vocabulary if a causal model gets a mask token."""
    return families.with_rows(self.description.size, self.ids.mask_id + 1)


def inspect(folder: Path) -> Source:
  """Reads everything except the values of the weights.

  Raises:
    ValueError: a file is missing or broken, contradicts another one, or contains something that is not supported.
  """
  description = load.describe(folder)
  tokenizer = tokenizers.load(folder)
  if tokenizer is None:  # only the ids that config.json names have a meaning
    ids = folders.special_ids(folders.read(folder), {}, size=description.size.vocab)
  else:
    ids = folders.SpecialIds(tokenizer.mask_id, tokenizer.stop_ids, tokenizer.pad_id, None, tokenizer.vocab)
  source = Source(folder, description, tokenizer, ids)
  most = description.size.vocab + families.ROWS  # the vocabulary may grow by a few added tokens and a mask
  if ids.vocab > min(most, source.size.vocab):
    raise ValueError(
      f"{folder}: the tokenizer has {ids.vocab} ids, the embedding {description.size.vocab} rows:"
      " these files are of two models"
    )
  return source
