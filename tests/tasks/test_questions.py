import json
import logging

import pytest

from d1jax.tasks import DataError, questions

FILES = ("toy/train.jsonl", "toy/extra.jsonl", "toy/test.jsonl")


def parse(place: str, row: dict):
  if row.get("bad"):
    raise DataError(f"{place}: bad")
  return None if row.get("left out") else {**row, "place": place}


def read(root, split, count=questions.EVERYTHING):
  return questions.read("toy", root, split, count, files=FILES, key="question", parse=parse)


@pytest.fixture
def root(tmp_path):
  (tmp_path / "toy").mkdir()
  for name, start, stop in zip(FILES, (0, 1000, 1300), (1000, 1300, 1320), strict=True):
    lines = [json.dumps({"question": f"How many is {number}?"}) for number in range(start, stop)]
    (tmp_path / name).write_text("\n".join(lines) + "\n")
  return str(tmp_path)


def texts(records) -> list[str]:
  return [record["question"] for record in records]


def test_every_question_has_one_split(root):
  train, validation = texts(read(root, "train")), texts(read(root, "validation"))
  assert set(train).isdisjoint(validation)
  assert {*train, *validation} == {f"How many is {number}?" for number in range(1300)}
  assert len(train) + len(validation) == 1300
  assert 65 - 32 < len(validation) < 65 + 32  # four standard deviations
  assert texts(read(root, "demonstrations")) == train
  assert texts(read(root, "test")) == [f"How many is {number}?" for number in range(1300, 1320)]


def test_the_first_records_are_a_fair_sample(root):
  for split in ("train", "validation"):
    every = read(root, split)
    some = read(root, split, 40)
    assert some == every[:40]
    extra = sum(record["place"].startswith(FILES[1]) for record in some)
    assert 0 < extra < 40


def test_order_and_other_rows_do_not_move_a_question(root, tmp_path):
  before = texts(read(root, "validation"))
  path = tmp_path / FILES[0]
  lines = path.read_text().splitlines()
  path.write_text("\n".join(lines[::-1][:500]) + "\n")
  after = texts(read(root, "validation"))
  assert after == [text for text in before if text in after]
  assert 0 < len(after) < len(before)


@pytest.mark.parametrize("split", ["demonstrations", "train", "validation"])
def test_no_other_split_has_a_question_of_the_test_file(split, root, tmp_path, caplog):
  before = texts(read(root, split))
  leaked = [before[0], before[1].upper(), before[2].replace(" ", " \n ")]
  with (tmp_path / FILES[2]).open("a") as file:
    file.write("".join(json.dumps({"question": text}) + "\n" for text in leaked))
  assert texts(read(root, split)) == before[3:]
  assert "left out 0 rows without an answer, 0 repeated ones and 3 test questions" in caplog.text
  assert texts(read(root, "test"))[-3:] == leaked
  with (tmp_path / FILES[2]).open("a") as file:
    file.write('{"bad": 1}\n')
  with pytest.raises(DataError, match=r"^toy/test\.jsonl line 24: bad"):
    read(root, split)
  (tmp_path / FILES[2]).unlink()
  assert texts(read(root, split)) == before


def test_questions_that_differ_in_blanks_and_case_are_one(root, tmp_path):
  with (tmp_path / FILES[1]).open("a") as file:
    file.write('{"question": "HOW many is  7?"}\n')
  both = texts(read(root, "train")) + texts(read(root, "validation"))
  assert len(both) == 1300
  assert "How many is 7?" in both


def test_a_further_file_may_be_missing_and_the_others_not(root, tmp_path):
  (tmp_path / FILES[1]).unlink()
  assert len(read(root, "train")) + len(read(root, "validation")) == 1000
  (tmp_path / FILES[0]).unlink()
  with pytest.raises(DataError, match=r"toy/train.jsonl: not found in .*; point root at the folder that holds it$"):
    read(root, "train")
  assert len(read(root, "test")) == 20
  (tmp_path / FILES[2]).unlink()
  with pytest.raises(DataError, match=r"toy/test.jsonl: not found"):
    read(root, "test")


@pytest.mark.parametrize(("split", "name"), [("train", "train"), ("validation", "train"), ("test", "test")])
def test_no_root_names_the_file_and_the_option(split, name):
  message = rf"toy root is None, .*set root \(config.data.root\) to the folder that holds toy/{name}.jsonl, or to 'hub'"
  with pytest.raises(ValueError, match=message):
    read(None, split)


def test_rows_are_left_out_counted_and_located(root, tmp_path, caplog):
  with caplog.at_level(logging.WARNING):
    read(root, "train")
  assert not caplog.records
  path = tmp_path / FILES[2]
  rows = [{"question": "a", "n": 1}, {"left out": 1}, {"question": "b"}, {"question": "a", "n": 2}]
  path.write_text("\n".join(map(json.dumps, rows)) + "\n")
  records = read(root, "test")
  assert records == ({"question": "a", "n": 1, "place": "toy/test.jsonl line 1"}, records[1])
  assert records[1]["question"] == "b"
  assert "left out 1 rows without an answer, 1 repeated ones and 0 test questions" in caplog.text
  with path.open("a") as file:
    file.write(json.dumps({"bad": 1}) + "\n")
  with pytest.raises(DataError, match=r"^toy/test\.jsonl line 5: bad"):
    read(root, "test")


def test_sizes_of_zero_and_splits_without_rows(root, tmp_path):
  assert read(root, "test", 0) == ()
  (tmp_path / FILES[2]).write_text('{"left out": 1}\n')
  with pytest.raises(DataError, match=r"toy/test.jsonl: no usable row belongs to the split 'test'"):
    read(root, "test")
  with pytest.raises(ValueError, match="unknown split 'eval'"):
    read(root, "eval")


@pytest.mark.parametrize(
  ("value", "message"),
  [
    (7, "^here: a is '7', expected a text"),
    (None, "a is 'None', expected a text"),
    (" \n", "a is blank; fill it in"),
    ("ab\ud800", "a has half a surrogate pair at character 2"),
  ],
)
def test_check_texts(value, message):
  questions.check_texts("here", {"a": "1", "b": value}, ["a"])
  with pytest.raises(DataError, match=message):
    questions.check_texts("here", {"a": value}, ["a"])


def test_some_texts_may_be_blank():
  questions.check_texts("here", {"a": ""}, ["a"], blank=["a"])
