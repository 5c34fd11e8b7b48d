"""Rows of the user's own data."""

import json

import pytest

from d1jax.data.examples import Example, form_of, json_lines, parse

USER, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
CHAT, PAIR, TEXT = {"messages": [USER, ANSWER]}, {"prompt": "Why?", "response": "So."}, {"text": "Once upon"}


def rows(*values):
  return [(f"mine.jsonl line {i}", value) for i, value in enumerate(values, 1)]


def test_each_turn_of_the_assistant_is_an_example_with_all_turns_before_it():
  system, more = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Really?", "name": "x"}
  found = parse(rows({"messages": [system, USER, ANSWER, more, ANSWER], "source": 3}, CHAT))
  plain = {"role": "user", "content": "Really?"}
  assert found == [
    Example("mine.jsonl line 1", "Why?", [system, USER], "So."),
    Example("mine.jsonl line 1", "Why?", [system, USER, ANSWER, plain], "So."),
    Example("mine.jsonl line 2", "Why?", [USER], "So."),
  ]


def test_pairs_and_texts():
  assert parse(rows(PAIR)) == [Example("mine.jsonl line 1", "Why?", ({"role": "user", "content": "Why?"},), "So.")]
  assert parse(rows(TEXT)) == [Example("mine.jsonl line 1", "Once upon", (), "Once upon")]


def test_of_several_forms_the_first_counts():
  assert form_of(CHAT | PAIR | TEXT) == "messages"
  assert form_of({"messages": None} | PAIR | TEXT) == "prompt and response"
  assert form_of({"prompt": "Why?"} | TEXT) == "text"
  assert form_of({"prompt": "Why?"}) is form_of([1]) is None


def chat(*turns):
  return {"messages": list(turns)}


@pytest.mark.parametrize(
  ("values", "message"),
  [
    (
      [PAIR, CHAT],
      r"line 2: has messages, but mine.jsonl line 1 has prompt and response, .*may name a folder of files",
    ),
    (
      [TEXT, {"prompt": "Why?"}],
      r"line 2: mine.jsonl line 1 has text, and a file has rows of one kind: correct the row",
    ),
    ([TEXT, [1]], r"line 2: mine.jsonl line 1 has text, and a file has rows of one kind"),
    ([{"text": " \n"}], r"line 1: text is blank; fill it in, or remove the row"),
    ([{"text": 3}], r"line 1: text is a JSON int, expected a string; correct the row"),
    ([{"text": "a\ud800"}], r"line 1: text holds half of a surrogate pair"),
    ([PAIR | {"response": ""}], r"line 1: response is blank; fill it in"),
    ([PAIR | {"prompt": [USER]}], r"line 1: prompt is a JSON list, expected a string"),
    (
      [CHAT | {"messages": "Why?"}],
      r"line 1: messages is a JSON str, expected a list of \{.role.: .*; correct the row",
    ),
    ([chat(USER, "So.")], r"line 1: messages\[1\] is 'So.', expected a list of"),
    ([chat({"from": "human", "value": "Why?"})], r"line 1: messages\[0\] is .*, expected a list of"),
    ([chat({"role": 3, "content": "x"})], r"line 1: messages\[0\].role is a JSON int"),
    ([chat({"role": "user", "content": [{"type": "text"}]})], r"messages\[0\].content is a JSON list"),
    ([chat(USER, {"role": "assistant", "content": " "})], r"messages\[1\].content is blank; fill it in"),
    ([chat(USER)], r"line 1: messages has no turn of the role 'assistant', .*; add one, or remove the row"),
    ([chat()], r"line 1: messages has no turn of the role 'assistant'"),
    ([chat(ANSWER)], r"line 1: messages begins with the assistant, .*; put a turn of the user before it"),
  ],
)
def test_a_wrong_row_is_one_line_with_its_place(values, message):
  with pytest.raises(ValueError, match=message) as caught:
    parse(rows(*values))
  assert str(caught.value).startswith("mine.jsonl line ")
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (None, "mine.jsonl is missing, expected a file; check the path"),
    (b"\n \n", "mine.jsonl: the file is empty; fetch it again"),
    (b'{"text": "a"}\n{"text": "b"\n', r"mine.jsonl line 2 is not JSON \(.*\); write one object a line"),
    (b"\xff\xfe", "mine.jsonl is not UTF-8 .*; check the path, its rights, and that it is UTF-8 text"),
  ],
)
def test_a_wrong_file_is_one_line(tmp_path, content, message):
  path = tmp_path / "mine.jsonl"
  if content is not None:
    path.write_bytes(content)
  with pytest.raises(ValueError, match=message) as caught:
    list(json_lines(path))
  assert "\n" not in str(caught.value)


def test_lines_have_their_numbers(tmp_path):
  (tmp_path / "mine.jsonl").write_text(f"\n{json.dumps(TEXT)}\n\n{json.dumps(PAIR)}")
  assert [place.rpartition(" ")[2] for place, _ in json_lines(tmp_path / "mine.jsonl")] == ["2", "4"]
