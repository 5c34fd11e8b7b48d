import collections
import functools
import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d1jax.tasks import Countdown, DataError, arithmetic

SIZES = {"demonstrations": 120, "train": 500, "validation": 60, "test": 100}
RECORD = {"nums": [3, 25, 7], "target": 68, "expression": "25*3-7"}


@functools.cache
def generated(split: str, seed: int = 0):
  return Countdown(seed=seed, sizes=SIZES).records(split)


def multisets(records):
  return {tuple(sorted(record["nums"])) for record in records}


def problems(records):
  return {(tuple(sorted(record["nums"])), record["target"]) for record in records}


def write_rows(tmp_path, *rows) -> str:
  (tmp_path / "countdown").mkdir()
  lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
  (tmp_path / "countdown/train.jsonl").write_text("\n".join(lines) + "\n")
  return str(tmp_path)


def check_no_leak(records_of):
  seen = [multisets(records_of(split)) for split in SIZES]
  assert all(seen)
  assert len(set.union(*seen)) == sum(map(len, seen))


def test_no_leak_generated_or_read(data_root):
  check_no_leak(generated)
  # So few multisets exist here that splits would share some by chance.
  few = Countdown(numbers=(3, 3), largest=12, sizes=dict.fromkeys(SIZES, 40))
  check_no_leak(few.records)
  task = Countdown(root=data_root, sizes=dict.fromkeys(SIZES, 20_000))
  read = functools.cache(task.records)
  check_no_leak(read)
  # 88 rows of the file repeat a problem; nothing else is lost.
  assert sum(len(read(split)) for split in SIZES) == 19_996 - 88
  assert not multisets(read("test")) & multisets(generated("train", seed=7))


@pytest.mark.parametrize("split", SIZES)
def test_generated_problems_follow_the_rule(split):
  records = generated(split)
  assert len(records) == len(problems(records)) == SIZES[split]
  for record in records:
    value, used = arithmetic.evaluate(record["expression"])
    assert (value, sorted(used)) == (record["target"], sorted(record["nums"]))
    assert 10 <= record["target"] <= 100
    assert all(1 <= number <= 99 for number in record["nums"])
  json.dumps(list(records))


def test_lengths_and_targets_are_uniform():
  records = generated("train")
  lengths = collections.Counter(len(record["nums"]) for record in records)
  assert sorted(lengths) == [3, 4]
  assert abs(lengths[3] - 250) < 45  # four standard deviations
  thirds = collections.Counter((record["target"] - 10) * 3 // 91 for record in records)
  assert sorted(thirds) == [0, 1, 2]
  assert sum((count - 500 / 3) ** 2 / (500 / 3) for count in thirds.values()) < 18.4


@pytest.mark.parametrize("split", SIZES)
def test_draws_are_deterministic_and_grow_at_the_end(split):
  fewer = Countdown(sizes={split: SIZES[split] // 3}).records(split)
  assert list(fewer) == list(generated(split)[: SIZES[split] // 3])
  assert generated(split, seed=1)[:20] != generated(split)[:20]


def test_options_shape_the_problems():
  task = Countdown(numbers=(2, 2), largest=9, targets=(5, 8), sizes={"train": 20})
  for record in task.records("train"):
    assert len(record["nums"]) == 2
    assert max(record["nums"]) <= 9
    assert 5 <= record["target"] <= 8


def test_more_than_there_are_is_an_error():
  task = Countdown(numbers=(2, 2), largest=3, targets=(2, 3), sizes={"train": 1000})
  message = r"sizes\['train'\] is 1000, but only \d+ problems .* widen numbers"
  with pytest.raises(DataError, match=message):
    task.records("train")


# Files.


@pytest.mark.parametrize(
  ("row", "message"),
  [
    ("{nums: 1}", "line 2: '{nums: 1}' is not JSON"),
    ("", "line 2: '' is not JSON"),
    ("[" * 100_000, "line 2: .* is not JSON"),
    ("[1]", "line 2: expected .*, got '\\[1\\]'"),
    ({"nums": [1, 2]}, "line 2: expected"),
    ({"nums": "12", "target": 3}, "line 2: nums is 12, expected a list of positive integers"),
    ({"nums": [1, 2.0], "target": 3}, r"line 2: nums is \[1, 2.0\]"),
    ({"nums": [1, True], "target": 3}, "line 2: nums is"),
    ({"nums": [1, 0], "target": 3}, "line 2: nums is"),
    ({"nums": [1], "target": 3}, "line 2: nums has 1 numbers, expected 2 to 6"),
    ({"nums": [1, 2], "target": "3"}, "line 2: target is '3', expected an integer"),
  ],
  ids=lambda value: str(value)[:20],
)
def test_bad_rows(tmp_path, row, message):
  good = {"nums": [3, 25, 7], "target": 68}
  with pytest.raises(DataError, match=f"^countdown/train.jsonl {message}") as error:
    Countdown(root=write_rows(tmp_path, good, row, good)).records("train")
  assert "\n" not in str(error.value)


def test_rows_are_filtered_kept_in_order_and_logged(tmp_path, data_root, caplog):
  read = Countdown(root=data_root, numbers=(3, 3), sizes={"train": 300}).records("train")
  with open(f"{data_root}/countdown/train.jsonl") as file:
    order = [json.loads(line) for line in file]
  places = [order.index(record) for record in read]
  assert len(places) == 300
  assert places == sorted(places)
  assert {len(record["nums"]) for record in read} == {3}
  caplog.clear()
  first = read[0]
  again = {"nums": first["nums"][::-1], "target": first["target"]}
  five = {"nums": [1, 2, 3, 4, 5], "target": 9}
  root = write_rows(tmp_path, first, again, five)
  assert list(Countdown(root=root).records("train")) == [first]
  assert "1 problems without 3 to 4 numbers and 1 repeated" in caplog.text
  with pytest.raises(DataError, match=r"train.jsonl: no usable row .* 'test'"):
    Countdown(root=root).records("test")


def test_demonstrations_of_read_problems_are_searched(data_root):
  task = Countdown(root=data_root)
  for record in task.records("demonstrations")[:100]:
    assert "expression" not in record
    assert task.grade(task.demonstration(record, "d1"), record).reward == 1.0
  with pytest.raises(DataError, match=r"no expression over \[1, 1\] reaches 50"):
    task.demonstration({"nums": [1, 1], "target": 50}, "d1")


# Prompts and completions.


def test_d1_prompt_is_verbatim():
  messages, prefill = Countdown().prompt({"nums": (3, 25, 7), "target": 68}, "d1")
  assert prefill == ""
  content = Path(__file__).with_name("d1_countdown_prompt.txt").read_text()
  assert messages == [{"role": "user", "content": content}]


def test_terse_style():
  messages, prefill = Countdown().prompt(RECORD, "terse")
  assert (messages, prefill) == ([{"role": "user", "content": "3 25 7 = 68"}], "")
  assert Countdown().demonstration(RECORD, "terse") == "25 * 3 - 7"
  assert Countdown().baseline(RECORD, "terse") == "3 + 25 + 7"
  bracketed = {**RECORD, "expression": "(25-3)*7"}
  assert Countdown().demonstration(bracketed, "terse") == "( 25 - 3 ) * 7"


def test_d1_completions_and_cluster():
  demonstration = Countdown().demonstration(RECORD, "d1")
  assert demonstration.startswith("<reasoning>\n25*3-7 = 68")
  assert demonstration.endswith("\n</reasoning>\n<answer>\n25*3-7\n</answer>")
  assert Countdown().baseline(RECORD, "d1").endswith("<answer>\n3+25+7\n</answer>")
  assert Countdown().cluster(RECORD) == "3 7 25"


# Grades.


@pytest.mark.parametrize("style", ["d1", "terse"])
def test_demonstrations_earn_everything(style):
  task = Countdown()
  for record in generated("demonstrations"):
    grade = task.grade(task.demonstration(record, style), record)
    assert grade.components == {"correct": 1.0, "well_formed": 0.0}
    assert grade.metrics == {"solved": (1, 1), "well_formed": (1, 1)}


@pytest.mark.parametrize(
  ("answer", "reward"),
  [
    ("25*3-7", 1.0),
    ("3*25 - 7", 1.0),
    ("(25*3)-7", 1.0),
    ("25+3+7", 0.1),
    ("3/7/25", 0.1),
    ("25*3-7=68", 0.0),
    ("\\boxed{25*3-7}", 0.0),
    ("68", 0.0),
    ("68+25*0", 0.0),
    ("75-7", 0.0),
    ("25*3-7+3-3", 0.0),
    ("25*3", 0.0),
    ("2 5*3-7", 0.0),
    ("3**25-7", 0.0),
    ("25*3--7", 0.0),
    ("25/(3-3)-7", 0.0),
    ("25.0*3-7", 0.0),
    ("２５*3-7", 0.0),
    ("", 0.0),
  ],
)
def test_answers(answer, reward):
  for text in (answer, f"7 <answer>1</answer> so <answer>\n{answer}\n</answer> 99"):
    grade = Countdown().grade(text, RECORD)
    assert grade.reward == reward
    assert grade.metrics == {"solved": (int(reward == 1), 1), "well_formed": (int(reward > 0), 1)}


def test_repeated_numbers_count():
  record = {"nums": [5, 5, 2], "target": 12}
  assert Countdown().grade("5+5+2", record).reward == 1.0
  assert Countdown().grade("5*2+2", record).reward == 0.0
  assert Countdown().grade("(5+5/5)*2", record).reward == 0.0


def test_fractions_are_exact():
  record = {"nums": [8, 3, 8, 3], "target": 24}
  assert Countdown().grade("8/(3-8/3)", record).reward == 1.0
  # 1e-5 off is a miss; d1 accepts it.
  assert Countdown().grade("1/200000+7", {"nums": [1, 200000, 7], "target": 7}).reward == 0.1


@pytest.mark.parametrize(
  "text",
  [
    "99**98**97",
    "(" * 100_000,
    "9" * 1_000_000,
    "99*" * 400_000 + "1",
    "<answer>" * 100_000,
    "99//98//97",
    "99 if 98 else 97",
    "\0",
    "\ud800",
    "٩٩+98+97",
  ],
  ids=lambda text: ascii(text[:12]),
)
def test_attacks_earn_nothing(text):
  record = {"nums": [99, 98, 97], "target": 1}
  assert Countdown().grade(text, record).reward == 0.0
  assert Countdown().grade(f"<answer>{text}</answer>", record).reward == 0.0


@given(
  st.text()
  | st.lists(st.sampled_from(["<answer>", "</answer>", "3", "25", "7", "+", "*", "-", "/", "(", ")", " "])).map("".join)
)
def test_any_string_gets_a_bounded_grade(text):
  task = pickle.loads(pickle.dumps(Countdown()))
  grade = task.grade(text, RECORD)
  assert grade == task.grade(text, RECORD)
  assert grade.reward in (0.0, 0.1, 1.0)
  assert set(grade.components) == {"correct", "well_formed"}
  for numerator, denominator in grade.metrics.values():
    assert 0 <= numerator <= denominator == 1
