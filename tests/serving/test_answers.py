"""Texts as they become final: characters, spaces, stop texts, log-probabilities."""

import asyncio
import dataclasses
import functools

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from d1jax.data.tokenizer import SentencePieceTokenizer, train_sentencepiece
from d1jax.serving import protocol
from d1jax.serving.answers import Answer, Inbox, Words, canvas
from d1jax.serving.request import Request, Update
from tests.serving.engines import SERVED, tokenizer, updates, written

TEXTS = ["Hello there, wörld! ", "the cat sat on the mat. ", "12 + 30 = 42\n", "日本 é ✓ "]


@functools.cache
def pieces() -> SentencePieceTokenizer:
  return SentencePieceTokenizer(train_sentencepiece(TEXTS * 20, model_type="bpe", vocab_size=90))


def asked(**fields) -> protocol.Ask:
  body = {"prompt": "a", "temperature": 1.0, "max_tokens": 32} | fields
  return protocol.parse(body, SERVED, chat=False)


def grown(ask: protocol.Ask, ids: list[int], own=None, size: int = 8) -> tuple[Answer, list]:
  """An answer, and its pieces, of blocks of `size`."""
  own = own or tokenizer()
  blocks = -(-ask.tokens // size)
  spec = dataclasses.replace(ask.spec, completion_length=blocks * size, block_length=size, diffusion_steps=blocks)
  answer, found = Answer(ask, own), []
  for update in updates(Request(np.zeros(1, np.int32), spec), ids, own.mask_id, own.stop_ids):
    found.append(answer.feed(update, [update.known]))
    if answer.finish:
      break
  return answer, found


@pytest.mark.parametrize(
  ("said", "fields", "text", "finish", "count"),
  [
    ("abc", {}, "abc", "stop", 4),
    ("a" * 40, {}, "a" * 32, "length", 32),
    ("abcdef", {"max_tokens": 3}, "abc", "length", 3),
    ("abc", {"max_tokens": 3}, "abc", "length", 3),
    ("abc", {"max_tokens": 4}, "abc", "stop", 4),
    ("abcdefg", {"stop": "de"}, "abc", "stop", 5),
    ("abcdefghijkl", {"stop": "hi"}, "abcdefg", "stop", 9),
    ("abcdefghijklmnopqrstuvw", {"stop": "efghijklmnopqrs"}, "abcd", "stop", 19),
    ("abcdefghijkl", {"stop": "hx"}, "abcdefghijkl", "stop", 13),
    ("abcdefgh", {"stop": "hx"}, "abcdefgh", "stop", 9),
    ("xxxxxxxy", {"stop": "xxxy"}, "xxxx", "stop", 8),
    ("aabaabaabaac", {"stop": "aabaac"}, "aabaab", "stop", 12),
    ("abcdefghijkl", {"stop": ["kl", "jk", "ijk"]}, "abcdefgh", "stop", 11),
    ("abc", {"stop": "abc"}, "", "stop", 3),
    ("abc", {"stop": "a", "max_tokens": 1}, "", "stop", 1),
    ("éé" * 3, {"max_tokens": 9}, "éééé", "length", 9),
    ("1234567é", {"stop": "é"}, "1234567", "stop", 9),
    ("1234567✓ok", {}, "1234567✓ok", "stop", 13),
  ],
)
def test_an_answer_ends_where_it_should(said, fields, text, finish, count):
  answer, found = grown(asked(**fields), written(said))
  assert (answer.text, answer.finish, answer.count) == (text, finish, count)
  assert "".join(piece.text for piece in found) == text


def test_what_may_be_a_stop_text_is_held_back_until_it_is_none():
  _, found = grown(asked(stop="hi!"), written("abcdefgh is no greeting"))
  assert [piece.text for piece in found] == ["abcdefg", "h is no g", "reeting"]
  _, found = grown(asked(), written("1234567✓89"))
  assert [piece.text for piece in found] == ["1234567", "✓89"]


IDS = st.lists(st.integers(0, 257), max_size=40)
STOPS = st.lists(st.text("ab\n é", min_size=1, max_size=3), max_size=2)


@hypothesis.given(IDS, STOPS, st.sampled_from((1, 2, 4, 8, 32)), st.integers(1, 32), st.booleans())
def test_parts_make_the_whole_of_any_bytes(ids, stops, size, tokens, logprobs):
  ask = asked(stop=stops or None, max_tokens=tokens, **({"logprobs": 0} if logprobs else {}))
  answer, found = grown(ask, [*ids, 258], size=size)
  whole, _ = grown(ask, [*ids, 258], size=size)
  assert "".join(piece.text for piece in found) == answer.text == whole.text
  assert answer.finish is not None
  assert not any(stop in answer.text for stop in stops)
  read = next((i for i, one in enumerate(ids) if one in tokenizer().stop_ids), len(ids))
  (plain,) = tokenizer().decode_all([ids[: min(read, tokens)]])
  assert plain.startswith(answer.text)
  if not stops:
    assert plain.removeprefix(answer.text) in ("", *("\ufffd" * n for n in (1, 2, 3)))
  if logprobs:
    assert "".join(token.text for piece in found for token in piece.tokens) == answer.text
    placed = [token for piece in found for token in piece.tokens]
    assert all(answer.text[token.start :].startswith(token.text) for token in placed)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_words_keep_their_spaces_and_characters(size):
  ids = pieces().completion("the cat sat there, é ✓ 42\n日本")
  assert len(ids) <= 32
  _, found = grown(asked(), ids, pieces(), size)
  assert "".join(piece.text for piece in found) == "the cat sat there, é ✓ 42\n日本"
  texts = Words(pieces()).texts(ids)
  assert "".join(texts) == "the cat sat there, é ✓ 42\n日本"


def test_log_probabilities_come_with_the_text_of_their_tokens():
  _, found = grown(asked(logprobs=0, stop="hi!"), written("abcdefgh✓"))
  assert [[token.text for token in piece.tokens] for piece in found] == [list("abcdefg"), ["h", "", "", "✓"]]
  assert [token.logp for token in found[0].tokens] == [-0.5 * (i + 1) for i in range(7)]
  assert [token.start for token in found[1].tokens] == [7, 8, 8, 8]


def test_tokens_of_a_stop_text_have_no_log_probability():
  _, found = grown(asked(logprobs=0, stop="cd"), written("abcdef"))
  assert [token.text for piece in found for token in piece.tokens] == ["a", "b"]


def test_a_canvas_has_texts_and_steps_and_holes():
  ids = tokenizer().encode("ab") + [261] * 6
  steps = np.asarray([7, 4, *[-1] * 6], np.int32)
  update = Update(np.asarray(ids, np.int32), steps, np.zeros(8, np.float32), 0, None)
  shown = canvas(update, Words(tokenizer()), 261, 4)
  assert shown == {"step": 2, "tokens": ["a", "b", None, None], "steps": [1, 0, None, None]}


def test_an_inbox_keeps_the_last_update_and_every_length():
  made = updates(Request(np.zeros(1, np.int32), SERVED.sampler), written("a" * 30), 261, (258,))

  async def read():
    inbox = Inbox(2)
    assert await inbox.get(0.001) == []
    for update in made:
      inbox.put(1, update)
    ((index, update, marks),) = await inbox.get(5)
    assert (index, marks) == (1, [8, 16, 24, 31])
    assert update is made[-1]
    assert await inbox.get(0.001) == []

  asyncio.run(read())
