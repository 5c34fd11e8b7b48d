"""Units, percent and words that count or compare, which are harmless where the question asks for them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d1jax.tasks import asked
from d1jax.tasks.gsm8k import Gsm8k
from d1jax.tasks.hendrycks_math import HendrycksMath

ROWS = [
  # Words that are never asked for, or not here.
  (
    "What is it?",
    ["18 gallons"],
    ["18 pairs", "18 couples", "18 score", "18 dozens", "18 half", "18 gross", "18 fold"],
  ),
  ("What is it?", ["18 each"], ["18 less", "18 more", "18 fewer", "18 short", "18 loss", "18 in debt", "18 minus"]),
  ("What is it?", ["18~dollars", r"18~\text{dollars}", r"18\text{~cm}", "x~= 18", "18~"], ["17~18", "18 zillion"]),
  ("What is it?", ["18"], ["~18", "x = ~18", "x =~18", "$~18$", "~$18", r"~\frac{36}{2}", "≈18", r"\approx 18"]),
  ("What is it?", [], ["about 18", "18 about", "18 roughly", "18 or so", "18 at most", "18 approximately", "18 ish"]),
  ("What is it?", [], ["18 wrong", "18 maybe", "18 but wrong", "18 repeating", "18 recurring", "18 squared"]),
  # Those that this question asks for.
  (
    "How many pairs of shoes has he?",
    ["18 pairs", r"18\text{ pairs}"],
    ["18 dozen", "18 couples"],
  ),
  ("How many socks are in 9 pairs?", ["18", "18 socks"], ["18 pairs", r"18\text{ pairs}"]),
  ("How many more dozen eggs are needed?", ["18 dozen", "18 more dozen", "18 dozen eggs"], ["18 pairs", "18 fewer"]),
  ("How many eggs are in a dozen boxes?", ["18 eggs"], ["18 dozen", "18 dozen eggs"]),
  ("How many additional apples does he need?", ["18 more apples", "18 more"], ["18 less", "18 minus", "18 more 5"]),
  ("How many more cars has she? Tom has less.", ["18 cars"], ["18 or less"]),
  ("Tom has less. How many cars has she?", ["18 cars"], ["18 less", "18 more"]),
  ("How many dollars was he short?", ["18 short", "$18 short", "18 dollars"], ["18 over", "18%"]),
  ("How many times did he run?", ["18 times", "18"], ["18 times 2", "18 times two"]),
  ("How many million tons are they?", ["18 million", "18 million tons"], ["18 thousand", "18 billion"]),
  ("What percentage of them are red?", ["18%", "18 percent", r"18\%"], ["0.18", "18 degrees", "18 dollars"]),
  ("What is the interest rate?", ["18%", "18"], ["1800%"]),
  ("How many of the 36 are red?", ["18 painted ones"], ["18%", "18 percent", r"18\%"]),
  (
    "How many hours does it take?",
    ["18 hours", "18 hours per day", "18 hrs"],
    ["18 minutes", "18 dollars", "$18", "18%"],
  ),
  ("How many minutes and how many hours?", ["18 minutes", "18 hours"], ["18 or 19 hours"]),
  ("How many cents are left?", ["18 cents", "18"], ["$18", "18 dollars"]),
  ("How many square cm is it?", ["18 cm^2", "18 square cm", "18 square units"], ["18 cm", "18 square inches"]),
  ("How many miles per hour is it?", ["18 mph", "18 miles", "18 miles per hour"], ["18 km/h", "18 hours"]),
]


@pytest.mark.parametrize(("question", "right", "wrong"), ROWS, ids=lambda value: value[:24] if value else "")
def test_words_behind_an_answer(question, right, wrong):
  for task, record in (
    (Gsm8k(), {"question": question, "answer": "18"}),
    (HendrycksMath(), {"problem": question, "solution": "", "answer": "18"}),
  ):
    solved = {text: task.grade(f"<answer>{text}</answer>", record).metrics["solved"][0] for text in right + wrong}
    assert [text for text in right if not solved[text]] == []
    assert [text for text in wrong if solved[text]] == []


def test_a_unit_of_the_gold_answer_is_stronger_than_the_question():
  assert not asked.is_another(r"18\%", r"18\%", "How many?")
  assert asked.is_another(r"18\%", "18", "How many?")


@given(st.text(), st.text())
def test_every_text_is_read(answer, question):
  assert isinstance(asked.without_counts(answer, question), str)
  assert asked.is_another(answer, "18", question) in (False, True)
