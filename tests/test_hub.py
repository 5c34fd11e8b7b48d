"""Names of the hub, against a stand-in of it on this machine."""

import errno
import json
from pathlib import Path

import pytest

import d1jax
from d1jax import hub, source
from d1jax.errors import RunError
from tests import hub_server

NAME = "lab/model"
FILES = {
  "config.json": b"{}",
  "model-00001-of-00001.safetensors": bytes(range(256)) * 64,
  "model.safetensors.index.json": b"{}",
  "chat_template.jinja": b"x",
  "merges.txt": b"",
  "modeling_llada.py": b"raise SystemExit",
  "pytorch_model.bin": b"pickle",
  "README.md": b"#",
  "deep/config.json": b"{}",
}


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
  with hub_server.running(monkeypatch, tmp_path / "cache") as found:
    found.files[f"model/{NAME}"] = dict(FILES)
    yield found


@pytest.mark.parametrize(
  ("name", "found"),
  [
    ("GSAI-ML/LLaDA-8B-Instruct", ("GSAI-ML/LLaDA-8B-Instruct", None)),
    ("hf:lab/model", ("lab/model", None)),
    ("hf:lab/model@refs/pr/1", ("lab/model", "refs/pr/1")),
    ("lab/model@v1.0", ("lab/model", "v1.0")),
    ("hf:here/model", ("here/model", None)),
    # Paths: here is `here/there`, so that `here/typo` is no name.
    *[
      (path, None) for path in ("model", "here/there", "here/typo", "./lab/model", "/lab/model", "lab/model/", "a/b/c")
    ],
    *[(path, None) for path in ("../model", "lab/model.", "~/model", "lab//model", "", "lab/mo del")],
  ],
)
def test_what_is_a_name_and_what_a_path(name, found, tmp_path, monkeypatch):
  (tmp_path / "here/there").mkdir(parents=True)
  monkeypatch.chdir(tmp_path)
  assert hub.parse(name) == found


@pytest.mark.parametrize("name", ["hf:", "hf:model", "hf:a/b/c", "hf:../b", "hf:lab/model@", "hf:lab/model@../x"])
def test_a_wrong_name_is_refused(name):
  with pytest.raises(hub.HubError, match=r"is no name on the hub: write hf:OWNER/NAME or hf:OWNER/NAME@REVISION"):
    hub.parse(name)


def test_weights_and_tokenizers_are_fetched_once_and_no_code(stand_in, monkeypatch):
  folder = hub.folder(NAME)
  expected = sorted(set(FILES) - {"modeling_llada.py", "pytorch_model.bin", "README.md", "deep/config.json"})
  assert sorted(path.name for path in folder.iterdir()) == expected
  assert all((folder / path).read_bytes() == FILES[path] for path in expected)
  assert folder.name == stand_in.commit(f"model/{NAME}")
  assert hub.origin(folder) == hub.Snapshot(NAME, folder.name)
  assert hub.origin(folder.parent) is None
  assert stand_in.fetched() == expected
  stand_in.asked.clear()
  assert hub.folder(f"hf:{NAME}@{folder.name}") == folder
  assert not stand_in.fetched()


def test_a_download_that_was_cut_goes_on(stand_in):
  stand_in.cut = "model-00001-of-00001.safetensors"
  try:
    folder = hub.folder(NAME)
  except hub.HubError:  # the package tries again by itself, or leaves the rest to the next command
    folder = hub.folder(NAME)
  assert (folder / "model-00001-of-00001.safetensors").read_bytes() == bytes(range(256)) * 64


def test_the_cache_serves_where_the_hub_is_out_of_reach_or_must_not_be_asked(stand_in, monkeypatch):
  folder = hub.folder(NAME)
  stand_in.asked.clear()
  assert hub.find(NAME, cached=True) == hub.Snapshot(NAME, folder.name)
  assert not stand_in.asked
  monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
  assert hub.folder(NAME) == folder
  with pytest.raises(hub.HubError, match=r"lab/other is no folder here and not in the hub's cache, .*be reached"):
    hub.folder("lab/other")
  with pytest.raises(hub.HubError, match="the name comes from a checkpoint: fetch it with `hf download lab/other`"):
    hub.find("lab/other", cached=True)


def test_what_the_hub_refuses_is_one_line_with_its_remedy(stand_in, monkeypatch):
  stand_in.files |= {f"model/lab/{name}": dict(FILES) for name in ("gated", "private")}
  stand_in.files["model/lab/old"] = {"config.json": b"{}", "pytorch_model.bin": b""}
  stand_in.gated, stand_in.private = {"model/lab/gated"}, {"model/lab/private"}
  for name, message in {
    "lab/none": "lab/none is no folder here, and http.* has no model of this name that you may read",
    "lab/private": "set HF_TOKEN if it is private",
    "lab/gated": "lab/gated is gated: accept its terms at http.*/lab/gated, and set HF_TOKEN",
    "lab/model@nowhere": "lab/model has no revision nowhere",
    "lab/old": "lab/old has no file .safetensors",
  }.items():
    with pytest.raises(hub.HubError, match=message) as caught:
      hub.folder(name)
    assert "\n" not in str(caught.value)
  monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
  assert hub.folder("lab/private").is_dir()
  assert {token for _, _, token in stand_in.asked} == {None, hub_server.TOKEN}


def test_a_full_disk_stays_a_full_disk(stand_in, monkeypatch):
  def fail(*arguments, **more):
    raise OSError(errno.ENOSPC, "No space left on device")

  found = hub.find(NAME)
  monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
  with pytest.raises(OSError, match="No space left"):
    hub.download(found)


def test_a_commit_that_is_pushed_meanwhile_is_not_taken(stand_in):
  found = hub.find(NAME)
  stand_in.files[f"model/{NAME}"] |= {"config.json": b"[]"}
  with pytest.raises(hub.HubError, match=f"{NAME}"):  # the stand-in keeps no history
    hub.download(found)
  assert hub.download(hub.find(NAME)).name != found.commit


def test_a_model_is_loaded_by_its_name(stand_in, monkeypatch):
  monkeypatch.setattr("d1jax.model.inspect", lambda folder: pytest.fail(folder.name))
  with pytest.raises(pytest.fail.Exception, match=stand_in.commit(f"model/{NAME}")):
    d1jax.from_pretrained(NAME)


def test_a_folder_is_pushed(stand_in, tmp_path, monkeypatch):
  folder = tmp_path / "out"
  folder.mkdir()
  for name in ("README.md", "model.safetensors"):
    (folder / name).write_bytes(name.encode())
  for repository, message in {
    "model": "write OWNER/NAME",
    "lab/new": "needs a token that may write: set HF_TOKEN",
  }.items():
    with pytest.raises(hub.HubError, match=message):
      hub.check_push(repository)
  assert not stand_in.asked
  monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
  with pytest.raises(hub.HubError, match="the token is of somebody, who writes to somebody, lab alone"):
    hub.check_push("stranger/new")
  hub.check_push("lab/new")
  assert hub.push(folder, "lab/new", private=True).endswith("/lab/new")
  assert stand_in.files["model/lab/new"] == {path.name: path.read_bytes() for path in Path(folder).iterdir()}
  assert stand_in.made[0]["name"] == "new"
  assert stand_in.made[0].get("visibility", stand_in.made[0].get("private")) in ("private", True)


def test_all_processes_take_the_commit_that_the_first_one_found(stand_in, tmp_path, monkeypatch):
  """What process 0 finds travels as JSON, and decides for all; what it cannot find is a RunError for all."""
  asked = []

  def from_main(find):
    asked.append(find)
    return json.loads(json.dumps(find()))

  monkeypatch.setattr(source.multihost, "alone", lambda: False)
  monkeypatch.setattr(source.multihost, "from_main", from_main)
  monkeypatch.setattr(source.multihost, "wait_long", asked.append)
  assert source.locate(NAME) == hub.Snapshot(NAME, stand_in.commit(f"model/{NAME}"))
  assert source.locate(str(tmp_path)) == source.fetch(str(tmp_path)) == tmp_path
  assert source.locate(Path(NAME)) == Path(NAME)
  assert source.fetch(f"hf:{NAME}").name == stand_in.commit(f"model/{NAME}")
  assert [one for one in asked if isinstance(one, str)] == ["download"]
  with pytest.raises(RunError, match="lab/none is no folder here"):
    source.fetch("lab/none")


def test_the_model_that_comes_with_d1jax_is_small_and_found_by_its_name():
  folder = source.fetch("d1jax:sudoku")
  assert sum(path.stat().st_size for path in folder.iterdir()) < 400_000
  assert set(source.inspect(folder).tokenizer.decode_raw([[*range(4, 24)]])[0]) >= set("01234")
  with pytest.raises(ValueError, match="'d1jax:chess' does not come with d1jax; known: d1jax:sudoku"):
    source.fetch("d1jax:chess")
