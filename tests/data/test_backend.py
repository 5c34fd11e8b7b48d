import json

import pytest
from tokenizers import Tokenizer

from d1jax.data import backend
from tests.data.folders import changed, small_files


def ids_of(files: dict[str, bytes], text: str) -> list[int]:
  return backend.build(files).encode(text, add_special_tokens=False).ids


def as_json(files: dict[str, bytes], **values) -> dict[str, bytes]:
  """The files with a tokenizer.json in place of vocab.json and merges.txt."""
  whole = json.loads(backend.build(files).to_str()) | values
  kept = {name: content for name, content in files.items() if name not in ("vocab.json", "merges.txt")}
  return kept | {"tokenizer.json": json.dumps(whole).encode()}


def test_a_vocabulary_and_its_merges_make_a_tokenizer_that_loses_nothing():
  tokenizer = backend.build(small_files())
  ids = tokenizer.encode("x the é 12").ids
  assert 257 in ids  # " th", merged twice
  assert tokenizer.decode(ids) == "x the é 12"
  assert tokenizer.encode("<|hole|>").ids == [261]
  assert ids_of(small_files(), "e\u0301") == ids_of(small_files(), "é")  # NFC


def test_tokenizer_json_makes_the_same_tokenizer():
  files = small_files()
  for text in ("x the é 12", "a<|hole|>\n\nb"):
    assert ids_of(as_json(files), text) == ids_of(files, text)


def test_nothing_is_cut_or_padded():
  padding = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None}
  padding |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "!"}
  truncation = {"max_length": 2, "direction": "Right", "strategy": "LongestFirst", "stride": 0}
  files = as_json(small_files(), padding=padding, truncation=truncation)
  assert len(Tokenizer.from_str(files["tokenizer.json"].decode()).encode("abcde").ids) == 9
  assert len(ids_of(files, "abcde")) == 5


def test_a_random_tokenizer_is_refused():
  files = as_json(small_files())
  model = json.loads(files["tokenizer.json"])["model"] | {"dropout": 0.1}
  with pytest.raises(ValueError, match=r"tokenizer\.json: model\.dropout=0\.1 makes ids random; set it to null"):
    backend.build(changed(files, "tokenizer.json", model=model))


def test_added_tokens_json_adds_what_tokenizer_config_does_not_list():
  files = changed(small_files(), "added_tokens.json", **{"<|hole|>": 261, "<tool>": 262})
  assert ids_of(files, "a<tool><|hole|>")[1:] == [262, 261]
  assert not backend.build(files).get_added_tokens_decoder()[262].special
  named = changed(files, "special_tokens_map.json", additional_special_tokens=["<tool>"])
  assert backend.build(named).get_added_tokens_decoder()[262].special


def test_a_token_with_a_role_is_special_whatever_its_description_says():
  files = small_files()
  described = json.loads(files["tokenizer_config.json"])["added_tokens_decoder"]
  described["261"]["special"] = False
  files = changed(files, "tokenizer_config.json", added_tokens_decoder=described)
  assert not backend.build(files).get_added_tokens_decoder()[261].special
  files = changed(files, "tokenizer_config.json", mask_token="<|hole|>")
  tokenizer = backend.build(files)
  assert tokenizer.get_added_tokens_decoder()[261].special
  assert tokenizer.token_to_id("<|hole|>") == 261
  assert backend.build(as_json(files)).token_to_id("<|hole|>") == 261


@pytest.mark.parametrize(
  ("name", "values", "message"),
  [
    (
      "added_tokens.json",
      {"<|hole|>": 270},
      r"tokenizer_config\.json gives '<\|hole\|>' the id 261, added_tokens\.json gives it 270",
    ),
    ("added_tokens.json", {"<new>": 261}, r"gives the id 261 to '<\|hole\|>', added_tokens\.json gives it to '<new>'"),
    ("added_tokens.json", {"<new>": 300}, r"gives '<new>' the id 300, but the next free id is 262"),
    ("added_tokens.json", {"Ġth": 262}, r"gives 'Ġth' the id 262, but the vocabulary has it at 257"),
    ("added_tokens.json", {"<new>": "262"}, r"added_tokens\.json: the id of '<new>' is '262'; expected an integer"),
    ("tokenizer_config.json", {"pad_token": "<pad>"}, r"names '<pad>', but no file gives it an id"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "a"}}}, r"added_tokens_decoder has 'x'"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"258": "a"}}, r"added_tokens_decoder has '258': 'a'"),
    ("tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer"}, r"merges\.txt of a GPT2Tokenizer are not supp"),
    ("vocab.json", {"Ġth": "257"}, r"vocab\.json: the id of 'Ġth' is '257'; expected an integer"),
    ("vocab.json", {"Ġth": 256}, r"vocab\.json: two tokens have the same id"),
  ],
)
def test_files_that_contradict_each_other_are_named(name, values, message):
  with pytest.raises(ValueError, match=message):
    backend.build(changed(small_files(), name, **values))


def test_tokenizer_json_is_held_against_the_other_files_too():
  files = as_json(small_files())
  with pytest.raises(ValueError, match=r"'<\|hole\|>' the id 261, added_tokens\.json gives it 262"):
    backend.build(changed(files, "added_tokens.json", **{"<|hole|>": 262}))
  files = changed(files, "tokenizer_config.json", added_tokens_decoder={"270": {"content": "<|hole|>"}})
  with pytest.raises(ValueError, match=r"'<\|hole\|>' the id 270, but the vocabulary has it at 261"):
    backend.build(files)


@pytest.mark.parametrize(
  ("merges", "message"),
  [
    (b"#version: 0.2\n\xc4\xa0 t\n\xc4\xa0th", r"merges\.txt line 3: 'Ġth' is not two tokens"),
    (b"a b c\n", r"merges\.txt line 1: 'a b c' is not two tokens"),
    (b"a \n", r"merges\.txt line 1: 'a ' is not two tokens"),
    (b"\n", r"merges\.txt line 1: '' is not two tokens"),
    (b"a b\n", r"merges\.txt line 1: 'ab' is not in vocab\.json; fetch the files of one and the same model"),
    (b"a \xff\n", r"merges\.txt is not UTF-8 \(byte 2"),
  ],
)
def test_merges_that_do_not_parse_name_their_line(merges, message):
  with pytest.raises(ValueError, match=message):
    backend.build(small_files() | {"merges.txt": merges})


@pytest.mark.parametrize(
  ("name", "values", "message"),
  [
    (
      "vocab.json",
      {"zz": 2**32},
      r"vocab\.json: the id of 'zz' is 4294967296; expected an integer from 0 to 2147483647",
    ),
    ("added_tokens.json", {"zz": 2**31}, r"added_tokens\.json: the id of 'zz' is 2147483648"),
    ("tokenizer_config.json", {"added_tokens_decoder": [1]}, r"added_tokens_decoder is not an object"),
    (
      "tokenizer_config.json",
      {"added_tokens_decoder": {"9" * 5000: {"content": "a"}}},
      "added_tokens_decoder has '9999",
    ),
    (
      "tokenizer_config.json",
      {"added_tokens_decoder": {"258": {"content": "a", "special": 1}}},
      "has '258': .* expected",
    ),
    (
      "tokenizer_config.json",
      {"added_tokens_decoder": {"258": {"content": "a", "lstrip": None}}},
      "has '258': .* expected",
    ),
    ("tokenizer_config.json", {"eos_token": ["a"]}, r"eos_token is \['a'\]; expected a token's text"),
  ],
)
def test_values_of_another_type_are_named(name, values, message):
  with pytest.raises(ValueError, match=message):
    backend.build(changed(small_files(), name, **values))


def test_whatever_the_library_raises_is_one_line_that_names_the_file():
  class PanicError(BaseException):
    """As the library's own."""

  for error, shown in (
    (PanicError("a\nb"), r"x\.json: the library tokenizers fails \(PanicError: a b\)"),
    (MemoryError(), "memory"),
  ):
    with pytest.raises(ValueError, match=shown), backend.library("x.json"):
      raise error
  with pytest.raises(KeyboardInterrupt), backend.library("x.json"):
    raise KeyboardInterrupt


def test_merges_may_have_windows_line_ends():
  files = small_files()
  windows = files | {"merges.txt": files["merges.txt"].replace(b"\n", b"\r\n")}
  assert ids_of(windows, "x the") == ids_of(files, "x the")


@pytest.mark.parametrize(("present", "absent"), [("vocab.json", "merges.txt"), ("merges.txt", "vocab.json")])
def test_half_a_vocabulary_is_named(present, absent):
  files = small_files()
  del files[absent]
  with pytest.raises(ValueError, match=f"{present} is there, but {absent} is not; fetch {absent}"):
    backend.build(files)


@pytest.mark.parametrize("content", [b"", b"{}", b'{"model": {"type": "BPE"}}', b"\xff"])
def test_a_broken_tokenizer_json_is_named(content):
  with pytest.raises(
    ValueError, match=r"tokenizer\.json(: the library tokenizers fails| is not) .*fetch the file again"
  ):
    backend.build({"tokenizer.json": content})
