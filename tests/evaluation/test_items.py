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


def test_a_question_is_named_by_its_content():
  first = items.question_id({"nums": [1, 2], "target": 3})
  assert first == items.question_id(json.loads('{"target": 3, "nums": [1, 2]}'))
  assert first != items.question_id({"nums": [2, 1], "target": 3})
