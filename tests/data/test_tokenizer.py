import io
import json
import re

import pytest
import sentencepiece

from d1jax.data.confined import ConfinedTokenizer
from d1jax.data.tokenizer import (
  MASK_PIECE,
  SentencePieceTokenizer,
  Tokenizer,
  from_files,
  load,
  train_sentencepiece,
)
from tests.data.folders import shared_tokenizers, small_files, write_files

TEXTS = [
  "① ﬁ Ａ ½ é\t",
  "Solve the puzzle: 0123456789\n",
  "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ\n",
  "<reasoning>\n1 + 2 = 3\n</reasoning>\n<answer>\n12(34)-5*6/7\n</answer>\n",
]
SAMPLES = [
  "0123456789",
  "2041304212033410",
  "a",
  " ",
  "  two  spaces  ",
  "\n",
  "line one\nline two\n\n\n",
  " leading",
  "trailing ",
  "\n \n",
  "<answer>\n12(34)-5*6/7\n</answer>",
  "",
  "① ﬁ Ａ ½\té",
]


@pytest.fixture(scope="module")
def model() -> bytes:
  return train_sentencepiece(TEXTS * 3, model_type="char", vocab_size=200)


@pytest.fixture(scope="module")
def tokenizer(model) -> SentencePieceTokenizer:
  return SentencePieceTokenizer(model)


@pytest.mark.parametrize("text", SAMPLES)
def test_text_comes_back_to_the_letter(tokenizer, text):
  ids = tokenizer.completion(text)
  assert tokenizer.decode_all([ids]) == [text]
  assert tokenizer.decode_all([ids[:-1]]) == [text]


def test_every_character_of_a_text_is_one_token(tokenizer):
  for text in SAMPLES:
    assert len(tokenizer.completion(text)) == len(text) + 1


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_other_models_split_digits_and_keep_text(model_type):
  texts = [f"move {i} of {j} to the line\n" for i in range(30) for j in range(9)]
  tokenizer = SentencePieceTokenizer(train_sentencepiece(texts, model_type=model_type, vocab_size=60))
  for text in ("move 1234 of 7\n", " to the  line"):
    assert tokenizer.decode_all([tokenizer.completion(text)]) == [text]
  digits = tokenizer.completion("123456")
  assert len(digits) >= 7


def test_the_same_texts_give_the_same_bytes(model):
  assert train_sentencepiece(iter(TEXTS * 3), model_type="char", vocab_size=200) == model


def test_long_texts_are_trained_on_too():
  """SentencePiece leaves texts of more than 4192 bytes out, unless it is told not to."""
  texts = ["short", "long " * 1000 + "\u6f22!"]
  tokenizer = SentencePieceTokenizer(train_sentencepiece(texts, model_type="char", vocab_size=50))
  assert tokenizer.unknown("long \u6f22!") == []


@pytest.mark.parametrize(
  ("texts", "options", "message"),
  [
    ([], {}, "there is no text to train a tokenizer on"),
    (["a\ud800"], {}, "is not Unicode"),
    (["abcdefghij"], {"vocab_size": 4, "model_type": "unigram"}, r"tokenizer\.vocab_size=4 \(.*give another size"),
    (["a"], {"model_type": "word"}, "model_type='word' is unknown"),
  ],
)
def test_what_no_tokenizer_can_be_trained_on_is_one_line(texts, options, message):
  with pytest.raises(ValueError, match=message):
    train_sentencepiece(texts, **({"model_type": "char", "vocab_size": 50} | options))


def test_unknown_characters_are_said_once_and_texts_of_them_are_refused(model, caplog):
  tokenizer = SentencePieceTokenizer(model)
  turns = [{"role": "user", "content": "12 \u6f22 3"}]
  for _ in range(2):
    tokenizer.prompt(turns, "")
    tokenizer.completion("\u6f22\u5b57 4 5 6")
  assert [message.split(";")[0] for message in caplog.messages] == [
    "the tokenizer does not know '\u6f22'",
    "the tokenizer does not know '\u6f22', '\u5b57'",
  ]
  with pytest.raises(ValueError, match="does not know most of the text '\u6f22\u5b571'"):
    tokenizer.prompt([{"role": "user", "content": "\u6f22\u5b571"}], "")
  assert tokenizer.unknown("a\u5b57b\u6f22\u5b57") == ["\u5b57", "\u6f22"]
  with pytest.raises(ValueError, match="is not Unicode"):
    tokenizer.prompt([{"role": "user", "content": "\ud800"}], "")


def test_no_ordinary_text_makes_a_mask_a_stop_or_an_unknown(tokenizer):
  special = {tokenizer.mask_id, tokenizer.pad_id, tokenizer.bos_id, 0}
  assert len(special) == 4
  for text in [*TEXTS, *SAMPLES, "mask", "<mask>", "< mask >", "</s>", "<s>", "<unk>"]:
    assert not special & set(tokenizer.completion(text)[:-1])


def test_a_prompt_is_a_start_token_the_turns_and_the_prefill(tokenizer):
  turns = [{"role": "user", "content": "12\n"}, {"role": "user", "content": " 3"}]
  ids = tokenizer.prompt(turns, "ab")
  assert ids == [tokenizer.bos_id, *tokenizer.completion("12\n 3ab")[:-1]]
  assert tokenizer.decode_all([ids]) == ["12\n 3ab"]
  assert tokenizer.prompt([], "") == [tokenizer.bos_id]


def test_a_completion_ends_with_the_one_stop_id_which_pads(tokenizer):
  ids = tokenizer.completion("12")
  assert ids[-1] == tokenizer.pad_id
  assert ids.count(tokenizer.pad_id) == 1
  assert tokenizer.stop_ids == (tokenizer.pad_id,)


def test_special_ids_decode_as_documented_and_ids_beyond_the_model_as_nothing(tokenizer):
  a, b = tokenizer.completion("ab")[:2]
  rows = [
    [tokenizer.bos_id, a, tokenizer.pad_id, tokenizer.pad_id],
    [a, tokenizer.mask_id, b],
    [a, tokenizer.vocab, b, tokenizer.vocab + 7, 126_335],
    [],
    [tokenizer.vocab],
  ]
  assert tokenizer.decode_all(rows) == ["a", "ab", "ab", "", ""]


def test_decode_all_of_empty_rows_and_of_none(tokenizer):
  a = tokenizer.completion("a")[0]
  assert tokenizer.decode_all([[], [a]]) == ["", "a"]
  assert tokenizer.decode_all([[]]) == [""]
  assert tokenizer.decode_all([]) == []


def plain_model() -> bytes:
  """A model without a mask piece, with the library's own defaults otherwise."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(TEXTS),
    model_writer=model,
    model_type="char",
    vocab_size=100,
    hard_vocab_limit=False,
    minloglevel=2,
  )
  return model.getvalue()


def test_the_mask_of_a_model_without_one_is_the_first_new_id():
  tokenizer = SentencePieceTokenizer(plain_model())
  size = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model).vocab_size()
  assert (tokenizer.mask_id, tokenizer.vocab) == (size, size + 1)
  ids = tokenizer.completion(f"0{MASK_PIECE}1")
  assert size not in ids
  assert tokenizer.decode_all([[size, *tokenizer.completion("01")]]) == ["01"]


def test_a_model_that_we_train_is_the_one_file_that_makes_it(tokenizer, model):
  assert tokenizer.files == {"tokenizer.model": model}
  assert isinstance(tokenizer, Tokenizer)


def config_file(**config) -> dict[str, bytes]:
  return {"config.json": json.dumps(config).encode()}


def test_config_json_names_ids_of_a_sentencepiece_folder(tmp_path, model):
  write_files(tmp_path, {"tokenizer.model": model} | config_file(mask_token_id=7, eos_token_id=[9, 2], steps=3))
  tokenizer = load(tmp_path)
  assert isinstance(tokenizer, SentencePieceTokenizer)
  assert (tokenizer.mask_id, tokenizer.stop_ids, tokenizer.pad_id) == (7, (9, 2), 9)
  assert tokenizer.decode_all([[7, 9, 2]]) == [""]
  assert set(tokenizer.files) == {"tokenizer.model", "config.json"}
  again = from_files(tokenizer.files)
  assert (again.mask_id, again.stop_ids, again.vocab) == (7, (9, 2), tokenizer.vocab)
  piece = sentencepiece.SentencePieceProcessor(model_proto=model).id_to_piece(7)
  with pytest.raises(ValueError, match=r"becomes the mask \(id 7\)"):
    tokenizer.prompt([], piece)


def test_a_config_json_that_names_no_ids_is_no_part_of_a_tokenizer(tmp_path, model):
  write_files(tmp_path, {"tokenizer.model": model} | config_file(seed=0, model={"size": "tiny"}))
  tokenizer = load(tmp_path)
  assert tokenizer is not None
  assert tokenizer.files == {"tokenizer.model": model}
  assert tokenizer.completion("12") == SentencePieceTokenizer(model).completion("12")


def test_a_chat_template_beside_a_sentencepiece_model_is_refused(tmp_path, model):
  write_files(tmp_path, {"tokenizer.model": model, "chat_template.jinja": b"x"})
  with pytest.raises(ValueError, match=r"a chat template beside tokenizer\.model is not supported.*tokenizer\.json"):
    load(tmp_path)


@pytest.mark.parametrize(("content", "what"), [(b"not a model", "not a SentencePiece model"), (b"", "empty")])
def test_a_broken_model_is_named(tmp_path, content, what):
  write_files(tmp_path, {"tokenizer.model": content})
  with pytest.raises(ValueError, match=rf"tokenizer\.model is {what}.*fetch the file again"):
    load(tmp_path)


@pytest.mark.parametrize(("config", "mask"), [({}, 32101), ({"mask_token_id": 32099}, 32099)])
def test_t5_s_model_is_read(tmp_path, config, mask):
  model = (shared_tokenizers() / "t5_sentencepiece_32k.model").read_bytes()
  tokenizer = load(write_files(tmp_path, {"tokenizer.model": model} | config_file(**config)))
  assert tokenizer is not None
  assert (tokenizer.mask_id, tokenizer.stop_ids, tokenizer.pad_id) == (mask, (1,), 0)
  assert tokenizer.vocab == max(32101, mask + 1)
  text = "Twelve plus 30 is 42."
  ids = sentencepiece.SentencePieceProcessor(model_proto=model).encode(text)
  assert tokenizer.completion(text) == [*ids, 1]
  assert tokenizer.decode_all([tokenizer.prompt([{"role": "user", "content": text}], ""), [0, mask, 1]]) == [text, ""]


def test_a_folder_without_tokenizer_files_has_none(tmp_path):
  assert load(tmp_path) is None
  write_files(tmp_path, {"model.safetensors": b"x"} | config_file(mask_token_id=3))
  assert load(tmp_path) is None


@pytest.mark.parametrize("name", ["tokenizer_config.json", "added_tokens.json", "chat_template.jinja"])
def test_a_folder_whose_vocabulary_is_absent_is_named(tmp_path, name):
  write_files(tmp_path, {name: b"{}"})
  with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path))}: there is {name}, but no tokenizer\.json"):
    load(tmp_path)


def test_errors_name_the_folder_and_the_file(tmp_path):
  files = small_files()
  del files["merges.txt"]
  with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path))}: vocab\.json is there, but merges\.txt is not"):
    load(write_files(tmp_path, files))


def test_a_vocabulary_wins_over_a_sentencepiece_model(tmp_path, model):
  tokenizer = load(write_files(tmp_path, small_files() | {"tokenizer.model": model}))
  assert isinstance(tokenizer, ConfinedTokenizer)


def test_a_tokenizer_comes_back_from_a_folder_of_its_own_files(tmp_path):
  first = from_files(small_files(mask_token_id=261))
  again = load(write_files(tmp_path, dict(first.files)))
  assert again is not None
  turns = [{"role": "user", "content": "12 the <|hole|>"}]
  assert again.prompt(turns, "a") == first.prompt(turns, "a")
  assert (again.mask_id, again.stop_ids, again.pad_id, again.vocab) == (261, (258,), 258, 262)
