"""d1's published generations and the examples of its rewards, under both protocols.

Numbers said to be d1's come from running its own functions on the same texts.
"""

import gzip
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d1jax.tasks import build, common, d1_evaluation, d1_rewards, sudoku_grids

FILES = {"gsm8k": "gsm8k", "math": "math500", "countdown": "countdown", "sudoku": "sudoku"}


def published(data_root: str, name: str) -> list[tuple[str, dict, dict]]:
  """LLaDA-8B-Instruct's answers that d1 published: the raw text, the record, the row."""
  path = Path(data_root) / "generations" / f"{FILES[name]}_128.jsonl.gz"
  if not path.is_file():
    pytest.skip(f"no published generations at {path}")
  with gzip.open(path, "rt", encoding="utf-8") as file:
    rows = [json.loads(line) for line in file]
  return [(row["generations"], dict(d1_evaluation.record(name, row)), row) for row in rows]


def percent(pairs) -> str:
  pairs = list(pairs)
  return f"{100 * sum(right for right, _ in pairs) / sum(of for _, of in pairs):.2f}"


# What d1 published.


@pytest.mark.parametrize(
  ("name", "count", "accuracy"),
  [("gsm8k", 1130, "69.29"), ("math", 500, "26.00"), ("countdown", 256, "20.70"), ("sudoku", 256, "11.72")],
)
def test_the_accuracies_that_d1_published(data_root, name, count, accuracy):
  rows = published(data_root, name)
  assert len(rows) == count
  assert percent(build(name).grade(text, record, "d1").metrics["d1_accuracy"] for text, record, _ in rows) == accuracy


def test_gsm8k_on_published_generations(data_root):
  rows = [(text, d1_evaluation.gsm8k_gold(record["answer"])) for text, record, _ in published(data_root, "gsm8k")]
  assert [gold for _, gold in rows] == [row["ground_truth"] for _, _, row in published(data_root, "gsm8k")]
  assert sum(gold is None for _, gold in rows) == 2  # the negative ones
  assert sum(d1_evaluation.read_gsm8k(text) is None for text, _ in rows) == 23
  # Without their commas one more is right; the last box instead of the first changes nothing.
  assert percent((d1_evaluation.gsm8k(text.replace(",", ""), gold), 1) for text, gold in rows) == "69.38"
  turned = ["\n".join([*reversed(re.findall(r"\\boxed{.*?}", text)), text]) for text, _ in rows]
  assert any(new != text for new, (text, _) in zip(turned, rows, strict=True))
  assert percent((d1_evaluation.gsm8k(new, gold), 1) for new, (_, gold) in zip(turned, rows, strict=True)) == "69.29"


def test_countdown_on_published_generations(data_root):
  rows = published(data_root, "countdown")
  read = [d1_evaluation.read_countdown(text) for text, _, _ in rows]
  used = [sorted(map(int, re.findall(r"\d+", expression))) for expression in read]
  assert sum(sorted(record["nums"]) == numbers for (_, record, _), numbers in zip(rows, used, strict=True)) == 134
  assert not any("**" in expression or "//" in expression for expression in read)


def test_sudoku_on_published_generations(data_root):
  rows = published(data_root, "sudoku")
  pairs = [d1_evaluation.sudoku(text, record["puzzle"], record["solution"]) for text, record, _ in rows]
  assert {of for _, of in pairs} == {8}
  assert sum(right == of for right, of in pairs) == 1
  strict = [build("sudoku").grade(text.split("<|")[0], record) for text, record, _ in rows]
  assert sum(grade.metrics["solved"][0] for grade in strict) == 1
  read = [d1_evaluation.read_sudoku(text) for text, _, _ in rows]
  assert sum(len(answer) == 16 for answer in read) == 147
  kept = [
    all(clue in ("0", digit) for clue, digit in zip(record["puzzle"], answer.ljust(16, "0"), strict=False))
    for (_, record, _), answer in zip(rows, read, strict=True)
  ]
  assert sum(kept) == 90
  # One digit in every empty cell beats all of this, and d1's best.
  constant = [
    100 * sum(d1_evaluation.sudoku(digit * 16, r["puzzle"], r["solution"])[0] for _, r, _ in rows) / (8 * 256)
    for digit in "1234"
  ]
  assert (round(min(constant), 1), round(max(constant), 1)) == (24.2, 26.2)


def test_published_puzzles_have_several_solutions(data_root):
  records = [record for _, record, _ in published(data_root, "sudoku")]
  counts = [
    sum(re.fullmatch(record["puzzle"].replace("0", "."), grid) is not None for grid in sudoku_grids.GRIDS)
    for record in records
  ]
  assert (min(counts), max(counts), sum(count > 1 for count in counts)) == (1, 4, 63)
  assert len({record["solution"] for record in records}) == 156


# Examples.

GOOD = common.tagged("First.\nSecond.", "72")
SOLVED, PUZZLE = "1234432121433412", "0204032001400402"


def gsm8k(answer: str) -> dict:
  return {"question": "How many?", "solution": "", "answer": answer}


def boxed(answer: str) -> dict:
  return {"problem": "Find $q$.", "solution": f"\\boxed{{{answer}}}", "answer": answer}


def numbers(target: float, *nums: int) -> dict:
  return {"nums": list(nums), "target": target}


@pytest.mark.parametrize(
  ("name", "record", "text", "paid", "solved", "accurate"),
  [
    # The format that d1 asks for, of several lines, earns no format; the two formats that do exclude each other.
    ("gsm8k", gsm8k("72"), GOOD, {"soft_format": 0.0, "strict_format": 0.0, "correctness": 2.0}, 1, 1),
    (
      *("gsm8k", gsm8k("72"), common.tagged("First.", "72") + "\n"),
      *({"soft_format": 0.0, "strict_format": 0.5, "correctness": 2.0}, 1, 1),
    ),
    (
      *("gsm8k", gsm8k("72"), "<reasoning>a</reasoning><answer>72</answer>"),
      *({"soft_format": 0.5, "strict_format": 0.0, "correctness": 2.0}, 1, 1),
    ),
    # Numbers as texts, and for the evaluation's parser as floats.
    ("gsm8k", gsm8k("2,125"), "<answer>2125</answer>", {"int": 0.5, "correctness": 0.0}, 1, 1),
    ("gsm8k", gsm8k("2,125"), "<answer>2,125</answer>", {"int": 0.0, "correctness": 2.0}, 1, 0),
    ("gsm8k", gsm8k("2,125"), "<answer>\\boxed{2,125}</answer>", {"int": 0.0, "correctness": 0.0}, 1, 0),
    ("gsm8k", gsm8k("5"), "<answer>$5</answer>", {"int": 0.0, "correctness": 0.0}, 1, 1),
    ("gsm8k", gsm8k("5"), "<answer>5.0</answer>", {"int": 0.0, "correctness": 0.0}, 1, 1),
    ("gsm8k", gsm8k("-5"), "<answer>-5</answer>", {"int": 0.0, "correctness": 2.0}, 1, 0),
    ("gsm8k", gsm8k("72"), "72", {"int": 0.5, "correctness": 2.0}, 1, 0),
    # No numeric equality; the box in the answer is never seen, the closing tag not asked for.
    ("math", boxed("5"), "<answer>\n\\boxed{5.0}\n</answer>", {"correctness": 0.0, "format": 0.75}, 1, 0),
    ("math", boxed("1000"), "<answer>\n\\boxed{1,000}\n</answer>", {"correctness": 0.0, "format": 0.75}, 1, 0),
    ("math", boxed("5"), "<answer>\\boxed{5}", {"correctness": 2.0, "format": 0.75}, 1, 1),
    ("math", boxed("5"), "\\boxed{5}", {"correctness": 2.0, "format": 0.25}, 1, 1),
    ("math", boxed("5"), "<answer>5</answer>", {"correctness": 0.0, "format": 0.75}, 1, 0),
    # 0.1 for any block; d1's evaluation wants the box that its reward does not know.
    ("countdown", numbers(24, 2, 3, 4), "<answer></answer>", {"countdown": 0.1}, 0, 0),
    ("countdown", numbers(24, 2, 3, 4), "<answer>2*3*4=24</answer>", {"countdown": 0.1}, 0, 1),
    ("countdown", numbers(24, 2, 3, 4), "<answer>\\boxed{2*3*4}</answer>", {"countdown": 0.1}, 1, 1),
    ("countdown", numbers(24, 2, 3, 4), "<answer>2*3*4</answer>", {"countdown": 1.0}, 1, 0),
    ("countdown", numbers(6, 2, 3, 4), "<answer>2*3</answer>", {"countdown": 0.1}, 0, 0),
    ("countdown", numbers(5, 2, 3, 4), "<answer>-2+3+4</answer>", {"countdown": 1.0}, 1, 0),
    ("countdown", numbers(24, 2, 3, 4), "<answer>2*3*4.</answer>", {"countdown": 1.0}, 1, 0),
    # What the task forbids.
    ("countdown", numbers(32, 2, 3, 4), "<answer>2**3*4</answer>", {"countdown": 1.0}, 0, 0),
    ("countdown", numbers(6, 2, 3, 7), "<answer>7//2+3</answer>", {"countdown": 1.0}, 0, 0),
    ("countdown", numbers(1.7, 4, 2, 3), "<answer>4-2.3</answer>", {"countdown": 1.0}, 0, 0),
    ("countdown", numbers(32, 2, 3, 4), "\\boxed{2**3*4}", {"countdown": 0.0}, 0, 1),
    ("countdown", numbers(6, 2, 3, 7), "\\boxed{7//2+3}", {"countdown": 0.0}, 0, 1),
    ("countdown", numbers(1, 97, 98, 99), "<answer>\\boxed{99**98**97}</answer>", {"countdown": 0.1}, 0, 0),
    ("countdown", numbers(1, 97, 98, 99), "<answer>99**98**97</answer>", {"countdown": 0.1}, 0, 0),
    # One stored solution, its empty cells alone, digits from anywhere in the block.
    ("sudoku", {"puzzle": PUZZLE, "solution": SOLVED}, f"<answer>{SOLVED}</answer>", {"sudoku": 1.0}, 1, 8),
    ("sudoku", {"puzzle": PUZZLE, "solution": SOLVED}, f"<answer>1434{SOLVED[4:]}</answer>", {"sudoku": 1.0}, 0, 8),
    ("sudoku", {"puzzle": PUZZLE, "solution": SOLVED}, f"<answer>[{SOLVED}]</answer>", {"sudoku": 1.0}, 1, 2),
    ("sudoku", {"puzzle": PUZZLE, "solution": SOLVED}, SOLVED, {"sudoku": 0.0}, 1, 8),
    (
      *("sudoku", {"puzzle": "1234341200000000", "solution": "1234341221434321"}),
      *("<answer>1234341243212143</answer>", {"sudoku": 0.0}, 1, 0),
    ),
  ],
)
def test_examples(name, record, text, paid, solved, accurate):
  task = build(name)
  strict, d1 = task.grade(text, record), task.grade(text, record, "d1")
  assert d1.components.items() >= paid.items()
  assert strict.metrics["solved"] == d1.metrics["solved"] == (solved, 1)
  assert d1.metrics["d1_accuracy"] == (accurate, 8 if name == "sudoku" else 1)
  assert "d1_accuracy" not in strict.metrics
  assert strict.answer == d1.answer


@pytest.mark.parametrize(
  "text", [GOOD, common.tagged("First.", "72") + "\n", "<reasoning>a</reasoning><answer>72</answer>"]
)
def test_every_good_format_earns_as_much_under_strict(text):
  assert build("gsm8k").grade(text, gsm8k("72")).components["format"] == 1.0


@given(st.lists(st.sampled_from(["<reasoning>", "</reasoning>", "<answer>", "</answer>", "\n", "x"])).map("".join))
def test_no_text_earns_both_formats_of_d1(text):
  text = f"<reasoning>{text}"
  paid = d1_rewards.gsm8k(text, "72")
  assert 0.0 in (paid["soft_format"], paid["strict_format"])


def test_an_unknown_gold_is_no_question_for_strict_and_wrong_for_d1():
  strict, d1 = (
    build("gsm8k").grade("\\boxed{-5}", {**gsm8k(""), "answer": None}, protocol) for protocol in common.PROTOCOLS
  )
  assert strict.metrics["solved"] == d1.metrics["solved"] == (0, 0)
  assert d1.metrics["d1_accuracy"] == (0, 1)
