import json
from pathlib import Path

import pytest

from d1jax.tasks import PROTOCOLS, DataError, Gsm8k, rationals
from d1jax.tasks.common import ACCURACY

RECORD = {"question": "How many?", "solution": "Half of 2,160 is 1,080.", "answer": "1,080"}


def write_rows(tmp_path, *rows, name="train") -> str:
  (tmp_path / "gsm8k").mkdir(exist_ok=True)
  lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
  (tmp_path / f"gsm8k/{name}.jsonl").write_text("\n".join(lines) + "\n")
  return str(tmp_path)


def read_file(data_root: str) -> list[dict]:
  path = Path(data_root) / "gsm8k/train.jsonl"
  if not path.is_file():
    pytest.skip(f"no {path}")
  return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_file_is_read_whole(data_root):
  rows = read_file(data_root)
  everything = dict.fromkeys(("validation",), 10_000)
  task = Gsm8k(root=data_root, sizes=everything)
  train, validation = task.records("train"), task.records("validation")
  assert len(train) + len(validation) == len(rows) == 7473
  assert len(validation) == 404
  assert {r["question"] for r in (*train, *validation)} == {row["question"] for row in rows}
  assert task.records("demonstrations") == train
  assert len(Gsm8k(root=data_root).records("validation")) == 400
  json.dumps(train[:2])
  golds = {row["question"]: row["answer"].rpartition("#### ")[2] for row in rows}
  assert all(record["answer"] == golds[record["question"]] for record in train)
  assert not [r for r in train if "<<" in r["solution"] or ">>" in r["solution"] or "####" in r["solution"]]


def test_demonstrations_are_right_and_the_baseline_seldom(data_root):
  read_file(data_root)
  task = Gsm8k(root=data_root)
  for record in (records := task.records("demonstrations")):
    text = task.demonstration(record, "d1")
    assert task.grade(text, record).components == {"correct": 2.0, "number": 0.5, "format": 1.0}
    assert task.grade(text, record, "d1").components["correctness"] == 2.0
  guessed = sum(task.grade(task.baseline(r, "d1"), r).metrics["solved"][0] for r in records)
  assert 0 < guessed < 0.05 * len(records)


@pytest.mark.parametrize(
  ("row", "message"),
  [
    ("{", "line 2: '{' is not JSON"),
    ("[1]", 'line 2: expected {"question": "...", "answer": "... #### 7"}, got'),
    ({"question": "Q"}, "line 2: expected"),
    ({"question": "Q", "answer": 7}, "line 2: answer is '7', expected a text"),
    ({"question": " ", "answer": "#### 7"}, "line 2: question is blank"),
    ({"question": "Q", "answer": "It is 7."}, "line 2: answer has 0 marks ####, expected one"),
    ({"question": "Q", "answer": "#### 7\n#### 8"}, "line 2: answer has 2 marks ####"),
    ({"question": "Q", "answer": "So #### seven"}, "line 2: 'seven' behind #### is not a number"),
    ({"question": "Q", "answer": "So ####"}, "line 2: '' behind #### is not a number"),
    ({"question": "Q\ud800", "answer": "#### 7"}, "line 2: question has half a surrogate pair at character 1"),
  ],
  ids=lambda value: ascii(value)[:30],
)
def test_bad_rows(tmp_path, row, message):
  good = {"question": "Q", "answer": "So\n#### 1"}
  for split, name in (("train", "train"), ("test", "test")):
    root = write_rows(tmp_path, good, row, name=name)
    with pytest.raises(DataError) as error:
      Gsm8k(root=root).records(split)
    assert str(error.value).startswith(f"gsm8k/{name}.jsonl {message}")


def test_test_rows_keep_their_order(tmp_path):
  rows = [{"question": f"Q{n}", "answer": f"It is {n}-1=<<{n}-1={n - 1}>>{n - 1}.\n#### {-n}"} for n in (5, 3, 4)]
  records = Gsm8k(root=write_rows(tmp_path, *rows, name="test")).records("test")
  assert [r["question"] for r in records] == ["Q5", "Q3", "Q4"]
  assert records[0] == {"question": "Q5", "solution": "It is 5-1=4.", "answer": "-5"}


def test_no_root_is_an_error_that_says_what_to_do():
  with pytest.raises(ValueError, match=r"gsm8k root is None.*config.data.root.*gsm8k/train.jsonl"):
    Gsm8k().records("train")


def test_prompts():
  content = Path(__file__).with_name("d1_gsm8k_prompt.txt").read_text()
  assert Gsm8k().prompt(RECORD, "d1") == ([{"role": "user", "content": content}], "")
  assert Gsm8k().prompt(RECORD, "terse") == ([{"role": "user", "content": "How many?"}], "")
  content = Path(__file__).with_name("d1_eval_gsm8k_prompt.txt").read_text()
  assert Gsm8k().prompt(RECORD, "d1_eval") == ([{"role": "user", "content": content}], "<reasoning>")


def test_demonstration():
  text = "<reasoning>\nHalf of 2,160 is 1,080.\n</reasoning>\n<answer>\n1,080\n</answer>"
  assert Gsm8k().demonstration(RECORD, "d1") == Gsm8k().demonstration(RECORD, "terse") == text
  assert Gsm8k().cluster(RECORD) == "How many?"


def test_evaluation_demonstration_follows_the_prefill():
  text = Gsm8k().demonstration(RECORD, "d1_eval")
  assert text == "\nHalf of 2,160 is 1,080.\n</reasoning>\n<answer>\n\\boxed{1080}\n</answer>"
  for protocol in PROTOCOLS:  # the box has no comma, which d1's parser takes for the end of a number
    assert Gsm8k().grade("<reasoning>" + text, RECORD, protocol).metrics[ACCURACY[protocol]] == (1, 1)
  assert Gsm8k().grade("<reasoning>" + text, RECORD).components == {"correct": 2.0, "number": 0.5, "format": 1.0}
  assert Gsm8k().baseline(RECORD, "d1_eval") == "\nI guess.\n</reasoning>\n<answer>\n\\boxed{4}\n</answer>"


@pytest.mark.parametrize(
  ("answer", "is_number", "is_right"),
  [
    *((answer, 1, 1) for answer in ("1080", "1,080", "$1,080.00", "1080.", "\\boxed{1080}", "$\\boxed{1,080}$")),
    *((answer, 1, 0) for answer in ("-1080", "1", "1080.5", "1/1080", "0", "9" * 100)),
    *((answer, 0, 0) for answer in ("", "x", "1080 1080", "2*540", "9" * 101, "\\boxed{}", "1080/0")),
  ],
)
def test_strict_answers(answer, is_number, is_right):
  grade = Gsm8k().grade(f"<answer>1</answer> or <answer>\n{answer}\n</answer>", RECORD)
  assert grade.components["correct"] == 2.0 * is_right
  assert grade.components["number"] == 0.5 * is_number
  assert grade.metrics == {"solved": (is_right, 1), "well_formed": (is_number, 1)}
  assert Gsm8k().grade(answer, RECORD).metrics == grade.metrics


@pytest.mark.parametrize(
  "answer",
  [
    *(
      "18 dollars",
      "\\boxed{18\\text{ dollars}}",
      "\\text{18}",
      "9 + 9 = 18",
      "x = 18",
      "Total = $18",
      "18 sheets per month.",
    ),
    *("\\frac{36}{2}", "\\dfrac{18}1", "17 1/1", "**18**", "18 cm^2", "\\boxed{18", "\\boxed{18 miles", "boxed{18}"),
  ],
)
def test_what_a_reader_takes_for_the_number(answer):
  assert Gsm8k().grade(f"<answer>\n{answer}\n</answer>", {"answer": "18"}).metrics["solved"] == (1, 1)


@pytest.mark.parametrize(
  "answer",
  [
    *(
      "18 or 19",
      "18 and 19 dollars",
      "not 17, 18",
      "17 18",
      "18 million",
      "18 dozen",
      "18:00",
      "18-18",
      "18x",
      "18 x",
    ),
    *(
      "The answer is not 18.",
      "It is 18.",
      "18 is what I get in the end",
      "x = y = 18",
      "\\boxed{}18",
      "\\boxed{17} 18",
      "1 8",
      "+-18",
    ),
  ],
)
def test_a_number_among_others_or_in_a_sentence_is_no_answer(answer):
  assert Gsm8k().grade(f"<answer>\n{answer}\n</answer>", {"answer": "18"}).metrics["solved"] == (0, 1)


def test_a_box_that_the_end_of_a_completion_leaves_open_is_no_answer():
  for text in ("\\boxed{18", "<answer>\n\\boxed{18", "boxed{18}"):
    assert Gsm8k().grade(text, {"answer": "18"}).metrics["well_formed"] == (0, 1)


def test_without_a_gold_nothing_is_known():
  grade = Gsm8k().grade("18", {"answer": None})
  assert grade.metrics == {"solved": (0, 0), "well_formed": (1, 1)}
  assert (grade.components["correct"], grade.answer) == (0.0, "18")


def test_negative_and_decimal_golds():
  assert Gsm8k().grade("-10.0", {"answer": "-10"}).metrics["solved"] == (1, 1)
  assert Gsm8k().grade("10", {"answer": "-10"}).metrics["solved"] == (0, 1)
  assert Gsm8k().grade("5/2", {"answer": "2.50"}).metrics["solved"] == (1, 1)
  assert rationals.parse("2.50") == rationals.parse("5/2")


def test_strict_format_is_earned_by_many_lines_at_no_cost_in_length():
  for lines in (1, 2, 100):
    text = "<reasoning>\n" + "Think.\n" * lines + "</reasoning>\n<answer>\n1080\n</answer>"
    for ending in ("", "\n", "\n\n"):
      assert Gsm8k().grade(text + ending, RECORD).reward == 3.5
  assert Gsm8k().grade(text + " So there.", RECORD).reward == 3.0
  assert Gsm8k().grade("1080", RECORD).reward == 2.5


def test_d1_components_are_named_after_its_functions():
  grade = Gsm8k().grade("<reasoning>a</reasoning><answer>$1,080</answer>", RECORD, "d1")
  wanted = {"xmlcount": 0.0, "soft_format": 0.5, "strict_format": 0.0, "int": 0.0, "correctness": 0.0}
  assert grade.components == wanted
  assert grade.metrics == {"solved": (1, 1), "well_formed": (1, 1), "d1_accuracy": (0, 1)}
