import io

import pytest
import sentencepiece

from d1jax.data.tokenizer import MASK_PIECE, SentencePieceTokenizer, train_sentencepiece

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


def test_a_model_without_a_mask_is_refused():
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(TEXTS),
    model_writer=model,
    model_type="char",
    vocab_size=100,
    hard_vocab_limit=False,
    minloglevel=2,
  )
  with pytest.raises(ValueError, match=MASK_PIECE):
    SentencePieceTokenizer(model.getvalue())
