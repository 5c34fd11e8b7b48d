import pytest
from hypothesis import given
from hypothesis import strategies as st

from d1jax.tasks import latex

BRACES = ["{", "}", r"\{", r"\}", r"\\", r"\boxed{", r"\frac", r"\sqrt", r"\text{ "]
OTHERS = [r"\left", r"^\circ", "/", "=", ".", ",", "-", "1", "2", "72", "x", "$", "%", " ", "\n", "\ud800"]
PIECES = st.lists(st.sampled_from(BRACES + OTHERS)).map("".join)


@pytest.mark.parametrize(
  ("text", "inside"),
  [
    (r"so \boxed{5}.", "5"),
    (r"\boxed{4} then \boxed{5}", "5"),
    (r"\boxed {5}", "5"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\boxed{x=\boxed{5}}", "5"),
    (r"\boxed{4} then \boxed{5", "4"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\boxed{1 \\} 2", r"1 \\"),
    (r"} \boxed{5}}", "5"),
    (r"\boxed{}", ""),
    (r"\boxed{5", None),
    (r"\boxed 5$", None),
    (r"\fbox{5}", "5"),
    ("boxed{5}", None),
    ("", None),
  ],
)
def test_last_box(text, inside):
  assert latex.last_box(text) == inside


@given(PIECES)
def test_a_box_is_balanced_and_stands_in_the_text(text):
  inside = latex.last_box(text)
  if inside is not None:
    assert inside + "}" in text
    bare = inside.replace("\\\\", "").replace("\\{", "").replace("\\}", "")
    assert bare.count("{") == bare.count("}")


@pytest.mark.parametrize("text", ["\\boxed{" * 100_000, "\\boxed{" * 100_000 + "}" * 100_000, "{" * 500_000])
def test_boxes_take_linear_time(text):
  # Looking for each opening brace's partner anew would need minutes.
  assert latex.last_box(text) == ("" if "}" in text else None)


@pytest.mark.parametrize(
  ("text", "normal"),
  [
    (r"\left( 3, \right. 4)", "(3,0.4)"),
    (r"90^\circ", "90"),
    (r"90^{\circ}", "90"),
    (r"\$ 5", "5"),
    (r"40\%", "40"),
    (r"25 \text{ ft}", "25"),
    (r"25\text{ft}", r"25\text{ft}"),
    (r"\dfrac{1}{2}", r"\frac{1}{2}"),
    (r"\tfrac12", r"\frac{1}{2}"),
    (r"\frac1{72}", r"\frac{1}{72}"),
    (r"\frac{72}1", r"\frac{72}1"),
    ("1/2", r"\frac{1}{2}"),
    ("-1/2", r"\frac{-1}{2}"),
    ("01/2", "01/2"),
    ("1/2/3", "1/2/3"),
    ("0.5", r"\frac{1}{2}"),
    (".5", r"\frac{1}{2}"),
    ("0.50", "0.50"),
    ("{.5}", "{0.5}"),
    ("k = 5", "5"),
    ("ab=5", "5"),
    ("abc=5", "abc=5"),
    ("a=b=5", "a=b=5"),
    (r"\sqrt3", r"\sqrt{3}"),
    (r"2\sqrt{3}", r"2\sqrt{3}"),
    (r"\sqrt 3", r"\sqrt{}3"),
    ("1,000", "1,000"),
    ("5.0", "5.0"),
    ("a\n b\\!c", "abc"),
    (r"1 \\ 2", "1\\2"),
    (r"\frac1", r"\frac1"),
    ("", ""),
    (r"\text{ ft}", ""),
  ],
)
def test_normalize(text, normal):
  assert latex.normalize(text) == normal


@pytest.mark.parametrize(
  "text",
  [r"\frac", r"\frac\frac12", r"\sqrt", r"2\sqrt\sqrt3", r"1\text{ m}2\text{ s}", "x/2", "1/", "9" * 5000 + "/2"],
)
def test_where_the_rules_give_up(text):
  with pytest.raises(ValueError, match=r"in '|of '|invalid literal|Exceeds the limit"):
    latex.normalize(text)
