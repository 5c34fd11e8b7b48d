import json
import re
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from d1jax.models import tensor_files
from d1jax.models.tensor_files import TensorFiles
from tests.models import folders

HEAD = "model.transformer.ff_out.weight"
QUERY = "model.transformer.blocks.1.q_proj.weight"


@pytest.fixture
def single(tmp_path):
  """A folder of one file, and its weights."""
  return tmp_path, folders.write(tmp_path, "llada")


@pytest.fixture
def sharded(tmp_path):
  """A folder of three files behind an index, and its weights."""
  return tmp_path, folders.write(tmp_path, "llada", dtype="bfloat16", shards=3)


def header_of(path):
  """The header of a safetensors file, and where its tensors start."""
  data = path.read_bytes()
  (length,) = struct.unpack("<Q", data[:8])
  return json.loads(data[8 : 8 + length]), 8 + length


def file_with(folder, tensor):
  """The shard that holds a tensor."""
  index = json.loads((folder / tensor_files.INDEX).read_text(encoding="utf-8"))
  return folder / index["weight_map"][tensor]


def edit_index(folder, **changes):
  """Changes entries of the weight map; `...` takes one away."""
  path = folder / tensor_files.INDEX
  index = json.loads(path.read_text(encoding="utf-8"))
  changed = index["weight_map"] | changes
  index["weight_map"] = {name: file for name, file in changed.items() if file is not ...}
  path.write_text(json.dumps(index), encoding="utf-8")


def rewrite(path, **changes):
  """Writes a file again with some tensors changed; `...` takes one away."""
  tensors = load_file(path) | changes
  save_file({name: value for name, value in tensors.items() if value is not ...}, path)


def refused(folder, *parts):
  """The folder cannot be opened, and the message has all of `parts`."""
  with pytest.raises(ValueError, match=re.escape(str(folder))) as caught:
    TensorFiles(folder)
  for part in parts:
    assert str(part) in str(caught.value), str(caught.value)


@pytest.mark.parametrize("which", ["single", "sharded"])
def test_every_tensor_is_read_as_it_was_written(which, request):
  folder, weights = request.getfixturevalue(which)
  files = TensorFiles(folder)
  assert files.shapes == {name: value.shape for name, value in weights.items()}
  assert set(files.dtypes.values()) == {"F32" if which == "single" else "BF16"}
  for name, value in weights.items():
    found = files.read(name, *(slice(None),) * value.ndim)
    assert found.dtype == value.dtype
    assert found.tobytes() == value.tobytes()
    assert name in load_file(files.file_of(name))


def test_a_slice_is_read_alone(sharded):
  folder, weights = sharded
  found = TensorFiles(folder).read(HEAD, slice(3, 20), slice(7, 9))
  np.testing.assert_array_equal(found, weights[HEAD][3:20, 7:9])


def test_float16_is_read(tmp_path):
  values = np.linspace(-2, 2, 6).reshape(2, 3).astype(np.float16)
  save_file({"a": values}, tmp_path / tensor_files.SINGLE)
  files = TensorFiles(tmp_path)
  assert files.dtypes == {"a": "F16"}
  np.testing.assert_array_equal(files.read("a", slice(1, 2)), values[1:2])


def test_other_names_of_the_files(tmp_path):
  save_file({"a": np.ones(3, np.float32)}, tmp_path / "other.safetensors")
  assert TensorFiles(tmp_path, "no.index.json", "other.safetensors").shapes == {"a": (3,)}


def test_an_index_goes_before_a_single_file(sharded):
  folder, weights = sharded
  save_file({"stray": np.ones(3, np.float32)}, folder / tensor_files.SINGLE)
  assert TensorFiles(folder).shapes.keys() == weights.keys()


def test_no_weights_at_all(tmp_path):
  (tmp_path / "config.json").write_text("{}", encoding="utf-8")
  refused(tmp_path, tmp_path, tensor_files.SINGLE, tensor_files.INDEX, "point to the folder")


def test_a_truncated_file_names_the_tensor_that_is_cut(single):
  folder, _ = single
  path = folder / tensor_files.SINGLE
  header, start = header_of(path)
  data = path.read_bytes()
  ends = sorted((e["data_offsets"][1], name) for name, e in header.items() if name != "__metadata__")
  for end, name in (ends[0], ends[len(ends) // 2], ends[-1]):
    path.write_bytes(data[: start + end - 1])  # the last byte of the tensor is missing
    refused(folder, path, f"tensor {name} is truncated", "fetch it again")


@pytest.mark.parametrize("kept", [1, 7, 8, 9, 200, -1])
def test_a_file_that_is_cut_inside_its_header_is_named(single, kept):
  folder, _ = single
  path = folder / tensor_files.SINGLE
  _, start = header_of(path)
  path.write_bytes(path.read_bytes()[: kept if kept > 0 else start - 1])
  refused(folder, path, "cannot be read", "fetch it again")


def test_a_truncated_shard_is_named_and_the_others_are_not(sharded):
  folder, _ = sharded
  path = file_with(folder, QUERY)
  path.write_bytes(path.read_bytes()[:-1])
  refused(folder, path, "is truncated")


def test_bytes_behind_the_tensors_are_refused(single):
  folder, _ = single
  path = folder / tensor_files.SINGLE
  path.write_bytes(path.read_bytes() + b"\0")
  refused(folder, path, "cannot be read")


@pytest.mark.parametrize(
  "content",
  [
    b"",
    b"\0",
    b"PK\x03\x04 a zip file, as torch.save writes it" * 10,
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    b"<html>not found</html>" * 20,
    struct.pack("<Q", 2) + b"{}" + b"stray bytes",
    struct.pack("<Q", 2) + b"[]",
    struct.pack("<Q", 4) + b"null",
    struct.pack("<Q", 9) + b'{"a": [1]',
    struct.pack("<Q", 8) + b'{"a": 1}',
  ],
)
def test_a_file_that_is_no_safetensors_is_named(tmp_path, content):
  path = tmp_path / tensor_files.SINGLE
  path.write_bytes(content)
  refused(tmp_path, path, "cannot be read", "fetch it again")


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path):
  (tmp_path / tensor_files.SINGLE).mkdir()
  refused(tmp_path, tmp_path / tensor_files.SINGLE, "cannot be read")


def test_a_missing_shard_is_named(sharded):
  folder, _ = sharded
  path = file_with(folder, QUERY)
  path.unlink()
  refused(folder, path, "is missing", "fetch it again")


def test_a_tensor_that_its_shard_lacks_is_named(sharded):
  folder, _ = sharded
  path = file_with(folder, QUERY)
  rewrite(path, **{QUERY: ...})
  refused(folder, path, f"tensor {QUERY} is missing", tensor_files.INDEX)


def test_an_index_that_names_another_file_is_refused(sharded):
  folder, _ = sharded
  right = file_with(folder, QUERY)
  wrong = next(p for p in sorted(folder.glob("*.safetensors")) if p != right)
  edit_index(folder, **{QUERY: wrong.name})
  refused(folder, wrong, f"tensor {QUERY} is missing")


def test_a_tensor_that_the_index_does_not_list_is_named(sharded):
  folder, _ = sharded
  edit_index(folder, **{QUERY: ...})
  refused(folder, file_with(folder, HEAD).parent, f"tensor {QUERY} is not listed in {tensor_files.INDEX}")


@pytest.mark.parametrize("listed_first", [True, False])
def test_a_tensor_in_two_files_is_refused(sharded, listed_first):
  folder, weights = sharded
  paths = sorted(folder.glob("*.safetensors"))
  paths = paths if listed_first else paths[::-1]
  own, other = paths[0], paths[-1]
  twice = next(name for name in load_file(own))
  rewrite(other, **{twice: np.zeros_like(weights[twice])})
  refused(folder, own, other, twice)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64, np.float64, np.bool_, ml_dtypes.float8_e4m3fn])
def test_a_tensor_of_another_type_is_named(single, dtype):
  folder, weights = single
  path = folder / tensor_files.SINGLE
  rewrite(path, **{QUERY: weights[QUERY].astype(dtype)})
  refused(folder, path, f"tensor {QUERY} is ", "only F32, BF16, F16")


@pytest.mark.parametrize(
  "text",
  ["", "{", "[]", "null", "3", "{}", '{"weight_map": null}', '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}'],
)
def test_an_index_that_is_none_is_named(single, text):
  folder, _ = single
  (folder / tensor_files.INDEX).write_text(text, encoding="utf-8")
  refused(folder, folder / tensor_files.INDEX, "fetch it again")


def test_a_file_that_is_damaged_after_it_was_opened_is_named(single):
  folder, _ = single
  files = TensorFiles(folder)
  path = files.file_of(HEAD)
  path.write_bytes(path.read_bytes()[:-4])
  with pytest.raises(ValueError, match="truncated"):
    files.read(HEAD, slice(None))
  path.unlink()
  with pytest.raises(ValueError, match=f"{path} is missing"):
    files.read(HEAD, slice(None))


def test_no_file_stays_open(sharded):
  folder, _ = sharded
  files = TensorFiles(folder)
  files.read(HEAD, slice(0, 2))
  maps = Path("/proc/self/maps")
  if not maps.exists():
    pytest.skip("no /proc on this system")
  assert str(folder) not in maps.read_text(encoding="utf-8")
