import itertools
import operator
import re
import warnings
from fractions import Fraction

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from d1jax.tasks import arithmetic

SIGNS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def combine(children):
  return st.tuples(st.sampled_from("+-*/"), children, children)


trees = st.recursive(st.integers(0, 120), combine, max_leaves=8)


def leaves(tree) -> list[int]:
  return [tree] if isinstance(tree, int) else leaves(tree[1]) + leaves(tree[2])


def value(tree) -> Fraction:
  return Fraction(tree) if isinstance(tree, int) else SIGNS[tree[0]](value(tree[1]), value(tree[2]))


def write(tree) -> str:
  """With every parenthesis."""
  return str(tree) if isinstance(tree, int) else f"({write(tree[1])} {tree[0]} {write(tree[2])})"


@given(trees)
def test_agrees_with_the_value_of_random_trees(tree):
  try:
    expected = (value(tree), leaves(tree))
  except ZeroDivisionError:
    expected = None
  assert arithmetic.evaluate(write(tree)) == expected


@given(st.lists(st.integers(1, 99), min_size=1, max_size=7), st.data())
def test_precedence_agrees_with_python(nums, data):
  signs = [data.draw(st.sampled_from("+-*/")) for _ in nums[1:]]
  text = str(nums[0]) + "".join(f"{s}{n}" for s, n in zip(signs, nums[1:], strict=True))
  # Python's own precedence over exact numbers; the text is this test's, not a model's.
  names = {f"n{i}": Fraction(n) for i, n in enumerate(nums)}
  program = "n0" + "".join(f"{s}n{i}" for i, s in enumerate(signs, start=1))
  assert arithmetic.evaluate(text) == (eval(program, {}, names), nums)


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("7", 7),
    (" ( ( 7 ) ) ", 7),
    ("8-3-2", 3),
    ("8/4/2", 1),
    ("2+3*4", 14),
    ("(2+3)*4", 20),
    ("1/3*3", 1),
    ("10-(2-1)*3/6", Fraction(19, 2)),
    ("\n25 +\t7 ", 32),
    ("0*5", 0),
    ("-1+2", 1),
    ("-2*3+10", 4),
    ("2*(-3+5)", 4),
    ("[(1+2)*3]", 9),
  ],
)
def test_values(text, expected):
  assert arithmetic.evaluate(text)[0] == expected


@pytest.mark.parametrize(
  "text",
  [
    "",
    " ",
    "()",
    "1+",
    "+1",
    "2*-1",
    "1 2",
    "1(2)",
    "--1+2",
    "1+-2",
    "-",
    "(-)",
    "[1)",
    "(1]",
    "[(1])",
    "1]",
    "(1)(2)",
    "(1",
    "1)",
    "1)+(2",
    ")1(",
    "((1)",
    "1//1",
    "2**3",
    "99**98**97",
    "4-2.3",
    "1.",
    "1,2",
    "1_0",
    "1e3",
    "0x1",
    "007",
    "01",
    "2 5+1 0 0",
    "1=1",
    "\\boxed{1}",
    "x",
    "1;2",
    "__import__('os')",
    "٣+4",
    "３+4",
    "2×3",
    "6÷2",
    "2³",
    "1\u00a0+2",
    "1\0+2",
    "\ud800",
    "1/0",
    "5/(3-3)",
    "0/0",
    "(" * 50,
    "(" * 100_000,
    ")" * 100_000,
    "1+" * 50_000 + "1",
    "9" * 100_000,
    "(" * 100 + "1" + ")" * 100,
  ],
  ids=lambda text: repr(text[:14]),
)
def test_refused(text):
  assert arithmetic.evaluate(text) is None


def test_the_longest_expressions_are_evaluated():
  limit = arithmetic.MOST_CHARACTERS
  assert limit == 200
  assert arithmetic.evaluate("(" * 99 + "12" + ")" * 99) == (12, [12])
  assert arithmetic.evaluate("9*" * 99 + "9")[0] == 9**100
  assert arithmetic.evaluate("9" * limit)[0] == 10**limit - 1
  assert arithmetic.evaluate("9" * (limit + 1)) is None
  assert arithmetic.evaluate(" " * 1000 + "9") == (9, [9])


@given(st.text(alphabet="0123456789+-*/() ", max_size=30))
def test_total_and_exact_on_random_words(text):
  result = arithmetic.evaluate(text)
  if result is not None:
    assert isinstance(result[0], Fraction)
    assert "".join(map(str, result[1])) == "".join(filter(str.isdigit, text))


@given(st.lists(st.integers(1, 99), min_size=2, max_size=4), st.integers(1, 200))
def test_solutions_are_right_and_short(nums, target):
  expression = arithmetic.solve(nums, target)
  if expression is not None:
    result, used = arithmetic.evaluate(expression)
    assert result == target
    assert sorted(used) == sorted(nums)
    assert expression.count("(") <= len(nums) - 2


def reachable(values: tuple[int, ...]) -> set[int]:
  """By splitting the numbers in two, unlike the solver, which merges pairs."""
  if len(values) == 1:
    return set(values)
  found = set()
  for size in range(1, len(values)):
    for chosen in itertools.combinations(range(len(values)), size):
      left = tuple(values[i] for i in chosen)
      right = tuple(v for i, v in enumerate(values) if i not in chosen)
      for a, b in itertools.product(reachable(left), reachable(right)):
        found |= {a + b, a * b, abs(a - b)}
        if b and a % b == 0:
          found.add(a // b)
  return found


@pytest.mark.parametrize("nums", [(5, 5), (2, 7), (3, 25, 7), (1, 1, 8), (3, 4, 7, 50), (9, 9, 9, 1)])
def test_the_solver_finds_all_that_can_be_reached(nums):
  found = {target for target in range(1, 130) if arithmetic.solve(nums, target) is not None}
  assert found == reachable(nums) & set(range(1, 130))


def test_parentheses_are_few():
  assert arithmetic.solve([7, 25, 3], 154) in ("7*(25-3)", "(25-3)*7")
  assert arithmetic.solve([24, 8, 4], 6) == "24/(8-4)"
  assert arithmetic.words("7*(25-3)") == ["7", "*", "(", "25", "-", "3", ")"]


PYTHON_WORDS = [
  "1",
  "2",
  "3",
  "25",
  "0",
  "+",
  "-",
  "*",
  "/",
  "**",
  "//",
  "(",
  ")",
  ".",
  "..",
  " ",
  "\n",
  "\f",
  "00",
  "07",
]


@example(words=["1", "\n", " "])
@given(st.lists(st.sampled_from(PYTHON_WORDS), max_size=9))
def test_python_expressions_agree_with_python(words):
  text = "".join(words)
  # Else Python might never finish.
  assume(text.count("**") < 2 and not re.search(r"\*\*.*[0-9]{3}", text, re.DOTALL))
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", SyntaxWarning)
      # The text is this test's: digits, operators, blanks.
      expected = eval(text, {"__builtins__": None}, {})
  except (SyntaxError, TypeError, ArithmeticError):
    expected = None
  found = arithmetic.evaluate_as_python(text)
  if type(expected) not in (int, float, complex):
    expected = None  # an ellipsis or an empty tuple
  assert (type(found), found) == (type(expected), expected)


@pytest.mark.parametrize(
  ("text", "value"),
  [
    ("-2**2", -4),
    ("2**3**2", 512),
    ("2**-1", 0.5),
    ("7//2", 3),
    ("-7//2", -4),
    ("4-2.3", 4 - 2.3),
    ("8.", 8.0),
    ("- - 3", 3),
    ("1**999999999999", 1),
    ("2**65000", 2**65000),
    (" 7", 7),
  ],
  ids=lambda value: value if isinstance(value, str) else "",
)
def test_python_values(text, value):
  assert arithmetic.evaluate_as_python(text) == value


@pytest.mark.parametrize(
  "text",
  [
    *(
      "99**98**97",
      "9**9**9",
      "2**131073",
      "10.0**400",
      "0**-1",
      "1/0",
      "1//0",
      "1.0//0",
      "2**65000*2**65000*2**65000",
    ),
    *("", "()", "...", "(1)(2)", "1 2", "1\n2", "x", "x+1", "[1]", "1,2", "'1'", "True", "None", "1j", "1 if 1 else 2"),
    *("__import__('os').abort()", "(lambda: 1)()", "1<2", "~1", "5%3", "07", "\0", "1\0", "\ud800", "1\xa0+1", "((1)"),
    *("(" * 1000, "(" * 500 + "1" + ")" * 500, "9" * 1001, "(" * 1_000_000, "-" * 1_000_000 + "1"),
  ],
  ids=lambda text: ascii(text[:12]),
)
def test_python_expressions_that_are_refused(text):
  assert arithmetic.evaluate_as_python(text) is None


def test_long_python_expressions_are_evaluated():
  limit = arithmetic.MOST_PYTHON_CHARACTERS
  assert limit == 1000
  assert arithmetic.evaluate_as_python("9*" * 499 + "9") == 9**500
  assert arithmetic.evaluate_as_python("1" + "-1" * 499) == -498
  assert arithmetic.evaluate_as_python("-" * 100 + "1") == 1
