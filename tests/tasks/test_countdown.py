import collections
import dataclasses
import functools
import itertools
import json
import pickle
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

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


@pytest.mark.slow(reason="draws and reads every problem")
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


def reachable(nums: tuple[int, ...]) -> set[int]:
  """What the public rule makes of numbers in any order: a plain search over sets of values."""
  if len(nums) == 1:
    return {nums[0]}
  found = set()
  for i, j in itertools.permutations(range(len(nums)), 2):
    a, b = nums[i], nums[j]
    rest = [n for k, n in enumerate(nums) if k not in (i, j)]
    values = {a + b, a * b, abs(a - b), *([a // b] if b and a % b == 0 else [])}
    found |= {value for made in values for value in reachable((*rest, made))}
  return found


def all_problems(task: Countdown, split: str) -> set:
  """Everything that can be drawn: as many problems as the error says that there are."""
  with pytest.raises(DataError, match=r"only \d+ problems") as error:
    dataclasses.replace(task, sizes={split: 10_000}).records(split)
  count = int(re.search(r"only (\d+) problems", str(error.value))[1])
  return problems(dataclasses.replace(task, sizes={split: count}).records(split))


@pytest.mark.parametrize(("numbers", "largest"), [((2, 2), 12), ((3, 3), 5)])
def test_exactly_the_problems_of_the_rule_can_be_drawn(numbers, largest):
  targets = range(20, 25)
  wanted = {
    (nums, target)
    for nums in itertools.combinations_with_replacement(range(1, largest + 1), numbers[0])
    for target in targets
    if target in reachable(nums)
  }
  task = Countdown(numbers=numbers, largest=largest, targets=(20, 24))
  assert set.union(*(all_problems(task, split) for split in SIZES)) == wanted


def test_the_draw_has_the_weights_of_the_rule():
  # The target first, uniformly; then the numbers in their order, uniformly among those that reach it.
  small = Countdown(numbers=(2, 2), largest=6, targets=(4, 7), sizes={"train": 1})
  counts: collections.Counter = collections.Counter()
  for seed in range(3000):
    (record,) = dataclasses.replace(small, seed=seed).records("train")
    counts[*record["nums"], record["target"]] += 1
  owned = {nums for nums, _ in all_problems(dataclasses.replace(small, targets=(1, 36)), "train")}
  pairs = [pair for pair in itertools.product(range(1, 7), repeat=2) if tuple(sorted(pair)) in owned]
  reaching = {target: [pair for pair in pairs if target in reachable(pair)] for target in range(4, 8)}
  wanted = {(*pair, target): 3000 / 4 / len(found) for target, found in reaching.items() for pair in found}
  assert counts.keys() == wanted.keys()
  statistic = sum((counts[key] - expected) ** 2 / expected for key, expected in wanted.items())
  assert stats.chi2.sf(statistic, len(wanted) - 1) > 1e-5


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
  assert "left out 1 problems without 3 to 4 numbers, 1 repeated ones and 0 with numbers of" in caplog.text
  with pytest.raises(DataError, match=r"train.jsonl: no usable row .* 'test'"):
    Countdown(root=root).records("test")


def test_demonstrations_of_read_problems_are_searched(data_root):
  task = Countdown(root=data_root)
  for record in task.records("demonstrations")[:100]:
    assert "expression" not in record
    assert task.grade(task.demonstration(record, "d1"), record).reward == 1.0
  with pytest.raises(DataError, match=r"no expression over \[1, 1\] reaches 50"):
    task.demonstration({"nums": [1, 1], "target": 50}, "d1")


D1_ROWS = [{"input": "30,100,93", "output": "23"}, {"input": "3, 25, 7", "output": "68"}]


def test_d1s_test_file_is_the_test_split_and_no_other_has_its_numbers(tmp_path, caplog):
  rows = [{"nums": [a, 2, 3], "target": 9} for a in range(1, 60)]
  root = write_rows(tmp_path, *rows, {"nums": [7, 3, 25], "target": 99}, {"nums": [93, 30, 100], "target": 23})
  before = {split: multisets(Countdown(root=root).records(split)) for split in SIZES}
  lines = [json.dumps(row) for row in [*D1_ROWS, {**D1_ROWS[0], "output": 23}, rows[0]]]
  (tmp_path / "countdown/test.jsonl").write_text("\n".join(lines) + "\n")
  task = Countdown(root=root)
  wanted = [{"nums": [30, 100, 93], "target": 23}, {"nums": [3, 25, 7], "target": 68}, rows[0]]
  assert list(task.records("test")) == wanted
  assert "test.jsonl: left out 0 problems without 3 to 4 numbers, 1 repeated ones and 0 with" in caplog.text
  for split in ("demonstrations", "train", "validation"):
    assert multisets(task.records(split)) == before[split] - multisets(wanted)
  assert "train.jsonl: left out 0 problems without 3 to 4 numbers, 0 repeated ones and 3 with" in caplog.text
  demonstration = task.demonstration(wanted[0], "d1_eval")
  assert task.grade("<reasoning>" + demonstration, wanted[0]).metrics["solved"] == (1, 1)


@pytest.mark.parametrize(
  ("row", "message"),
  [
    ({"input": "30,100,93"}, 'expected {"input": "30,100,93", "output": "23"}'),
    ({"input": "30;100", "output": "23"}, "input is '30;100', expected a text such as '30,100,93'"),
    ({"input": [30, 100], "output": "23"}, r"input is '\[30, 100\]', expected a text"),
    ({"input": "30,100,93", "output": "2,3"}, "output is '2,3', expected a text such as '23'"),
    ({"input": "30,100,93", "output": "9" * 5000}, "output is '9999"),
    ({"input": "٣,1", "output": "3"}, "input is"),
    ({"input": "0,1", "output": "3"}, r"nums is \[0, 1\], expected a list of positive"),
    ({"input": "1", "output": "3"}, "nums has 1 numbers, expected 2 to 6"),
  ],
  ids=str,
)
def test_bad_rows_of_d1s_test_file(tmp_path, row, message):
  root = write_rows(tmp_path, {"nums": [3, 25, 7], "target": 68})
  (tmp_path / "countdown/test.jsonl").write_text(json.dumps(D1_ROWS[0]) + "\n" + json.dumps(row) + "\n")
  for split in ("train", "test"):
    with pytest.raises(DataError, match=f"^countdown/test.jsonl line 2: {message}"):
      Countdown(root=root).records(split)


# Prompts and completions.


@pytest.mark.parametrize(("style", "prefill"), [("d1", ""), ("d1_eval", "<reasoning>")])
def test_d1_prompts_are_verbatim(style, prefill):
  content = Path(__file__).with_name(f"{style}_countdown_prompt.txt").read_text()
  prompt = Countdown().prompt({"nums": (3, 25, 7), "target": 68}, style)
  assert prompt == ([{"role": "user", "content": content}], prefill)


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
  boxed = demonstration.removeprefix("<reasoning>").replace("\n25*3-7\n", "\n\\boxed{25*3-7}\n")
  assert Countdown().demonstration(RECORD, "d1_eval") == boxed
  assert Countdown().baseline(RECORD, "d1_eval").endswith("<answer>\n\\boxed{3+25+7}\n</answer>")


# Grades.


@pytest.mark.parametrize("style", ["d1", "d1_eval", "terse"])
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
    (r"\boxed{25*3-7}", 1.0),
    (r"So it is $\boxed{ 25 \times 3 - 7 }$.", 1.0),
    (r"\boxed{3} or \boxed{25\cdot3-7}", 1.0),
    (r"25\cdot3-7", 1.0),
    (r"\boxed{25 \div 3 - 7}", 0.1),
    (r"\boxed{\frac{25}{3} \times 7}", 0.1),
    (r"\boxed{25*3-7} or \boxed{3}", 0.0),
    (r"\boxed{25*3-7=68}", 0.0),
    (r"\boxed{25*3-7} = 68", 1.0),
    (r"\boxed{25*3-7", 0.0),
    (r"\boxed{}", 0.0),
    (r"\boxed{\frac{25}{1/3}-7}", 0.0),
    (r"\boxed{25\times\times3-7}", 0.0),
    (r"\boxed{\frac25{3}*7}", 0.0),
    (r"\boxed{25\sqrt{3}-7}", 0.0),
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


def test_fractions_of_latex_divide_what_is_in_them():
  assert Countdown().grade(r"\boxed{\frac{25-7}{3}}", {"nums": [3, 25, 7], "target": 6}).reward == 1.0
  assert (
    Countdown().grade(r"\boxed{7-\dfrac{\tfrac{24}{2}}{6-3}}", {"nums": [24, 2, 3, 6, 7], "target": 3}).reward == 1.0
  )


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
