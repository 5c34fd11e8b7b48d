import functools
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from d1jax.models import families, load, lora, names, transformer
from d1jax.models.families import llada, qwen2
from d1jax.models.quantize import Quantized
from d1jax.parallel import mesh as meshes
from tests.models import folders

WIDE = dict(vocab=80, embed=256, heads=4, kv_heads=4, head_size=64, mlp=128, layers=2)
"""Four blocks of 64 along embed, two along mlp: enough to split quantised weights four ways and two ways."""
QUERY = "model.transformer.blocks.1.q_proj.weight"
GATE = "model.transformer.blocks.0.ff_proj.weight"
EMBEDDING, HEAD = "model.transformer.wte.weight", "model.transformer.ff_out.weight"
EMBED_NORM = "model.transformer.blocks.0.attn_norm.weight"


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
  """A LLaDA in three float32 shards, and its weights."""
  folder = tmp_path_factory.mktemp("wide")
  return folder, folders.write(folder, "llada", shards=3, **WIDE)


@pytest.fixture(scope="module")
def loaded(wide):
  """Loads of it on one device, made once each."""
  return functools.cache(lambda dtype, quantized=None: load.load(wide[0], dtype, quantized=quantized))


def assert_same(found, expected):
  """Two trees of the same arrays, bit for bit."""
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
    assert (a.shape, a.dtype) == (b.shape, b.dtype), path
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


def by_hand(weights, size, scheme, dtype):
  """The parameters, made of the tensors with numpy: transposed, stacked, cast."""
  shapes = jax.eval_shape(transformer.build(size).init, jax.random.key(0))

  def make(path, leaf):
    where = tuple(entry.key for entry in path)
    stored = [weights[name] for name in names.tensors_of(where, scheme[where], size.layers)]
    stored = [w.T if w.ndim == 2 and where != ("embedding",) else w for w in stored]
    value = np.stack(stored) if where[0] == "blocks" else stored[0]
    assert value.shape == leaf.shape
    return value.astype(dtype)

  return jax.tree_util.tree_map_with_path(make, shapes)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_parameters_are_the_tensors_transposed_stacked_and_cast(wide, loaded, dtype):
  found = loaded(dtype)
  assert_same(found.params, by_hand(wide[1], found.network.size, llada.NAMES, dtype))
  assert found.description == families.describe(wide[0])


@pytest.mark.parametrize("family", ["dream", "llama_tied"])
def test_biases_grouped_heads_and_a_tied_head(tmp_path, family):
  weights = folders.write(tmp_path, family, dtype="bfloat16")
  found = load.load(tmp_path, jnp.bfloat16)
  assert_same(found.params, by_hand(weights, found.network.size, qwen2.NAMES, ml_dtypes.bfloat16))
  assert ("head" in found.params) == (family == "dream")
  assert ("query_bias" in found.params["blocks"]["attention"]) == (family == "dream")


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantised_load_is_the_load_quantised(loaded, kind):
  dense, found = loaded(jnp.float32), loaded(jnp.float32, kind)
  assert_same(found.params, jax.jit(lora.quantized, static_argnums=1)(dense.params, kind))
  shapes = load.abstract(found.network, jnp.float32, kind)
  assert jax.tree.map(lambda a: (a.shape, a.dtype), found.params) == jax.tree.map(lambda a: (a.shape, a.dtype), shapes)


def test_what_is_not_a_projection_is_kept_in_the_dtype_beside_quantised_weights(wide, loaded):
  found = load.load(wide[0], jnp.bfloat16, quantized="nf4").params
  assert isinstance(found["blocks"]["mlp"]["down"], Quantized)
  dense = loaded(jnp.bfloat16).params
  for name in ("embedding", "head", "final_norm"):
    assert_same(found[name], dense[name])
  assert_same(found["blocks"]["attention_norm"], dense["blocks"]["attention_norm"])


MESHES = [
  ("float32", None, dict(data=1, fsdp=8, tensor=1)),
  ("float32", "nf4", dict(data=1, fsdp=4, tensor=2)),
  ("bfloat16", None, dict(data=2, fsdp=2, tensor=2)),
]


@pytest.mark.slow(reason="compiles programs of its own")
@pytest.mark.parametrize(("dtype", "kind", "sizes"), MESHES, ids=lambda v: str(v))
def test_a_read_on_a_mesh_is_the_load(wide, loaded, dtype, kind, sizes):
  one = loaded(jnp.dtype(dtype).type, kind)
  mesh = meshes.make_mesh(sizes)
  axes = lora.quantized_axes(one.network.axes) if kind else one.network.axes
  placements = meshes.shardings(mesh, meshes.RULES, axes)
  found = load.read(wide[0], one.network, jnp.dtype(dtype), placements, quantized=kind)
  assert_same(found, one.params)
  largest = 0
  for leaf, placement in zip(jax.tree.leaves(found), jax.tree.leaves(placements), strict=True):
    assert leaf.sharding == placement
    assert len(leaf.addressable_shards) == 8
    for shard in leaf.addressable_shards:
      assert shard.data.shape == placement.shard_shape(leaf.shape)
      assert shard.data.devices() == {shard.device}
      np.testing.assert_array_equal(np.asarray(shard.data), np.asarray(leaf)[shard.index])
      largest = max(largest, shard.data.size / leaf.size if leaf.ndim > 2 else 0)
  assert largest == 1 / (sizes["fsdp"] * sizes["tensor"]), "matrices are not split over fsdp and tensor"


@pytest.mark.slow(reason="compiles programs of its own")
@pytest.mark.parametrize("kind", [None, "nf4"])
def test_norms_of_heads_are_whole_on_every_device(tmp_path, kind):
  folders.write(tmp_path, "qwen3", mlp=256, embed=256)
  one = load.load(tmp_path, jnp.float32, quantized=kind)
  axes = lora.quantized_axes(one.network.axes) if kind else one.network.axes
  placements = meshes.shardings(meshes.make_mesh(dict(data=2, fsdp=2, tensor=2)), meshes.RULES, axes)
  found = load.read(tmp_path, one.network, jnp.float32, placements, quantized=kind)
  assert_same(found, one.params)
  scale = found["blocks"]["attention"]["query_norm"]["scale"]
  assert {shard.data.shape for shard in scale.addressable_shards} == {scale.shape} == {(3, 32)}


@pytest.mark.parametrize("kind", [None, "nf4"])
def test_small_pieces_give_the_same_bits(wide, loaded, monkeypatch, kind):
  """An odd number of rows a piece, so that the last one is smaller."""
  monkeypatch.setattr(load, "PIECE", 4 * 256 * 23)
  reads = []
  read = load.TensorFiles.read
  monkeypatch.setattr(load.TensorFiles, "read", lambda self, *a: reads.append(read(self, *a).nbytes) or read(self, *a))
  found = load.load(wide[0], jnp.float32, quantized=kind)
  assert_same(found.params, loaded(jnp.float32, kind).params)
  assert max(reads) <= load.PIECE
  assert len(reads) > 2 * len(wide[1])


def test_float16_files_are_read(tmp_path, wide):
  folder = tmp_path / "half"
  weights = {name: value.astype(np.float16) for name, value in folders.write(folder, "llada").items()}
  save_file(weights, folder / "model.safetensors")
  found = load.load(folder, jnp.float32)
  assert_same(found.params, by_hand(weights, found.network.size, llada.NAMES, np.float32))


@pytest.mark.parametrize(("family", "spread"), [("llada", False), ("qwen2", False), ("llada", True)])
def test_a_grown_vocabulary_has_the_mean_in_its_new_rows(tmp_path, family, spread):
  weights = folders.write(tmp_path, family)
  rows = folders.SIZES[family]["vocab"]
  if spread:
    network = transformer.build(families.with_rows(families.describe(tmp_path).size, rows + 1))
    placements = meshes.shardings(
      meshes.make_mesh(dict(data=1, fsdp=2, tensor=2), jax.devices()[:4]), meshes.RULES, network.axes
    )
    params = load.read(tmp_path, network, jnp.float32, placements)
    assert params["embedding"].sharding == placements["embedding"]
  else:
    network, params, _ = load.load(tmp_path, jnp.float32, rows=rows + 1)
  assert network.size.vocab == 128
  assert network.size.tied == ("head" not in params) == (family == "qwen2")
  tables = {"llada": {"embedding": EMBEDDING, "head": HEAD}, "qwen2": {"embedding": "model.embed_tokens.weight"}}
  for name, tensor in tables[family].items():
    table = np.asarray(params[name])
    table = table.T if name == "head" else table
    assert table.shape == (128, 64)
    assert table[:rows].tobytes() == weights[tensor].tobytes()
    assert (table[rows:] == table[rows]).all()
    mean = weights[tensor].astype(np.float64).mean(0)
    np.testing.assert_allclose(table[rows], mean, atol=1e-6)
    assert np.abs(mean).max() > 1e-3


def test_a_vocabulary_that_is_large_enough_stays(tmp_path):
  folders.write(tmp_path, "qwen2")
  assert load.load(tmp_path, jnp.float32, rows=72).network.size.vocab == 72


@pytest.fixture
def damaged(tmp_path):
  """Writes a small folder of one file with some tensors changed; `...` takes one away."""

  def make(family="llada", **changes):
    weights = folders.write(tmp_path, family) | changes
    save_file({k: v for k, v in weights.items() if v is not ...}, tmp_path / "model.safetensors")
    return tmp_path

  return make


def refused(folder, *parts):
  with pytest.raises(ValueError, match="tensor") as caught:
    load.load(folder, jnp.float32)
  for part in (*parts, str(folder)):
    assert str(part) in str(caught.value), str(caught.value)


@pytest.mark.parametrize("name", [QUERY, EMBED_NORM, HEAD, "model.transformer.ln_f.weight"])
def test_a_missing_tensor_is_named(damaged, name):
  refused(damaged(**{name: ...}), name, "missing", "1 missing, 0 unknown")


def test_a_missing_embedding_is_named(damaged):
  """It tells which of the family's names a folder has; without it, they are taken to be LLaDA's own."""
  reason = "config.json and the safetensors do not belong together"
  refused(damaged(**{EMBEDDING: ...}), EMBEDDING, "is missing (1 missing, 0 unknown)", reason)


@pytest.mark.parametrize("name", ["model.transformer.blocks.2.q_proj.weight", "model.transformer.blocks.0.q_proj.bias"])
def test_an_extra_tensor_is_named_with_its_file(damaged, name):
  folder = damaged(**{name: np.zeros((64, 64), np.float32)})
  refused(folder, folder / "model.safetensors", name, "unknown", "0 missing, 1 unknown")


@pytest.mark.parametrize(
  ("name", "shape"),
  [
    (QUERY, (64, 63)),
    (QUERY, (64, 64, 1)),
    (GATE, (64, 96)),  # transposed
    (EMBED_NORM, (65,)),
    (EMBED_NORM, (64, 1)),
    (EMBEDDING, (83, 65)),
    (EMBEDDING, (82, 64)),
    (EMBEDDING, (84, 64)),
    (EMBEDDING, ()),
    (HEAD, (82, 64)),
    (HEAD, (64, 83)),
  ],
  ids=str,
)
def test_a_misshaped_tensor_is_named_with_its_file(damaged, name, shape):
  folder = damaged(**{name: np.zeros(shape, np.float32)})
  refused(folder, folder / "model.safetensors", name, f"has shape {shape}, config.json asks for ")


def test_a_misshaped_embedding_is_named_where_the_vocabulary_grows_too(damaged):
  folder = damaged(**{EMBEDDING: np.zeros((82, 64), np.float32)})
  with pytest.raises(ValueError, match=r"wte.weight has shape \(82, 64\), config.json asks for \(83, 64\)"):
    load.load(folder, jnp.float32, rows=100)


def test_a_configuration_of_another_model_is_refused(damaged):
  folder = damaged()
  folders.edit_config(folder, n_layers=3)
  refused(folder, "blocks.2.", "missing")
  folders.edit_config(folder, n_layers=1)
  refused(folder, "blocks.1.", "unknown")
  config = folders.CONFIGS["dream"](folders.SIZES["llada"], "float32")
  (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
  refused(folder, "model.layers.", "missing")


def test_an_integer_tensor_and_a_truncated_file_are_refused(damaged):
  folder = damaged(**{QUERY: np.zeros((64, 64), np.int32)})
  refused(folder, folder / "model.safetensors", QUERY, "I32")
  folder = damaged()
  path = folder / "model.safetensors"
  path.write_bytes(path.read_bytes()[:-3])
  refused(folder, path, "is truncated")


def test_a_network_of_other_sizes_than_the_folder_is_refused(damaged):
  folder = damaged()
  network = transformer.build(transformer.TransformerSize(vocab=83, embed=64, heads=4, mlp=80, layers=2))
  placements = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), network.axes)
  with pytest.raises(ValueError, match=r"ff_out.weight has shape \(64, 96\), config.json asks for \(64, 80\)"):
    load.read(folder, network, jnp.float32, placements)


def test_buffers_are_ignored(damaged):
  names_of = ("self_attn.rotary_emb.inv_freq", "self_attn.position_ids", "self_attn.masked_bias")
  buffers = {f"model.layers.{i}.{name}": np.ones(8, np.int64) for i in range(2) for name in names_of}
  folder = damaged("llama", **buffers)
  weights = {k: v for k, v in load_file(folder / "model.safetensors").items() if k not in buffers}
  found = load.load(folder, jnp.float32)
  assert_same(found.params, by_hand(weights, found.network.size, qwen2.NAMES, np.float32))


def tied(damaged, family, change):
  """A tied folder that stores a head: the embedding, changed by a function."""
  scheme = llada.NAMES if family == "llada" else qwen2.NAMES
  shapes = folders.shapes_of(family, folders.SIZES[family])
  table = folders.draw(scheme[("embedding",)], shapes[scheme[("embedding",)]])
  folder = damaged(family, **{scheme[("head",)]: change(table)})
  folders.edit_config(folder, **{"weight_tying" if family == "llada" else "tie_word_embeddings": True})
  return folder, table


@pytest.mark.parametrize("family", ["qwen2", "llama_tied", "llada", "dream"])
def test_a_tied_model_may_store_its_head_a_second_time(damaged, family):
  """As the small models of Qwen do."""
  folder, table = tied(damaged, family, lambda table: table.copy())
  found = load.load(folder, jnp.float32)
  assert "head" not in found.params
  np.testing.assert_array_equal(found.params["embedding"], table)
  grown = load.load(folder, jnp.float32, rows=100).params
  assert grown["embedding"].shape == (128, 64)


@pytest.mark.parametrize("family", ["qwen2", "llada"])
def test_a_tied_model_with_a_head_of_its_own_is_refused(damaged, monkeypatch, family):
  def change(table):
    table = table.copy()
    table[-1, -1] += 1e-6
    return table

  monkeypatch.setattr(load, "PIECE", 8 * 64 * 5)
  folder, _ = tied(damaged, family, change)
  key = "weight_tying" if family == "llada" else "tie_word_embeddings"
  with pytest.raises(ValueError, match=f'is not .*, though config.json says "{key}": true; .* write "{key}": false'):
    load.load(folder, jnp.float32)
  folders.edit_config(folder, **{key: False})  # what it advises
  assert "head" in load.load(folder, jnp.float32).params
  if family == "llada":
    folders.edit_config(folder, **{key: ...})
    with pytest.raises(ValueError, match=f'though config.json leaves out, which means, "{key}": true'):
      load.load(folder, jnp.float32)


def test_a_stored_head_of_another_shape_is_refused(damaged):
  folder, _ = tied(damaged, "qwen2", lambda table: table[:-1].copy())
  refused(folder, "lm_head.weight has shape (71, 64), config.json asks for (72, 64)")


@pytest.mark.parametrize("family", ["dream", "llada"])
def test_a_missing_head_names_the_flag(damaged, family):
  scheme, key = (llada.NAMES, "weight_tying") if family == "llada" else (qwen2.NAMES, "tie_word_embeddings")
  folder = damaged(family, **{scheme[("head",)]: ...})
  advice = f'if the head is the embedding, write "{key}": true into config.json, otherwise fetch the files again'
  refused(folder, scheme[("head",)], "is missing (1 missing, 0 unknown)", advice)
  folders.edit_config(folder, **{key: True})
  assert "head" not in load.load(folder, jnp.float32).params


@pytest.mark.parametrize("key", ["n_layers", "embedding_size", "mlp_hidden_size", "d_model"])
def test_a_size_that_the_files_do_not_have_is_refused_before_anything_is_made_of_it(damaged, key):
  folder = damaged()
  folders.edit_config(folder, **{key: 10**30})
  with pytest.raises(ValueError, match=f"config.json: {key}=10{{30}} is more than the safetensors hold"):
    load.load(folder, jnp.float32)


@pytest.mark.parametrize(("kind", "name"), [(None, QUERY), ("nf4", QUERY), (None, EMBEDDING), (None, EMBED_NORM)])
def test_weights_that_are_not_finite_are_refused(tmp_path, kind, name):
  weights = folders.write(tmp_path, "llada", **WIDE)
  weights[name].flat[3] = np.nan
  save_file(weights, tmp_path / "model.safetensors")
  with pytest.raises(ValueError, match=f"tensor {name} holds NaN or infinity"):
    load.load(tmp_path, jnp.float32, quantized=kind)


def test_a_folder_without_weights_or_configuration_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r"config\.json is missing"):
    load.load(tmp_path)
  folders.write(tmp_path, "llada")
  (tmp_path / "model.safetensors").unlink()
  with pytest.raises(ValueError, match=r"holds neither model\.safetensors nor"):
    load.load(tmp_path)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_abstract_says_what_is_kept_without_memory(dtype):
  network = transformer.build(families.PRESETS["llada_8b"])
  dense, small = load.abstract(network, dtype), load.abstract(network, dtype, "nf4")
  assert {leaf.dtype for leaf in jax.tree.leaves(dense)} == {jnp.dtype(dtype)}
  assert small["blocks"]["mlp"]["up"].codes.shape == (32, 64, 32, 12288)
  assert small["blocks"]["mlp"]["up"].scale.dtype == jnp.bfloat16
  assert small["embedding"] == dense["embedding"]
