import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d1jax.fingerprint import fingerprint
from d1jax.parallel.mesh import make_mesh, place, sharding

RULES = {"rows": ("data", "fsdp"), "columns": "tensor", "tensor_rows": "tensor"}
DTYPES = ["float32", "bfloat16", "float16", "int32", "int8", "uint8", "uint32", "bool"]


def array(dtype: str) -> np.ndarray:
  return np.random.default_rng(0).integers(0, 2, (8, 16)).astype(jnp.dtype(dtype))


def flip(x: np.ndarray, index: int, bit: int) -> np.ndarray:
  """`x` with one bit of one element turned over."""
  raw = np.array(x)
  raw.view(np.uint8).reshape(x.size, -1)[index, bit // 8] ^= np.uint8(1 << bit % 8)
  return raw


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 1, 1), (2, 2, 2), (1, 8, 1), (1, 2, 4)])
def test_the_same_on_any_mesh(sizes):
  tree = {"w": array("float32"), "b": array("bfloat16"), "n": np.int32(3)}
  devices = jax.devices()[: int(np.prod(sizes))]
  mesh = make_mesh(dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)), devices)
  placed = {
    "w": place(tree["w"], sharding(mesh, RULES, "rows", "columns")),
    "b": place(tree["b"], sharding(mesh, RULES, "tensor_rows")),
    "n": place(tree["n"], sharding(mesh, RULES)),
  }
  assert fingerprint(placed) == fingerprint(tree)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_single_bit_changes_it(dtype):
  x = array(dtype)
  bits = 1 if dtype == "bool" else 8 * x.dtype.itemsize
  rng = np.random.default_rng(1)
  seen = {fingerprint({"x": x})}
  changes = [(0, 0), (x.size - 1, bits - 1)] + [(int(rng.integers(x.size)), int(rng.integers(bits))) for _ in range(20)]
  for index, bit in set(changes):
    seen.add(fingerprint({"x": flip(x, index, bit)}))
  assert len(seen) == len(set(changes)) + 1


def test_swapping_two_elements_or_rows_changes_it():
  x = np.arange(12, dtype=np.int32).reshape(3, 4)
  swapped = x.copy()
  swapped[0, 1], swapped[2, 3] = x[2, 3], x[0, 1]
  assert len({fingerprint([v]) for v in (x, swapped, x[::-1], x[:, ::-1])}) == 4


def test_signed_zeros_and_nans_with_other_bits_differ():
  values = np.asarray([0x00000000, 0x80000000, 0x7FC00000, 0x7FC00001], np.uint32).view(np.float32)
  assert len({fingerprint([v[None]]) for v in values}) == 4


def test_name_shape_and_type_change_it():
  x = np.zeros(6, np.int32)
  variants = [
    {"x": x},
    {"y": x},
    {"x": {"x": x}},
    {"x": x.reshape(2, 3)},
    {"x": x.reshape(3, 2)},
    {"x": x[:5]},
    {"x": x.astype(np.float32)},
    {"x": x.astype(np.int8)},
    {"x": x.astype(bool)},
    {"x": x, "y": x},
    [x],
  ]
  assert len({fingerprint(v) for v in variants}) == len(variants)


def test_swapping_two_leaves_changes_it():
  a, b = np.zeros(3, np.int32), np.ones(3, np.int32)
  assert fingerprint({"a": a, "b": b}) != fingerprint({"a": b, "b": a})


def test_key_arrays_and_scalars():
  made = [jax.random.key(0), jax.random.key(1), jax.random.split(jax.random.key(0), 2), jnp.int32(0), jnp.int32(1)]
  assert len({fingerprint({"k": v}) for v in made}) == len(made)
  assert fingerprint({"k": jax.random.key(1)}) == fingerprint({"k": jax.random.key(1)})


def test_it_never_changes_between_versions():
  """Checkpoints hold fingerprints: what was written must be found again by a later version."""
  tree = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "n": np.int32(1)}
  assert fingerprint(tree) == fingerprint(jax.tree.map(jnp.asarray, tree))
  assert fingerprint(tree) == GOLDEN


GOLDEN = "049e87794d70c2441d48f51f4e119056430f868be4de92174cd5eaee1ae1ef01"
