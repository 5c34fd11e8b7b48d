"""The networks that the performance benchmarks run: random weights, random prompts."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from d1jax.diffusion.denoiser import Denoiser
from d1jax.model import build_denoiser
from d1jax.models import transformer
from d1jax.models.families import PRESETS
from d1jax.models.transformer import Network, TransformerSize
from d1jax.parallel import mesh as meshes
from d1jax.parallel.attention import attention


@dataclasses.dataclass(frozen=True)
class Case:
  """A network and what is asked of it.

  Attributes:
    size: of the network.
    dtype: of its products, and of its weights in a rollout.
    batches: rows of a rollout, measured one after the other.
    prompt: tokens.
    completion: tokens.
    block: tokens.
    steps: denoising steps of a completion.
    unroll: layers that the scan unrolls.
  """

  size: TransformerSize
  dtype: str
  batches: tuple[int, ...]
  prompt: int
  completion: int
  block: int
  steps: int
  unroll: int = 1

  @property
  def mask_id(self) -> int:
    """The last id; the one before it stops."""
    return self.size.vocab - 1

  @property
  def canvas(self) -> int:
    """Positions of prompt and completion."""
    return self.prompt + self.completion


CASES = {
  "mid": Case(TransformerSize(32768, 512, 8, 1536, 8), "float32", (4,), 128, 64, 32, 32),
  "llada_8b": Case(PRESETS["llada_8b"], "bfloat16", (6, 24, 32), 200, 256, 32, 128),
  "llada_4_layers": Case(dataclasses.replace(PRESETS["llada_8b"], layers=4), "bfloat16", (6,), 200, 256, 32, 128),
  "small": Case(TransformerSize(2048, 128, 4, 384, 2), "bfloat16", (2, 4), 24, 64, 16, 16),
}
"""`mid` is for a CPU and `llada_8b` for a GPU, with four layers where all weights are trained: moments, gradients and a
reference of all 32 do not fit 80 GB. `small` takes the path of both in seconds.
"""


def described(case: Case) -> dict[str, Any]:
  """The fields of a case, for a line of JSON."""
  size = {name: value for name, value in dataclasses.asdict(case.size).items() if not isinstance(value, type)}
  return dataclasses.asdict(case) | {"size": size}


def default_case() -> str:
  """The name of the case for the devices that there are."""
  return "mid" if jax.default_backend() == "cpu" else "llada_8b"


class Model(NamedTuple):
  """A network on a mesh: rows over its devices, weights on each.

  Attributes:
    mesh: data parallel.
    network: pure functions of its weights.
    denoiser: with full attention.
    params: placed.
    row: where batches live.
    everywhere: where weights do.
  """

  mesh: Mesh
  network: Network
  denoiser: Denoiser
  params: Any
  row: NamedSharding
  everywhere: NamedSharding


def data_mesh(devices: Sequence[Any]) -> Mesh:
  """A mesh that shares rows alone."""
  return meshes.make_mesh({"data": len(devices), "fsdp": 1, "tensor": 1}, devices)


def build(case: Case, devices: Sequence[Any], seed: int = 0, stored: str | None = None) -> Model:
  """Draws the weights and places them on each of the devices.

  Args:
    case: the network.
    devices: which share rows.
    seed: of the weights.
    stored: the weights' dtype; None: that of the products.
  """
  mesh = data_mesh(devices)
  everywhere = meshes.sharding(mesh, meshes.RULES)
  network = transformer.build(
    case.size,
    dtype=case.dtype,
    unroll=case.unroll,
    constrain=meshes.constrainer(mesh, meshes.RULES),
    attention=attention(mesh, meshes.RULES),
  )
  draw = lambda key: jax.tree.map(lambda w: w.astype(stored or case.dtype), network.init(key))
  params = jax.jit(draw, out_shardings=everywhere)(jax.random.key(seed))
  row = meshes.sharding(mesh, meshes.RULES, "batch")
  return Model(mesh, network, denoiser(case, network), params, row, everywhere)


def denoiser(case: Case, network: Network, block: int | None = None) -> Denoiser:
  """The denoiser of a case's network; with a `block`, attention is block-causal."""
  stops = (case.mask_id - 1,)
  return build_denoiser(network, mask_id=case.mask_id, stop_ids=stops, known_ids=case.size.vocab, block=block)


def prompts(case: Case, batch: int) -> np.ndarray:
  """Random ids [B, P], none of them special."""
  return np.random.default_rng(0).integers(0, case.mask_id - 1, (batch, case.prompt), np.int32)


def place(model: Model, *arrays: Any) -> tuple[jax.Array, ...]:
  """Arrays by row."""
  return tuple(jax.device_put(jnp.asarray(x), model.row) for x in arrays)
