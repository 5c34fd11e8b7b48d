"""What every task must answer, of every task in the table."""

import math
import pickle
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d1jax.tasks import PROTOCOLS, SPLITS, STYLES, TASKS, Grade, Task, build

RECORDS = {
  "sudoku": {"puzzle": "0204032001400402", "solution": "1234432121433412"},
  "countdown": {"nums": [97, 98, 99], "target": 98, "expression": "97*98/99"},
  "gsm8k": {"question": "How many?", "solution": "Two and two.", "answer": "1,004"},
  "math": {"problem": "Find $q$.", "solution": "It is $\\boxed{\\frac{1}{2}}$.", "answer": "\\frac{1}{2}"},
}
ATTACKS = [
  *("", "\0", "\ud800", "\N{COMBINING ACUTE ACCENT}" * 50_000, " " * 100_000, "\n" * 100_000),
  *("99**98**97", "99//98//97", "99*98*97" * 20_000, "-" * 100_000 + "97", "97" + "/98" * 50_000, "9" * 100_000),
  *("(" * 100_000, "(" * 50_000 + ")" * 50_000, "{" * 100_000, "}" * 100_000, "\\" * 100_001, "=" * 100_000),
  *("<answer>" * 20_000, "</answer>" * 20_000, "<reasoning>" * 20_000, "</reasoning><answer>" * 10_000),
  *("</reasoning>" + " " * 100_000, "\n<answer>\n" * 10_000, "\n</answer>\n" * 10_000, "." * 100_000),
  *("\\boxed{" * 20_000, "\\boxed{" * 20_000 + "}" * 20_000, "\\boxed " * 20_000, "\\fbox{" * 20_000),
  *("\\frac" * 20_000, "\\frac12" * 20_000, "\\sqrt" * 20_000, "\\text{ " * 20_000, "\\text{ x}" * 20_000),
  *("0." + "0" * 100_000 + "1", "1" + ",111" * 30_000, "9" * 4000 + "/" + "9" * 4000, "1/0", "1e999999", "-0"),
  *("__import__('os').abort()", "٣" * 100_000, "²" * 100_000, "9" * 90 + "/" + "9" * 9, "\\frac{1}{0}"),
]
WRAPPERS = [
  "{}",
  "<answer>{}</answer>",
  "<answer>\\boxed{{{}}}</answer>",
  "<reasoning>{}",
  "<reasoning>\n{}\n</reasoning>\n<answer>\n{}\n</answer>\n",
]
PIECES = [
  "<reasoning>",
  "</reasoning>",
  "<answer>",
  "</answer>",
  "\\boxed{",
  "\\frac",
  "}",
  "\n",
  " ",
  "1",
  "97",
  "*",
  "-",
  "/",
]

each_task = pytest.mark.parametrize("name", TASKS)


def check(grade: Grade) -> None:
  assert grade.components
  assert all(type(paid) is float and math.isfinite(paid) for paid in grade.components.values())
  for numerator, denominator in grade.metrics.values():
    assert 0 <= numerator <= denominator


@each_task
def test_every_task_is_one(name):
  task = build(name)
  assert isinstance(task, Task)
  assert task.name == name
  assert task.splits == SPLITS
  assert pickle.loads(pickle.dumps(task)) == task
  assert RECORDS.keys() == TASKS.keys()


@each_task
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_attacks_are_graded_quickly(name, protocol):
  task, record = build(name), RECORDS[name]
  for attack in ATTACKS:
    for wrapper in WRAPPERS:
      start = time.process_time()
      grade = task.grade(wrapper.format(attack, attack), record, protocol)
      # Measured: below 0.1 s. What takes quadratic time needs a minute.
      assert time.process_time() - start < 5, (attack[:20], wrapper)
      check(grade)
      assert grade.metrics["solved"][0] == 0, (attack[:20], wrapper)


@each_task
@given(st.text() | st.lists(st.sampled_from(PIECES) | st.text(max_size=3)).map("".join))
def test_any_string_gets_a_finite_grade(name, text):
  task, record = build(name), RECORDS[name]
  grades = [task.grade(text, record, protocol=protocol) for protocol in PROTOCOLS]
  for grade in grades:
    check(grade)
  # What is right does not depend on what is paid, and strict is the default.
  assert grades[0].metrics == grades[1].metrics
  assert task.grade(text, record) == grades[0]


@each_task
@pytest.mark.parametrize("style", STYLES)
def test_a_demonstration_earns_more_than_the_baseline(name, style):
  task = build(name)
  record = {**RECORDS[name]}
  if name == "countdown":
    record = {"nums": [3, 25, 7], "target": 68, "expression": "25*3-7"}
  for protocol in PROTOCOLS:
    best = task.grade(task.demonstration(record, style), record, protocol)
    guess = task.grade(task.baseline(record, style), record, protocol)
    assert set(best.components) == set(guess.components)
    assert best.metrics["solved"] == best.metrics["well_formed"] == (1, 1)
    assert guess.metrics["solved"] == (0, 1)
    assert guess.metrics["well_formed"] == (1, 1)
    # d1 pays nothing without tags for Countdown and Sudoku.
    assert best.reward > guess.reward or (protocol == "d1" and style == "terse" and best.reward == 0)


@each_task
def test_an_unknown_protocol_is_an_error(name):
  with pytest.raises(ValueError, match="unknown protocol 'loose'; choose one of: strict, d1"):
    build(name).grade("", RECORDS[name], protocol="loose")
