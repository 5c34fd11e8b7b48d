import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d1jax.tasks import TASKS, Countdown, Gsm8k, HendrycksMath, Sudoku, Task, build, common
from d1jax.tasks.base import DataError, Grade


@pytest.mark.parametrize(
  ("text", "answer"),
  [
    ("<answer>1</answer>", "1"),
    ("a <answer>1</answer> b <answer>2</answer> c", "2"),
    ("<answer>1<answer>2</answer>", "2"),
    ("<answer>1</answer> 2</answer>", "1"),
    ("<answer>1</answer><answer>2", "1"),
    ("<answer></answer>", ""),
    ("</answer>1<answer>", "</answer>1<answer>"),
    ("1</answer>", "1</answer>"),
    ("<answer>1", "<answer>1"),
    ("", ""),
    (common.tagged("why", "4 2"), "\n4 2\n"),
  ],
)
def test_final_answer(text, answer):
  assert common.final_answer(text) == answer


@pytest.mark.parametrize(
  ("text", "block"),
  [
    ("<answer>1</answer>", "1"),
    ("a <answer>1</answer> b <answer>2</answer> c", "2"),
    ("<answer>1<answer>2</answer>", "1<answer>2"),
    ("<answer>1</answer> 2</answer>", "1"),
    ("<answer>1</answer><answer>2", "1"),
    ("<answer></answer>", ""),
    ("</answer>1<answer>", None),
    ("1", None),
  ],
)
def test_last_block(text, block):
  assert common.last_block(text) == block


@given(st.lists(st.sampled_from(["<answer>", "</answer>", "1", "\n", "<answer", "\ud800"])).map("".join))
def test_last_block_agrees_with_the_expression_that_it_replaces(text):
  blocks = re.findall("<answer>(.*?)</answer>", text, re.DOTALL)
  assert common.last_block(text) == (blocks[-1] if blocks else None)


@pytest.mark.parametrize(
  ("text", "score"),
  [
    (common.tagged("One.\nTwo.", "7"), 1.0),
    (f"\n {common.tagged('One.', '7')}\n\n", 1.0),
    ("<reasoning></reasoning><answer></answer>", 1.0),
    (common.tagged("One.", "7") + ".", 0.5),
    ("So " + common.tagged("One.", "7"), 0.5),
    ("<reasoning></reasoning> so <answer></answer>", 0.5),
    ("<reasoning><answer></reasoning></answer>", 0.5),
    ("<answer></answer><reasoning></reasoning>", 0.5),
    ("<reasoning></reasoning><answer></answer></answer>", 0.375),
    ("<answer>7</answer>", 0.25),
    ("<answer>1</answer><answer>7</answer>", 0.0),
    ("7", 0.0),
    ("", 0.0),
  ],
)
def test_format_score(text, score):
  assert common.format_score(text) == score


@given(st.lists(st.sampled_from(["<answer>", "</answer>", "1", "\n", "<answer", "\ud800"])))
def test_final_answer_holds_no_whole_block(pieces):
  answer = common.final_answer("".join(pieces))
  assert answer in "".join(pieces)
  if answer != "".join(pieces):
    assert "</answer>" not in answer


def test_final_answer_takes_linear_time():
  # A regular expression with a lazy wildcard needs minutes here.
  text = "<answer>" * 200_000
  assert common.final_answer(text) == text
  assert common.final_answer(text + "</answer>") == ""
  assert common.last_block(text) is None
  assert common.last_block(text + "</answer>") == text.removeprefix("<answer>")


def test_build_makes_every_task():
  sudoku: Task = build("sudoku", seed=3, sizes={"train": 5}, clues=[7, 8])
  assert sudoku == Sudoku(seed=3, sizes={"train": 5}, clues=(7, 8))
  assert len(sudoku.records("train")) == 5
  assert build("countdown", largest=9) == Countdown(largest=9)
  assert build("countdown", sizes=None).sizes == Countdown().sizes
  assert hash(build("sudoku")) == hash(Sudoku())


def test_unknown_names_list_the_known_ones():
  with pytest.raises(ValueError, match="unknown task 'chess'; choose one of: sudoku, countdown, gsm8k, math"):
    build("chess")
  with pytest.raises(ValueError, match=r"unknown option of sudoku 'clue'; .*clues"):
    build("sudoku", clue=(4, 5))
  for task in map(build, TASKS):
    record = {"puzzle": "0" * 16, "solution": "1" * 16, "nums": [1, 2], "target": 3, "answer": "7"}
    record |= {"question": "How many?", "problem": "How many?"}
    with pytest.raises(ValueError, match=r"unknown split 'eval'; .*train, validation, test"):
      task.records("eval")
    for method in (task.prompt, task.demonstration, task.baseline):
      with pytest.raises(ValueError, match="unknown style 'd2'; choose one of: d1, d1_eval, terse"):
        method(record, "d2")


@pytest.mark.parametrize("task", TASKS.values())
@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("seed", -1, "seed is -1; give an integer of at least 0"),
    ("seed", True, "seed is True"),
    ("root", 7, "root is 7; give the data folder's path"),
    ("sizes", {"train": -2}, r"sizes\['train'\] is -2; give an integer of at least 0"),
    ("sizes", {"train": 1.5}, r"sizes\['train'\] is 1.5"),
    ("sizes", {"dev": 1}, "unknown split in .* sizes 'dev'; choose one of: demonstrations"),
  ],
)
def test_bad_shared_fields(task, field, value, message):
  with pytest.raises(ValueError, match=message):
    task(**{field: value})


@pytest.mark.parametrize(
  ("task", "field", "value", "message"),
  [
    (Sudoku, "clues", (3, 9), r"sudoku clues is \(3, 9\); .* 4 <= first <= last <= 15"),
    (Sudoku, "clues", (4, 16), "sudoku clues"),
    (Sudoku, "clues", (9, 8), "sudoku clues"),
    (Sudoku, "clues", 8, "sudoku clues is 8"),
    (Countdown, "numbers", (1, 3), r"countdown numbers .* 2 <= first <= last <= 6"),
    (Countdown, "numbers", (3, 7), "countdown numbers"),
    (Countdown, "largest", 0, "countdown largest is 0"),
    (Countdown, "targets", (0, 5), "1 <= first <= last$"),
    (Countdown, "targets", (5, True), "countdown targets"),
  ],
)
def test_bad_own_fields(task, field, value, message):
  with pytest.raises(ValueError, match=message):
    task(**{field: value})


def test_a_size_of_zero_is_an_empty_split(data_root):
  for task in (Sudoku, Countdown):
    for root in (None, data_root):
      assert list(task(root=root, sizes={"test": 0}).records("test")) == []


def test_a_size_of_zero_needs_no_file(tmp_path):
  for task in (Gsm8k, HendrycksMath):
    assert list(task(root=str(tmp_path), sizes={"test": 0}).records("test")) == []


def test_a_file_may_lack_a_split_of_size_zero(tmp_path):
  (tmp_path / "sudoku").mkdir()
  (tmp_path / "sudoku/train.csv").write_text("Puzzle,Solution\n")
  task = Sudoku(root=str(tmp_path), sizes={"train": 0})
  assert list(task.records("train")) == []
  with pytest.raises(DataError, match="no usable row"):
    task.records("validation")


@pytest.mark.parametrize(("task", "name"), [(Sudoku, "train.csv"), (Countdown, "train.jsonl")])
def test_a_missing_file_that_can_be_done_without(tmp_path, task, name):
  with pytest.raises(DataError, match=f"{name}: not found in .*root to None"):
    task(root=str(tmp_path)).records("train")


@pytest.mark.parametrize(
  ("task", "name"),
  [(Sudoku, "train.csv"), (Countdown, "train.jsonl"), (Gsm8k, "train.jsonl"), (HendrycksMath, "train.jsonl")],
)
def test_missing_empty_and_binary_files(tmp_path, task, name):
  path = tmp_path / task.name / name
  with pytest.raises(DataError, match=f"{name}: not found in .*; point root at the folder that holds it"):
    task(root=str(tmp_path)).records("train")
  path.parent.mkdir()
  path.write_text("")
  with pytest.raises(DataError, match=f"{name}: the file is empty"):
    task(root=str(tmp_path)).records("train")
  path.write_bytes(b"ab\xff")
  with pytest.raises(DataError, match=rf"{name} is not UTF-8 \(byte 2: .*; save it as UTF-8"):
    task(root=str(tmp_path)).records("train")


@pytest.mark.parametrize("content", ["a\nb\n", "\ufeffa\r\nb\r\n", "a\n\nb", "\n \r\na\nb\n\n"])
def test_marks_line_ends_and_blank_lines_are_no_content(tmp_path, content):
  (tmp_path / "x.csv").write_text(content, newline="")
  numbers, lines = zip(*common.read_lines(str(tmp_path), "x.csv"), strict=True)
  assert lines == ("a", "b")
  assert [content.split("\n")[number - 1].strip("\ufeff\r") for number in numbers] == ["a", "b"]


def test_a_table_of_another_program_is_read(tmp_path):
  """With a byte-order mark, carriage returns and a blank line at the end, as Excel writes it."""
  (tmp_path / "sudoku").mkdir()
  solved = list(Sudoku(sizes={"train": 3}).records("train"))
  rows = "\r\n".join(f"{one['puzzle']},{one['solution']}" for one in solved)
  (tmp_path / "sudoku/train.csv").write_bytes(f"\ufeffPuzzle,Solution\r\n{rows}\r\n\r\n".encode())
  assert list(Sudoku(root=str(tmp_path), sizes={"train": 3}).records("train")) == solved


def test_a_completion_follows_the_prefill_of_evaluations():
  whole = "<reasoning>\nwhy\n</reasoning>\n<answer>\n7\n</answer>"
  assert common.tagged("why", "7") == whole
  assert common.PREFILL + common.tagged("why", "7", "d1_eval") == whole


def test_check_fields():
  row = {"a": 1, "b": None, "c": 3}
  assert common.check_fields("here", row, {"a": "1", "b": "2"}) is row
  for bad in ({"a": 1}, [1, 2], None, "a b"):
    with pytest.raises(DataError, match=r'^here: expected {"a": 1, "b": "x"}, got ') as error:
      common.check_fields("here", bad, {"a": "1", "b": '"x"'})
    assert str(bad) in str(error.value)


def test_split_hash_is_of_the_content_in_order():
  records = [{"nums": [3, 25], "target": 68}, {"question": "Was\u00df?\ud800", "answer": None}]
  # sha256 of the two lines of JSON, computed by sha256sum.
  assert common.split_hash(records) == "cd0da098c46d4ef7c84601745d3b22aaea3596afcaa38d5ac9cc2eae20546a62"
  assert common.split_hash([dict(reversed(record.items())) for record in records]) == common.split_hash(records)
  assert common.split_hash(tuple(records)) == common.split_hash(records)
  assert common.split_hash([{**records[0], "nums": (3, 25)}, records[1]]) == common.split_hash(records)
  changed = [records[::-1], records[:1], [*records, {}], [{**records[0], "nums": [325]}, records[1]], []]
  assert len({common.split_hash(other) for other in (records, *changed)}) == 6


def test_reward_is_the_sum_of_components():
  assert Grade({"a": 0.25, "b": 1.0}, {}).reward == 1.25
