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


@given(st.integers(-(10**30), 10**30), st.integers(0, 10**6))
def test_agrees_with_fractions(whole, decimals):
  text = f"{whole}.{decimals:07d}"
  expected = Fraction(text)
  assert rationals.parse(text) == expected
  assert rationals.parse(f"{whole:,}.{decimals:07d}") == expected


@given(st.text() | st.text(alphabet="0123456789,.-+/$% \\()[]"))
def test_total(text):
  assert isinstance(rationals.parse(text), Fraction | None)
