import functools
import json
import os
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from d1jax.models import families, load, lora, save, transformer
from d1jax.models.lora import LoraSpec
from d1jax.models.tensor_files import INDEX, SINGLE, TensorFiles
from d1jax.parallel import mesh as meshes
from tests.models import folders, forward

OTHERS = {"tokenizer_config.json": b'{"a": 1}', "modeling_llada.py": b"# code\n", "README.md": b"\xff\x00"}


def write_source(folder, family, **options):
  """A folder with other files beside its weights, and with weights in other formats, which are not copied."""
  weights = folders.write(folder, family, **options)
  for name, content in OTHERS.items():
    (folder / name).write_bytes(content)
  for name in ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.gguf", "consolidated.pth"):
    (folder / name).write_bytes(b"old weights")
  (folder / "original").mkdir()
  return weights


def read_all(folder):
  """Every tensor of a folder."""
  return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def assert_same_tensors(found, expected):
  assert found.keys() == expected.keys()
  for name, value in expected.items():
    assert (found[name].shape, found[name].dtype) == (value.shape, value.dtype), name
    assert found[name].tobytes() == value.tobytes(), name


def config_of(folder):
  return json.loads((folder / "config.json").read_text(encoding="utf-8"))


@pytest.mark.few(4, reason="each case writes and reads a model")
@pytest.mark.parametrize("family", folders.FAMILIES)
@pytest.mark.parametrize(("dtype", "shard_bytes"), [("float32", 40_000), ("bfloat16", save.SHARD)])
def test_a_round_trip_keeps_every_bit(tmp_path, family, dtype, shard_bytes):
  source, target = tmp_path / "source", tmp_path / "made" / "target"
  weights = write_source(source, family, dtype=dtype, shards=2 if family == "dream" else 1)
  loaded = load.load(source, jnp.float32)  # bfloat16 files, too: float32 holds their values
  save.export(
    target, loaded.params, loaded.network.size, source=source, token_ids={}, shard_bytes=shard_bytes
  )  # fmt: skip
  assert_same_tensors(read_all(target), weights)
  assert config_of(target) == config_of(source)
  files = {path.name for path in target.iterdir()}
  shards = sorted(target.glob("*.safetensors"))
  assert files == {"config.json", *OTHERS, *(path.name for path in shards)} | ({INDEX} if len(shards) > 1 else set())
  for name, content in OTHERS.items():
    assert (target / name).read_bytes() == content
  for path in shards:
    with safe_open(path, "numpy") as file:
      assert file.metadata() == {"format": "pt"}
    assert path.stat().st_mode & 0o444 == 0o444, "others cannot read it"
  if dtype == "bfloat16":
    assert [path.name for path in shards] == [SINGLE]
    return
  assert len(shards) > 3
  index = json.loads((target / INDEX).read_text(encoding="utf-8"))
  assert index["metadata"]["total_size"] == sum(value.nbytes for value in weights.values())
  for number, path in enumerate(shards, start=1):
    assert path.name == f"model-{number:05d}-of-{len(shards):05d}.safetensors"
    held = load_file(path)
    assert sum(value.nbytes for value in held.values()) <= shard_bytes or len(held) == 1
    assert {index["weight_map"][name] for name in held} == {path.name}
  assert index["weight_map"].keys() == weights.keys()


@pytest.fixture(scope="module")
def llada(tmp_path_factory):
  """A LLaDA folder and its load."""
  folder = tmp_path_factory.mktemp("source") / "llada"
  write_source(folder, "llada", dtype="bfloat16")
  return folder, load.load(folder, jnp.float32)


def write(target, llada, **changes):
  folder, loaded = llada
  options = dict(params=loaded.params, size=loaded.network.size, source=folder, token_ids={}) | changes
  save.export(target, options.pop("params"), options.pop("size"), **options)


def test_trained_weights_are_rounded_to_the_folders_dtype(tmp_path, llada):
  params = jax.tree.map(lambda w: w * 1.001 + 1e-4, llada[1].params)
  write(tmp_path / "out", llada, params=params)
  found = read_all(tmp_path / "out")["model.transformer.blocks.1.ff_out.weight"]
  expected = np.asarray(params["blocks"]["mlp"]["down"][1]).T.astype(ml_dtypes.bfloat16)
  assert found.tobytes() == expected.tobytes()


def test_sharded_weights_are_written_as_whole_ones(tmp_path, llada):
  folder, loaded = llada
  placements = meshes.shardings(
    meshes.make_mesh(dict(data=2, fsdp=4, tensor=1)), meshes.RULES, loaded.network.axes
  )  # fmt: skip
  params = jax.tree.map(jax.device_put, loaded.params, placements)
  write(tmp_path / "out", llada, params=params)
  assert_same_tensors(read_all(tmp_path / "out"), read_all(folder))


def test_tensors_of_a_mixed_folder_keep_their_own_types(tmp_path):
  source = tmp_path / "source"
  weights = folders.write(source, "llama", dtype="bfloat16")
  norms = {name: value.astype(np.float32) + 1e-5 for name, value in weights.items() if "norm" in name}
  save_file(weights | norms, source / SINGLE)
  loaded = load.load(source, jnp.float32)
  save.export(tmp_path / "out", loaded.params, loaded.network.size, source=source, token_ids={})
  assert_same_tensors(read_all(tmp_path / "out"), weights | norms)


@pytest.mark.parametrize("family", ["llada", "llama_tied"])
def test_a_grown_vocabulary_is_in_the_configuration_and_reads_back(tmp_path, family):
  source, target = tmp_path / "source", tmp_path / "target"
  folders.write(source, family)
  loaded = load.load(source, jnp.float32, rows=100)
  ids = {"mask_token_id": 99, "eos_token_id": 3, "pad_token_id": 5}
  save.export(target, loaded.params, loaded.network.size, source=source, token_ids=ids)
  before, after = config_of(source), config_of(target)
  changed = {name: after[name] for name in after if after[name] != before.get(name)}
  if family == "llada":  # has all ids
    assert changed == {"vocab_size": 128, "embedding_size": 128}
  else:
    assert changed == {"vocab_size": 128, "mask_token_id": 99, "pad_token_id": 5}
  again = load.load(target, jnp.float32)
  assert again.network.size == loaded.network.size
  jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)


@pytest.mark.parametrize(
  ("family", "block", "key", "found"),
  [
    ("sdar", 4, "block_size", 4),
    ("qwen3", 8, "block_size", 8),  # a causal start that was grown
    ("fast_dllm_qwen", None, "bd_size", 4),
    ("fast_dllm_qwen", 8, "bd_size", 8),
    ("sdar", None, "block_size", None),
  ],
)
def test_the_block_length_is_in_the_configuration(tmp_path, family, block, key, found):
  """So that the export is read back without a flag."""
  folders.write(tmp_path / "source", family)
  loaded = load.load(tmp_path / "source", jnp.float32)
  save.export(
    tmp_path / "out", loaded.params, loaded.network.size, source=tmp_path / "source", token_ids={}, block=block
  )
  after = config_of(tmp_path / "out")
  assert after == config_of(tmp_path / "source") | ({} if found is None else {key: found})
  assert families.describe(tmp_path / "out").block == found


@pytest.mark.slow(reason="compiles programs of its own")
def test_a_network_from_no_folder_becomes_a_llada(tmp_path):
  size = transformer.TransformerSize(vocab=40, embed=32, heads=4, mlp=48, layers=2, rope_theta=77.0, kv_heads=2)
  network = transformer.build(size)
  params = jax.jit(network.init)(jax.random.key(0))
  ids = {"mask_token_id": 38, "eos_token_id": 1, "pad_token_id": 2}
  save.export(tmp_path / "out", params, size, source=None, token_ids=ids, block=8)
  files = TensorFiles(tmp_path / "out")
  assert set(files.dtypes.values()) == {"F32"}
  assert files.shapes == folders.llada_shapes(
    dict(vocab=40, embed=32, heads=4, kv_heads=2, head_size=8, mlp=48, layers=2)
  )
  again = load.load(tmp_path / "out", jnp.float32)
  assert (again.description.family.model_type, again.description.block) == ("llada", 8)
  assert {name: again.description.config[name] for name in ids} == ids
  assert again.description.size == size.__class__(**{**vars(size), "kv_heads": 2})
  tokens, valid = jnp.arange(12, dtype=jnp.int32).reshape(2, 6), jnp.ones((2, 6), bool)
  logits = [
    jax.jit(functools.partial(forward.logits, n))(p, tokens, valid)
    for n, p in ((network, params), (again.network, again.params))
  ]
  np.testing.assert_array_equal(*logits)


@pytest.mark.parametrize("changes", [{"qkv_bias": True}, {"head_dim": 16}])
def test_a_network_that_is_no_llada_needs_its_folder(tmp_path, changes):
  size = transformer.TransformerSize(vocab=8, embed=16, heads=2, mlp=16, layers=1, **changes)
  params = jax.eval_shape(transformer.build(size).init, jax.random.key(0))
  with pytest.raises(ValueError, match="is no LLaDA: it can only be exported into the names of the folder"):
    save.export(tmp_path / "out", params, size, source=None, token_ids={})
  assert not (tmp_path / "out").exists()


def test_a_folder_in_use_is_refused_and_an_empty_one_is_not(tmp_path, llada):
  target = tmp_path / "out"
  target.mkdir()
  (target / "notes.txt").write_text("mine", encoding="utf-8")
  with pytest.raises(ValueError, match=f"{target} is not empty; name a new folder"):
    write(target, llada)
  assert [path.name for path in target.iterdir()] == ["notes.txt"]
  (target / "notes.txt").unlink()
  write(target, llada)
  assert families.describe(target).family.model_type == "llada"


@pytest.mark.parametrize("wrap", ["quantised", "adapted", "both"])
def test_weights_that_are_not_dense_are_refused(tmp_path, llada, wrap):
  network = transformer.build(llada[1].network.size)
  params = jax.eval_shape(network.init, jax.random.key(0))
  small = jax.eval_shape(lambda p: lora.quantized(p, "int8"), widened(params))
  spec = LoraSpec(2, 2.0)
  adapter = jax.eval_shape(lambda key: lora.init(key, spec, params), jax.random.key(0))
  kept = {"quantised": small, "adapted": lora.overlay(params, adapter), "both": lora.overlay(small, adapter)}[wrap]
  named = "merge them first" if wrap == "adapted" else "quantised weights cannot be exported"
  with pytest.raises(ValueError, match=named):
    write(tmp_path / "out", llada, params=kept)
  assert not list(tmp_path.iterdir())


def widened(params):
  """The shapes with an mlp of 128: 96 cannot be quantised."""
  widen = lambda a: jax.ShapeDtypeStruct(tuple(128 if n == 96 else n for n in a.shape), a.dtype)
  return jax.tree.map(widen, params)


@pytest.mark.parametrize("calls", [1, 3])
def test_an_interrupted_export_leaves_nothing_under_the_name(tmp_path, llada, monkeypatch, calls):
  """And the next one starts again."""
  original, left = save.write, [calls]

  def fail(*args, **options):
    left[0] -= 1
    if not left[0]:
      raise OSError("no space left on device")
    original(*args, **options)

  monkeypatch.setattr(save, "write", fail)
  with pytest.raises(OSError, match="no space left"):
    write(tmp_path / "out", llada, shard_bytes=40_000)
  assert not list(tmp_path.iterdir())
  monkeypatch.setattr(save, "write", original)
  write(tmp_path / "out", llada)
  assert [path.name for path in tmp_path.iterdir()] == ["out"]
  assert_same_tensors(read_all(tmp_path / "out"), read_all(llada[0]))


def test_folders_and_files_beside_the_output_are_left_alone(tmp_path, llada):
  mine = tmp_path / "out.tmp"
  mine.mkdir()
  (mine / "thesis.tex").write_text("all of it", encoding="utf-8")
  (tmp_path / "other.tmp").write_text("a file", encoding="utf-8")
  write(tmp_path / "out", llada)
  write(tmp_path / "other", llada)
  assert {path.name for path in tmp_path.iterdir()} == {"out", "out.tmp", "other", "other.tmp"}
  assert (mine / "thesis.tex").read_text(encoding="utf-8") == "all of it"


def test_links_out_of_the_source_are_not_copied(tmp_path, llada):
  """A clone of a hostile repository may have them, and an export is given away."""
  secret = tmp_path / "secret.txt"
  secret.write_text("a password", encoding="utf-8")
  source = tmp_path / "source"
  shutil.copytree(llada[0], source)
  (source / ".git").mkdir()
  (source / ".git" / "config").write_text("a token", encoding="utf-8")
  (source / "README.md").unlink()
  (source / "README.md").symlink_to(secret)
  (source / "up.txt").symlink_to("../secret.txt")
  (source / "remote.txt").symlink_to(".git/config")
  (source / "loop.txt").symlink_to("loop.txt")
  (source / "same.py").symlink_to("modeling_llada.py")
  os.mkfifo(source / "pipe")
  loaded = llada[1]
  left_out = save.export(tmp_path / "out", loaded.params, loaded.network.size, source=source, token_ids={})
  assert left_out == ["README.md", "remote.txt", "up.txt"]
  files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
  assert files.keys() == {"config.json", SINGLE, "tokenizer_config.json", "modeling_llada.py", "same.py"}
  assert files["same.py"] == OTHERS["modeling_llada.py"]
  assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_a_snapshot_of_the_hubs_cache_is_copied_whole(tmp_path, llada):
  cache = tmp_path / "models--a--b"
  source = cache / "snapshots" / "0123"
  source.mkdir(parents=True)
  shutil.copytree(llada[0], cache / "blobs")
  for path in (cache / "blobs").iterdir():
    (source / path.name).symlink_to(f"../../blobs/{path.name}")
  (tmp_path / "secret.txt").write_text("a password", encoding="utf-8")
  (source / "secret.txt").symlink_to("../../../secret.txt")
  loaded = load.load(source, jnp.float32)
  left_out = save.export(tmp_path / "out", loaded.params, loaded.network.size, source=source, token_ids={})
  assert left_out == ["secret.txt"]
  assert {name: (tmp_path / "out" / name).read_bytes() for name in OTHERS} == OTHERS
  assert_same_tensors(read_all(tmp_path / "out"), read_all(llada[0]))


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_an_export_has_the_permissions_of_new_files(tmp_path, llada, umask):
  before = os.umask(umask)
  try:
    write(tmp_path / "out", llada)
  finally:
    os.umask(before)
  assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~umask
  for path in (tmp_path / "out").iterdir():
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask, path


@pytest.mark.parametrize("kind", ["file", "below a file", "link to nothing"])
def test_what_cannot_be_a_folder_is_refused_and_stays(tmp_path, llada, kind):
  path = tmp_path / "out"
  if kind == "link to nothing":
    path.symlink_to(tmp_path / "nowhere")
  else:
    path.write_text("mine", encoding="utf-8")
  target = path / "deeper" if kind == "below a file" else path
  with pytest.raises(ValueError, match=f"{path} is a (file, expected a folder|link to nothing)"):
    write(target, llada)
  assert [each.name for each in tmp_path.iterdir()] == ["out"]


def test_a_link_to_an_empty_folder_is_filled(tmp_path, llada):
  (tmp_path / "real").mkdir()
  (tmp_path / "out").symlink_to("real")
  write(tmp_path / "out", llada)
  assert (tmp_path / "out").is_symlink()
  assert_same_tensors(read_all(tmp_path / "real"), read_all(llada[0]))
