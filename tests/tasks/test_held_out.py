import json
import re
from pathlib import Path

import pytest

from d1jax.tasks import Countdown, Gsm8k, HendrycksMath, Sudoku, held_out, sudoku_grids
from tests.tasks import make_held_out

TRAINING = ("demonstrations", "train", "validation")


@pytest.fixture(scope="module")
def answers_root(data_root):
  """The data folder, if it has d1's published answers."""
  if not Path(data_root, "generations").is_dir():
    pytest.skip(f"no generations in {data_root}")
  return data_root


@pytest.fixture(scope="module")
def questions(answers_root):
  """The rows of d1's published answers by task."""
  return {task: list(make_held_out.rows(answers_root, name)) for task, (name, _) in make_held_out.FILES.items()}


def test_the_list_is_what_its_script_writes(answers_root):
  assert held_out.FILE.read_text() == make_held_out.contents(answers_root)


def test_the_list_holds_every_question_and_nothing_else(questions):
  counts = {task: len(held_out.listed(task)) for task in questions}
  assert counts == {"gsm8k": 1130, "math": 500, "countdown": 256, "sudoku": 256}
  assert counts == {task: len(rows) for task, rows in questions.items()}
  assert held_out.listed("chess") == frozenset()


def test_normalize_and_fingerprint():
  assert held_out.normalize(" How  MANY\n\tare\u00a0there? ") == "how many are there?"
  assert held_out.normalize("STRASSE") == held_out.normalize("stra\N{LATIN SMALL LETTER SHARP S}e")
  assert held_out.fingerprint("abc") == "ba7816bf8f01cfea"  # FIPS 180-2's example


def poison(tmp_path, name: str, rows: list) -> str:
  """A data folder whose file is these rows."""
  path = tmp_path / name
  path.parent.mkdir(exist_ok=True)
  path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
  return str(tmp_path)


@pytest.mark.parametrize("split", TRAINING)
def test_published_questions_never_train(split, questions, tmp_path, caplog):
  # However they are written, and although there is no test file.
  shout = [{"question": f" {row['question'].upper()}\n", "answer": "#### 1"} for row in questions["gsm8k"]]
  fresh = [{"question": f"Q{n}", "answer": f"#### {n}"} for n in range(100)]
  root = poison(tmp_path, "gsm8k/train.jsonl", shout + fresh)
  found = Gsm8k(root=root).records(split)
  assert found
  assert all(re.fullmatch(r"Q\d+", record["question"]) for record in found)
  assert "0 repeated ones and 1130 test questions" in caplog.text

  caplog.clear()
  spread = [{"problem": row["question"].replace(" ", "  "), "solution": "\\boxed{1}"} for row in questions["math"]]
  fresh = [{"problem": f"P{n}", "solution": "\\boxed{1}"} for n in range(100)]
  found = HendrycksMath(root=poison(tmp_path, "math/train.jsonl", spread + fresh)).records(split)
  assert found
  assert all(re.fullmatch(r"P\d+", record["problem"]) for record in found)
  assert "0 repeated ones and 500 test questions" in caplog.text


def test_published_problems_are_test_problems_of_countdown(questions, tmp_path):
  problems = [row["ground_truth"] for row in questions["countdown"]]
  rows = [{"nums": nums[::-1], "target": target + 1} for nums, target in problems]
  rows += [{"nums": [a, 100, 100], "target": 300} for a in range(1, 99)]
  task = Countdown(root=poison(tmp_path, "countdown/train.jsonl", rows), sizes=dict.fromkeys((*TRAINING, "test"), 999))
  published = {tuple(sorted(nums)) for nums, _ in problems}
  numbers = lambda split: {tuple(sorted(record["nums"])) for record in task.records(split)}
  assert published <= numbers("test")
  for split in TRAINING:
    assert numbers(split)
    assert not numbers(split) & published


@pytest.mark.slow(reason="draws all problems")
def test_generated_countdown_holds_no_published_numbers(questions):
  # Problems of d1's numbers alone are drawn, so that chance cannot hide a leak.
  published = {tuple(sorted(row["ground_truth"][0])) for row in questions["countdown"]}
  small = {nums for nums in published if max(nums) <= 40}
  assert len(small) > 5
  task = Countdown(numbers=(3, 3), largest=40, targets=(1, 100), sizes=dict.fromkeys((*TRAINING, "test"), 1500))
  for split in TRAINING:
    assert not {tuple(sorted(record["nums"])) for record in task.records(split)} & small
  assert {tuple(sorted(record["nums"])) for record in task.records("test")} & small


def unique_clues(sudokus: dict) -> dict[str, str]:
  """The published puzzles that have one solution, with it."""
  fits = lambda puzzle: [grid for grid in sudoku_grids.GRIDS if re.fullmatch(puzzle.replace("0", "."), grid)]
  puzzles = {row["question"].split()[5]: row["ground_truth"] for row in sudokus}
  return {puzzle: solution for puzzle, solution in puzzles.items() if fits(puzzle) == [solution]}


def test_published_puzzles_never_train(questions, tmp_path, caplog):
  unique = unique_clues(questions["sudoku"])
  assert len(unique) == 193  # the other 63 have several solutions
  rows = ["Puzzle,Solution", *(",".join(pair) for pair in unique.items())]
  rows += [f"{solution[:15]}0,{solution}" for solution in dict.fromkeys(unique.values())]
  task = Sudoku(root=poison(tmp_path, "sudoku/train.csv", rows), sizes=dict.fromkeys(TRAINING, 999))
  for split in TRAINING:
    caplog.clear()
    puzzles = {record["puzzle"] for record in task.records(split)}
    assert puzzles
    assert not puzzles & set(unique)
    assert "0 repeated ones and 193 test puzzles" in caplog.text


def test_a_question_in_words_is_known_whatever_its_case_and_blanks(questions):
  for name in ("gsm8k", "math"):
    for row in questions[name][:50]:
      assert held_out.is_listed(f"  {row['question'].upper()}\n"), name
  assert not held_out.is_listed("What is 2 + 2?")
