"""A Hugging Face folder as a diffusion model: `d1jax.from_pretrained(folder)`."""

from os import PathLike
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from d1jax.data import folder as folders
from d1jax.data import tokenizer as tokenizers
from d1jax.data.tokenizer import Tokenizer
from d1jax.diffusion.denoiser import Denoiser
from d1jax.models import families, load, lora, transformer
from d1jax.models.families import Description
from d1jax.models.transformer import Network, Params
from d1jax.parallel import mesh as meshes
from d1jax.parallel.attention import attention


class Pretrained(NamedTuple):
  """What `from_pretrained` reads.

  Attributes:
    denoiser: pure functions of `params`.
    params: the weights.
    tokenizer: text to ids, None where the folder has none.
  """

  denoiser: Denoiser
  params: Params
  tokenizer: Tokenizer | None


class Source(NamedTuple):
  """A folder before its weights are read: what it says of its network and of its tokens."""

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


def build_denoiser(
  network: Network,
  *,
  mask_id: int,
  stop_ids: tuple[int, ...],
  known_ids: int,
  shift: int = 0,
  vocab_shards: int = 1,
) -> Denoiser:
  """The denoiser of a network; ids beyond `known_ids` have no meaning and are never drawn.

  Args:
    network: pure functions.
    mask_id: of the mask.
    stop_ids: each ends a completion.
    known_ids: of the tokenizer.
    shift: see `families.Description`.
    vocab_shards: over how many devices the vocabulary is cut.
  """
  return Denoiser(
    encode=network.encode,
    head=network.head,
    mask_id=mask_id,
    stop_ids=stop_ids,
    forbidden_ids=tuple({mask_id: None} | dict.fromkeys(range(known_ids, network.size.vocab))),
    vocab=network.size.vocab,
    shift=shift,
    init_cache=network.init_cache,
    encode_window=network.encode_window,
    vocab_shards=vocab_shards,
  )


def from_pretrained(
  folder: str | PathLike[str],
  dtype: DTypeLike = jnp.bfloat16,
  *,
  quantize: str | None = None,
  mesh: Mesh | None = None,
  rules: meshes.Rules = meshes.RULES,
) -> Pretrained:
  """Reads a downloaded LLaDA or Dream, or a causal Llama or Qwen2 as the start of a diffusion model.

  A causal model gets attention both ways, shifted logits and, where it has none, a mask token whose embedding is the
  mean of the others.

  Args:
    folder: with config.json, safetensors and, as a rule, a tokenizer.
    dtype: of weights and matrix products: bfloat16, or float32 on a CPU.
    quantize: `int8` or `nf4` stores the projections in few bits.
    mesh: over which the weights are sharded; None: the first device.
    rules: where logical axes live on it.

  Raises:
    ValueError: a file, a tensor or a value of the configuration is missing, wrong or not supported; the message names
      it.
  """
  source = inspect(Path(folder))
  if mesh is None:
    mesh = meshes.make_mesh(dict.fromkeys(meshes.MESH_AXES, 1), meshes.first_device())
  network = transformer.build(
    source.size,
    dtype=dtype,
    constrain=meshes.constrainer(mesh, rules),
    attention=attention(mesh, rules),
    cut_length=meshes.ways(mesh, rules, "length") > 1,
  )
  axes = lora.quantized_axes(network.axes) if quantize else network.axes
  placements = meshes.shardings(mesh, rules, axes)
  params = load.read(source.folder, network, dtype, placements, quantized=quantize)
  ids = source.ids
  denoiser = build_denoiser(
    network,
    mask_id=ids.mask_id,
    stop_ids=ids.stop_ids,
    known_ids=ids.vocab,
    shift=source.description.shift,
    vocab_shards=meshes.ways(mesh, rules, "vocab"),
  )
  return Pretrained(denoiser, params, source.tokenizer)
