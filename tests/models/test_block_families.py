"""The families of block diffusion, in and out: shards, few bits, adapters. Their logits are in test_load_parity.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from d1jax.models import families, load, lora, peft, save
from d1jax.parallel import mesh as meshes
from tests.models import folders

FAMILIES = ("a2d_qwen3", "sdar", "fast_dllm_qwen", "illada")
SIZES = dict(embed=256, heads=4, kv_heads=2, head_size=64, mlp=256, layers=2)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
  root = tmp_path_factory.mktemp("hub")
  for family in FAMILIES:
    folders.write(root / family, family, dtype="bfloat16", shards=3, **SIZES)
  return root.joinpath


@pytest.mark.slow(reason="compiles programs of its own")
@pytest.mark.parametrize(("family", "kind"), zip(FAMILIES, ("int8", "nf4", "int8", "nf4"), strict=True))
def test_a_base_in_few_bits_is_the_base_quantised_on_any_mesh(folder_of, family, kind):
  dense = load.load(folder_of(family), jnp.float32)
  one = load.load(folder_of(family), jnp.float32, quantized=kind)
  jax.tree.map(np.testing.assert_array_equal, one.params, jax.jit(lora.quantized, static_argnums=1)(dense.params, kind))
  mesh = meshes.make_mesh(dict(data=1, fsdp=2, tensor=2), jax.devices()[:4])
  placements = meshes.shardings(mesh, meshes.RULES, lora.quantized_axes(one.network.axes))
  read = load.read(folder_of(family), one.network, jnp.float32, placements, quantized=kind)
  jax.tree.map(np.testing.assert_array_equal, read, one.params)


@pytest.mark.few(1, reason="each case compiles programs of its own")
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_go_through_pefts_folders_and_into_the_export(folder_of, family, tmp_path):
  """Only the adapted matrices of the merged export differ from the base."""
  source = folder_of(family)
  loaded = load.load(source, jnp.float32)
  spec = lora.LoraSpec(2, 4.0, targets=("q_proj", "o_proj", "down_proj"))
  adapter = jax.tree.map(lambda w: w + 1, lora.init(jax.random.key(0), spec, loaded.params))
  scheme = families.describe(source).family.schemes[0]
  peft.save(tmp_path / "adapter", adapter, spec, base=str(source), scheme=scheme)
  again, tree = peft.load(tmp_path / "adapter", loaded.network)
  assert again == spec
  jax.tree.map(np.testing.assert_array_equal, tree, adapter)
  merged = lora.merged(lora.overlay(loaded.params, tree))
  save.export(tmp_path / "out", merged, loaded.network.size, source=source, token_ids={}, block=8)
  found = load_file(tmp_path / "out" / "model.safetensors")
  stored = {name: value for path in source.glob("*.safetensors") for name, value in load_file(path).items()}
  assert found.keys() == stored.keys()
  changed = {name for name in stored if found[name].tobytes() != stored[name].tobytes()}
  assert changed == {name for name in stored if any(f"{target}.weight" in name for target in spec.targets)}
  assert families.describe(tmp_path / "out").block == 8
