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
    ("5 apples", 5),
    ("½", Fraction(1, 2)),
    (r"\boxed{1}", 1),
    (r"0.\overline{3}", Fraction(1, 3)),
    (r"-2.08\overline{3}", Fraction(-25, 12)),
    (r"0.\overline{9}", 1),
    ("1 000 000.5", Fraction(2_000_001, 2)),
    ("(18)", 18),
    ("{18}", 18),
    ("36 / 8", Fraction(9, 2)),
    (r"0.\dot{3}", Fraction(1, 3)),
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
      "5 x",
      "x=5",
      "5+5",
      "٣",
      "３",
      "\0",
      "\ud800",
    ),
    *("9" * 101, "9" * 1_000_000, "," * 100_000, "1" + ",111" * 100_000, "nan", "inf"),
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
    *(r"\text{5 or 6}", r"5\text{ 6}", r"\text{A5}_{11}", "5 x", "5x", "18:00", "4, 6", "x = 5", "5!", "5^2", "2e3"),
    *(
      "(100,101)",
      "(18",
      "{1,8}",
      "18...",
      "18 /",
      "1 8 / 1 / 1",
      "1 00",
      "1 000,000",
      "0 100",
      r"0.\overline{3}3",
      r"\overline{3}",
      r"0.\overline{}",
    ),
    *("5 ab", "5 sixths", "5 squared", "5 base two", "5 pi", "18 19 apples"),
  ],
)
def test_what_changes_a_number_makes_it_none(text):
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
