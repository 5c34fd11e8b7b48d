"""Completions laid out on a grid: pieces of text, lines, colours."""

import re

import numpy as np
import pytest

from d1jax.data import tokenizer as tokenizers
from d1jax.generation import canvas as canvases
from d1jax.generation.canvas import BEHIND, END, GIVEN, NEVER, SCALE, SILENT, Canvas, evenly, layout, pieces, rgb
from d1jax.generation.generate import Generation
from tests.data.folders import small_files

IDS = b'{"mask_token_id": 261, "eos_token_id": 258, "pad_token_id": 258}'
STOP = 258


@pytest.fixture(scope="module")
def reader():
  """A tokenizer of bytes."""
  return tokenizers.from_files(small_files() | {"config.json": IDS})


def spelled(reader, text: str) -> list[int]:
  """The ids of a text without its end."""
  return [i for i in reader.completion(text) if i < STOP]


def generation(tokens: list[int], steps: list[int], length: int, prefill: str = "") -> Generation:
  return Generation("?", 0, 0, prefill, "", np.asarray(tokens), length, np.asarray(steps))


def drawn(lines) -> list[str]:
  return ["".join(glyph.text for glyph in line) for line in lines]


@pytest.mark.parametrize("text", ["a cat", "né", "日本", "a😀b", "x\n\ny  z", ""])
def test_pieces_are_the_text_and_a_character_belongs_to_its_last_byte(reader, text):
  found = pieces(reader, spelled(reader, text))
  assert "".join(found) == text
  assert len(found) == len(text.encode())
  assert [piece for piece in found if piece] == list(text)


def test_pieces_of_bytes_that_are_no_text_are_the_text_all_the_same(reader):
  ids = [*spelled(reader, "a"), spelled(reader, "é")[0], *spelled(reader, "b")]
  assert "".join(pieces(reader, ids)) == reader.decode_all([ids])[0] == "a\ufffdb"


@pytest.mark.parametrize("text", ["né日本a😀b" * 8, "é" * 70])
def test_the_pieces_of_a_long_text_are_those_of_its_whole_beginnings(reader, text):
  ids = spelled(reader, text)
  assert len(ids) > 2 * canvases.NEAR
  assert "".join(pieces(reader, ids)) == text
  assert [piece for piece in pieces(reader, ids) if piece] == list(text)


def test_a_tokenizer_that_joins_words_has_the_same_text():
  model = tokenizers.train_sentencepiece(["the cat sat", "on the mat"] * 20, model_type="unigram", vocab_size=40)
  joined = tokenizers.SentencePieceTokenizer(model)
  ids = joined.completion("the mat sat on the cat")[:-1]
  assert "".join(pieces(joined, ids)) == "the mat sat on the cat"


def test_a_canvas_of_a_completion_that_ended_early(reader):
  ids = [*spelled(reader, "né"), STOP, *spelled(reader, "xyz")]
  found = canvases.of(generation(ids, [9, 2, 2, 4, 4, -1, -1], length=4, prefill="so "), reader)
  assert found.texts == ("so ", "n", SILENT, "é", END, BEHIND, BEHIND, BEHIND)
  # Steps are counted without gaps: those between were of other rows, or of schedules that needed fewer.
  np.testing.assert_array_equal(found.steps, [GIVEN, 2, 0, 0, 1, 1, NEVER, NEVER])
  assert found.total == 3
  assert [found.progress(step) for step in (GIVEN, 0, 2)] == [
    ("step 0 of 3", "0 of 7 tokens"),
    ("step 1 of 3", "2 of 7 tokens"),
    ("step 3 of 3", "5 of 7 tokens"),
  ]


def test_a_canvas_without_an_end_or_without_text(reader):
  open_ended = canvases.of(generation(spelled(reader, "abc"), [0, 1, 2], length=3), reader)
  assert open_ended.texts == ("a", "b", "c")
  at_once = canvases.of(generation([STOP, STOP], [0, 0], length=1), reader)
  assert at_once.texts == (END, BEHIND)
  assert at_once.total == 1


def test_lines_break_between_words_and_at_line_breaks():
  texts = ["The qu", "ick brown ", "fox\nju", "mps", "\n\n", "over"]
  lines = layout(texts, 10)
  assert drawn(lines) == ["The quick ", "brown fox↵", "jumps↵", "↵", "over"]
  assert "".join(drawn(lines)).replace("↵", "\n") == "".join(texts)
  assert [glyph.token for glyph in lines[0]] == [0] * 6 + [1] * 4


@pytest.mark.parametrize("columns", [1, 2, 5, 17, 80])
def test_no_line_is_wider_than_asked_but_for_what_hangs(columns):
  text = "word  " * 3 + "extraordinarily-long-word-without-any-break 日本語のテキスト\n" + "." * 200
  lines = layout([text], columns)
  for line in lines:
    kept = "".join(glyph.text for glyph in line).rstrip(" ↵")
    assert sum(glyph.columns for glyph in line[: len(kept)]) <= max(columns, 2)
  assert "".join(drawn(lines)).replace("↵", "\n") == text


def test_wide_characters_take_two_columns_and_marks_none():
  (line,) = layout(["e", "\u0301", "日"], 10)
  assert [(glyph.text, glyph.columns, glyph.token) for glyph in line] == [("e\u0301", 1, 0), ("日", 2, 2)]


@pytest.mark.parametrize("char", ["\x1b", "\r", "\t", "\x00", "\u202e", "\u200b", "\u2028", "\x9b"])
def test_what_would_steer_a_terminal_is_replaced(char):
  (line,) = layout([f"a{char}b"], 10)
  assert drawn([line]) == ["a\ufffdb"]


def test_some_of_many_steps_are_evenly_spaced_up_to_the_last():
  assert evenly(range(5), 16) == [0, 1, 2, 3, 4]
  assert evenly(range(128), 16) == [7 + 8 * i for i in range(16)]
  assert evenly(range(17), 16)[-1] == 16
  assert len(set(evenly(range(17), 16))) == 16


def test_colours_run_from_one_end_of_the_scale_to_the_other():
  canvas = Canvas("", ("a",) * 20, np.arange(20))
  shades = [canvas.shade(token) for token in range(20)]
  assert shades == sorted(shades)
  assert set(shades) == set(range(len(SCALE)))
  assert Canvas("", ("a",), np.asarray([0])).shade(0) == 0


def luminance(color: tuple[int, int, int]) -> float:
  """Of WCAG 2."""
  linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (x / 255 for x in color)]
  return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def test_every_colour_is_readable_on_black_and_on_white():
  for shade in range(len(SCALE)):
    own = luminance(rgb(shade))
    assert (own + 0.05) / 0.05 >= 4.5
    assert 1.05 / (own + 0.05) >= 2.5
  assert len({rgb(shade) for shade in range(len(SCALE))}) == len(SCALE)


def test_colours_are_those_of_the_terminal():
  assert rgb(0) == (0, 135, 255)
  assert rgb(len(SCALE) - 1) == (215, 135, 0)
  assert all(re.fullmatch(r"\d+", str(number)) and 16 <= number < 232 for number in SCALE)
