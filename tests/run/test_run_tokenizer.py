"""The tokenizer that a run keeps: whatever becomes of its files, it is the one that the weights were trained with."""

import json
import shutil

import pytest

from d1jax.data import tokenizer as tokenizers
from d1jax.data.folder import DATE
from d1jax.errors import RunError
from d1jax.run import run_tokenizer
from d1jax.run.run_tokenizer import Kept, hashes
from d1jax.run.workdir import claim
from tests.damages import DAMAGES
from tests.data.folders import small_files

FLIPPED = {"flipped": lambda path: path.write_bytes(path.read_bytes().replace(b"3", b"4"))}
"""Loads, and means something else."""


def trained(texts=("1 + 2 = 3",)):
  return tokenizers.SentencePieceTokenizer(tokenizers.train_sentencepiece(texts, model_type="char", vocab_size=16))


def kept_by(workdir, tokenizer) -> Kept:
  claim(workdir, {}, tokenizer.files, {})
  return Kept(workdir, hashes(tokenizer.files))


@pytest.mark.parametrize("how", DAMAGES | FLIPPED)
def test_a_damaged_tokenizer_is_trained_again(tmp_path, how, caplog):
  tokenizer = trained()
  run = kept_by(tmp_path, tokenizer)
  path = tmp_path / "tokenizer" / "tokenizer.model"
  (DAMAGES | FLIPPED)[how](path)
  again = run_tokenizer.read_or_make(run, trained, "the task")
  assert again.files == tokenizer.files
  (said,) = [record.message for record in caplog.records]
  assert said.startswith(f"the tokenizer of the run in {tmp_path} is damaged (")
  assert said.endswith("that of the task has the same hashes, and serves")
  assert "fetch" not in said
  assert "\n" not in said
  if how == "a folder":
    with pytest.raises(RunError, match=r"tokenizer\.model is a folder, expected a file: move it away"):
      claim(tmp_path, {}, again.files, {})
    path.rmdir()
  claim(tmp_path, {}, again.files, {})
  assert run.files() == tokenizer.files


def test_a_whole_tokenizer_is_read_and_made_by_nobody(tmp_path):
  tokenizer = trained()
  run = kept_by(tmp_path, tokenizer)
  (tmp_path / "tokenizer" / ".DS_Store").write_bytes(b"\xff")
  (tmp_path / "tokenizer" / "notes").mkdir()
  assert run_tokenizer.read_or_make(run, None, "").files == tokenizer.files


@pytest.mark.parametrize(
  ("told", "made", "message"),
  [
    (True, None, "run the command that trained it again, which makes the tokenizer anew; or put"),
    (True, "other", "the task gives another one now: put"),
    (False, "same", "its checkpoints do not say which one it was: put"),
  ],
)
def test_what_cannot_be_made_again_says_what_helps(tmp_path, told, made, message):
  tokenizer = trained()
  run = kept_by(tmp_path / "run", tokenizer)
  run = run if told else run._replace(hashes=None)
  shutil.copytree(tmp_path / "run" / "tokenizer", tmp_path / "copy")
  (tmp_path / "run" / "tokenizer" / "tokenizer.model").write_bytes(b"")
  make = {None: None, "other": lambda: trained(["ab"]), "same": trained}[made]
  with pytest.raises(RunError) as caught:
    run_tokenizer.read_or_make(run, make, "the task")
  assert message in str(caught.value)
  assert "\n" not in str(caught.value)
  assert f"put {tmp_path}/run/tokenizer back from a copy" in str(caught.value)
  shutil.rmtree(tmp_path / "run" / "tokenizer")
  shutil.copytree(tmp_path / "copy", tmp_path / "run" / "tokenizer")
  assert run_tokenizer.read_or_make(run, make, "the task").files == tokenizer.files


def test_a_template_that_writes_the_day_keeps_that_of_the_start(tmp_path):
  files = small_files("{{ strftime_now('%d') }}{% for m in messages %}{{ m.content }}{% endfor %}")
  began = tokenizers.from_files(files | {DATE: b"2026-11-03"})
  run = kept_by(tmp_path, began)
  (tmp_path / "tokenizer" / "tokenizer.json").write_bytes(b"")
  assert run_tokenizer.read_or_make(run, lambda: tokenizers.from_files(files), "the folder").files == began.files
  (tmp_path / "tokenizer" / DATE).write_bytes(b"2026-11-04")
  with pytest.raises(RunError, match="the folder gives another one now"):
    run_tokenizer.read_or_make(run, lambda: tokenizers.from_files(files), "the folder")


@pytest.mark.parametrize("said", [None, 3, {}, {"tokenizer.model": 3}, "absent"])
def test_a_checkpoint_that_does_not_say_it_leaves_it_unknown(tmp_path, said):
  assert run_tokenizer.kept(tmp_path, {} if said == "absent" else {"tokenizer": said}).hashes is None


def test_the_newest_sound_checkpoint_says_it(tmp_path):
  tokenizer = trained()
  claim(tmp_path, {}, tokenizer.files, {})
  assert run_tokenizer.kept_in(tmp_path) is None
  for step, own in ((2, {"tokenizer": hashes(tokenizer.files)}), (4, {"fingerprint": 3})):
    path = tmp_path / "checkpoints" / "sft" / str(step) / "_CHECKPOINT_METADATA"
    path.parent.mkdir(parents=True)
    told = {"fingerprint": "f", "config": {}, "seconds": 0} | own
    path.write_text(json.dumps({"item_handlers": {}, "custom_metadata": told}))
  assert run_tokenizer.kept_in(tmp_path) == Kept(tmp_path, hashes(tokenizer.files))
  assert run_tokenizer.is_whole(tmp_path)
  (tmp_path / "tokenizer" / "tokenizer.model").write_bytes(b"")
  assert not run_tokenizer.is_whole(tmp_path)
