"""A downloaded folder before its weights are read: what it says of its network and of its tokens."""

from pathlib import Path
from typing import NamedTuple

from d1jax.data import folder as folders
from d1jax.data import tokenizer as tokenizers
from d1jax.data.tokenizer import Tokenizer
from d1jax.models import families, load, transformer
from d1jax.models.families import Description


class Source(NamedTuple):
  """What `inspect` reads.

  Attributes:
    folder: in the form of Hugging Face.
    description: of its network.
    tokenizer: text to ids, None where the folder has none.
    ids: of mask, stops and padding.
  """

  folder: Path
  description: Description
  tokenizer: Tokenizer | None
  ids: folders.SpecialIds

  @property
  def size(self) -> transformer.TransformerSize:
    """The network's sizes, with a row for the mask where a causal model gets one."""
    return families.with_rows(self.description.size, self.ids.mask_id + 1)


def inspect(folder: Path) -> Source:
  """Reads everything but the values of the weights.

  Raises:
    ValueError: a file is missing, broken, claims more than another holds or says something that is not supported.
  """
  description = load.describe(folder)
  tokenizer = tokenizers.load(folder)
  if tokenizer is None:  # the ids that config.json names, and no meaning for any other
    ids = folders.special_ids(folders.read(folder), {}, size=description.size.vocab)
  else:
    ids = folders.SpecialIds(tokenizer.mask_id, tokenizer.stop_ids, tokenizer.pad_id, None, tokenizer.vocab)
  source = Source(folder, description, tokenizer, ids)
  most = description.size.vocab + families.ROWS  # a few added tokens and a mask are as many rows as it may grow by
  if ids.vocab > min(most, source.size.vocab):
    raise ValueError(
      f"{folder}: the tokenizer has {ids.vocab} ids, the embedding {description.size.vocab} rows:"
      " these files are of two models"
    )
  return source
