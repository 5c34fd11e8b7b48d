"""What every task must answer, of every task in the table."""

import math
import pickle
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d1jax.tasks import PROTOCOLS, SPLITS, STYLES, TASKS, Grade, Task, build
from d1jax.tasks.common import ACCURACY
from tests.session import yardstick

RECORDS = {
  "sudoku": {"puzzle": "0204032001400402", "solution": "1234432121433412"},
  "countdown": {"nums": [97, 98, 99], "target": 98, "expression": "97*98/99"},
  "gsm8k": {"question": "How many?", "solution": "Two and two.", "answer": "1,004"},
  "word_problems": {"question": "How many?", "solution": "There are 2*502=1004.", "answer": "1004", "template": "few"},
  "math": {"problem": "Find $q$.", "solution": "It is $\\boxed{\\frac{1}{2}}$.", "answer": "\\frac{1}{2}"},
}
ATTACKS = [
  *("", "\0", "\ud800", "\N{COMBINING ACUTE ACCENT}" * 50_000, " " * 100_000, "\n" * 100_000, "\0\ud800" * 20_000),
  *("99**98**97", "99//98//97", "99*98*97" * 20_000, "-" * 100_000 + "97", "97" + "/98" * 50_000, "9" * 100_000),
  *("(" * 100_000, "(" * 50_000 + ")" * 50_000, "{" * 100_000, "}" * 100_000, "\\" * 100_001, "=" * 100_000),
  # Markers, also in markers.
  *("<answer>" * 20_000, "</answer>" * 20_000, "<reasoning>" * 20_000, "</reasoning><answer>" * 10_000),
  *("</reasoning>" + " " * 100_000, "\n<answer>\n" * 10_000, "\n</answer>\n" * 10_000, "." * 100_000),
  *("\\boxed{" * 20_000, "\\boxed{" * 20_000 + "}" * 20_000, "\\boxed " * 20_000, "\\fbox{" * 20_000),
  *("<answer>\\boxed{" * 5_000 + "}</answer>" * 5_000, "</answer><answer>" * 6_000, "\\boxed{\0\ud800}"),
  *("<answer><answer>\\boxed{x}</answer>" * 3_000, "<ans<answer>wer>" * 6_000, "\\bo\\boxed{xed{" * 6_000),
  # LaTeX that is long, deep or odd.
  *("\\frac" * 20_000, "\\frac12" * 20_000, "\\sqrt" * 20_000, "\\text{ " * 20_000, "\\text{ x}" * 20_000),
  *(
    "\\frac{" * 20_000 + "1" + "}{2}" * 20_000,
    "\\frac{" * 100 + "1" + "}{2}" * 100,
    "^{" * 30_000,
    "\\sqrt[" * 20_000,
  ),
  *("2" + "^{2" * 60 + "}" * 60, "\\sqrt[" * 99 + "3]{2}" * 99, "\\sin" * 40 + "x", "x" * 180, "x+" * 90 + "x"),
  *("\\begin{pmatrix}" * 5_000, "\\begin{pmatrix}" + "1&" * 450 + "\\end{pmatrix}", "\\cup" * 200, "\\pm" * 300),
  *(
    "\\begin{pmatrix}" + "1\\\\" * 300 + "\\end{pmatrix}",
    "(1,(2," * 100,
    "1," * 400 + "1",
    "," * 900,
    "\\pm 1," * 120,
  ),
  *("(" * 400 + "1,2" + ")" * 400, "(" * 8 + "x" + ")" * 8, "\\{" * 300 + "x" + "\\}" * 300, "\\{1,2" * 150, "$" * 900),
  *("=" * 900, "x=" * 400, "\\text{" * 150, "\\text{a}" * 120, "{,}" * 300, "\\left" * 180, "\\frac" + "{9}" * 300),
  *(" " * 900 + "x", "1 " * 450, "a " * 450, "\\text{ or }" * 90, "a,and " * 150, "1,111" * 18, "5 " + "a." * 45),
  # Numbers and functions that would take long.
  *("0." + "0" * 100_000 + "1", "1" + ",111" * 30_000, "9" * 4000 + "/" + "9" * 4000, "1/0", "1e999999", "-0"),
  *("10^{10^{10}}", "10^{10^{10^{10}}}", "9^9^9^9", "100!!!", "99!" * 60, "(99!)!", "9^{99!}", "17^9!", "1E999999999"),
  *("\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}^{99999}", "\\operatorname{eye}(99999)", "\\binom{10^9}{10^8}"),
  *(
    "\\sum_{n=1}^{\\infty} \\frac{1}{n^s}",
    "\\prod_{k=1}^{10^9} k",
    "\\int_0^\\infty e^{-x^{x^x}} dx",
    "\\lim_{x \\to 0} x",
  ),
  *("٣" * 100_000, "²" * 100_000, "9" * 90 + "/" + "9" * 9, "\\frac{1}{0}", "9" * 900, "$" * 49 + "x" + "$" * 49),
  # Notation.
  *("{1\\over" * 150, "\u221a(" * 400, "\u00bd" * 900, "1 000 " * 150, "Answer: " * 120, "5 " + "a/" * 440, "x<" * 300),
  *(
    "[\\begin{array}" * 60,
    "-(" * 90,
    "3(4)" * 45,
    "```" * 300,
    "5 " + "per " * 200,
    "\\overline{3}" * 70,
    "----\n" * 190,
  ),
  # What would be seen if it ran.
  *("__import__('os').abort()", "print(1)", "exec('import this')", "\\__import__('os').abort()", "breakpoint()"),
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

LIMIT = 0.1
"""CPU seconds of any grade."""

YARDSTICK = 0.01
"""CPU seconds of `yardstick` on the idle machine of the measurements."""

SLOW = pytest.mark.slow(reason="a hundred attacks on each task, in one more wrapper")

each_task = pytest.mark.parametrize("name", TASKS)

# Tasks with the same grader are graded once.
each_grader = pytest.mark.parametrize("name", [n for n in TASKS if n != "word_problems"])


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
  assert TASKS["word_problems"].grade is TASKS["gsm8k"].grade


def cpu_seconds(task, text, record, protocol) -> float:
  """CPU time of this process; the process behind MATH bounds itself."""
  start = time.process_time()
  check(task.grade(text, record, protocol))
  return time.process_time() - start


def slowness() -> float:
  """How much longer Python takes now than where graders were measured, at least 1: other work on a core shares its
  caches and clock, and some machines are slow."""
  return max(1.0, yardstick() / YARDSTICK)


@each_grader
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("wrapper", [WRAPPERS[2], *(pytest.param(w, marks=SLOW) for w in WRAPPERS if w != WRAPPERS[2])])
def test_attacks_are_graded_quickly_and_nothing_is_run(name, protocol, wrapper, capfd):
  task, record = build(name), RECORDS[name]
  task.grade("\\boxed{\\sqrt{2}}", record, protocol)
  modules = set(sys.modules)
  for attack in ATTACKS:
    text = wrapper.format(attack, attack)
    seconds = cpu_seconds(task, text, record, protocol)
    # Measured: 0.04 s at most.
    if seconds >= LIMIT:
      seconds = cpu_seconds(task, text, record, protocol) / slowness()
    assert seconds < LIMIT, attack[:20]
    assert task.grade(text, record, protocol).metrics["solved"][0] == 0, attack[:20]
  assert set(sys.modules) == modules
  assert capfd.readouterr() == ("", "")


@each_grader
@given(st.text() | st.lists(st.sampled_from(PIECES) | st.text(max_size=3)).map("".join))
def test_any_string_gets_a_finite_grade(name, text):
  task, record = build(name), RECORDS[name]
  strict, d1 = (task.grade(text, record, protocol=protocol) for protocol in PROTOCOLS)
  check(strict)
  check(d1)
  # What is right does not depend on what is paid, and strict is the default.
  assert {**d1.metrics, **strict.metrics} == d1.metrics
  assert d1.metrics.keys() - strict.metrics.keys() == {ACCURACY["d1"]}
  assert strict.answer == d1.answer
  assert task.grade(text, record) == strict


@each_task
def test_answers_are_normal_forms(name):
  task = build(name)
  pairs = {
    "sudoku": ("1234 4321 2143 3412", "<answer>\n1234432121433412\n</answer>", "123443212143341"),
    "countdown": ("97 * 98/99", "\\boxed{97*98/99}", "97*98/"),
    "gsm8k": ("\\boxed{$1,004.0}", "<answer>1004 apples</answer>", "no 1 knows 2"),
    "word_problems": ("\\boxed{1,004}", "<answer>1004 apples</answer>", "no 1 knows 2"),
    "math": ("\\boxed{\\left(0.5,\\frac{6}{2}\\right)}", "(\\dfrac12, 3)", " "),
  }
  answers = {"sudoku": "1234432121433412", "countdown": "97*98/99", "gsm8k": "1004", "math": "(1/2,3)"}
  answers["word_problems"] = answers["gsm8k"]
  for protocol in PROTOCOLS:
    read = [task.grade(text, RECORDS[name], protocol).answer for text in pairs[name]]
    assert read == [answers[name], answers[name], None]


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
    if protocol == "d1" and style == "d1_eval":  # d1's rewards know nothing of boxes, its evaluation does.
      assert best.metrics["d1_accuracy"][0] > guess.metrics["d1_accuracy"][0]
    else:  # d1 pays nothing without tags for Countdown and Sudoku.
      assert best.reward > guess.reward or (protocol == "d1" and style == "terse" and best.reward == 0)


@each_task
def test_an_unknown_protocol_is_an_error(name):
  with pytest.raises(ValueError, match="unknown protocol 'loose'; choose one of: strict, d1"):
    build(name).grade("", RECORDS[name], protocol="loose")
