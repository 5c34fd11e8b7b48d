import dataclasses
import json

import pytest

from d1jax.evaluation import items
from d1jax.evaluation.items import Item

ITEM = Item(
  task="sudoku",
  length=18,
  temperature=0.5,
  seed=1,
  sample=2,
  index=3,
  question="q",
  cluster="c",
  record={"puzzle": "12"},
  text="a\n\u2028\ud800\0</script>",
  answer=None,
  reward=0.25,
  metrics={"solved": (0, 1), "cell_accuracy": (3, 8)},
  tokens=4,
)


def test_any_text_survives_a_line(tmp_path):
  path = tmp_path / "deep" / "arm.jsonl"
  other = dataclasses.replace(ITEM, sample=3, answer="12", text="")
  items.append(path, [ITEM])
  items.append(path, [other])
  assert path.read_bytes().count(b"\n") == 2
  assert items.read(path) == [ITEM, other]


@pytest.mark.parametrize("lost", [1, 7, 40])
def test_a_line_that_was_cut_off_is_left_out_and_mended(tmp_path, lost):
  path = tmp_path / "arm.jsonl"
  items.append(path, [ITEM, dataclasses.replace(ITEM, sample=3)])
  path.write_bytes(path.read_bytes()[:-lost])
  assert items.read(path) == [ITEM]
  items.mend(path)
  whole = path.read_bytes()
  items.mend(path)
  assert path.read_bytes() == whole
  items.append(path, [dataclasses.replace(ITEM, sample=4)])
  assert [item.sample for item in items.read(path)] == [2, 4]


def test_a_file_of_half_a_line_becomes_empty(tmp_path):
  path = tmp_path / "arm.jsonl"
  path.write_text(ITEM.line()[:10])
  items.mend(path)
  assert path.read_bytes() == b""
  assert items.read(path) == []


FIELDS = json.loads(ITEM.line())
NOT_ITEMS = {
  "cut": ITEM.line()[:30].encode(),
  "not UTF-8": b'"\xff"',
  "a list": b"[]",
  "an object": b"{}",
  "null": b"null",
  "deep": b"[" * 100_000,
  "a field too many": json.dumps(FIELDS | {"x": 1}).encode(),
  "a field too few": json.dumps({k: v for k, v in FIELDS.items() if k != "seed"}).encode(),
  "an index of text": json.dumps(FIELDS | {"index": "3"}).encode(),
  "a metric that is no pair": json.dumps(FIELDS | {"metrics": {"solved": 1}}).encode(),
  "a metric of text": json.dumps(FIELDS | {"metrics": {"solved": ["0", "1"]}}).encode(),
}


@pytest.mark.parametrize("name", NOT_ITEMS)
def test_a_damaged_line_is_lost_alone_said_and_kept_aside(tmp_path, name, caplog):
  path, last = tmp_path / "arm.jsonl", dataclasses.replace(ITEM, sample=4)
  path.write_bytes(ITEM.line().encode() + b"\n" + NOT_ITEMS[name] + b"\n\n" + last.line().encode() + b"\n")
  before = path.read_bytes()
  assert items.read(path) == [ITEM, last]
  assert path.read_bytes() == before, "a reader writes nothing"
  items.mend(path)
  items.mend(path)
  assert path.read_bytes() == (ITEM.line() + "\n" + last.line() + "\n").encode()
  assert (tmp_path / "arm.jsonl.damaged").read_bytes() == NOT_ITEMS[name] + b"\n"
  assert [record.message.count("1 lines are no items") for record in caplog.records] == [1]


def test_a_question_is_named_by_its_content():
  first = items.question_id({"nums": [1, 2], "target": 3})
  assert first == items.question_id(json.loads('{"target": 3, "nums": [1, 2]}'))
  assert first != items.question_id({"nums": [2, 1], "target": 3})
