import datetime
import json
import os

import pytest
import tokenizers

from d1jax.data import folder
from tests.data.folders import shared_tokenizers

LOW = {"eos_token_id": 1}


def files_of(**values) -> dict[str, bytes]:
  """Files by stem: `config={...}` is config.json."""
  return {f"{name}.json": json.dumps(value).encode() for name, value in values.items()}


def test_a_folder_is_read_by_name_and_what_is_not_named_is_not(tmp_path):
  for name in ("tokenizer.json", "config.json", "chat_template.jinja", "model.safetensors", "tokenization_dream.py"):
    (tmp_path / name).write_bytes(name.encode())
  found = folder.read(tmp_path)
  assert found == {n: n.encode() for n in ("tokenizer.json", "chat_template.jinja", "config.json")}


def test_what_is_no_folder_is_named(tmp_path):
  with pytest.raises(ValueError, match=r"nowhere is not a folder; name the folder"):
    folder.read(tmp_path / "nowhere")


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "nothing"])
@pytest.mark.parametrize("name", ["tokenizer.json", "added_tokens.json", "generation_config.json"])
def test_a_name_that_is_no_regular_file_is_an_error(tmp_path, kind, name):
  path = tmp_path / name
  if kind == "folder":
    path.mkdir()
  elif kind == "pipe":
    os.mkfifo(path)
  else:
    path.symlink_to("/dev/zero" if kind == "device" else tmp_path / "blobs" / "1")
  with pytest.raises(ValueError, match=f"{name} is .*, expected a file"):
    folder.read(tmp_path)


def test_links_are_followed(tmp_path):
  """The hub's cache is made of them."""
  (tmp_path / "blobs").mkdir()
  (tmp_path / "blobs" / "1").write_bytes(b"{}")
  snapshot = tmp_path / "snapshots" / "main"
  snapshot.mkdir(parents=True)
  (snapshot / "config.json").symlink_to("../../blobs/1")
  assert folder.read(snapshot) == {"config.json": b"{}"}


@pytest.mark.parametrize(
  "content", [b"{", b"", b'{"a": \xff}', b"[1, 2]", b"null", b"[" * 100_000, b'{"a": 1' + b"0" * 400 + b"}"]
)
def test_broken_json_is_named(content):
  with pytest.raises(ValueError, match=r"config\.json .*fetch the file again"):
    folder.parse({"config.json": content}, "config.json")
  assert folder.parse({"config.json": content}, "other.json") == {}


def test_a_byte_order_mark_is_read():
  assert folder.parse({"config.json": b'\xef\xbb\xbf{"a": 1}'}, "config.json") == {"a": 1}


def test_llada_s_ids_come_from_its_config():
  root = shared_tokenizers() / "llada8b"
  own = {"eos_token_id": 126081, "pad_token_id": 126081, "bos_token_id": 126080}
  ids = folder.special_ids(folder.read(root), own, size=126349)
  assert ids == folder.SpecialIds(mask_id=126336, stop_ids=(126081,), pad_id=126081, bos_id=126080, vocab=126349)


def test_the_model_s_files_win_over_the_tokenizer_but_for_the_start():
  files = files_of(
    config={"eos_token_id": 3, "pad_token_id": 4, "mask_token_id": 5, "bos_token_id": 6},
    generation_config={"eos_token_id": [7, 8, 7], "pad_token_id": None},
  )
  own = {"eos_token_id": 0, "pad_token_id": 0, "mask_token_id": 0, "bos_token_id": 2}
  found = folder.special_ids(files, own, size=9)
  assert found == folder.SpecialIds(mask_id=5, stop_ids=(7, 8), pad_id=4, bos_id=2, vocab=9)
  assert folder.special_ids(files, own | {"bos_token_id": None}, size=9).bos_id is None
  del own["bos_token_id"]
  assert folder.special_ids(files, own, size=9).bos_id == 6
  only_own = folder.special_ids({}, {"eos_token_id": 1, "pad_token_id": 2, "mask_token_id": 3}, size=9)
  assert only_own == folder.SpecialIds(mask_id=3, stop_ids=(1,), pad_id=2, bos_id=None, vocab=9)


def test_without_a_mask_it_is_the_first_new_id_and_without_padding_the_stop_pads():
  found = folder.special_ids(files_of(config={"eos_token_id": [4, 2], "vocab_size": 64}), {}, size=10)
  assert found == folder.SpecialIds(mask_id=10, stop_ids=(4, 2), pad_id=4, bos_id=None, vocab=11)


def test_an_id_of_the_model_alone_counts_to_the_vocabulary():
  files = files_of(config={"mask_token_id": 12, "vocab_size": 16})
  assert folder.special_ids(files, LOW, size=10).vocab == 13


@pytest.mark.parametrize(
  ("config", "message"),
  [
    ({"mask_token_id": 16, "vocab_size": 16}, r"config\.json: mask_token_id=16 is outside the tokenizer \(10 ids\)"),
    ({"mask_token_id": 10}, r"config\.json: mask_token_id=10 is outside"),
    ({"pad_token_id": -1}, r"config\.json: pad_token_id=-1 is outside"),
    ({"eos_token_id": [1, 99]}, r"config\.json: eos_token_id=99 is outside"),
    ({"eos_token_id": "</s>"}, r"config\.json: eos_token_id is '</s>'; expected a token id"),
    ({"mask_token_id": True}, r"config\.json: mask_token_id is True; expected a token id"),
    ({"mask_token_id": 1}, r"mask_token_id=1 is also the eos_token_id; give the mask an id of its own"),
    ({"mask_token_id": 2, "pad_token_id": 2}, r"mask_token_id=2 is also the pad_token_id"),
  ],
)
def test_ids_that_cannot_be_are_named(config, message):
  with pytest.raises(ValueError, match=message):
    folder.special_ids(files_of(config=config), LOW, size=10)


@pytest.mark.parametrize("config", [{}, {"eos_token_id": None}, {"eos_token_id": []}])
def test_an_end_of_sequence_that_is_named_nowhere_is_an_error_that_lists_the_files(config):
  with pytest.raises(ValueError, match=r"looked at generation_config\.json, config\.json, tokenizer_config\.json, sp"):
    folder.special_ids(files_of(config=config), {"eos_token_id": None}, size=10)


def test_tokens_are_named_by_text_or_object_and_tokenizer_config_wins():
  files = files_of(
    tokenizer_config={"bos_token": None, "eos_token": {"content": "</s>"}, "unk_token": "?", "model_max_length": 4},
    special_tokens_map={"bos_token": "<s>", "eos_token": "</t>", "pad_token": {"content": "<p>"}},
  )
  assert folder.named_tokens(files) == {"bos_token": None, "eos_token": "</s>", "unk_token": "?", "pad_token": "<p>"}
  assert folder.named_tokens({}) == {}
  with pytest.raises(ValueError, match=r"special_tokens_map\.json: eos_token is 7; expected a token's text"):
    folder.named_tokens(files_of(special_tokens_map={"eos_token": 7}))


def test_extra_tokens_are_lists_or_named():
  files = files_of(
    tokenizer_config={"additional_special_tokens": ["<a>", {"content": "<b>"}], "extra_special_tokens": {"x": "<c>"}},
    special_tokens_map={"additional_special_tokens": ["<b>", "<d>"]},
  )
  assert folder.extra_tokens(files) == ["<a>", "<b>", "<c>", "<d>"]
  with pytest.raises(ValueError, match="additional_special_tokens is '<a>'; expected a list"):
    folder.extra_tokens(files_of(tokenizer_config={"additional_special_tokens": "<a>"}))


def test_the_date_of_prompts_is_a_file():
  assert folder.date({"prompt_date.txt": b"2026-11-03\n"}) == datetime.date(2026, 11, 3)
  assert folder.date({}) == datetime.date.today()
  with pytest.raises(ValueError, match=r"prompt_date\.txt: 'today' is not a date; write one like 2026-11-30"):
    folder.date({"prompt_date.txt": b"today"})


@pytest.mark.parametrize("core", ["tokenizer.json", "vocab.json"])
def test_a_new_mask_is_written_into_the_files_of_a_tokenizer(core):
  files = {
    core: b"{}",
    "tokenizer_config.json": json.dumps({"added_tokens_decoder": {"4": {"content": "<x>"}}}).encode(),
  }
  found = folder.with_mask(files, 7)
  told = {name: json.loads(content) for name, content in found.items()}
  assert told["tokenizer_config.json"]["mask_token"] == "<|mask|>"
  decoder = told["tokenizer_config.json"]["added_tokens_decoder"]
  assert [token["content"] for token in decoder.values()] == ["<x>", "<|mask|>"]
  if core == "vocab.json":
    assert told["added_tokens.json"] == {"<|mask|>": 7}
  else:
    (token,) = told["tokenizer.json"]["added_tokens"]
    assert (token["id"], token["content"], token["special"]) == (7, "<|mask|>", True)
  assert folder.with_mask({"tokenizer.model": b""}, 7) == {}


def test_a_real_tokenizer_knows_its_new_mask():
  found = folder.with_mask(folder.read(shared_tokenizers() / "smollm2"), 49152)
  assert tokenizers.Tokenizer.from_str(found["tokenizer.json"].decode()).token_to_id("<|mask|>") == 49152
