"""The numbers marked so come from running d1's functions, retyped from a public copy of them, on the same texts."""

import collections
import gzip
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d1jax.tasks import common, d1_rewards

PIECES = st.lists(
  st.sampled_from(["<reasoning>", "</reasoning>", "<answer>", "</answer>", "\n", " ", "\t", "5", "x", "\\boxed{", "}"])
).map("".join)
GOOD = common.tagged("First.\nSecond.", "72")


def generations(data_root: str, name: str) -> list[tuple[str, dict]]:
  """LLaDA-8B-Instruct's answers that d1 published, after the `<reasoning>` that its evaluation puts before them."""
  path = Path(data_root) / "generations" / f"{name}_128.jsonl.gz"
  if not path.is_file():
    pytest.skip(f"no published generations at {path}")
  with gzip.open(path, "rt", encoding="utf-8") as file:
    rows = [json.loads(line) for line in file]
  return [("<reasoning>" + re.sub(r"<\|[a-z_]+\|>", "", row["generations"]), row) for row in rows]


# GSM8K.


def test_gsm8k_on_published_generations(data_root):
  rows = generations(data_root, "gsm8k")
  assert len(rows) == 1130
  golds = ["none" if row["ground_truth"] is None else f"{row['ground_truth']:g}" for _, row in rows]
  paid = [d1_rewards.gsm8k(text, gold) for (text, _), gold in zip(rows, golds, strict=True)]
  counts = [reward["xmlcount"] for reward in paid]
  assert sum(counts) / len(counts) == pytest.approx(0.12324424778761, abs=1e-12)  # by d1's functions
  assert sum(count < 0 for count in counts) == 95  # 8 %
  totals = {name: sum(reward[name] for reward in paid) for name in paid[0] if name != "xmlcount"}
  # By d1's functions.
  assert totals == {"soft_format": 0.0, "strict_format": 0.0, "int": 2.0, "correctness": 6.0}
  assert not any(text.endswith("</answer>\n") for text, _ in rows)


def test_a_good_answer_of_several_lines_earns_no_format():
  paid = d1_rewards.gsm8k(GOOD, "72")
  # Without a line break at the end the whole text is charged, and one character is given back.
  xmlcount = 0.5 - 0.001 * len(GOOD) + 0.001
  assert paid.pop("xmlcount") == pytest.approx(xmlcount, abs=1e-12)
  assert paid == {"soft_format": 0.0, "strict_format": 0.0, "int": 0.5, "correctness": 2.0}


@pytest.mark.parametrize(
  ("text", "soft", "strict"),
  [
    ("<reasoning>\na\n</reasoning>\n<answer>\n7\n</answer>\n", 0.0, 0.5),
    ("<reasoning>\na\n</reasoning>\n<answer>\n7\n</answer>\n\n", 0.0, 0.5),
    ("<reasoning>\na\n</reasoning>\n<answer>\n7\n</answer>\n\n\n", 0.0, 0.0),
    ("<reasoning>\na\n</reasoning>\n<answer>\n7\n</answer>", 0.0, 0.0),
    ("<reasoning>\na\nb\n</reasoning>\n<answer>\n7\n</answer>\n", 0.0, 0.0),
    ("<reasoning>\n\n</reasoning>\n<answer>\n\n</answer>\n", 0.0, 0.5),
    ("<reasoning>a</reasoning><answer>7</answer>", 0.5, 0.0),
    ("<reasoning>a</reasoning>\n \n<answer>7</answer> and more", 0.5, 0.0),
    ("<reasoning>a\n</reasoning><answer>7</answer>", 0.0, 0.0),
    ("<reasoning>a</reasoning><answer>7\n</answer>", 0.0, 0.0),
    (" <reasoning>a</reasoning><answer>7</answer>", 0.0, 0.0),
    ("<reasoning></reasoning><answer></reasoning>\n<answer>7</answer>", 0.5, 0.0),
    ("<reasoning></reasoning><answer>7</answer></reasoning>\n<answer>\n", 0.5, 0.0),
    ("<reasoning></reasoning>\n</reasoning><answer>7</answer>", 0.0, 0.0),
  ],
)
def test_formats(text, soft, strict):
  paid = d1_rewards.gsm8k(text, "7")
  assert (paid["soft_format"], paid["strict_format"]) == (soft, strict)


@given(st.booleans(), PIECES)
def test_formats_agree_with_the_expressions_that_they_replace(starts, text):
  text = "<reasoning>" * starts + text
  soft = re.match(r"<reasoning>.*?</reasoning>\s*<answer>.*?</answer>", text)
  strict = re.match(r"^<reasoning>\n.*?\n</reasoning>\n<answer>\n.*?\n</answer>\n$", text)
  paid = d1_rewards.gsm8k(text, "5")
  assert (paid["soft_format"] > 0, paid["strict_format"] > 0) == (soft is not None, strict is not None)


@pytest.mark.parametrize(
  ("text", "score"),
  [
    ("", 0.0),
    ("<reasoning>\n", 0.125),
    ("<reasoning>\na\n</reasoning>\n", 0.25),
    ("\n</answer>\n", 0.125),
    ("\n</answer>", 0.126),
    ("\n</answer>12345678901", 0.125 - 0.01),
    ("\n<answer>\n" + "x" * 990, 0.125 - 1.0),
    ("\n<answer>\n7\n</answer>\n", 0.25),
    ("\n<answer>\n7\n</answer>\n123", 0.25 - 0.006),
    (2 * "\n<answer>\n", 0.0),
  ],
  ids=lambda value: repr(value)[:16],
)
def test_xmlcount(text, score):
  assert d1_rewards.xmlcount(text) == pytest.approx(score, abs=1e-12)


@pytest.mark.parametrize(
  ("text", "gold", "whole", "correctness"),
  [
    ("<answer>72</answer>", "72", 0.5, 2.0),
    ("72", "72", 0.5, 2.0),
    ("<answer> 72", "72", 0.5, 2.0),
    ("<answer>1</answer><answer>72</answer>", "72", 0.5, 2.0),
    ("<answer>2125</answer>", "2,125", 0.5, 0.0),
    ("<answer>2,125</answer>", "2,125", 0.0, 2.0),
    ("<answer>$5</answer>", "5", 0.0, 0.0),
    ("<answer>5.0</answer>", "5", 0.0, 0.0),
    ("<answer>-5</answer>", "-5", 0.0, 2.0),
    ("<answer>²</answer>", "2", 0.5, 0.0),
  ],
)
def test_numbers_are_compared_as_texts(text, gold, whole, correctness):
  paid = d1_rewards.gsm8k(text, gold)
  assert (paid["int"], paid["correctness"]) == (whole, correctness)


# MATH.


def test_math_on_published_generations(data_root):
  rows = generations(data_root, "math500")
  paid = [d1_rewards.hendrycks_math(text, f"\\boxed{{{row['ground_truth']}}}") for text, row in rows]
  # 130 of 500 are right, the 26.00 that d1 reports.
  assert sum(reward["correctness"] for reward in paid) == 2 * 130
  assert collections.Counter(reward["format"] for reward in paid) == {0.75: 477, 0.25: 23}  # by d1's functions


@pytest.mark.parametrize(
  ("text", "score"),
  [
    ("<answer>\n\\boxed{5}\n</answer>", 0.75),
    ("<answer>5", 0.75),
    ("\\boxed{5}", 0.25),
    ("", 0.25),
    ("<answer>\boxed{5}</answer>", 1.0),
    ("\boxed{5}", 0.5),
    ("<answer>5</answer><answer>\boxed{5}</answer>", 0.75),
  ],
)
def test_the_box_is_sought_by_a_misspelt_literal(text, score):
  assert d1_rewards.hendrycks_math(text, "\\boxed{5}")["format"] == score


@pytest.mark.parametrize(
  ("text", "gold", "is_right"),
  [
    (r"\boxed{5}", "5", True),
    (r"\boxed{4} \boxed{5}", "5", True),
    (r"\boxed{5} \boxed{4}", "5", False),
    ("5", "5", True),
    ("<answer>5</answer>", "5", False),
    (r"\boxed 5$ so \boxed{4}", "5", True),
    (r"\fbox{5}", "5", False),
    (r"\boxed{5", r"\boxed{5", False),
    (r"\boxed{5.0}", "5", False),
    (r"\boxed{1,000}", "1000", False),
    (r"\boxed{0.5}", r"\frac12", True),
    (r"\boxed{1/2}", r"\dfrac{1}{2}", True),
    (r"\boxed{2/4}", r"\frac{1}{2}", False),
    (r"\boxed{k=5\text{ cm}}", r"5", True),
    (r"\boxed{x/2}", "x/2", True),
    (r"\boxed{x/2}", "x / 2", False),
    (r"\boxed}{{}5", "5", False),
  ],
)
def test_math_correctness(text, gold, is_right):
  assert d1_rewards.hendrycks_math(text, f"so $\\boxed{{{gold}}}$.")["correctness"] == 2.0 * is_right


def test_unbox_of_odd_solutions():
  assert d1_rewards.unbox(r"our answer is $\boxed 2$.") == "2"
  assert d1_rewards.unbox(r"\fbox{2}") == r"\fbox{2}"
  assert d1_rewards.unbox(r"\boxed{2") is None
  assert d1_rewards.unbox("two") == "two"
  assert d1_rewards.hendrycks_math("5", r"\boxed{5")["correctness"] == 0.0


# Countdown.


def test_countdown_on_published_generations(data_root):
  rows = generations(data_root, "countdown")
  paid = collections.Counter(d1_rewards.countdown(text, *row["ground_truth"]) for text, row in rows)
  assert paid == {0.1: 243, 0.0: 12, 1.0: 1}  # by d1's functions; its answers stand in boxes


@pytest.mark.parametrize(
  ("answer", "nums", "target", "score"),
  [
    ("25*3-7", [3, 25, 7], 68, 1.0),
    ("25+3+7", [3, 25, 7], 68, 0.1),
    ("25*3", [3, 25, 7], 75, 0.1),
    ("", [3, 25, 7], 68, 0.1),
    ("2*3*4=24", [2, 3, 4], 24, 0.1),
    ("\\boxed{2*3*4}", [2, 3, 4], 24, 0.1),
    ("2**3*4", [2, 3, 4], 32, 1.0),
    ("7//2+3", [2, 3, 7], 6, 1.0),
    ("-2+3+4", [2, 3, 4], 5, 1.0),
    ("3- -4-2", [2, 3, 4], 5, 1.0),
    ("4-2.3", [4, 2, 3], 1.7, 1.0),
    ("2*3*4.", [2, 3, 4], 24, 1.0),
    ("(2*3\n*4)", [2, 3, 4], 24, 1.0),
    ("2*3\n*4", [2, 3, 4], 24, 0.1),
    ("(2)(3)(4)", [2, 3, 4], 24, 0.1),
    ("2 3 4", [2, 3, 4], 234, 0.1),
    ("4/(3-3)", [4, 3, 3], 4, 0.1),
    ("1/200000+7", [1, 200000, 7], 7, 1.0),
    ("(0-4)**(1/2)", [0, 4, 1, 2], 2, 0.1),
    ("((0-4)**(1/2))**2", [0, 4, 1, 2, 2], -4, 1.0),
    ("99**98**97", [97, 98, 99], 1, 0.1),
    ("9**9**9**9//9", [9, 9, 9, 9, 9], 1, 0.1),
    ("٢*٣*٤", [2, 3, 4], 24, 0.1),
    ("2*3*4\0", [2, 3, 4], 24, 0.1),
    ("2*3*4 or 4", [2, 3, 4], 24, 0.1),
    ("1.7*1" + "0" * 400, [1, 7, 10**400], 17, 0.1),
  ],
  ids=lambda value: ascii(value)[:16],
)
def test_countdown(answer, nums, target, score):
  for text in (f"<answer>{answer}</answer>", f"<answer>1</answer> <answer>\n{answer}\n</answer> <answer>9"):
    assert d1_rewards.countdown(text, nums, target) == score


@pytest.mark.parametrize("text", ["", "25*3-7", "<answer>25*3-7", "25*3-7</answer>"])
def test_countdown_without_a_block(text):
  assert d1_rewards.countdown(text, [3, 25, 7], 68) == 0.0


# Sudoku.


def test_sudoku_on_published_generations(data_root):
  rows = generations(data_root, "sudoku")
  assert len(rows) == 256
  paid = []
  for text, row in rows:
    puzzle = re.search("[0-4]{16}", row["question"])
    assert puzzle is not None
    paid.append(d1_rewards.sudoku(text, puzzle[0], row["ground_truth"]))
  # The 11.72 that d1 reports: its puzzles have 8 empty cells each.
  assert sum(paid) == 30.0
  assert round(100 * sum(paid) / len(paid), 2) == 11.72


@pytest.mark.parametrize(
  ("text", "score"),
  [
    ("<answer>1234432121433412</answer>", 1.0),
    ("<answer>1234 4321\n2143 3412</answer>", 1.0),
    ("<answer>12344321214334129999</answer>", 1.0),
    ("<answer>1434032121433412</answer>", 0.9),
    ("<answer>1</answer>", 0.1),
    ("<answer>9</answer><answer>none</answer>", 0.0),
    ("<answer></answer>", 0.0),
    ("1234432121433412", 0.0),
    ("<answer>1234432121433412", 0.0),
  ],
)
def test_sudoku(text, score):
  # Ten empty cells; the fourth text changes the clue in cell 2 and one empty cell.
  assert d1_rewards.sudoku(text, "0204002001400002", "1234432121433412") == pytest.approx(score, abs=1e-12)


def test_sudoku_without_empty_cells():
  assert d1_rewards.sudoku("<answer>1234432121433412</answer>", "1234432121433412", "1234432121433412") == 0.0
