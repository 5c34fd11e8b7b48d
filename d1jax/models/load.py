"""Reads the weights of a Hugging Face folder onto devices, one slice at a time.

Each device fills its own part of each parameter. A buffer for all layers is allocated once and written layer by layer
with donated updates, in pieces of a few MiB, so that the host never holds more than one piece of a tensor. Matrices are
transposed, cast or quantised on the way.
"""

import functools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding
from jax.typing import DTypeLike

from d1jax.models import families, lora, names, quantize, transformer
from d1jax.models.quantize import Quantized
from d1jax.models.tensor_files import TensorFiles
from d1jax.models.transformer import Network, Params

PIECE = 8 * 2**20
"""The number of bytes to read at a time."""


class Loaded(NamedTuple):
  """A network and its weights."""

  network: Network
  params: Params
  description: families.Description


def load(
  folder: Path, dtype: DTypeLike = jnp.bfloat16, *, quantized: str | None = None, rows: int | None = None
) -> Loaded:
  """Reads a whole folder onto the first device; `read` does the same for any placement.

  The arguments are those of `read`; `rows` is the size of the smallest vocabulary.
  """
  description = describe(folder)
  network = transformer.build(families.with_rows(description.size, rows), dtype=dtype)
  here = SingleDeviceSharding(jax.local_devices()[0])
  placements = jax.tree.map(lambda _: here, abstract(network, dtype, quantized))
  return Loaded(network, read(folder, network, dtype, placements, quantized=quantized), description)


def describe(folder: Path) -> families.Description:
  """The content of config.json, after the headers of the weight files have confirmed that its sizes are possible.

  Raises:
    ValueError: see `families.describe`, `TensorFiles` and `families.check_claims`.
  """
  description = families.describe(folder)
  families.check_claims(folder, description, TensorFiles(folder).shapes)
  return description


def abstract(network: Network, dtype: DTypeLike, quantized: str | None = None) -> Params:
  """Shapes and types of the parameters in their stored form."""

  def make(key: jax.Array) -> Params:
    params = jax.tree.map(lambda w: w.astype(dtype), network.init(key))
    return lora.quantized(params, quantized) if quantized else params

  return jax.eval_shape(make, jax.random.key(0))


def read(
  folder: Path, network: Network, dtype: DTypeLike, placements: Params, *, quantized: str | None = None
) -> Params:
  """Reads the weights of a folder, each slice directly onto its devices.

  If the network's vocabulary is larger than the folder's (a causal model gets a mask token), each new row is the mean
  of the stored ones.

  Args:
    folder: a folder with safetensors whose names are those of its family.
    network: a network of the folder's sizes (`families.describe`).
    dtype: the dtype of the stored weights.
    placements: a sharding for each leaf of `abstract(network, dtype, quantized)`.
    quantized: `int8`, `nf4` or None.

  Raises:
    ValueError: a tensor is missing, unknown, misshaped or truncated; the message names it.
  """
  files, known, rows = check(folder, network)
  if network.size.tied:
    _check_tied(files, families.describe(folder))
  whole = abstract(network, dtype, quantized)
  params = whole
  for path, template in known.items():
    leaf, placement = _get(whole, path), _get(placements, path)
    tensors = names.tensors_of(path, template, network.size.layers)
    filled = _fill(files, tensors, path, leaf, placement, quantized or "")
    if path in (("embedding",), ("head",)) and rows < network.size.vocab:
      filled = _with_new_rows(filled, rows, _mean_row(files, tensors[0]), placement, axis=int(path == ("head",)))
    params = _set(params, path, filled)
  return params


def _paths(tree: Mapping[str, Any], prefix: names.Path = ()) -> Iterator[names.Path]:
  for name, leaf in tree.items():
    if isinstance(leaf, Mapping):
      yield from _paths(leaf, (*prefix, name))
    else:
      yield (*prefix, name)


def _get(tree: Params, path: names.Path) -> Any:
  return functools.reduce(lambda node, name: node[name], path, tree)


def _set(tree: Params, path: names.Path, leaf: Any) -> Params:
  name, *rest = path
  return {**tree, name: _set(tree[name], tuple(rest), leaf) if rest else leaf}


def check(folder: Path, network: Network) -> tuple[TensorFiles, Mapping[names.Path, str], int]:
  """Checks, from the headers of a folder's files, that it has exactly the tensors that a network needs.

  Returns:
    The files, the tensor name of each parameter (`{}` for the layer), and the rows of the stored vocabulary.

  Raises:
    ValueError: a tensor is missing, unknown, misshaped or truncated; the message names it.
  """
  files = TensorFiles(folder)
  description, layers = families.describe(folder), network.size.layers
  scheme = description.family.scheme_of(files.shapes)
  shapes = jax.eval_shape(network.init, jax.random.key(0))
  known = {path: scheme.get(path, ".".join(path)) for path in _paths(shapes)}
  rows = description.size.vocab
  expected: dict[str, tuple[int, ...]] = {}
  for path, template in known.items():
    shape = _get(shapes, path).shape[path[0] == "blocks" :]
    for name in names.tensors_of(path, template, layers):
      expected[name] = shape[::-1] if names.is_transposed(path) else shape
  vocabulary = [known[path] for path in (("embedding",), ("head",)) if path in known]
  head = scheme[("head",)]
  if network.size.tied and head in files.shapes:  # many tied models store a head nevertheless; `read` compares it
    expected[head] = expected[scheme[("embedding",)]]
    vocabulary.append(head)
  missing = [name for name in expected if name not in files.shapes]
  extra = [name for name in files.shapes if name not in expected]
  if missing or extra:
    reason = "config.json and the safetensors do not belong together"
    if missing == [head] and not extra:
      flag = f'"{description.family.tied_key}": true'
      reason = f"if the head is the embedding, write {flag} into config.json, otherwise fetch the files again"
    raise ValueError(
      f"{folder if missing else files.file_of(extra[0])}: tensor {(missing or extra)[0]} is"
      f" {'missing' if missing else 'unknown'} ({len(missing)} missing, {len(extra)} unknown): {reason}"
    )
  for name, shape in expected.items():
    found = files.shapes[name]
    if name in vocabulary and rows < shape[0]:  # the network's vocabulary has grown
      shape = (rows, *shape[1:])
    if found != shape:
      raise ValueError(f"{files.file_of(name)}: tensor {name} has shape {found}, config.json asks for {shape}")
  return files, known, rows


def _check_tied(files: TensorFiles, description: families.Description) -> None:
  """Raises a ValueError if a tied model stores a head that is not the embedding, since that head would be ignored."""
  scheme = description.family.scheme_of(files.shapes)
  table, head = scheme[("embedding",)], scheme[("head",)]
  if head not in files.shapes:
    return
  for rows in _rows(files, table):
    if not np.array_equal(files.read(table, rows), files.read(head, rows)):
      key = description.family.tied_key
      says = "says" if key in description.config else "leaves out, which means,"
      raise ValueError(
        f'{files.file_of(head)}: tensor {head} is not {table}, though config.json {says} "{key}": true;'
        f' if the model has a head of its own, write "{key}": false into it, otherwise fetch the files again'
      )


def _rows(files: TensorFiles, name: str) -> Iterator[slice]:
  """The rows of a table, in pieces that have at most `PIECE` bytes as float64."""
  rows, width = files.shapes[name]
  step = max(1, PIECE // (8 * width))
  return (slice(i, min(i + step, rows)) for i in range(0, rows, step))


def _fill(files: TensorFiles, tensors: list[str], path: names.Path, leaf: Any, placement: Any, quantized: str) -> Any:
  """Makes one parameter, an array or `Quantized`, from its tensors on every device of this process."""
  # For each device: allocate its part of the parameter, read only that part of the files, piece by piece, and write
  # each piece at its place. Example: w[32, 4096, 4096] (layers, in, out), with `out` split over two devices. The second
  # one allocates [32, 4096, 2048]. The files hold 32 tensors [out, in], so it reads rows 2048 to 4095 of each in pieces
  # of 512 rows (8 MiB as float32), and writes the third piece of layer 5 at (5, 0, 1024). `Quantized` has two leaves,
  # codes and scale, which one write fills together.
  leaves, structure = jax.tree.flatten(leaf)
  shardings: list[Sharding] = jax.tree.leaves(placement)
  indices = [s.addressable_devices_indices_map(x.shape) for s, x in zip(shardings, leaves, strict=True)]
  stacked, transposed = path[0] == "blocks", names.is_transposed(path)
  parts: list[list[jax.Array]] = [[] for _ in leaves]
  for device in indices[0]:
    spans = [_spans(index[device], x.shape) for index, x in zip(indices, leaves, strict=True)]
    sizes = [[last - first for first, last in span] for span in spans]
    zeros = [jnp.zeros(size, x.dtype, device=device) for x, size in zip(leaves, sizes, strict=True)]
    buffers = jax.tree.unflatten(structure, zeros)
    write = _writer(device, stacked, transposed, quantized if isinstance(leaf, Quantized) else "")
    for layer in range(*spans[0][0]) if stacked else (0,):
      for piece, start in _pieces(files, tensors[layer], spans[0][stacked:], transposed, isinstance(leaf, Quantized)):
        at = np.asarray((layer - spans[0][0][0] if stacked else 0, start), np.int32)
        piece = piece if isinstance(leaf, Quantized) else piece.astype(leaf.dtype, copy=False)
        buffers = jax.block_until_ready(write(buffers, jax.device_put(piece, device), at))
    for part, buffer in zip(parts, jax.tree.leaves(buffers), strict=True):
      part.append(buffer)
  make = jax.make_array_from_single_device_arrays
  whole = [make(x.shape, s, p) for x, s, p in zip(leaves, shardings, parts, strict=True)]
  return jax.tree.unflatten(structure, whole)


Spans = list[tuple[int, int]]
"""The first index and the last one (exclusive) along each axis."""


def _spans(index: tuple[slice, ...] | None, shape: tuple[int, ...]) -> Spans:
  return [s.indices(n)[:2] for s, n in zip(index or (), shape, strict=True)]


def _pieces(
  files: TensorFiles, name: str, spans: Spans, transposed: bool, quantized: bool
) -> Iterator[tuple[np.ndarray, int]]:
  """Yields a device's part of a tensor in pieces of stored rows, in our layout, and the first row of each piece."""
  if quantized:  # [blocks, bytes, out]
    blocks, _, outer = spans
    spans = [(blocks[0] * quantize.BLOCK, blocks[1] * quantize.BLOCK), outer]
  stored = spans[::-1] if transposed else spans
  (first, last), *rest = stored
  last = min(last, files.shapes[name][0])  # rows of a grown vocabulary are not stored
  width = math.prod(b - a for a, b in rest)
  step = max(1, PIECE // (4 * max(width, 1)))
  for start in range(first, last, step):
    rows = slice(start, min(start + step, last))
    piece = files.read(name, rows, *(slice(a, b) for a, b in rest))
    # NumPy transposes and casts several times faster than XLA's programs do on a CPU.
    yield np.ascontiguousarray(piece.T) if transposed else piece, start - first


@functools.cache
def _writer(device: Any, stacked: bool, transposed: bool, quantized: str) -> Any:
  """The program `(buffers, piece, (layer, start)) -> buffers`, which donates them; equal shapes share a program."""
  here = SingleDeviceSharding(device)

  def write(buffers: Any, piece: jax.Array, at: jax.Array) -> Any:
    encoded = quantize.quantize(piece, quantized) if quantized else piece

    def put(buffer: jax.Array, part: jax.Array) -> jax.Array:
      place = [at[1] * 0] * part.ndim
      place[-1 if transposed else 0] = at[1]
      if stacked:
        part, place = part[None], [at[0], *place]
      return jax.lax.dynamic_update_slice(buffer, part, place)

    return jax.tree.map(put, buffers, encoded)

  return jax.jit(write, in_shardings=here, out_shardings=here, donate_argnums=0)


def _mean_row(files: TensorFiles, name: str) -> np.ndarray:
  """The mean of a tensor's rows, summed on the host in the file's order, so that its bits do not depend on devices."""
  total = sum(files.read(name, rows).astype(np.float64).sum(0) for rows in _rows(files, name))
  return np.asarray(total / files.shapes[name][0], np.float32)


def _with_new_rows(w: jax.Array, rows: int, mean: np.ndarray, placement: Sharding, axis: int) -> jax.Array:
  def extend(w: jax.Array) -> jax.Array:
    is_new = jax.lax.broadcasted_iota(jnp.int32, w.shape, axis) >= rows
    return jnp.where(is_new, jnp.expand_dims(jnp.asarray(mean, w.dtype), axis), w)

  return jax.jit(extend, in_shardings=placement, out_shardings=placement, donate_argnums=0)(w)
