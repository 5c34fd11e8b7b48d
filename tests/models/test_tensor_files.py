import json
import os
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


@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize("name", [tensor_files.SINGLE, tensor_files.INDEX])
def test_a_pipe_or_a_device_is_named_and_not_read(single, kind, name):
  """It would be waited for, or read for ever."""
  folder, _ = single
  path = folder / name
  path.unlink(missing_ok=True)
  if kind == "pipe":
    os.mkfifo(path)
  else:
    path.symlink_to("/dev/zero")
  refused(folder, path, "no regular file", "fetch it again")


def test_an_index_that_is_a_folder_is_named(single):
  folder, _ = single
  (folder / tensor_files.INDEX).mkdir()
  refused(folder, folder / tensor_files.INDEX, "is a folder", "fetch it again")


def with_header(path, header, data=b"", length=None):
  """Writes a file whose header says anything."""
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def entry(begin, end, shape=(4,), dtype="F32"):
  return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
  ("header", "length"),
  [
    ({"a": entry(0, 16)}, 2**63),
    ({"a": entry(0, 16)}, 2**64 - 1),
    ({"a": entry(0, 16)}, 10**9),
    ({"a": entry(0, 4 * 10**12, (10**12,))}, None),
    ({"a": entry(0, 16, (10**12,))}, None),
    ({"a": entry(0, 16, (10**30,))}, None),
    ({"a": entry(16, 0)}, None),
    ({"a": entry(-16, 0)}, None),
    ({"a": entry(8, 24), "b": entry(0, 16)}, None),
    ({"a": entry(0, 16), "b": entry(0, 16)}, None),
    ({"a": entry(0, 16), "b": entry(20, 36)}, None),
    ({"a": entry(0, 16, dtype="F33")}, None),
    ({"a": {"dtype": "F32", "shape": [4]}}, None),
    (b"[" * 100_000, None),
    (b'{"a": ' + b"[" * 100_000, None),
    (b'{"a": {"dtype": "F32", "shape": [1' + b"0" * 5000 + b'], "data_offsets": [0, 16]}}', None),
    (b"\xff" * 40, None),
  ],
  ids=lambda value: str(value)[:60],
)
def test_a_header_that_lies_is_refused(tmp_path, header, length):
  path = tmp_path / tensor_files.SINGLE
  with_header(path, header, b"\0" * 32, length)
  refused(tmp_path, path, "cannot be read", "fetch it again")


@pytest.mark.parametrize(
  "name", ["../outside.safetensors", "a/../../outside.safetensors", "ABSOLUTE", "/dev/zero", "a\0b"]
)
def test_an_index_may_not_name_what_is_outside_of_the_folder(tmp_path, name):
  folder = tmp_path / "model"
  weights = folders.write(folder, "llada", shards=3)
  outside = tmp_path / "outside.safetensors"
  save_file({QUERY: weights[QUERY]}, outside)
  name = str(outside) if name == "ABSOLUTE" else name
  edit_index(folder, **{QUERY: name})
  refused(folder, folder / tensor_files.INDEX, repr(name), QUERY, "is outside of the folder")


def test_an_index_may_not_name_what_no_file_can_be_called(sharded):
  folder, _ = sharded
  edit_index(folder, **{QUERY: "\ud800"})
  refused(folder, folder / tensor_files.INDEX, repr("\ud800"), QUERY, "cannot be a file's name")


@pytest.mark.parametrize("name", ["", ".", "deeper", "x" * 5000, "no.safetensors"])
def test_an_index_that_names_no_file_is_refused(sharded, name):
  folder, _ = sharded
  (folder / "deeper").mkdir()
  edit_index(folder, **{QUERY: name})
  refused(folder, "fetch it again")


def test_shards_may_lie_deeper_and_may_be_links(sharded, tmp_path_factory):
  """In the hub's cache all files are links to `../../blobs`."""
  folder, weights = sharded
  path = file_with(folder, QUERY)
  blob = tmp_path_factory.mktemp("blobs") / "0123"
  path.rename(blob)
  (folder / "deeper").mkdir()
  (folder / "deeper" / path.name).symlink_to(blob)
  held = load_file(blob)
  edit_index(folder, **dict.fromkeys(held, f"deeper/{path.name}"))
  found = TensorFiles(folder).read(QUERY, slice(None), slice(None))
  assert found.tobytes() == weights[QUERY].tobytes()


def test_an_index_with_a_byte_order_mark_is_read(sharded):
  folder, weights = sharded
  path = folder / tensor_files.INDEX
  path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
  assert TensorFiles(folder).shapes.keys() == weights.keys()


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_what_is_not_finite_is_refused_when_it_is_read(tmp_path, dtype, value):
  largest = float(ml_dtypes.finfo(dtype).max)
  values = np.asarray([[0, 1, -1], [largest, -largest, -0.0], [1e-7, value, 2]], dtype)
  save_file({"a": values, "b": values[:2]}, tmp_path / tensor_files.SINGLE)
  files = TensorFiles(tmp_path)
  np.testing.assert_array_equal(files.read("a", slice(0, 2)), values[:2])
  files.read("b", slice(None))
  with pytest.raises(ValueError, match=r"model\.safetensors: tensor a holds NaN or infinity.*fetch it again"):
    files.read("a", slice(1, 3))


@pytest.mark.parametrize(
  "buffer", ["rotary_emb.inv_freq", "self_attn.position_ids", "self_attn.masked_bias", "causal_mask"]
)
@pytest.mark.parametrize("dtype", [np.int64, np.float32, np.bool_])
def test_buffers_are_left_out_whatever_their_type(sharded, buffer, dtype):
  folder, weights = sharded
  name = f"model.layers.0.{buffer}"
  path = file_with(folder, QUERY)
  rewrite(path, **{name: np.ones(3, dtype)})
  edit_index(folder, **{name: path.name})
  files = TensorFiles(folder)
  assert files.shapes.keys() == files.dtypes.keys() == weights.keys()


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
