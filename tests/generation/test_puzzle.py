"""Questions that a person types: how they are read and written, what is said of an answer, and the grid of a Sudoku."""

import re

import numpy as np
import pytest
from PIL import Image

from d1jax.generation import board, film, puzzle, terminal
from d1jax.generation.canvas import NEVER, Canvas

PUZZLE, SOLUTION, WRONG = "0300413012003420", "2314413212433421", "2314413212443421"
STEPS = np.asarray([3, 0, 1, 2, 0, 0, 0, 1, 2, 2, 3, 3, 4, 4, 4, 5, 5, NEVER])


def canvas(digits: str) -> Canvas:
  texts = (*digits, "∎", "·")
  return Canvas(PUZZLE, texts, STEPS, board.of(texts, puzzle.read("sudoku", PUZZLE)))


@pytest.mark.parametrize(
  "text", [PUZZLE, ".3..413.12..342.", " 03 00\n41 30\n12 00\n34 20", "0 3|0 0|4 1|3 0|1 2|0 0|3 4|2 0"]
)
def test_a_sudoku_is_read_in_the_forms_that_people_write(text):
  assert puzzle.read("sudoku", text) == {"puzzle": PUZZLE, "solution": SOLUTION}


@pytest.mark.parametrize("text", ["3 25 7 = 68", " 3,25, 7=68 "])
def test_a_countdown_is_read(text):
  assert puzzle.read("countdown", text) == {"nums": [3, 25, 7], "target": 68}


@pytest.mark.parametrize(
  ("task", "text", "message"),
  [
    ("chess", "e4", "task='chess' is unknown; known: sudoku, countdown; without it, a prompt is sent as it is"),
    ("sudoku", "03", "prompt='03' is no Sudoku: write 16 digits from 0 to 4, 0 for empty, like 0300413012003420"),
    ("sudoku", "0" * 16, "is a Sudoku with 288 solutions: give clues that leave one"),
    ("sudoku", "11" + "0" * 14, "is a Sudoku with no solutions: give clues that leave one"),
    ("countdown", "68", "prompt='68' is no Countdown: write numbers and a target, like '3 25 7 = 68'"),
  ],
)
def test_a_text_that_is_no_question_is_told_how_to_write_one(task, text, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    puzzle.read(task, text)


@pytest.mark.parametrize(
  ("task", "text", "answer", "verdict"),
  [
    ("sudoku", PUZZLE, SOLUTION, "right"),
    ("sudoku", PUZZLE, WRONG, "wrong: 6 of the 7 empty cells are right"),
    ("sudoku", PUZZLE, "?", "wrong: it is no answer of the task sudoku"),
    ("countdown", "3 25 7 = 68", "25 * 3 - 7", "right"),
    ("countdown", "3 25 7 = 68", "25 + 3 + 7", "wrong"),
    ("countdown", "3 25 7 = 68", "68", "wrong: it is no answer of the task countdown"),
  ],
)
def test_an_answer_is_graded(task, text, answer, verdict):
  asked = puzzle.Question.of(task, puzzle.read(task, text), "terse")
  assert asked.prompt == {"sudoku": f"{PUZZLE}abcdefghijklmnop", "countdown": "3 25 7 = 68"}[task]
  assert asked.verdict(answer) == verdict
  assert puzzle.Question.of(task, asked.record, "d1_eval").prefill == "<reasoning>"


def test_a_grid_has_a_star_behind_each_error():
  assert str(canvas(WRONG).board).splitlines() == [
    " 2  3  | 1  4",
    " 4  1  | 3  2",
    "-------+-------",
    " 1  2  | 4  4*",
    " 3  4  | 2  1",
  ]


@pytest.mark.parametrize(
  ("texts", "tokens"),
  [
    (("<answer>", SOLUTION[:8], SOLUTION[8:], "</answer>"), (1,) * 8 + (2,) * 8),
    ((SOLUTION, " or ", *WRONG), tuple(range(2, 18))),
    ((SOLUTION, "5"), None),
    (("no", "grid"), None),
  ],
)
def test_the_board_is_the_last_grid_of_an_answer(texts, tokens):
  found = board.of(texts, puzzle.read("sudoku", PUZZLE))
  assert (found and found.tokens) == tokens


def test_steps_are_grids_with_grey_clues_and_marked_errors():
  plain = terminal.show(canvas(WRONG), columns=40, colored=False).split("\n\n")
  assert plain[0].splitlines() == [
    "step 1 of 6, 4 of 18 tokens",
    " ░  3  | ░  ░",
    " 4  1  | 3  ░",
    "-------+-------",
    " 1  2  | ░  ░",
    " 3  4  | 2  ░",
  ]
  assert plain[3].splitlines()[4] == " 1  2  | 4  4*"
  assert plain[-1] == terminal.BOARD_LEGEND[False]
  colored = terminal.show(canvas(WRONG), columns=40, colored=True)
  assert f"\x1b[{terminal._GREY}m3\x1b[0m" in colored
  assert colored.count(f"\x1b[{terminal._RED}m4\x1b[0m") == 3, "in the steps from which it is there"
  last = terminal.frame(canvas(WRONG), columns=40, colored=False)
  assert last == str(canvas(WRONG).board).splitlines()


def test_a_terse_answer_is_a_grid_from_its_first_step_on():
  record, hidden = puzzle.read("sudoku", PUZZLE), [digit == "1" for digit in WRONG] + [True, True]
  found = board.begun((*WRONG, "░", "░"), hidden, record)
  assert found.digits == WRONG.replace("1", "0")
  shown = Canvas("", (*WRONG, "░", "░"), np.where(hidden, NEVER, 0), found)
  assert terminal.frame(shown, columns=40, colored=False) == [
    " 2  3  | ░  4",
    " 4  1  | 3  2",
    "-------+-------",
    " 1  2  | 4  4*",
    " 3  4  | 2  ░",
  ]
  for texts in ((*WRONG[:15], "∎", "·"), (*WRONG[:12],), tuple("░" * 64)):
    assert board.begun(texts, [text == "░" for text in texts], record) is None


def test_a_film_of_a_sudoku_marks_its_errors_in_the_last_picture(tmp_path):
  reds = {}
  for name, digits in (("right", SOLUTION), ("wrong", WRONG)):
    film.save(tmp_path / "a.gif", [canvas(digits)])
    with Image.open(tmp_path / "a.gif") as image:
      assert image.n_frames == 8
      counts = []
      for index in range(image.n_frames):
        image.seek(index)
        near = np.abs(np.asarray(image.convert("RGB")).astype(int) - np.asarray(film._RED)).max(axis=-1) <= 12
        counts.append(int(near.sum()))
    reds[name] = counts
  assert reds["right"][-1] == reds["right"][-2]
  assert reds["wrong"][-1] > reds["wrong"][-2] + 50


def test_a_film_may_hold_a_sudoku_and_a_text(tmp_path):
  film.save(tmp_path / "a.gif", [canvas(SOLUTION), Canvas("Why?", ("so ", "be it"), np.asarray([0, 1]))])
  with Image.open(tmp_path / "a.gif") as image:
    assert image.n_frames == 8 + 4
