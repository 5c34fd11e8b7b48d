import itertools
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d1jax.tasks import answers, equivalence, rationals
from tests.tasks.test_answers import PIECES

MATH = [
  "x",
  "2",
  "10",
  "\\frac{",
  "\\sqrt{",
  "}",
  "{",
  "(",
  ")",
  "^",
  "^{",
  "+",
  "-",
  "\\cdot ",
  "\\pi",
  ",",
  "\\pm ",
  "i",
]


def same(answer: str, gold: str, problem: str = "") -> bool:
  verdict = equivalence.is_equivalent(answer, gold, problem)
  assert type(verdict) is bool
  return verdict


@pytest.mark.parametrize(
  ("answer", "gold"),
  [
    # By their normal forms.
    *(("0.5", r"\frac12"), ("x=5", "5"), (r"\text{even}", "Even"), ("2516", "2516_8"), ("2, 1", "1, 2")),
    # By math-verify.
    *((r"\frac{1}{\sqrt{3}}", r"\frac{\sqrt{3}}{3}"), (r"\sqrt{8}", r"2\sqrt2"), (r"3\ln 2", r"\ln 8")),
    *(("(x+1)(x-1)", "x^2 - 1"), ("3x + 2", "2+3x"), ("2i+1", "1+2i"), (r"0.5\pi", r"\frac{\pi}{2}")),
    *((r"\frac{\cos x}{\sin x}", r"\cot x"), (r"\frac{x+1}{2}", r"\frac{x}{2}+\frac{1}{2}"), ("p-q", "-q+p")),
    *((r"\sqrt{16}", "4"), ("2^{10}", "1024"), (r"3 \times 10^5", "300,000"), (r"\sin \frac{\pi}{6}", "0.5")),
    *(("10x - 14y + 22z + 8 = 0", "5x-7y+11z+4=0"), ("x^2 + y^2 - 1 = 0", "x^2+y^2=1"), ("y = 1+2x", "y=2x+1")),
    # Equations that end with the answer.
    *(
      ("1+2+3=6", "6"),
      (r"2 \cdot 3 = 6\text{ cm}", "6"),
      ("x = 2+3 = 5", "5"),
      ("1/2 = 2/4 = 0.5", r"\frac12"),
      ("5=5", "5"),
    ),
    *(
      (r"f(x)=2+3x", "3x+2"),
      (r"\theta_1 = \sqrt{8}", r"2\sqrt2"),
      ("AB = 5", "5"),
      (r"\angle ABC=5^\circ", "5"),
      ("P(A)=0.5", "1/2"),
    ),
    *(
      ("(x+1)(x-1)=x^2-1", "x^2-1"),
      (r"\frac{3}{3\sqrt3}=\frac{1}{\sqrt3}", r"\frac{\sqrt3}{3}"),
      ("a_{10} = 5", "5"),
      ("Area = 5", "5"),
    ),
    *(("(R-r)(R+r)", "R^2-r^2"), ("2r+R", "R+2r"), ("1+E", "E+1"), (r"R^2\pi", r"\pi R^2"), ("(x,y)=(1,2)", "(1,2)")),
    *(("x=1, y=2", "1,2"), ("x_2 = 1, x_1 = 2", "1,2"), (r"\$5.", "5"), ("$5$ cm", "5")),
    *(("x_1 = 1, x_2 = 2", "1, 2"), ("AB + 2", "2+AB"), (r"2AB", r"AB \cdot 2"), ("ba", "ab")),
    # Part by part.
    *((r"(\sqrt{8}, 1)", r"(2\sqrt{2},1)"), (r"\left[\frac{2\pi}{4},\pi\right]", r"[\pi/2,\pi]")),
    *((r"1+\sqrt{5}, 1-\sqrt5", r"1 \pm \sqrt{5}"), (r"\{-\sqrt{8},\sqrt{8}\}", r"2\sqrt2,-2\sqrt2")),
    (r"(\sqrt{8},9) \cup (0,\sqrt{2})", r"(0,\sqrt{2})\cup(2\sqrt2,9)"),
    (
      r"\begin{pmatrix} \sqrt{8} & 0.2 \\ 1 & x \end{pmatrix}",
      r"\begin{pmatrix} 2\sqrt{2} & 1/5 \\ 1 & x \end{pmatrix}",
    ),
  ],
)
def test_equivalent(answer, gold):
  assert same(answer, gold)


@pytest.mark.parametrize(
  ("answer", "gold"),
  [
    *(("", ""), ("", "1"), ("5", "-5"), ("1.41421356", r"\sqrt{2}"), ("0.333333", "1/3"), ("3.14", r"\pi")),
    *((r"\sqrt{3}", r"\frac{\sqrt{3}}{3}"), ("1-2i", "1+2i"), ("x+1", "x+2"), ("x+y+z+1=0", "5x-7y+11z+4=0")),
    # Brackets and order count.
    *(
      ("1,2", "12"),
      ("(1,2)", "[1,2]"),
      ("(1,2)", "(1,2]"),
      ("1,2", "(1,2)"),
      (r"\{1,2\}", "(1,2)"),
      ("(2,1)", "(1,2)"),
    ),
    *(
      (r"(1, \sqrt{8})", r"(2\sqrt{2},1)"),
      (r"\sqrt{8}", r"\sqrt{8}, 1"),
      (r"\sqrt{2},\sqrt{2}", r"\sqrt{2},\sqrt{8}"),
    ),
    # Bases, mixed numbers, units, names that math-verify reads otherwise.
    *(("203_5", "203_6"), ("203_5", "203"), ("2(3)", "5"), ("4{10}", "14"), ("3 4", "7"), ("2h", "2"), ("3c", "3t")),
    *((r"x = \sqrt{8}", r"y = 2\sqrt{2}"), (r"x=\sqrt{8},y=1", r"x=1,y=\sqrt{8}"), ("5, 6", "5"), ("5=6", "5")),
    # What is still to be computed.
    *(("2+3", "5"), ("501^2-499^2", "2000"), (r"2 \cdot 3", "6"), (r"8 \div 2", "4"), ("6=1+2+3", "6")),
    # Equations whose other sides are not equal to the last, nor what was asked for.
    *(
      ("17=18", "18"),
      ("1+2=4", "4"),
      ("17=17+1=18", "18"),
      ("x=y=18", "18"),
      ("2x=6", "6"),
      ("-x=5", "5"),
      ("x^2=9", "9"),
    ),
    *((r"\frac{x}{2}=5", "5"), (r"\sqrt{x}=3", "3"), ("|x|=3", "3"), ("n!=6", "6"), ("x^2=x^2-1", "x^2-1"), ("=", "5")),
    *((r"\frac{1}{2}=\frac{1}{\sqrt{3}}", r"\frac{\sqrt3}{3}"), (r"\text{half}=5", "5"), ("x(2)=5", "5"), ("==5", "5")),
    *((r"\sum_{i=1}^{2}i=4", "4"), ("2+3=5=6", "6"), (r"x=2+3=\sqrt{36}", "6")),
    # Large letters are others than small ones, which math-verify does not see.
    *(("r^2-R^2", "R^2-r^2"), ("Rr", "r^2"), ("X^2-1", "x^2-1"), ("A+b", "a+B"), ("E+1", "e+1"), ("1+2I", "1+2i")),
    # Signs between digits, and dots that say that a number goes on.
    *(("5%0", "50"), ("5$0", "50"), (r"5\%0", "50"), ("1$2$3", "123"), (r"18^\circ0", "180"), ("1234...", "1234")),
    # Coordinates and values in another order than their names.
    *(("(y,x)=(1,2)", "(1,2)"), ("x=2,y=1", "1,2")),
    # Capitals in a row are a name.
    *(("BA", "AB"), ("2BA", "2AB"), ("CAB", "ABC"), ("AC+DB", "AC+BD"), (r"A\cdot B", "AB"), ("AB^2", "A^2B")),
  ],
)
def test_not_equivalent(answer, gold):
  assert not same(answer, gold)


def test_what_is_copied_from_the_problem_is_no_answer():
  problem = "Factor $9x^2 + 3x.$"
  assert not same("9x^2+3x", "3x(3x+1)", problem)
  assert not same(r"\left(9x^2 + 3x\right)", "3x(3x+1)", problem)
  assert same("9x^2+3x", "3x(3x+1)", "Factor this.")
  assert same("3x(1+3x)", "3x(3x+1)", problem)
  assert same("x+1", "x + 1", "What is $x+1$?")


def test_an_equation_may_name_what_the_problem_asks_for():
  assert same("x + y = 5", "5", "Find $x+y$.")
  assert not same("x + y = 5", "5", "Find $x$ if $x+y+z=6$.")
  assert not same("17 = 18", "18", "What follows $17$?")


@pytest.mark.parametrize(
  "answer",
  [
    *("100!!!", "100!", "(5!)!", "n!", "10^{10^{10}}", "9^9^9", "2^{2^{9}}", "9^{5!}", "2^{10000}", "1e99", "1E99"),
    *(
      "(x+1)^{99}",
      "(2^{99})^{99}",
      "9" * 16,
      "x" * 4,
      "hello",
      "x" * 201,
      "x+((((((((((x)+1)+1)+1)+1)+1)+1)+1)+1)+1)",
      "\\int x",
      "x_1'",
    ),
    *(
      "\\operatorname{eye}(9)",
      "\\sum_{i=1}^{9} i",
      "__import__",
      "x; y",
      "a:b",
      "\0x",
      "x\ud800",
      "é",
      "\\",
      "\\\\ 2",
    ),
    *("203_5", "2(3)", "2 (3/4)", "4{10}", "3 4", "\\begin{pmatrix}x\\end{pmatrix}", "", "+-*/"),
  ],
  ids=lambda text: ascii(text[:20]),
)
def test_math_verify_is_not_asked_everything(answer, monkeypatch):
  asked = []
  monkeypatch.setattr(equivalence, "compare", lambda gold, answer: asked.append(answer))
  assert not same(answer, r"x\sqrt{2}")
  assert not asked


def test_each_pair_is_asked_once_and_the_gold_answer_first(monkeypatch):
  asked = []
  monkeypatch.setattr(equivalence.verifier.shared, "ask", lambda *pair: asked.append(pair) or True)
  equivalence.compare.cache_clear()
  for _ in range(3):
    assert same("$\\sqrt{18}$.", "3\\sqrt{2}")
    assert same("x = 3", "x=3")
    assert not same("3", "4")
  assert asked == [("3\\sqrt{2}", "\\sqrt{18}")]
  equivalence.compare.cache_clear()


def test_many_entries_are_not_all_asked(monkeypatch):
  asked = []
  monkeypatch.setattr(equivalence, "compare", lambda *pair: bool(asked.append(pair)))
  golds = ",".join(f"{n}\\sqrt{{2}}" for n in range(2, 40))
  assert not same(golds.replace("\\sqrt{2}", "\\sqrt{3}"), golds)
  assert not asked
  assert not same("\\sqrt{2},\\sqrt{3},\\sqrt{5},\\sqrt{7}", "\\pi,2\\pi,3\\pi,4\\pi")
  assert len(asked) == 4


@given(PIECES | st.text() | st.lists(st.sampled_from(MATH), max_size=12).map("".join), PIECES)
def test_every_pair_gets_a_verdict(answer, gold):
  assert same(answer, gold) == same(answer, gold)
  assert same(answer, answer) == (answers.normal_form(answer) is not None)


@pytest.fixture(scope="module")
def golds(data_root):
  with open(f"{data_root}/math/train.jsonl", encoding="utf-8") as file:
    found = sorted({json.loads(line)["answer"] for line in file} - {""})
  return [gold for gold in found if rationals.parse(answers.normal_form(gold) or "") is None]


@pytest.mark.slow(reason="asks math-verify hundreds of times")
def test_math_verify_reads_the_answers_of_the_file(golds):
  texts = random.Random(0).sample(golds, 300)
  parts = [part for text in texts for part in answers.split(answers.clean(text))[1]]
  asked = [part.strip() for part in parts if equivalence._is_askable(part)]
  assert len(asked) > 0.85 * len(parts)
  assert [part for part in asked if not equivalence.compare(part, part)] == []


@pytest.mark.slow(reason="asks math-verify hundreds of times")
def test_different_answers_of_the_file_are_different(golds):
  texts = random.Random(1).sample(golds, 24)
  forms = {text: answers.normal_form(text) for text in texts}
  pairs = [pair for pair in itertools.permutations(texts, 2) if forms[pair[0]] != forms[pair[1]]]
  assert [pair for pair in pairs if same(*pair)] == []
