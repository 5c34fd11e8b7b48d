import collections
import functools
import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d1jax.tasks import DataError, Sudoku, sudoku_grids

SIZES = {"demonstrations": 400, "train": 3000, "validation": 120, "test": 220}
RECORD = {"puzzle": "0321003004002100", "solution": "4321123434122143"}
ZERO = {"constraints": 0.0, "solved": 0.0}

text_or_marks = st.text() | st.lists(
  st.sampled_from(["<answer>", "</answer>", " ", "1", "2", "3", "4", "0", "\0", "\ud800", "１"])
).map("".join)


@functools.cache
def generated(split: str, seed: int = 0):
  return Sudoku(seed=seed, sizes=SIZES).records(split)


def solutions(puzzle: str) -> list[str]:
  """All solutions by plain search, at most two."""
  cell = puzzle.find("0")
  if cell < 0:
    return [puzzle]
  row, column = divmod(cell, 4)
  found = []
  for digit in "1234":
    peers = (
      puzzle[other]
      for other in range(16)
      if other // 4 == row or other % 4 == column or (other // 8, other % 4 // 2) == (row // 2, column // 2)
    )
    if digit not in peers:
      found += solutions(puzzle[:cell] + digit + puzzle[cell + 1 :])
    if len(found) > 1:
      break
  return found[:2]


def write_rows(tmp_path, *rows: str, header: str = "Puzzle,Solution") -> str:
  (tmp_path / "sudoku").mkdir()
  (tmp_path / "sudoku/train.csv").write_text("\n".join([header, *rows]) + "\n")
  return str(tmp_path)


# Records.


def test_the_searching_solver_of_this_test():
  assert solutions(RECORD["puzzle"]) == [RECORD["solution"]]
  assert len(solutions("1" + "0" * 15)) == 2
  assert solutions("1100" + "0" * 12) == []


@pytest.mark.parametrize("split", SIZES)
def test_every_generated_puzzle_has_one_solution(split):
  records = generated(split)
  assert len(records) == SIZES[split]
  for record in records[:400]:
    assert solutions(record["puzzle"]) == [record["solution"]]
  assert len({record["puzzle"] for record in records}) == len(records)


def check_no_leak(records_of, held_out):
  puzzles = {split: {r["puzzle"] for r in records_of(split)} for split in SIZES}
  grids = {split: {r["solution"] for r in records_of(split)} for split in SIZES}
  assert grids["test"] <= held_out
  for split in ("demonstrations", "train", "validation"):
    assert grids[split]
    assert not grids[split] & held_out
  assert not grids["validation"] & (grids["train"] | grids["demonstrations"])
  assert not puzzles["train"] & puzzles["demonstrations"]


def test_no_leak_generated_or_read(data_root):
  with open(f"{data_root}/sudoku/held_out_grids.txt") as file:
    held_out = set(file.read().split())
  check_no_leak(generated, held_out)
  big = {"train": 9000, "demonstrations": 9000, "validation": 9000}
  read = functools.cache(Sudoku(root=data_root, sizes=big).records)
  check_no_leak(read, held_out)
  # Nothing of the file is lost, and a run that generates can be mixed with one that reads.
  assert sum(len(read(split)) for split in big) == 13_836
  train = {record["puzzle"] for record in read("train")}
  assert not train & {r["puzzle"] for r in Sudoku(seed=5).records("demonstrations")}
  for record in read("train")[:300]:
    assert solutions(record["puzzle"]) == [record["solution"]]


def test_test_split_is_generated_when_the_file_has_none(data_root, tmp_path):
  task = Sudoku(root=data_root, sizes=SIZES, seed=2)
  assert task.records("test") == generated("test", seed=2)
  held_out = generated("test")[3]
  root = write_rows(tmp_path, f"{held_out['puzzle']},{held_out['solution']}")
  assert list(Sudoku(root=root).records("test")) == [held_out]
  with pytest.raises(DataError, match=r"train.csv: no usable row .* 'train'; .*sizes\['train'\]"):
    Sudoku(root=root).records("train")


def test_rows_keep_the_order_of_the_file(data_root):
  with open(f"{data_root}/sudoku/train.csv") as file:
    order = [line[:16] for line in file][1:]
  read = [r["puzzle"] for r in Sudoku(root=data_root, sizes={"train": 500}).records("train")]
  assert len(read) == 500
  places = [order.index(puzzle) for puzzle in read]
  assert places == sorted(places)


@pytest.mark.few(1, reason="each case draws all puzzles")
@pytest.mark.parametrize("split", SIZES)
def test_draws_are_deterministic_and_grow_at_the_end(split):
  fewer = Sudoku(sizes={split: SIZES[split] // 3}).records(split)
  assert list(fewer) == list(generated(split)[: SIZES[split] // 3])
  assert generated(split, seed=1)[:50] != generated(split)[:50]


def test_a_caller_cannot_change_later_records():
  task = Sudoku(sizes=SIZES)
  first = task.records("validation")[0]
  kept = dict(first)
  first["puzzle"] = "x"
  assert task.records("validation")[0] == kept


def test_grids_occur_equally_often():
  for split, grids in (("test", 88), ("validation", 40), ("demonstrations", 160)):
    for size in (SIZES[split], grids - 7):
      counts = collections.Counter(r["solution"] for r in generated(split)[:size])
      assert len(counts) == min(size, grids)
      assert max(counts.values()) - min(counts.values()) <= 1


def chi_square(counts, expected):
  return sum((count - expected) ** 2 / expected for count in counts)


def test_clue_counts_are_uniform():
  for split in ("train", "demonstrations"):
    counts = collections.Counter(16 - r["puzzle"].count("0") for r in generated(split))
    assert sorted(counts) == [6, 7, 8, 9, 10]
    # 4 degrees of freedom: 23.5 has probability 1e-4.
    assert chi_square(counts.values(), SIZES[split] / 5) < 23.5


def test_training_puzzles_are_uniform_given_the_clue_count():
  records = Sudoku(sizes={"train": 6000}, clues=(6, 6)).records("train")
  stock = [len(puzzles_with(6, grid)) for grid in sudoku_grids.TRAINING_GRIDS]
  counts = collections.Counter(record["solution"] for record in records)
  statistic = sum(
    (counts[sudoku_grids.GRIDS[grid]] - 6000 * share / sum(stock)) ** 2 / (6000 * share / sum(stock))
    for grid, share in zip(sudoku_grids.TRAINING_GRIDS, stock, strict=True)
  )
  assert statistic < 240  # 159 degrees of freedom; probability about 1e-5.
  # Cells are clues equally often.
  cells = [sum(record["puzzle"][cell] != "0" for record in records) for cell in range(16)]
  assert max(cells) - min(cells) < 6000 * 0.06


def puzzles_with(clues: int, grid: int):
  codes = sudoku_grids.grid_puzzles("train", grid)
  return codes[sudoku_grids.clue_counts()[codes & 0xFFFF] == clues]


def test_more_than_there_are_is_an_error():
  exist = sum(
    (sudoku_grids.clue_counts()[sudoku_grids.grid_puzzles("test", grid) & 0xFFFF] == 4).sum()
    for grid in sudoku_grids.TEST_GRIDS
  )
  every = Sudoku(sizes={"test": int(exist)}, clues=(4, 4)).records("test")
  assert len({record["puzzle"] for record in every}) == exist
  with pytest.raises(DataError, match=rf"sizes\['test'\] is {exist + 1}, but only {exist} puzzles"):
    Sudoku(sizes={"test": int(exist) + 1}, clues=(4, 4)).records("test")


# Files.

GOOD = f"{RECORD['puzzle']},{RECORD['solution']}"


@pytest.mark.parametrize(
  ("row", "message"),
  [
    ("0321003004002100,1234", "line 3: solution '1234' has 4 digits, expected 16"),
    ("321003004002100,4321123434122143", "line 3: puzzle '321003004002100' has 15 digits"),
    (".321003004002100,4321123434122143", "line 3: puzzle .* is not all digits"),
    ("٠321003004002100,4321123434122143", "line 3: puzzle .* is not all digits"),
    ("5321003004002100,4321123434122143", "line 3: puzzle .* digits other than 0, 1, 2, 3, 4"),
    ("0321003004002100,4321123434122140", "line 3: solution .* digits other than 1, 2, 3, 4"),
    ("0321003004002100,4321123434122134", "line 3: solution .* is not a valid grid"),
    ("0322003004002100,4321123434122143", "line 3: clue 2 in cell 4 contradicts .* 1"),
    ("0321003004002100", "line 3: 1 columns, expected 2"),
    (GOOD + ",1", "line 3: 3 columns, expected 2"),
  ],
)
def test_bad_rows(tmp_path, row, message):
  root = write_rows(tmp_path, GOOD, row, GOOD)
  with pytest.raises(DataError, match=f"^sudoku/train.csv {message}") as error:
    Sudoku(root=root).records("train")
  assert "\n" not in str(error.value)


def test_wrong_header(tmp_path):
  root = write_rows(tmp_path, GOOD, header="quizzes,solutions")
  with pytest.raises(DataError, match="line 1: the header is 'quizzes,solutions', expected 'Puz"):
    Sudoku(root=root).records("train")


def test_ambiguous_and_repeated_rows_are_left_out_and_logged(tmp_path, caplog):
  ambiguous = "4321123400000000," + RECORD["solution"]
  assert len(solutions(ambiguous[:16])) == 2
  root = write_rows(tmp_path, ambiguous, GOOD, GOOD)
  splits = ("demonstrations", "train", "validation")
  (split,) = [s for s in splits if sudoku_grids.in_split(s, encode_good())[0]]
  with caplog.at_level(logging.WARNING):
    assert list(Sudoku(root=root).records(split)) == [RECORD]
  assert "1 puzzles with several solutions, 1 repeated ones and 0 test puzzles" in caplog.text


def encode_good():
  return np.array([sudoku_grids.encode(**RECORD)])


# Prompts and completions.


@pytest.mark.parametrize(("style", "prefill"), [("d1", ""), ("d1_eval", "<reasoning>")])
def test_d1_prompts_are_verbatim(style, prefill):
  content = Path(__file__).with_name(f"{style}_sudoku_prompt.txt").read_text()
  assert Sudoku().prompt(RECORD, style) == ([{"role": "user", "content": content}], prefill)


def test_terse_style():
  messages, prefill = Sudoku().prompt(RECORD, "terse")
  words = "0321003004002100abcdefghijklmnop"
  assert (messages, prefill) == ([{"role": "user", "content": words}], "")
  assert Sudoku().demonstration(RECORD, "terse") == "4321123434122143"
  assert Sudoku().baseline(RECORD, "terse") == "1321113114112111"


def test_d1_completions():
  assert Sudoku().demonstration(RECORD, "d1").startswith("<reasoning>\n")
  ending = "\n</reasoning>\n<answer>\n4321123434122143\n</answer>"
  assert Sudoku().demonstration(RECORD, "d1").endswith(ending)
  assert Sudoku().baseline(RECORD, "d1").endswith("<answer>\n1321113114112111\n</answer>")
  for write in (Sudoku().demonstration, Sudoku().baseline):
    assert "<reasoning>" + write(RECORD, "d1_eval") == write(RECORD, "d1")
  assert Sudoku().cluster(RECORD) == RECORD["solution"]


# Grades.


@pytest.mark.parametrize("style", ["d1", "terse"])
def test_demonstrations_earn_everything(style):
  task = Sudoku()
  for record in generated("demonstrations")[:100]:
    grade = task.grade(task.demonstration(record, style), record)
    empty = record["puzzle"].count("0")
    assert grade.components == {"constraints": 1.0, "solved": 1.0}
    assert grade.metrics == {
      "solved": (1, 1),
      "cell_accuracy": (empty, empty),
      "well_formed": (1, 1),
    }
    guess = task.grade(task.baseline(record, style), record)
    assert 0 <= guess.reward < 1
    assert guess.metrics["solved"] == (0, 1)
    right = sum(p == "0" and s == "1" for p, s in zip(*record.values(), strict=True))
    assert guess.metrics["cell_accuracy"] == (right, empty)


@pytest.mark.parametrize(
  ("answer", "satisfied", "right", "well_formed"),
  [
    ("4321123434122143", 12, 9, 1),
    ("432112343412214", 0, 0, 0),
    ("43211234341221433", 0, 0, 0),
    ("1" * 16, 0, 2, 1),
    ("4321123434122134", 10, 7, 1),  # columns 3 and 4 break; row and box stay complete.
    ("5321123434122143", 9, 8, 0),
    ("0321003004002100", 0, 0, 0),
    ("４321123434122143", 0, 0, 0),  # a fullwidth digit
    ("4321-1234-3412-2143", 0, 0, 0),
  ],
)
def test_answers(answer, satisfied, right, well_formed):
  grade = Sudoku().grade(f"so <answer>\n{answer}\n</answer> done", RECORD)
  assert grade.components == {"constraints": satisfied / 12, "solved": float(satisfied == 12)}
  assert grade.metrics == {
    "solved": (int(satisfied == 12), 1),
    "cell_accuracy": (right, 9),
    "well_formed": (well_formed, 1),
  }


@given(st.sampled_from(sudoku_grids.GRIDS), st.lists(st.integers(0, 15), max_size=2), st.data())
def test_constraints_count_rows_columns_and_boxes(grid, cells, data):
  digits = list(grid)
  for cell in cells:
    digits[cell] = data.draw(st.sampled_from("1234"))
  square = np.array(digits).reshape(4, 4)
  boxes = square.reshape(2, 2, 2, 2).swapaxes(1, 2).reshape(4, 4)
  satisfied = sum(len(set(unit)) == 4 for unit in (*square, *square.T, *boxes))
  record = {"puzzle": "0" * 16, "solution": grid}
  grade = Sudoku().grade("".join(digits), record)
  assert grade.components["constraints"] == satisfied / 12


def test_a_changed_clue_spoils_its_three_units():
  # The clue in cell 1 of the solution is turned into an empty cell of an otherwise equal record.
  record = {"puzzle": "3000000000000000", "solution": RECORD["solution"]}
  grade = Sudoku().grade(RECORD["solution"], record)
  assert grade.components == {"constraints": 9 / 12, "solved": 0.0}


def test_another_valid_grid_solves_an_ambiguous_puzzle():
  first, second = solutions("4321123400000000")
  grade = Sudoku().grade(second, {"puzzle": "4321123400000000", "solution": first})
  assert grade.components["solved"] == 1.0


@given(st.sampled_from(sudoku_grids.GRIDS), st.deferred(lambda: st.sampled_from(generated("train"))))
def test_only_the_solution_is_solved(grid, record):
  grade = Sudoku().grade(grid, record)
  assert grade.components["solved"] == float(grid == record["solution"])
  if grid != record["solution"]:
    assert grade.components["constraints"] < 1


@given(text_or_marks)
def test_any_string_gets_a_bounded_grade(text):
  task = pickle.loads(pickle.dumps(Sudoku()))
  grade = task.grade(text, RECORD)
  assert grade == task.grade(text, RECORD)
  assert 0 <= grade.reward <= 2
  assert set(grade.components) == set(ZERO)
  for numerator, denominator in grade.metrics.values():
    assert 0 <= numerator <= denominator


@pytest.mark.parametrize(
  "text",
  ["1" * 1_000_000, "<answer>" * 100_000, "\0" * 16, "\ud800" * 16, "", "²" * 16, "٣" * 16],
  ids=["long", "markers", "nul", "surrogate", "empty", "superscript", "arabic"],
)
def test_hostile_strings_earn_nothing(text):
  assert Sudoku().grade(text, RECORD).components == ZERO
