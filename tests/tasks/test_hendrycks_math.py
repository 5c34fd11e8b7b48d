import json
from pathlib import Path

import pytest

from d1jax.tasks import DataError, HendrycksMath

RECORD = {"problem": "Find $q$.", "solution": "Clearly $q=\\boxed{\\frac{1}{2}}$.", "answer": "\\frac{1}{2}"}


def write_rows(tmp_path, *rows, name="train") -> str:
  (tmp_path / "math").mkdir(exist_ok=True)
  lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
  (tmp_path / f"math/{name}.jsonl").write_text("\n".join(lines) + "\n")
  return str(tmp_path)


@pytest.fixture(scope="module")
def records(data_root):
  if not (Path(data_root) / "math/train_extra.jsonl").is_file():
    pytest.skip(f"no math/train_extra.jsonl in {data_root}")
  task = HendrycksMath(root=data_root, sizes={"validation": 10_000})
  return {split: task.records(split) for split in ("demonstrations", "train", "validation")}


def test_the_files_are_read_whole(records, data_root):
  # Two of 12,000 have an empty box, two others come twice but for their blanks.
  assert (len(records["train"]), len(records["validation"])) == (11_397, 599)
  problems = {record["problem"] for split in ("train", "validation") for record in records[split]}
  assert len(problems) == 11_996
  assert records["demonstrations"] == records["train"]
  assert len(HendrycksMath(root=data_root).records("validation")) == 400
  extra = {json.loads(line)["problem"] for line in (Path(data_root) / "math/train_extra.jsonl").open()}
  share = sum(record["problem"] in extra for record in records["validation"][:400]) / 400
  assert abs(share - 4500 / 12_000) < 0.1  # four standard deviations
  json.dumps(records["train"][:2])


@pytest.mark.slow(reason="grades every problem")
def test_demonstrations_are_right_and_the_baseline_seldom(records):
  task = HendrycksMath()
  for record in records["demonstrations"]:
    text = task.demonstration(record, "d1")
    assert task.grade(text, record).components == {"correct": 2.0, "box": 0.5, "format": 1.0}
    assert task.grade(text, record, "d1").components == {"correctness": 2.0, "format": 0.75}
  solved = [task.grade(task.baseline(r, "d1"), r).metrics["solved"][0] for r in records["train"]]
  assert 0 < sum(solved) < 0.05 * len(solved)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ("{", "line 2: '{' is not JSON"),
    ({"problem": 7}, "line 2: problem is '7', expected a text"),
    ({"problem": ""}, "line 2: problem is blank"),
    ({"solution": None}, "line 2: solution is 'None', expected a text"),
    ({"solution": "It is 2."}, "line 2: solution ends with 'It is 2.' and has no closed \\boxed{...}"),
    ({"solution": "It is \\boxed{2."}, "line 2: solution ends with 'It is \\\\boxed{2.' and has no closed"),
    ({"answer": " "}, "line 2: answer is blank, but the solution boxes '\\\\frac{1}{2}'"),
    ({"answer": 2}, "line 2: answer is '2', expected a text"),
    ({"answer": "\udc00"}, "line 2: answer has half a surrogate pair"),
  ],
  ids=lambda value: ascii(value)[:30],
)
def test_bad_rows(tmp_path, change, message):
  row = change if isinstance(change, str) else {**RECORD, **change}
  for split, name in (("train", "train"), ("test", "test")):
    root = write_rows(tmp_path, RECORD, row, name=name)
    with pytest.raises(DataError) as error:
      HendrycksMath(root=root).records(split)
    assert str(error.value).startswith(f"math/{name}.jsonl {message}")
  missing = {key: value for key, value in RECORD.items() if key != "solution"}
  with pytest.raises(DataError, match=r'line 1: expected {"problem": "\.\.\.", "solution": "\.\.\."}'):
    HendrycksMath(root=write_rows(tmp_path, missing)).records("train")


def test_rows_without_the_field_answer_have_what_they_box(tmp_path):
  bare = {key: value for key, value in RECORD.items() if key != "answer"}
  empty = {"problem": "Why?", "solution": "So \\boxed{}."}
  root = write_rows(tmp_path, bare, empty, name="test")
  assert HendrycksMath(root=root).records("test") == (RECORD,)


def test_bad_rows_of_the_extra_file_are_located(tmp_path):
  write_rows(tmp_path, {**RECORD, "solution": "none"}, name="train_extra")
  with pytest.raises(DataError, match=r"^math/train_extra.jsonl line 1: solution"):
    HendrycksMath(root=write_rows(tmp_path, RECORD)).records("train")


def test_rows_without_any_answer_are_left_out_and_logged(tmp_path, caplog):
  empty = {"problem": "Why?", "solution": "So \\boxed{}.", "answer": ""}
  blank = {**RECORD, "answer": " \\frac{1}{2}\n", "level": "Level 1"}
  root = write_rows(tmp_path, empty, blank, name="test")
  assert HendrycksMath(root=root).records("test") == (RECORD,)
  assert "left out 1 rows without an answer, 0 repeated ones and 0 test questions" in caplog.text


def test_no_root_is_an_error_that_says_what_to_do():
  with pytest.raises(ValueError, match=r"math root is None.*config.data.root.*math/test.jsonl"):
    HendrycksMath().records("test")


def test_prompts_and_demonstration():
  task = HendrycksMath()
  content = Path(__file__).with_name("d1_math_prompt.txt").read_text()
  assert task.prompt(RECORD, "d1") == ([{"role": "user", "content": content}], "")
  assert task.prompt(RECORD, "terse") == ([{"role": "user", "content": "Find $q$."}], "")
  content = Path(__file__).with_name("d1_eval_math_prompt.txt").read_text()
  assert task.prompt(RECORD, "d1_eval") == ([{"role": "user", "content": content}], "<reasoning>")
  answer = "<answer>\n\\boxed{\\frac{1}{2}}\n</answer>"
  text = f"<reasoning>\nClearly $q=\\boxed{{\\frac{{1}}{{2}}}}$.\n</reasoning>\n{answer}"
  assert task.demonstration(RECORD, "d1") == task.demonstration(RECORD, "terse") == text
  assert "<reasoning>" + task.demonstration(RECORD, "d1_eval") == text
  assert task.baseline(RECORD, "d1_eval") == "\nI guess.\n</reasoning>\n<answer>\n\\boxed{2}\n</answer>"
  assert task.cluster(RECORD) == "Find $q$."


@pytest.mark.parametrize(
  ("answer", "has_box", "is_right"),
  [
    (r"\boxed{\frac{1}{2}}", 1, 1),
    (r"\boxed{\frac12}", 1, 1),
    (r"\boxed{1/2}", 1, 1),
    (r"$\boxed{0.5}$", 1, 1),
    (r"\boxed{0.50}.", 1, 1),
    (r"\boxed{3} or \boxed{q=\dfrac{2}{4}}", 1, 1),
    (r"\frac12", 0, 1),
    ("0.5", 0, 1),
    (r"\boxed{2}", 1, 0),
    (r"\boxed{\frac12} or \boxed{2}", 1, 0),
    (r"\boxed{}", 0, 0),
    (r"\boxed{\frac12", 0, 0),
    ("It is 0.5", 0, 0),
    ("", 0, 0),
  ],
)
def test_strict_answers(answer, has_box, is_right):
  grade = HendrycksMath().grade(f"\\boxed{{7}} <answer>\n{answer}\n</answer> \\boxed{{8}}", RECORD)
  assert (grade.components["correct"], grade.components["box"]) == (2.0 * is_right, 0.5 * has_box)
  assert grade.metrics == {"solved": (is_right, 1), "well_formed": (has_box, 1)}
  assert HendrycksMath().grade(answer, RECORD).metrics == grade.metrics


def test_equivalent_answers_are_right_and_copied_ones_wrong():
  record = {"problem": "Factor $9x^2+3x$.", "solution": "\\boxed{3x(3x+1)}", "answer": "3x(3x+1)"}
  graded = {text: HendrycksMath().grade(f"\\boxed{{{text}}}", record) for text in ("3x(1+3x)", "9x^2 + 3x", "3x + 1")}
  assert [grade.metrics["solved"] for grade in graded.values()] == [(1, 1), (0, 1), (0, 1)]
  assert [grade.answer for grade in graded.values()] == ["3x(1+3x)", "9x^2+3x", "3x+1"]


def test_without_a_gold_nothing_is_known():
  grade = HendrycksMath().grade("\\boxed{0.5}", {**RECORD, "answer": None})
  assert (grade.metrics["solved"], grade.components["correct"], grade.answer) == ((0, 0), 0.0, "1/2")


def test_strict_format_is_earned_by_many_lines():
  text = "<reasoning>\n" + "Think.\n" * 50 + "</reasoning>\n<answer>\n\\boxed{\n0.5\n}\n</answer>"
  assert HendrycksMath().grade(text, RECORD).components == {"correct": 2.0, "box": 0.5, "format": 1.0}
  assert HendrycksMath().grade(text, RECORD, "d1").components == {"correctness": 2.0, "format": 0.75}


def test_d1_compares_with_the_box_of_the_solution():
  odd = {**RECORD, "solution": "our answer is $\\boxed 2$.", "answer": "2"}
  assert HendrycksMath().grade("\\boxed{2}", odd, "d1").components == {"correctness": 2.0, "format": 0.25}
  assert HendrycksMath().grade("\\boxed{2.0}", odd, "d1").components["correctness"] == 0.0
  assert HendrycksMath().grade("\\boxed{2.0}", odd).metrics["solved"] == (1, 1)


def test_without_math_verify_there_is_no_task_that_grades_with_it(monkeypatch):
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  with pytest.raises(ValueError, match=r'math: math_verify is not installed: pip install "d1jax\[math\]" brings it'):
    HendrycksMath()
