import json
import os
from pathlib import Path

import pytest

from d1jax.data.demonstrations import SYSTEM_PROMPT, Demonstration, conversation, read, split

S1K = {"question": "Q?", "thinking_trajectories": ["first\n", "second"], "attempt": " so \\boxed{3}", "solution": "3"}
S1K_1_1 = {"question": "Q?", "solution": "3", "deepseek_thinking_trajectory": "t", "deepseek_attempt": "a"}
MATH = {"problem": "P?", "solution": "As $1+1=\\boxed{2}$.", "answer": "2", "level": "Level 5"}
SOLVED = {"question": "Q?", "solution": "So \\boxed{1}, no: $\\boxed{\\frac{1}{2}}$."}
GSM8K = {"question": "Q?", "answer": "He has 2*3 = <<2*3=6>>6.\nAnd $<<6/4=1.50>>1.50 each.\n#### 1,001"}


@pytest.fixture(scope="module")
def data_root() -> Path:
  default = Path(__file__).parents[2] / "../shared/data"
  root = Path(os.environ.get("D1JAX_DATA", default)).resolve()
  if not (root / "s1k/s1k.jsonl").is_file():
    pytest.skip(f"no data folder at {root}; set D1JAX_DATA to one (see its README)")
  return root


@pytest.fixture
def written(tmp_path):
  """Writes rows (or lines as they are) into a file and gives its path."""

  def write(*rows):
    path = tmp_path / "demonstrations.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path

  return write


@pytest.mark.parametrize(
  ("row", "expected"),
  [
    (S1K, Demonstration("Q?", "first\n", " so \\boxed{3}")),
    (S1K_1_1, Demonstration("Q?", "t", "a")),
    (S1K_1_1 | {"gemini_thinking_trajectory": "g", "gemini_attempt": "b"}, Demonstration("Q?", "t", "a")),
    (MATH | {"messages": None}, Demonstration("P?", "As $1+1=\\boxed{2}$.", "\\boxed{2}")),
    (MATH, Demonstration("P?", "As $1+1=\\boxed{2}$.", "\\boxed{2}")),
    (SOLVED, Demonstration("Q?", SOLVED["solution"], "\\boxed{\\frac{1}{2}}")),
    (GSM8K, Demonstration("Q?", "He has 2*3 = 6.\nAnd $1.50 each.", "1,001")),
  ],
  ids=["s1k", "s1k_1_1", "s1k_1_1_and_gemini", "numina", "math", "s1k_without_traces", "gsm8k"],
)
def test_a_schema_is_known_by_its_fields(written, row, expected, caplog):
  assert read(written(row, row)) == [expected, expected]
  assert read(str(written(dict(reversed(row.items()))))) == [expected]
  assert not caplog.messages


@pytest.mark.parametrize(
  ("solution", "answer"),
  [
    ("\\boxed{a{b}c{}} }", "\\boxed{a{b}c{}}"),
    ("\\boxed{\\left\\{ x \\right.}", "\\boxed{\\left\\{ x \\right.}"),
    ("\\boxed{1\\\\}", "\\boxed{1\\\\}"),
    ("\\boxed {17}.", "\\boxed{17}"),
    ("\\boxed{1} \\boxed{2}", "\\boxed{2}"),
    ("\\boxed{1} then \\boxed 2", "\\boxed{1}"),
  ],
)
def test_the_answer_is_the_last_box_up_to_its_own_brace(written, solution, answer):
  assert [d.answer for d in read(written({"question": "Q", "solution": solution}))] == [answer]


@pytest.mark.parametrize("solution", ["QED", "\\boxed 2", "\\boxed{1", "\\boxed{ }", "\\boxed{1\\}", "\\boxed{1\\"])
def test_solutions_without_a_box_are_left_out_and_counted(written, solution, caplog):
  path = written(SOLVED, {"question": "R", "solution": solution}, SOLVED, {"question": "S", "solution": solution})
  assert [d.question for d in read(path)] == ["Q?", "Q?"]
  assert "demonstrations.jsonl: left out 2 of 4 rows" in caplog.text


def test_math_rows_without_an_answer_are_left_out_and_counted(written, caplog):
  assert len(read(written(MATH, MATH | {"answer": ""}))) == 1
  assert "left out 1 of 2 rows" in caplog.text


def test_a_file_without_any_answer_is_an_error(written):
  with pytest.raises(ValueError, match=r"demonstrations\.jsonl: none of 1 rows.*another file"):
    read(written({"question": "Q", "solution": "QED"}))


@pytest.mark.parametrize(
  ("first", "second", "message"),
  [
    (GSM8K, "{", r"line 2 is not JSON .*one object a line"),
    (GSM8K, "[" * 100_000, r"line 2 is nested too deep; write one object a line"),
    (GSM8K, '{"question": ' + "9" * 400 + "}", r"line 2 holds a number of 400 digits"),
    (GSM8K, '["a"]', r"line 2: is a JSON list, expected an object"),
    (GSM8K, GSM8K | {"question": "  "}, r"line 2: question is blank"),
    (GSM8K, GSM8K | {"question": 3}, r"line 2: question is a JSON int, expected a string"),
    (GSM8K, GSM8K | {"answer": "6"}, r"line 2: answer has 0 '####', expected one"),
    (GSM8K, GSM8K | {"answer": "a #### b #### c"}, r"line 2: answer has 2 '####'"),
    (GSM8K, GSM8K | {"answer": "a ####  "}, r"line 2: answer behind '####' is blank"),
    (GSM8K, GSM8K | {"answer": "<<1=1>>#### 1"}, r"line 2: answer before '####' is blank"),
    (GSM8K, SOLVED, r"line 2: field 'answer' is missing, which GSM8K has"),
    (SOLVED, GSM8K, r"line 2: field 'solution' is missing, which s1K without traces has"),
    (SOLVED, {"question": "Q", "solution": None}, r"line 2: solution is a JSON NoneType"),
    (S1K, SOLVED, r"line 2: field 'thinking_trajectories' is missing, which s1K has"),
    (S1K, S1K | {"thinking_trajectories": []}, r"line 2: thinking_trajectories is '\[\]', expected a list"),
    (S1K, S1K | {"thinking_trajectories": "text"}, r"line 2: thinking_trajectories is 'text', expected a list"),
    (S1K, S1K | {"thinking_trajectories": [7]}, r"line 2: thinking_trajectories\[0\] is a JSON int"),
    (S1K, S1K | {"attempt": "\n"}, r"line 2: attempt is blank"),
    (S1K, {k: v for k, v in S1K.items() if k != "question"}, r"line 2: field 'question' is missing"),
    (MATH, MATH | {"problem": ""}, r"line 2: problem is blank"),
    (MATH, MATH | {"answer": 2}, r"line 2: answer is a JSON int"),
    (MATH, '{"problem": "\\ud800", "solution": "s", "answer": "1"}', r"line 2: problem holds half of a surrogate"),
    ({"problem": "P", "solution": "s"}, MATH, r"line 1: field 'answer' is missing, which MATH has"),
    ({"text": "Q", "code": "c"}, MATH, r"line 1: fields 'text', 'code' fit no known schema; .*GSM8K: question, answer"),
    ({}, MATH, r"line 1: fields none fit no known schema"),
    (S1K_1_1, SOLVED, r"line 2: field 'deepseek_thinking_trajectory' is missing, which s1K-1\.1 has"),
    (S1K_1_1, S1K_1_1 | {"deepseek_attempt": None}, r"line 2: deepseek_attempt is a JSON NoneType"),
    (
      SOLVED | {"gemini_thinking_trajectory": "t"},
      SOLVED,
      r"line 1: has the field 'gemini_thinking_trajectory', whose",
    ),
    (
      MATH | {"generations": ["<think>"]},
      MATH,
      r"line 1: has the field 'generations', whose reasoning MATH would drop",
    ),
    (MATH | {"messages": [{}]}, MATH, r"line 1: has .* or remove 'messages' to train on 'solution'"),
  ],
)
def test_a_wrong_row_is_an_error_that_names_its_line(written, first, second, message):
  with pytest.raises(ValueError, match=rf"demonstrations\.jsonl {message}"):
    read(written(first, second))


def test_files_that_cannot_be_read_are_errors(tmp_path):
  with pytest.raises(ValueError, match=r"absent\.jsonl is missing, expected a file; check the path"):
    read(tmp_path / "absent.jsonl")
  for content in (b"", b"\n"):
    (tmp_path / "empty.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=r"empty\.jsonl: the file is empty"):
      read(tmp_path / "empty.jsonl")
  (tmp_path / "latin.jsonl").write_bytes(b'{"question": "\xe9"}')
  with pytest.raises(ValueError, match=r"latin\.jsonl is not UTF-8 \(byte 14"):
    read(tmp_path / "latin.jsonl")


def test_marks_line_ends_and_blank_lines_are_no_content(tmp_path):
  path = tmp_path / "windows.jsonl"
  path.write_bytes(f"\ufeff\r\n{json.dumps(SOLVED)}\r\n\r\n{json.dumps(SOLVED)}\r\n".encode())
  assert len(read(path)) == 2
  path.write_bytes(f"\n{json.dumps(SOLVED)}\n\n{{}}".encode())
  with pytest.raises(ValueError, match=r"windows\.jsonl line 4: field 'question' is missing"):
    read(path)


def test_a_line_separator_inside_text_is_text(written):
  assert read(written(GSM8K | {"question": "a\u2028b"}))[0].question == "a\u2028b"


def test_the_conversation_is_d1s_to_the_letter():
  assert SYSTEM_PROMPT == (
    "\nRespond in the following format:\n<reasoning>\nYour reasoning here\n</reasoning>\n<answer>\n...\n</answer>\n"
  )
  messages, completion = conversation(Demonstration("Why?", "As it is.\n", "So."))
  assert messages == [{"role": "user", "content": SYSTEM_PROMPT + "\n\nWhy?"}]
  assert completion == "<reasoning>As it is.\n</reasoning>\n<answer>So.</answer>"


MANY = [Demonstration(f"What is {i}?", "r", str(i)) for i in range(2000)]


def test_a_split_parts_by_question_and_by_nothing_else():
  train, validation = split(MANY, 0.1)
  assert sorted(train + validation) == sorted(MANY)
  assert 160 <= len(validation) <= 240, "binomial, three standard deviations"
  assert [d for d in MANY if d in set(train)] == train, "in order"
  backwards = split([d._replace(reasoning="else", answer="x") for d in reversed(MANY)], 0.1)
  assert {d.question for d in backwards[1]} == {d.question for d in validation}
  fewer = split(MANY[::3], 0.1)
  assert {d.question for d in fewer[1]} == {d.question for d in validation} & {d.question for d in MANY[::3]}


def test_a_larger_share_holds_out_more_of_the_same():
  small, large = (set(split(MANY, share)[1]) for share in (0.05, 0.3))
  assert small < large


def test_questions_that_differ_in_white_space_stay_together():
  train, validation = split([*MANY, *(d._replace(question=f" {d.question}\n") for d in MANY)], 0.5)
  assert not {d.question.strip() for d in train} & {d.question.strip() for d in validation}


def test_nothing_is_held_out_of_a_share_of_zero():
  assert split(MANY, 0) == (MANY, [])
  assert split(MANY, 0.0) == (MANY, [])


def test_the_split_never_changes():
  assert [d.answer for d in split(MANY[:40], 0.1)[1]] == ["0", "5", "17", "37"]


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan"), float("inf")])
def test_a_share_outside_its_range_is_refused(share):
  with pytest.raises(ValueError, match=r"held_out=.* is not a share"):
    split(MANY, share)


def test_an_empty_side_is_an_error():
  with pytest.raises(ValueError, match=r"held_out=0.001 parts 3 demonstrations into 3 to train on and 0 to hold out"):
    split(MANY[:3], 0.001)
  with pytest.raises(ValueError, match=r"held_out=0.999 parts 3 demonstrations into 0 to train on"):
    split(MANY[:3], 0.999)
  with pytest.raises(ValueError, match=r"parts 0 demonstrations"):
    split([], 0)


@pytest.mark.parametrize(
  ("name", "count", "left_out"), [("s1k/s1k", 294, 704), ("math/train", 7498, 2), ("math/train_extra", 4500, 0)]
)
def test_real_files_with_boxed_answers(data_root, name, count, left_out, caplog):
  found = read(data_root / f"{name}.jsonl")
  assert len(found) == count
  assert [f"left out {left_out} of" in message for message in caplog.messages] == [True] * bool(left_out)
  assert all(d.answer.startswith("\\boxed{") and d.answer.endswith("}") and "\\boxed" in d.reasoning for d in found)


@pytest.mark.parametrize(("name", "different"), [("train", [1656, 1708, 5530, 5532]), ("train_extra", [])])
def test_the_last_box_of_a_real_solution_is_the_answer_that_math_names(data_root, tmp_path, name, different):
  lines = (data_root / f"math/{name}.jsonl").read_text("utf-8").splitlines()
  rows = [json.loads(line) for line in lines]
  path = tmp_path / "solved.jsonl"
  solved = [{"question": str(number), "solution": row["solution"]} for number, row in enumerate(rows, start=1)]
  path.write_text("\n".join(map(json.dumps, solved)), "utf-8")
  answers = {int(d.question): d.answer for d in read(path)}
  named = {number: f"\\boxed{{{row['answer']}}}" for number, row in enumerate(rows, start=1)}
  # Two are written `\boxed 2` and `\boxed 9`, two boxes are empty.
  assert [number for number in named if answers.get(number) != named[number]] == different


def test_real_gsm8k(data_root):
  found = read(data_root / "gsm8k/train.jsonl")
  assert len(found) == 7473
  assert found[0].reasoning == (
    "Natalia sold 48/2 = 24 clips in May.\nNatalia sold 48+24 = 72 clips altogether in April and May."
  )
  assert found[0].answer == "72"
  assert not [d for d in found if "<<" in d.reasoning or "####" in d.reasoning or d.answer.strip("-0123456789,")]
