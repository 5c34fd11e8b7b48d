import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d1jax.tasks import answers

BRACKETS = ["{", "}", "(", ")", "[", "]", r"\{", r"\}", r"\\", r"\boxed{", r"\begin{pmatrix}", r"\end{pmatrix}", "&"]
COMMANDS = [
  r"\frac",
  r"\sqrt",
  r"\text{ ",
  r"\left",
  r"^\circ",
  r"\cup",
  r"\pm",
  r"\in",
  r"\,",
  r"\mbox{",
  r"\text{or}",
]
OTHERS = ["/", "=", ".", ",", "-", "1", "2", "72", "x", "$", "%", " ", "\n", "\ud800", "^", "_", " and ", "!"]
PIECES = st.lists(st.sampled_from(BRACKETS + COMMANDS + OTHERS)).map("".join)


@pytest.mark.parametrize(
  ("text", "form"),
  [
    *(("5", "5"), (" 5.\n", "5"), ("5.0", "5"), ("1,000", "1000"), (r"10\,000", "10000"), ("1{,}000", "1000")),
    *(("0.50", "1/2"), (r"\dfrac12", "1/2"), ("2/4", "1/2"), (r"-\frac{1}{2}", "-1/2"), (r"2\frac{1}{2}", "5/2")),
    *((r"\$36", "36"), ("40\\%", "40"), (r"36^\circ", "36"), ("36\N{DEGREE SIGN}", "36"), ("x = 5", "5")),
    *((r"15\mbox{ cm}^2", "15"), (r"864 \text{ square inches}", "864"), (r"12\sqrt3\text{ feet}", r"12\sqrt{3}")),
    *((r"\text{Evelyn}", "evelyn"), ("(C)", "C"), (r"\text{(C)}", "C"), (r"(\text{C})", "C"), ("C", "C")),
    *(("(2)", "2"), ("((2))", "2"), (r"\{2\}", "2"), (r"x^{2} - 1", "x^2-1"), ("x^{12}", "x^{12}")),
    *(("( 0.5,2 )", "(1/2,2)"), (r"\left[ 1, \infty \right)", r"[1,\infty)"), ("(1,(2,3))", "(1,(2,3))")),
    *(("2,-1", "{-1,2}"), (r"\{-1, 2\}", "{-1,2}"), (r"2 \text{ and } -1", "{-1,2}"), ("2 or -1", "{-1,2}")),
    *((r"x = 2, x = -1", "{-1,2}"), (r"x=2, y=1", "{x=2,y=1}"), (r"2 \pm 1", "{2+1,2-1}"), ("(x,y) = (1,2)", "(1,2)")),
    *((r"x \in [-2,7]", "[-2,7]"), (r"(0,9) \cup (9,36)", "cup((0,9),(9,36))"), (r"[5]", "[5]"), ("1,2,", "{,1,2}")),
    (r"\begin{pmatrix} 1/2 & 2 \\ 3 & 4.0 \end{pmatrix}", "matrix 2 2(1/2,2,3,4)"),
    (r"\begin{bmatrix} 1 \\ 2 \end{bmatrix}.", "matrix 1 1(1,2)"),
    *(("1 2", "1~2"), (r"\frac 3 8", "3/8"), ("3 1/2", "7/2"), (r"\frac{12}{5,525}", "12/5525")),
    *((r"204_{5}", "204_5"), ("(204)_5", "204_5"), ("4x-5y = -50", "4x-5y=-50"), ("2x=6", "2x=6"), (r"AB = 9", "9")),
    *((r"y = 2x - 13", "2x-13"), (r"9\text{ a.m.}", "9a.m."), (r"\sqrt", r"\sqrt"), ("1/", "1/")),
    *(("", None), (" ", None), ("$", None), (".", None), ("9" * 1001, None), (" " * 1000 + "5", None)),
  ],
  ids=lambda value: repr(value)[:30],
)
def test_normal_form(text, form):
  assert answers.normal_form(text) == form


@pytest.mark.parametrize(
  ("answer", "gold"),
  [
    *((r"\frac{1}{-2}", "-0.5"), ("$5$", "5"), ("x/2", "x / 2"), (r"2\sqrt3", r"2\sqrt{3}"), ("odd", r"\text{Odd}")),
    *(("12 and 13", r"12\text{ and }13"), ("13, 12", r"12\text{ and }13"), ("7", r"7\text{ hours}."), ("k=5", "5")),
    *((r"\{1 \pm \sqrt5, -2\}", r"\left\{ -2, 1 - \sqrt{5}, 1 + \sqrt{5} \right\}"), (r"\pm 3", "3, -3")),
    *((r"(9,36)\cup(0,9)", r"(0,9) \cup (9,36)"), ("(0.6,2]", r"\left(\frac{3}{5},2\right]"), ("x=5", "x = 5.0")),
  ],
)
def test_same(answer, gold):
  assert answers.is_same(answer, gold)
  assert answers.is_same(gold, answer)


@pytest.mark.parametrize(
  ("answer", "gold"),
  [
    *(("", "5"), ("$", "5"), ("", ""), ("5", "-5"), ("1/3", "0.333333"), ("(2,1)", "(1,2)"), ("1,2", "12")),
    *(
      ("1 2", "12"),
      ("31/2", "3 1/2"),
      ("(1,2)", "[1,2]"),
      ("(1,2)", "(1,2]"),
      ("(1,2)", "1,2"),
      ("(1,2)", r"\{1,2\}"),
    ),
    *((r"\frac{1}{0}", "0"), (r"\frac{1}{0}", r"\frac{2}{0}"), ("5 or 6", "5"), ("2x=6", "6"), ("x=5", "y=5")),
    *(("-12", r"-12 \text{ or } -30"), ("12", r"12\text{ and }13"), ("1234", r"1 \text{ or } 234")),
    *(("x=1, y=2", "x=2, y=1"), ("x=1, y=2", "1,2"), ("203_5", "204_5"), ("204_6", "204_5")),
    *((r"9\text{ a.m.}", r"9\text{ p.m.}"), (r"2\text{ million}", "2"), ("2", "2x"), ("2 b", "2")),
    *((" " * 2000 + "5", "5"), ("9" * 100_000, "9"), (r"\frac{" + "9" * 900 + "}{9}", "1")),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", "(1,2)"),
  ],
  ids=lambda text: text[:12],
)
def test_not_same(answer, gold):
  assert not answers.is_same(answer, gold)
  assert not answers.is_same(gold, answer)


def test_the_base_of_a_number_may_be_left_out_but_not_added():
  assert answers.is_same("204", "204_5")
  assert not answers.is_same("204_5", "204")


@pytest.mark.parametrize(
  ("answer", "problem", "is_copied"),
  [
    ("x^2 - 4", "Factor $x^2-4.$", True),
    (r"\left(x^2-4\right)", "Factor $(x^2 - 4)$", True),
    ("(x-2)(x+2)", "Factor $x^2-4$.", False),
    ("x" * 2000, "x" * 2000, False),
  ],
  ids=lambda value: str(value)[:12],
)
def test_copies(answer, problem, is_copied):
  assert answers.is_copied(answer, problem) == is_copied


@given(PIECES | st.text())
def test_every_text_has_a_form_or_none_and_parts(text):
  form = answers.normal_form(text)
  assert form is None or form
  assert answers.normal_form(f" {text}\n") in (form, None)
  assert answers.is_same(text, text) == (form is not None)
  kind, entries = answers.split(answers.clean(text))
  assert entries
  assert kind or len(entries) == 1


def test_deep_and_long_lists_are_not_taken_apart():
  assert answers.split("(" * 20 + "1,2" + ")" * 20)[0] == ""
  assert answers.split(",".join("1" * 50)) == ("{}", ["1"] * 50)
  assert answers.split(",".join("1" * 51))[0] == ""


def test_the_answers_of_the_files_are_the_same_as_themselves(data_root):
  with open(f"{data_root}/math/train.jsonl", encoding="utf-8") as file:
    golds = [json.loads(line)["answer"] for line in file]
  assert [a for a in golds if not answers.is_same(a, f" {a}.\n")] == ["", ""]
