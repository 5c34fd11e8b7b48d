"""Folders with files that somebody, or something, has changed at random: they load, or one line says why not."""

import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d1jax.models import load
from d1jax.models.tensor_files import INDEX, TensorFiles
from d1jax.source import inspect
from tests import hub

pytestmark = pytest.mark.slow(reason="hundreds of folders, each read whole")

JSON_FILES = ("config.json", INDEX)
ODD = [
  None,
  True,
  -1,
  0,
  1,
  2.5,
  10**9,
  10**30,
  float("nan"),
  float("inf"),
  "",
  "../x",
  "/dev/zero",
  [],
  [[]],
  {},
  {"a": 1},
]


@pytest.fixture(scope="module", params=["llada", "qwen2"])
def folder(request, tmp_path_factory):
  return hub.write(tmp_path_factory.mktemp("hub") / request.param, request.param)


def reason(folder):
  """Reads all but most of the weights; why that failed, where it did. Other errors than ValueErrors pass."""
  try:
    source = inspect(folder)
    load.check(folder, load.transformer.build(source.size))
    files = TensorFiles(folder)
    for name, shape in files.shapes.items():
      files.read(name, *(slice(0, 2) for _ in shape))
  except ValueError as error:
    return str(error)
  return "none"


def with_content(folder, name, content):
  """Reads the folder while a file of it has another content."""
  path = folder / name
  before = path.read_bytes()
  try:
    path.write_bytes(content)
    assert 0 < len(reason(folder)) < 2000
  finally:
    path.write_bytes(before)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_values_of_any_kind(folder, data):
  name = data.draw(st.sampled_from(JSON_FILES))
  found = json.loads((folder / name).read_text(encoding="utf-8"))
  table = found["weight_map"] if name == INDEX and data.draw(st.booleans()) else found
  for key in data.draw(st.lists(st.sampled_from(sorted(table)), min_size=1, max_size=3)):
    table[key] = data.draw(st.sampled_from(ODD))
  with_content(folder, name, json.dumps(found).encode())


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_bytes_of_any_kind(folder, data):
  name = data.draw(st.sampled_from([*JSON_FILES, *sorted(path.name for path in folder.glob("*.safetensors"))]))
  content = bytearray((folder / name).read_bytes())
  for _ in range(data.draw(st.integers(1, 4))):
    at = data.draw(st.integers(0, min(len(content) - 1, 4000)))
    content[at] = data.draw(st.integers(0, 255))
  if data.draw(st.booleans()):
    del content[data.draw(st.integers(0, len(content))) :]
  with_content(folder, name, bytes(content))


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "loop", "nothing"])
@pytest.mark.parametrize("name", [*JSON_FILES, "vocab.json", "tokenizer_config.json"])
def test_what_is_no_file(folder, name, kind):
  path = folder / name
  kept = path.rename(folder.parent / "kept")
  try:
    if kind == "folder":
      path.mkdir()
    elif kind == "pipe":
      os.mkfifo(path)
    else:
      path.symlink_to({"device": "/dev/zero", "loop": name, "nothing": "nowhere"}[kind])
    with pytest.raises(ValueError, match=path.name):
      inspect(folder)
  finally:
    if kind == "folder":
      path.rmdir()
    else:
      path.unlink()
    kept.rename(path)
