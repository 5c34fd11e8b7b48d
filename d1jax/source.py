"""A model's folder, or its name on the hub, before its weights are read: what its network and its tokens are."""

from os import PathLike
from pathlib import Path
from typing import NamedTuple

from d1jax import hub
from d1jax.data import folder as folders
from d1jax.data import tokenizer as tokenizers
from d1jax.data.tokenizer import Tokenizer
from d1jax.errors import input_checked
from d1jax.models import families, load, transformer
from d1jax.models.families import Description
from d1jax.parallel import multihost

SHIPPED = Path(__file__).parent / "shipped"
"""The folder of the models that come with d1jax: `d1jax:sudoku` is the folder `sudoku` in it."""


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

  def as_start(self) -> str | None:
    """A sentence about a causal model that becomes the start of a diffusion model; None if a file names its mask."""
    family, mask = self.description.family, self.ids.mask_id
    has_text = self.tokenizer is not None and self.tokenizer.decode_raw([[mask]])[0]
    if family.masked or has_text or folders.named_ids(folders.read(self.folder), "mask_token_id")[0]:
      return None
    was, rows = self.description.size.vocab, self.size.vocab
    grows = f"the vocabulary grows from {was:,} to {rows:,}" if rows > was else f"a spare row of the {rows:,}"
    return (
      f"{self.folder} is a causal {family.model_type}, no diffusion model before it is fine-tuned: attention goes both"
      f" ways, and the mask is the new id {mask} ({grows}). If the tokenizer has a token for it, write its id into"
      " config.json as mask_token_id"
    )

  def block_of(self, chosen: int | None) -> int | None:
    """The length of the blocks inside which the network's attention goes both ways; None: full attention.

    Args:
      chosen: the user's choice, which goes before that of config.json, since a model is grown from short blocks to long
        ones; None: config.json's.

    Raises:
      ValueError: attention is block-causal, but nobody says what the block length is.
    """
    family = self.description.family
    block = self.description.block if chosen is None else chosen
    if block is None and family.block_causal:
      raise ValueError(
        f"{self.folder}: the attention of a {family.model_type} is block-causal, but config.json has no"
        f" {family.block_key}: set model.block to the block length that the model was trained with (block=... in"
        f' Python), or write "{family.block_key}" into config.json'
      )
    return block


def locate(name: str | PathLike[str], kind: str = "model", *, cached: bool = False) -> Path | hub.Snapshot:
  """The folder of a name, or the snapshot of the hub that it stands for; nothing is downloaded.

  Of several processes the first decides, so that all read the same commit, even if a new one is pushed meanwhile.

  Args:
    name: a folder, `owner/name` or `hf:owner/name@revision`, see `hub.parse`; or `d1jax:sudoku`, a model that comes
      with d1jax. A `pathlib.Path` is a folder always.
    kind: `model` or `dataset`.
    cached: whether the hub is not asked, because a checkpoint chose the name.

  Raises:
    HubError: the hub does not have it. With several processes it is a RunError.
    ValueError: no such model comes with d1jax.
  """
  if not isinstance(name, str):
    return Path(name)
  prefix, _, shipped = name.partition("d1jax:")
  if kind == "model" and shipped and not prefix:
    known = sorted(folder.name for folder in SHIPPED.iterdir())
    if shipped not in known:
      raise ValueError(f"{name!r} does not come with d1jax; known: {', '.join(f'd1jax:{one}' for one in known)}")
    return SHIPPED / shipped
  if multihost.alone():
    return hub.find(name, kind, cached=cached) or Path(name)

  def find() -> hub.Snapshot | None:
    with input_checked():
      return hub.find(name, kind, cached=cached)

  found = multihost.from_main(find)
  return hub.Snapshot(*found) if found else Path(name)


def fetch(name: str | PathLike[str], kind: str = "model", *, cached: bool = False) -> Path:
  """The folder of a name; what is on the hub is downloaded into its cache first. Arguments and errors: see `locate`."""
  found = locate(name, kind, cached=cached)
  return found if isinstance(found, Path) else download(found)


def download(found: hub.Snapshot) -> Path:
  """The folder of a snapshot in this machine's cache, once every process has it in the cache of its own.

  The processes of one machine wait for each other at each file, so that it is downloaded once.
  """
  folder = hub.download(found)
  multihost.wait_long("download")
  return folder


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
  if description.family.masked:
    _check_mask(folder, description, tokenizer, ids.mask_id)
  source = Source(folder, description, tokenizer, ids)
  most = description.size.vocab + families.ROWS  # the vocabulary may grow by a few added tokens and a mask
  if ids.vocab > min(most, source.size.vocab):
    raise ValueError(
      f"{folder}: the tokenizer has {ids.vocab} ids, the embedding {description.size.vocab} rows:"
      " these files are of two models"
    )
  return source


def _check_mask(folder: Path, description: Description, tokenizer: Tokenizer | None, mask_id: int) -> None:
  """Raises a ValueError if the mask that a model was trained with is not known, or has no row in its embedding."""
  is_named = bool(folders.named_ids(folders.read(folder), "mask_token_id")[0])
  if not is_named and (tokenizer is None or not tokenizer.decode_raw([[mask_id]])[0]):  # an id of its own has a text
    raise ValueError(
      f"{folder}: neither config.json nor the tokenizer names the mask with which this {description.family.model_type}"
      " was trained; write mask_token_id into config.json"
    )
  if mask_id >= description.size.vocab:
    raise ValueError(
      f"{folder}: mask_token_id={mask_id} is beyond the {description.size.vocab} rows of the vocabulary; correct"
      " mask_token_id in config.json, or fetch the files of one and the same model"
    )
