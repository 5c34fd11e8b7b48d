import datetime
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d1jax.data import folder
from d1jax.data.hugging_face import HuggingFaceTokenizer
from d1jax.data.tokenizer import Tokenizer
from tests.data.folders import changed, load_json, shared_tokenizers, small_files, write_json, write_llada_tokenizer

GOLDENS = load_json(Path(__file__).parent / "goldens" / "tokenizers.json")
USER = [{"role": "user", "content": "hi"}]
END, START, TURN, HOLE = 258, 259, 260, 261
"""Special ids of `small_files`."""


@pytest.fixture(scope="module")
def dream() -> HuggingFaceTokenizer:
  return HuggingFaceTokenizer(folder.read(shared_tokenizers() / "dream7b"))


@pytest.fixture(scope="module")
def llada(tmp_path_factory) -> HuggingFaceTokenizer:
  """With a post-processor that would add a start token; transformers made the goldens without one."""
  path = tmp_path_factory.mktemp("llada")
  write_json(path / "config.json", write_llada_tokenizer(path, double_bos=True))
  return HuggingFaceTokenizer(folder.read(path))


def small(
  template: str | None = "{% for m in messages %}{{ m.content }}{% endfor %}", **config
) -> HuggingFaceTokenizer:
  tokenizer = HuggingFaceTokenizer(small_files(template, **config))
  tokenizer.try_template()
  return tokenizer


def asked(content: str) -> list[dict[str, str]]:
  return [{"role": "user", "content": content}]


@pytest.mark.parametrize("name", ["dream", "llada"])
def test_ids_and_chats_are_those_of_transformers(name, request):
  tokenizer = request.getfixturevalue(name)
  end = len(tokenizer.completion(""))
  for golden in GOLDENS[name]["texts"]:
    ids = tokenizer.completion(golden["text"])
    assert ids[: len(ids) - end] == golden["ids"], golden["text"]
    assert tokenizer.decode_all([ids]) == [golden["decoded"]]
  for golden in GOLDENS[name]["chats"]:
    assert tokenizer.prompt(golden["messages"], golden["prefill"]) == golden["ids"]


def test_a_llada_prompt_is_written_to_the_letter(llada):
  expected = "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\nWhat?<|eot_id|>"
  expected += "<|start_header_id|>assistant<|end_header_id|>\n\n<reasoning>\n"
  ids = llada.prompt(asked(" What?\n"), "<reasoning>\n")
  assert llada._tokenizer.decode(ids, skip_special_tokens=False) == expected
  assert llada.decode_all([ids]) == ["user\n\nWhat?assistant\n\n<reasoning>\n"]


def test_a_start_token_is_never_doubled(llada):
  start = 49152
  assert llada._tokenizer.encode("<|startoftext|>a", add_special_tokens=True).ids[:2] == [start, start]
  assert llada.prompt(USER, "").count(start) == 1
  assert start not in llada.completion("hi")


def test_a_folder_without_a_post_processor_gives_the_same_ids(llada, tmp_path):
  write_json(tmp_path / "config.json", write_llada_tokenizer(tmp_path))
  plain = HuggingFaceTokenizer(folder.read(tmp_path))
  assert plain.prompt(USER, "<reasoning>") == llada.prompt(USER, "<reasoning>")
  assert plain.completion("1 2") == llada.completion("1 2")


def test_dream_gets_its_default_system_turn(dream):
  text = dream.decode_all([dream.prompt(USER, "")])[0]
  assert text == "system\nYou are a helpful assistant.\nuser\nhi\nassistant\n"


def test_special_ids_come_from_the_folders(dream, llada):
  assert (dream.mask_id, dream.stop_ids, dream.pad_id, dream.vocab) == (151666, (151643,), 151643, 151667)
  assert (llada.mask_id, llada.stop_ids, llada.pad_id, llada.vocab) == (49408, (49153,), 49153, 49421)
  assert isinstance(dream, Tokenizer)


def test_a_completion_ends_the_turn_and_the_sequence(dream, llada):
  assert dream.completion("hi")[-2:] == [151645, 151643]
  assert llada.completion("hi")[-2:] == [49420, 49153]
  assert llada.completion("hi").count(49153) == 1


@settings(max_examples=2 * settings.default.max_examples)
@given(text=st.text())
def test_any_text_comes_back_to_the_letter(text):
  tokenizer = _without_normalizer()
  assert tokenizer.decode_all([tokenizer.completion(text)]) == [text]


_MADE: list[HuggingFaceTokenizer] = []


def _without_normalizer() -> HuggingFaceTokenizer:
  if not _MADE:
    files = small_files()
    whole = json.loads(HuggingFaceTokenizer(files)._tokenizer.to_str()) | {"normalizer": None}
    _MADE.append(HuggingFaceTokenizer(files | {"tokenizer.json": json.dumps(whole).encode()}))
  return _MADE[0]


@given(pieces=st.lists(st.sampled_from(["<|hole|>", "<|end|>", "<|im_end|>", "<|", "|>", "hole", " ", "a", "\n"])))
def test_no_text_becomes_a_special_token(pieces):
  text = "".join(pieces)
  tokenizer = _without_normalizer()
  ids = tokenizer.completion(text)
  assert ids[-2:] == [TURN, END]
  assert not {START, TURN, END, HOLE} & set(ids[:-2])
  assert tokenizer.decode_all([ids]) == [text]
  prompt = tokenizer.prompt(asked(text), text)
  assert [i for i in prompt if i >= END] == [START, TURN, START]
  assert tokenizer.decode_all([prompt]) == [f"user\n{text}\nassistant\n{text}"]


def test_a_question_that_spells_the_mask_is_no_hole(dream, llada):
  for tokenizer, mask in ((dream, "<|mask|>"), (llada, "<|mdm_mask|>")):
    question = f"what does {mask} mean, {mask}?"
    ids = tokenizer.prompt(asked(question), "")
    assert tokenizer.mask_id not in ids
    assert question in tokenizer.decode_all([ids])[0]
    assert [i for i in ids if i in tokenizer._silent] == [
      i for i in tokenizer.prompt(USER, "") if i in tokenizer._silent
    ]
    assert tokenizer.mask_id not in tokenizer.completion(question)


def test_a_mask_that_two_texts_make_together_is_refused():
  tokenizer = small(mask_token_id=HOLE)
  with pytest.raises(ValueError, match=r"becomes the mask \(id 261\), which the sampler would fill; change the text"):
    tokenizer.prompt(asked("<|ho"), "le|>")
  assert HOLE not in small(None, mask_token_id=HOLE).prompt(asked("<|ho"), "le|>")


def test_a_mask_that_is_an_ordinary_token_is_refused_when_text_becomes_it():
  tokenizer = small(mask_token_id=257)  # " th"
  tokenizer.completion("other")
  with pytest.raises(ValueError, match=r"'to the' becomes the mask \(id 257\)"):
    tokenizer.completion("to the")


def test_special_ids_that_are_ordinary_tokens_have_no_text():
  letters = small().completion("abc")[:3]
  tokenizer = small(mask_token_id=letters[0], eos_token_id=letters[1])
  assert tokenizer.decode_all([letters]) == ["c"]


def test_words_that_cover_special_tokens_may_occur_in_text():
  text = "CoveredToken0CoveredToken <|end|> CoveredTokenX"
  tokenizer = small()
  assert tokenizer.decode_all([tokenizer.prompt(asked(text), "")]) == [text]
  tokenizer = small("CoveredToken7CoveredToken{% for m in messages %}{{ m.content }}{% endfor %}")
  assert tokenizer.decode_all([tokenizer.prompt(asked("<|end|>"), "")]) == ["CoveredToken7CoveredToken<|end|>"]


def test_without_a_mask_anywhere_it_is_a_new_id_that_has_no_text():
  tokenizer = small(eos_token_id=[TURN, END], vocab_size=512)
  assert (tokenizer.mask_id, tokenizer.vocab, tokenizer.pad_id) == (262, 263, TURN)
  assert tokenizer.decode_all([[262, tokenizer.completion("a")[0], 300]]) == ["a"]


@pytest.mark.parametrize("text", ["<|MASK|>", "|<MASK>|", "<[MASK]>", "<|mask|>"])
def test_a_mask_that_no_file_names_is_found_by_its_text(text):
  """As in the folders of Fast-dLLM v2 and iLLaDA; a name goes before it."""
  files = {name: content.replace(b"<|hole|>", text.encode()) for name, content in small_files(vocab_size=512).items()}
  tokenizer = HuggingFaceTokenizer(files)
  assert (tokenizer.mask_id, tokenizer.vocab) == (HOLE, 262)
  assert HOLE not in tokenizer.prompt(asked(text), "")
  assert HuggingFaceTokenizer(changed(files, "tokenizer_config.json", mask_token="Ġth")).mask_id == 257
  assert HuggingFaceTokenizer(changed(files, "config.json", mask_token_id=300)).mask_id == 300


def test_a_mask_that_only_config_json_names_is_special():
  files = small_files(mask_token_id=HOLE)
  described = json.loads(files["tokenizer_config.json"])["added_tokens_decoder"]
  described["261"]["special"] = False
  tokenizer = HuggingFaceTokenizer(changed(files, "tokenizer_config.json", added_tokens_decoder=described))
  assert tokenizer.decode_all([tokenizer.completion("a<|hole|>b")]) == ["a<|hole|>b"]
  assert tokenizer.decode_all([[HOLE]]) == [""]


@pytest.mark.parametrize(
  ("template", "config", "end"),
  [
    ("{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>\n{% endfor %}", {}, [TURN, END]),
    ("{% for m in messages %}{{ m.content }}<|end|>{% endfor %}", {}, [END]),
    ("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}", {"eos_token_id": [END, TURN]}, [TURN]),
    ("{% for m in messages %}{{ m.content }}\n\n{% endfor %}", {}, [END]),
    (None, {"eos_token_id": [TURN, END]}, [TURN]),
  ],
)
def test_an_answer_ends_as_the_template_ends_it(template, config, end):
  tokenizer = small(template, **config)
  letter = tokenizer.completion("a")[0]
  assert tokenizer.completion("a") == [letter, *end]


def test_text_between_an_answer_and_its_end_belongs_to_the_end():
  tokenizer = small("{% for m in messages %}{{ m.content }} .<|im_end|>{% endfor %}")
  assert tokenizer.decode_all([tokenizer.completion("a")]) == ["a ."]


def test_a_template_that_drops_the_answer_is_refused():
  with pytest.raises(ValueError, match="the chat template leaves the assistant's turn out"):
    small("{{ messages[0].content }}")


def test_without_a_template_the_texts_follow_the_start_token():
  files = changed(small_files(None), "tokenizer_config.json", bos_token="<|im_start|>")
  tokenizer = HuggingFaceTokenizer(files)
  turns = [{"role": "system", "content": "x "}, {"role": "user", "content": "y"}]
  ids = tokenizer.prompt(turns, " z")
  assert ids[0] == START
  assert tokenizer.decode_all([ids]) == ["x y z"]
  assert START not in HuggingFaceTokenizer(small_files(None)).prompt(turns, " z")
  assert HuggingFaceTokenizer(changed(files, "tokenizer_config.json", add_bos_token=True)).prompt(turns, " z") == ids
  assert (
    HuggingFaceTokenizer(changed(files, "tokenizer_config.json", add_bos_token=False)).prompt(turns, " z") == ids[1:]
  )


def test_files_make_the_same_tokenizer_again(dream):
  assert set(dream.files) == {
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "config.json",
  }
  files = small_files(mask_token_id=HOLE) | {"tokenizer.model": b"not read"}
  first = HuggingFaceTokenizer(files)
  assert "tokenizer.model" not in first.files
  again = HuggingFaceTokenizer(first.files)
  assert again.prompt(USER, "<|hole|>") == first.prompt(USER, "<|hole|>")
  assert (again.vocab, again.mask_id, again.stop_ids) == (first.vocab, HOLE, first.stop_ids)


def test_the_day_that_a_template_writes_is_kept_with_the_files(monkeypatch):
  files = small_files("{{ strftime_now('%d %b %Y') }} {% for m in messages %}{{ m.content }}{% endfor %}")
  dated = HuggingFaceTokenizer(files | {folder.DATE: b"2026-11-03"})
  assert dated.decode_all([dated.prompt(USER, "")]) == ["03 Nov 2026 hi"]
  assert dated.files[folder.DATE] == b"2026-11-03"
  first = HuggingFaceTokenizer(files)
  assert first.files[folder.DATE].decode() == datetime.date.today().isoformat()
  assert folder.DATE not in small().files


def test_tokenizer_json_stands_before_vocab_json():
  files = small_files() | {"tokenizer.json": HuggingFaceTokenizer(small_files())._tokenizer.to_str().encode()}
  tokenizer = HuggingFaceTokenizer(files | {"vocab.json": b"broken", "merges.txt": b"broken"})
  assert not {"vocab.json", "merges.txt"} & set(tokenizer.files)
  assert tokenizer.prompt(USER, "") == HuggingFaceTokenizer(small_files()).prompt(USER, "")


@given(rows=st.lists(st.lists(st.integers(-5, 600), max_size=12), max_size=4))
def test_decoding_is_total(rows):
  tokenizer = _without_normalizer()
  meant = [[i for i in row if 0 <= i < END] for row in rows]
  texts = tokenizer.decode_all(rows)
  assert texts == tokenizer.decode_all(meant)
  assert [text == "" for text in texts] == [row == [] for row in meant]


def test_half_a_character_is_a_replacement_and_what_has_no_text_vanishes():
  tokenizer = _without_normalizer()
  first, second = tokenizer.completion("é")[:2]
  rows = [[first], [first, second], [first, END, second], [START, HOLE, 262, 10**6, -1], []]
  assert tokenizer.decode_all(rows) == ["\ufffd", "é", "é", "", ""]
  assert tokenizer.decode_all([]) == []


def test_text_that_is_not_unicode_is_named():
  with pytest.raises(ValueError, match="is not Unicode"):
    small().completion("a\ud800")
