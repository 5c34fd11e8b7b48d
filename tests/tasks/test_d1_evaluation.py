"""Numbers said to be d1's, and the goldens, come from running its own evaluation parser on the same texts."""

import json
import re
import time
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d1jax.tasks import DataError, build, d1_evaluation, gsm8k, rationals, sudoku_grids

GOLDENS = json.loads(Path(__file__).with_name("goldens").joinpath("d1_evaluation.json").read_text())
PIECES = ["\\boxed{", "}", "\n", " ", "5", "-7", "1,000", "...", "<answer>", "</answer>", "=", "2*3", "x"]
D1_TASKS = ("sudoku", "countdown", "gsm8k", "math")
SOLVED, PUZZLE = "1234432121433412", "0204032001400402"


def judge(name: str, text: str, gold):
  """Read and judge a text; `gold` is as d1 has it, for Sudoku puzzle and solution."""
  if name == "gsm8k":
    return d1_evaluation.read_gsm8k(text), d1_evaluation.gsm8k(text, gold)
  if name == "math":
    return d1_evaluation.read_math(text), d1_evaluation.hendrycks_math(text, gold)
  if name == "countdown":
    return d1_evaluation.read_countdown(text), d1_evaluation.countdown(text, *gold)
  return d1_evaluation.read_sudoku(text), list(d1_evaluation.sudoku(text, *gold))


@pytest.mark.parametrize("name", D1_TASKS)
def test_goldens_made_by_d1(name):
  cases = [case[1:] for case in GOLDENS["cases"] if case[0] == name]
  verdicts = [verdict for *_, verdict in cases]
  assert len(cases) > 80
  assert sum(verdict[0] > 0 if name == "sudoku" else verdict for verdict in verdicts) > 40
  for text, gold, read, verdict in cases:
    # By their names, so that nan equals nan and True is not 1.
    assert repr(judge(name, text, gold)) == repr((read, verdict)), text


# GSM8K.


@pytest.mark.parametrize(
  ("text", "number"),
  [
    (r"\boxed{18}", 18.0),
    (r"\boxed{18} \boxed{19}", 18.0),
    (r"\boxed{} \boxed{...} \boxed{.} \boxed{ x } \boxed{19}", 19.0),
    (r"\boxed{2,125}", 2.0),
    (r"\boxed{$5}", 5.0),
    (r"\boxed{-5 or 6}", -5.0),
    (r"\boxed{5.}", 5.0),
    (r"\boxed{.5 cm}", 5.0),
    (r"\boxed{\frac{1}{2}}", 1.0),
    (r"\boxed{1_000}", 1000.0),
    (r"\boxed{1e3}", 1000.0),
    (r"\boxed{inf}", float("inf")),
    ("\\boxed{\u0663\u0664}", 34.0),
    ("\\boxed{\n18}", None),
    (r"\boxed{18", None),
    ("18", None),
    ("<answer>18</answer>", 18.0),
    ("<answer>\n3 and 4.5.\n</answer>", 4.5),
    ("<answer>2,125</answer>", 125.0),
    ("<answer>1</answer><answer>2</answer>", 1.0),
    ("<answer>3<answer>4</answer>", 4.0),
    *((text, None) for text in ("<answer>18", "18</answer>", "<answer></answer><answer>2</answer>")),
    (r"\boxed{x}<answer>7 \boxed{y}</answer>", 7.0),
    (r"<answer>7</answer><|eot_id|>\boxed{8}", 8.0),
  ],
)
def test_gsm8k(text, number):
  assert d1_evaluation.read_gsm8k(text) == number
  assert d1_evaluation.gsm8k(text, number) == (number is not None)
  assert not d1_evaluation.gsm8k(text, None)
  assert not d1_evaluation.gsm8k(text, 17.0)


def test_nan_is_a_number_that_equals_none():
  assert d1_evaluation.gsm8k(r"\boxed{nan} \boxed{5}", mock.ANY)
  assert not d1_evaluation.gsm8k(r"\boxed{nan} \boxed{5}", float("nan"))


@given(st.lists(st.sampled_from(PIECES)).map("".join))
def test_boxes_are_those_of_the_expression_that_is_replaced(text):
  found = re.findall(r"\\boxed{(.*?)}", text)
  first = next((box for box in found if re.search(r"\d", box)), None)
  if first is not None:
    wanted = d1_evaluation.read_gsm8k(f"\\boxed{{{first}}}")
    assert wanted is not None
    assert d1_evaluation.read_gsm8k(text) == wanted


@pytest.mark.parametrize(
  ("answer", "gold"),
  [
    *(("18", 18.0), (" $1,080", 1080.0), ("2.50", 2.5), ("5.", 5.0), ("5/2", 5.0), ("18 eggs", 18.0)),
    *((answer, None) for answer in ("-10", "+10", ".5", ",", "", None)),
  ],
)
def test_gsm8k_gold(answer, gold):
  assert d1_evaluation.gsm8k_gold(answer) == gold


def test_golds_of_the_training_questions(data_root):
  lines = (Path(data_root) / gsm8k.FILE).read_text(encoding="utf-8").splitlines()
  answers = [json.loads(line)["answer"].split("####")[1].strip() for line in lines]
  negative = [answer for answer in answers if answer.startswith("-")]
  assert negative
  for answer in answers:
    value = rationals.parse(answer)
    assert value is not None
    assert d1_evaluation.gsm8k_gold(answer) == (None if answer in negative else float(value))


# MATH.


@pytest.mark.parametrize(
  ("text", "read"),
  [
    (r"\boxed{4} \boxed{5}", "5"),
    (r"\boxed{\frac{1}{2}} so", r"\frac{1}{2}"),
    (r"\boxed{4} \boxed 5$.", "5"),
    (r"\fbox{5}", r"\fbox{5}"),
    ("5", "5"),
    ("<answer>5</answer>", "<answer>5</answer>"),
    (r"\boxed{} <answer> 5 </answer> <answer>6</answer>", "5"),
    (r"\boxed{} <answer> </answer>", ""),
    (r"\boxed{}", ""),
    (r"<answer>5</answer> \boxed{6", "5"),
    (r"\boxed{6", None),
    ("", ""),
  ],
)
def test_read_math(text, read):
  assert d1_evaluation.read_math(text) == read
  assert d1_evaluation.hendrycks_math(text, "5") == (read == "5")
  assert not d1_evaluation.hendrycks_math(text, None)


@pytest.mark.parametrize(
  ("answer", "gold", "is_right"),
  [
    (r"\dfrac12", r"\frac{1}{2}", True),
    ("0.5", "1/2", True),
    (r"5\text{ cm}", "5", True),
    ("x = 5", "5", True),
    ("5.0", "5", False),
    ("1,000", "1000", False),
    (r"1\text{ a}\text{ b}", r"1\text{ a}\text{ b}", True),
    (r"1 \text{ a}\text{ b}", r"1\text{ a}\text{ b}", False),
    (r"\frac", r"\frac", True),
    (r"\sqrt ", r"\sqrt", False),
    ("x / 2", "x/2", False),
    ("9" * 5000 + "/2", "9" * 5000 + "/2", True),
  ],
  ids=lambda value: repr(value)[:16],
)
def test_hendrycks_math(answer, gold, is_right):
  assert d1_evaluation.hendrycks_math(f"\\boxed{{{answer}}}", gold) is is_right


# Countdown.


@pytest.mark.parametrize(
  ("text", "read"),
  [
    (r"\boxed{1} \boxed{2*3}", "2*3"),
    (r"\boxed{2 \times 3 \div 4 \cdot 5}", "2 * 3 / 4 * 5"),
    (r"\boxed{2*3 = 6}", "2*3"),
    (r"\boxed{x: (2+3)*4= 20.0 = 5}", "(2+3)*4"),
    (r"\boxed{2*3=x}", "2*3=x"),
    (r"\boxed{2*3=}", "2*3="),
    (r"\boxed{=5 2*3=6}", "5 2*3"),
    (r"\boxed{x=5=6}", "5"),
    (r"\boxed{x =5}", ""),
    ("so 2*3=6.", "2*3"),
    ("so 2*3", "so 2*3"),
    ("<answer>2*3</answer>", "<answer>2*3</answer>"),
    (r"\boxed{2*3 <answer> 4*5 </answer>", "4*5"),
    (r"\boxed{2*3", r"\boxed{2*3"),
    (r"\boxed{} 2*3", ""),
  ],
)
def test_read_countdown(text, read):
  assert d1_evaluation.read_countdown(text) == read


@given(st.lists(st.sampled_from([*PIECES, " = ", "6.0"])).map("".join))
def test_equations_are_those_of_the_expression_that_is_replaced(text):
  text = text.replace("\\boxed{", "")
  found = re.search(r"([0-9+\-*/() ]+)=[0-9. ]+", text)
  assert d1_evaluation.read_countdown(text) == (found[1].strip() if found else text)


@pytest.mark.parametrize(
  ("text", "nums", "target", "is_right"),
  [
    (r"\boxed{25*3-7}", [3, 25, 7], 68, True),
    (r"\boxed{25 \times 3 - 7 = 1}", [3, 25, 7], 68, True),
    ("25*3-7", [3, 25, 7], 68, True),
    ("<answer>25*3-7</answer>", [3, 25, 7], 68, False),
    ("so 25*3-7 = 68", [3, 25, 7], 68, True),
    (r"\boxed{25*3}", [3, 25, 7], 75, False),
    (r"\boxed{25*3*7}", [3, 25, 7], 68, False),
    (r"\boxed{\frac{8}{4} * 2}", [8, 4, 2], 4, False),
    (r"\boxed{2**3*4}", [2, 3, 4], 32, True),
    (r"\boxed{7//2+3}", [2, 3, 7], 6, True),
    (r"\boxed{-2+3+4}", [2, 3, 4], 5, True),
    (r"\boxed{4-2.3}", [4, 2, 3], 1.7, True),
    (r"\boxed{2*3*4.}", [2, 3, 4], 24, True),
    (r"\boxed{1/200000+7}", [1, 200000, 7], 7, True),
    ("\\boxed{2 *" + " " * 5000 + "3}", [2, 3], 6, True),
    # What d1 does not survive, in time or at all.
    (r"\boxed{99**98**97}", [97, 98, 99], 1, False),
    (r"\boxed{9**9**9**9//9}", [9, 9, 9, 9, 9], 1, False),
    (r"\boxed{()*5}", [5], 5, False),
    (r"\boxed{1.7*1" + "0" * 400 + "}", [1, 7, 10**400], 17, False),
    (r"\boxed{(0-4)**99.5*9**900}", [0, 4, 99, 5, 9, 900], 1, False),
    ("\\boxed{2*3</answer><answer>2*3*4}", [2, 3, 4], 24, False),
    ("\\boxed{x<answer>2*3*4</answer>}", [2, 3, 4], 24, False),
    (r"\boxed{" + "-" * 999 + "5}", [5], -5, True),
    (r"\boxed{" + "-" * 1001 + "5}", [5], -5, False),
  ],
  ids=lambda value: repr(value)[:24],
)
def test_countdown(text, nums, target, is_right):
  assert d1_evaluation.countdown(text, nums, target) is is_right


# Sudoku.


@pytest.mark.parametrize(
  ("text", "read"),
  [
    (f"<answer>\n{SOLVED}\n</answer>", SOLVED),
    (f"<answer>{SOLVED}<|eot_id|>9</answer>", SOLVED),
    (f"<answer>{SOLVED}<|endoftext|>9", SOLVED),
    ("<answer>12 34\n43</answer>", "123443"),
    ("<answer>[1234]|5</answer>", "[1234]|5"),
    ("<answer>1</answer><answer>2</answer>", "1"),
    ("<answer>1<answer>2</answer>", "1<answer>2"),
    ("<answer>1 ``` 12\n34 ``` 2</answer>", "1234"),
    ("<answer>1</answer> ```12```", "12"),
    ("<answer>1 ```x``` ```12```</answer>", "1```x``````12```"),
    ("<answer>1 ``` ``` ```12```</answer>", "1`````````12```"),
    ("```12``` <answer>1</answer>", "1"),
    ("<answer> </answer> 12 34 <|eot_id|>56", "1234"),
    ("12</answer>34\n", "34"),
    ("<answer>12", ""),
    (f"{SOLVED} </answer> <|eot_id|>", SOLVED),
    (f"9{SOLVED}</answer>", SOLVED),
    (f"so {SOLVED}.", SOLVED),
    (f"so x{SOLVED}", ""),
    (f"so 9{SOLVED}", ""),
    ("", ""),
  ],
)
def test_read_sudoku(text, read):
  assert d1_evaluation.read_sudoku(text) == read


@pytest.mark.parametrize(
  ("answer", "right"),
  [
    (SOLVED, 8),
    (SOLVED + "9999", 8),
    (SOLVED[:4], 2),
    (f"[{SOLVED}]", 2),
    ("9" * 16, 0),
    ("1" * 16, 3),
    ("", 0),
    ("4" + SOLVED[1:], 7),
    (SOLVED[0] + "1" + SOLVED[2:], 8),  # a clue is changed
  ],
)
def test_sudoku(answer, right):
  assert d1_evaluation.sudoku(f"<answer>{answer}</answer>", PUZZLE, SOLVED) == (right, 8)


def test_sudoku_accepts_no_other_solution():
  puzzle = "1234341200000000"
  first, *others = [grid for grid in sudoku_grids.GRIDS if grid.startswith(puzzle[:8])]
  assert d1_evaluation.sudoku(f"<answer>{first}</answer>", puzzle, first) == (8, 8)
  assert all(d1_evaluation.sudoku(f"<answer>{other}</answer>", puzzle, first)[0] < 8 for other in others)
  strict = [build("sudoku").grade(other, {"puzzle": puzzle, "solution": first}).metrics["solved"] for other in others]
  assert strict == [(1, 1)] * len(others) != []


# Attacks.

SLOW = [
  *("\\boxed{\n" * 20_000, "\\boxed{" * 20_000 + "\n}", "\\boxed{1x" * 20_000 + "}" * 20_000, "\\boxed{x}" * 20_000),
  *("\\boxed{1" + "_1" * 50_000 + "}", "\\boxed{0." + "0" * 100_000 + "1}", "\\boxed{1e" + "9" * 100_000 + "}"),
  *("1=x" * 30_000, "1+" * 50_000 + "=", "a=1" * 30_000, "\\boxed{2" + " \n" * 50_000 + "*3}", "1 " * 50_000),
  *("<answer>" + "```" * 30_000, "<answer>```" + " " * 100_000 + "x", "<answer>" + "```1 " * 20_000),
  *(("1" * 16 + " " * 50) * 1500, "1" * 16 + " " * 100_000, "</answer>" + " " * 100_000 + "x", "<|eot_id|" * 10_000),
]


@pytest.mark.parametrize("name", D1_TASKS)
@pytest.mark.parametrize("text", SLOW, ids=lambda text: ascii(text)[1:16])
def test_time_is_linear(name, text):
  gold = {"gsm8k": 4.0, "math": "4", "countdown": ([2, 3], 6), "sudoku": (PUZZLE, SOLVED)}
  start = time.process_time()
  judge(name, text, gold[name])
  # Measured: below 0.1 s. What takes quadratic time needs a minute.
  assert time.process_time() - start < 5


# Records.

ROWS = {
  "gsm8k": {"question": "How many?", "generations": "\n\\boxed{18}", "ground_truth": 18.0},
  "math": {"question": "Find $q$.", "generations": "", "ground_truth": "\\frac{1}{2}"},
  "countdown": {
    "question": "Numbers: [30, 100, 93]\nTarget: 23",
    "generations": "",
    "ground_truth": [[30, 100, 93], 23],
  },
  "sudoku": {
    "question": f"Solve the following Sudoku puzzle: {PUZZLE}\n",
    "generations": "",
    "ground_truth": SOLVED,
  },
}


@pytest.mark.parametrize(
  ("name", "record"),
  [
    ("gsm8k", {"question": "How many?", "solution": "", "answer": "18"}),
    ("math", {"problem": "Find $q$.", "solution": "\\boxed{\\frac{1}{2}}", "answer": "\\frac{1}{2}"}),
    ("countdown", {"nums": [30, 100, 93], "target": 23}),
    ("sudoku", {"puzzle": PUZZLE, "solution": SOLVED}),
  ],
)
def test_records(name, record):
  assert d1_evaluation.record(name, {**ROWS[name], "prompt_input": "..."}) == record


@pytest.mark.parametrize(
  ("gold", "answer"),
  [(None, None), (2.5, "2.5"), (-5.0, "-5"), (0.0001, "0.0001"), (1e-7, "0.0000001"), (1e20, "1" + "0" * 20), (7, "7")],
)
def test_gsm8k_answers_keep_their_value(gold, answer):
  record = d1_evaluation.record("gsm8k", {**ROWS["gsm8k"], "ground_truth": gold})
  assert record["answer"] == answer
  assert answer is None or float(answer) == gold


def test_sudoku_puzzles_in_front():
  assert d1_evaluation.record("sudoku", {**ROWS["sudoku"], "question": PUZZLE + "\n"})["puzzle"] == PUZZLE


@pytest.mark.parametrize(
  ("name", "change", "message"),
  [
    ("gsm8k", {"ground_truth": "18"}, "ground_truth is '18', expected a number such as 18.0, or null"),
    ("gsm8k", {"ground_truth": True}, "ground_truth is True, expected a number"),
    ("gsm8k", {"ground_truth": float("nan")}, "ground_truth is nan, expected a number"),
    ("gsm8k", {"ground_truth": float("inf")}, "ground_truth is inf, expected a number"),
    ("gsm8k", {"question": 5}, "question is '5', expected a text"),
    ("gsm8k", {"question": " "}, "question is blank"),
    ("gsm8k", {"generations": ["x"]}, r"generations is \['x'\], expected the completion as a text"),
    ("math", {"ground_truth": 2.0}, "ground_truth is 2.0, expected the answer as a text"),
    ("math", {"ground_truth": ""}, "ground_truth is '', expected the answer as a text"),
    ("countdown", {"ground_truth": None}, r"ground_truth is None, expected numbers and target, such as \[\[30"),
    ("countdown", {"ground_truth": [[], 23]}, r"ground_truth is \[\[\], 23\], expected numbers and target"),
    ("countdown", {"ground_truth": [["3"], 23]}, "expected numbers and target"),
    ("countdown", {"ground_truth": [[3], "23"]}, "expected numbers and target"),
    ("countdown", {"ground_truth": [30, 23]}, "expected numbers and target"),
    ("sudoku", {"question": "Sudoku puzzle: 123"}, "question is 'Sudoku puzzle: 123', expected 16 digits 0 to 4"),
    ("sudoku", {"question": "Sudoku puzzle: 1234567800000000"}, "expected 16 digits 0 to 4"),
    ("sudoku", {"ground_truth": SOLVED[1:]}, f"ground_truth is '{SOLVED[1:]}', expected 16 digits 1 to 4"),
    ("sudoku", {"ground_truth": 1234}, "ground_truth is 1234, expected 16 digits 1 to 4"),
  ],
)
def test_bad_rows(name, change, message):
  with pytest.raises(DataError, match=message):
    d1_evaluation.record(name, {**ROWS[name], **change})


@pytest.mark.parametrize("field", ["question", "generations", "ground_truth"])
def test_missing_fields(field):
  row = {name: value for name, value in ROWS["math"].items() if name != field}
  with pytest.raises(DataError, match=f"the field {field} is missing; expected question, generations and ground_truth"):
    d1_evaluation.record("math", row)


def test_unknown_tasks():
  with pytest.raises(ValueError, match="unknown task of d1 'chess'; choose one of: gsm8k, math, countdown, sudoku"):
    d1_evaluation.record("chess", ROWS["math"])
