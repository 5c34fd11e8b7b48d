from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d1jax.tasks import rationals


@pytest.mark.parametrize(
  "text",
  [
    *("2125", "2,125", " 2125\n", "2125.", "2125.0", "2125.000", "+2125", "$2125", "$2,125.00", "\\$2,125", "£2125"),
    *("2125%", "2125\\%", "2125 %.", "$2125$", "$ 2,125 $", "\\(2125\\)", "\\[2125\\]", "4250/2", "02125", "$+2125"),
  ],
)
def test_one_number_in_many_forms(text):
  assert rationals.parse(text) == 2125


@pytest.mark.parametrize(
  ("text", "value"),
  [
    ("0", 0),
    ("-3", -3),
    ("\N{MINUS SIGN}3", -3),
    ("-$3", -3),
    ("$-3", -3),
    (".5", Fraction(1, 2)),
    ("-0.50", Fraction(-1, 2)),
    ("1/3", Fraction(1, 3)),
    ("0.1", Fraction(1, 10)),
    ("1,000,000", 1_000_000),
    ("9" * 100, 10**100 - 1),
    ("$ - 3$", -3),
    ("- $3", -3),
    (r"\frac{1}{2}", Fraction(1, 2)),
    (r"\dfrac12", Fraction(1, 2)),
    (r"-\tfrac{3}{4}", Fraction(-3, 4)),
    (r"\frac{-3}{ 4 }", Fraction(-3, 4)),
    (r"\frac{3}{-4}", Fraction(-3, 4)),
    (r"2\frac{1}{2}", Fraction(5, 2)),
    (r"-2 \frac12", Fraction(-5, 2)),
    ("2 1/2", Fraction(5, 2)),
    (r"385\,000", 385_000),
    ("1{,}000", 1000),
    (r"1,\!000.5", Fraction(2001, 2)),
    (r"\text{18}", 18),
    ("**18**", 18),
    (r"$\mathbf{18}$.", 18),
    (r"18\text{ dollars}", 18),
    (r"15\mbox{ cm}^2", 15),
    (r"7\;\text{km/h}.", 7),
    (r"4\%", 4),
  ],
)
def test_values(text, value):
  assert rationals.parse(text) == value


@pytest.mark.parametrize(
  "text",
  [
    *(
      "",
      " ",
      ".",
      "-",
      "$",
      "$$",
      "%",
      ",",
      "/",
      "1/",
      "/2",
      "./2",
      "1/0",
      "1.5/2",
      "1,5",
      "1,0000",
      ",100",
      "1000,000",
    ),
    *(
      "1 2",
      "1e5",
      "0x1",
      "1_0",
      "--1",
      "-$-1",
      "$$1",
      "1..",
      "5 apples",
      "x=5",
      "5+5",
      "٣",
      "３",
      "½",
      "\0",
      "\ud800",
    ),
    *("9" * 101, "9" * 1_000_000, "," * 100_000, "1" + ",111" * 100_000, "\\boxed{1}", "nan", "inf"),
  ],
  ids=lambda text: ascii(text[:12]),
)
def test_no_numbers(text):
  assert rationals.parse(text) is None


@pytest.mark.parametrize(
  "text",
  [
    *(r"2\text{ million}", r"2\text{ dozen}", r"5\text{ or more}", r"5\text{ to }", r"9\text{ a.m.}", r"9\text{PM}"),
    *(r"2\frac{-1}{2}", r"\frac{1}{0}", r"\frac{a}{2}", r"\frac{1}{2}x", r"\frac{1}", "2 1/0", "1 2/", "1040,000"),
    *(r"\text{5 apples}", r"5\text{ 6}", r"\text{A5}_{11}", "5 x", "5x", "18:00", "4, 6", "x = 5", "5!", "5^2", "2e3"),
  ],
)
def test_what_changes_a_number_makes_it_none(text):
  assert rationals.parse(text) is None


@pytest.mark.parametrize(
  ("words", "is_unit"),
  [
    *(("dollars", True), ("square inches", True), ("sq. m", True), ("oranges", True), ("tons", True), ("", True)),
    *(("million", False), ("Dozens", False), ("or so", False), ("miles or km", False), ("a.m.", False), ("PM", False)),
  ],
)
def test_units(words, is_unit):
  assert rationals.is_unit(words) == is_unit


@pytest.mark.parametrize(
  ("text", "inside"),
  [
    *(
      ("$5$", "5"),
      ("$ $5$ $", "5"),
      (r"\(5\)", "5"),
      (r"\[ 5 \]", "5"),
      (r"$\text{ab}$", "ab"),
      ("$", "$"),
      ("$$", "$$"),
    ),
    *((r"\text{A5}_{11}", r"\text{A5}_{11}"), (r"\text{a}b", r"\text{a}b"), (r"\text{\frac{1}{2}}", r"\frac{1}{2}")),
  ],
)
def test_unquoted(text, inside):
  assert rationals.unquoted(text) == inside


@given(st.integers(-(10**30), 10**30), st.integers(0, 10**6))
def test_agrees_with_fractions(whole, decimals):
  text = f"{whole}.{decimals:07d}"
  expected = Fraction(text)
  assert rationals.parse(text) == expected
  assert rationals.parse(f"{whole:,}.{decimals:07d}") == expected


@given(st.text() | st.text(alphabet="0123456789,.-+/$% \\()[]"))
def test_total(text):
  assert isinstance(rationals.parse(text), Fraction | None)
