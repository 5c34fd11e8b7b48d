"""What all strict graders read alike, and beside every form that is read one that must stay wrong."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d1jax.tasks import notation
from d1jax.tasks.countdown import Countdown
from d1jax.tasks.gsm8k import Gsm8k
from d1jax.tasks.hendrycks_math import HendrycksMath
from d1jax.tasks.sudoku import Sudoku

GRID = {"puzzle": "0321003004002100", "solution": "4321123434122143"}
FENCE = "```"
SIGNS = "π√∞²½×÷−·≥≤∪°∅~\\ ,;.:=$%*`'\"(){}[]|^_/-+0123456789 xyzcm" + "₂³⁻"
COMMANDS = [
  r"\frac",
  r"\text{",
  r"\over",
  r"\left",
  r"\right",
  r"\hspace{",
  r"\overline{",
  r"\begin{array}{c}",
  r"\boxed{",
]
PIECES = st.lists(st.sampled_from([*SIGNS, *COMMANDS, "Answer: ", "dollars", "per ", "cm"])).map("".join)


def solves(task, record, answer) -> bool:
  """Inside of an answer block, and as all of the text."""
  verdicts = {task.grade(text, record).metrics["solved"][0] for text in (f"1 <answer>\n{answer}\n</answer>", answer)}
  assert len(verdicts) == 1
  return bool(verdicts.pop())


@pytest.mark.parametrize(
  ("gold", "right", "wrong"),
  [
    # Units: known ones, or any words in \text; they must not contradict, and change no number.
    ("5", ["5 cm", "5cm", "5 inches", r"5~\text{cm}", r"5\quad\text{ m}", r"5\hspace{1mm} cm"], ["5 x", "5 m", "5 ab"]),
    (
      "5",
      [r"5\thinspace\text{cm}", r"5\,\textup{cm}", r"5\operatorname{cm}"],
      ["5 dozen", "5 fifths", "5 squared", "50 mm"],
    ),
    (
      r"5\text{ m}",
      ["5", "5 meters", r"5\mathrm{m}", r"5 \textit{ metres}"],
      ["5 cm", r"5\text{ m}^2", "500 cm", "5%"],
    ),
    (
      r"15\mbox{ cm}^2",
      ["15", "15 cm²", "15 square centimeters", "15 sq. cm", "15 square units"],
      ["15 cm", "15 cm^3"],
    ),
    (r"7\text{ mph}", ["7 miles per hour", "7 mi/h", "7"], ["7 km/h", "7 miles", "7 per hour"]),
    (
      r"28\%",
      ["28 percent", "28", "28%", r"28\,\%", "28 per cent"],
      ["0.28", "0.28%", "28 thousand", "28 degrees", r"\$28"],
    ),
    (r"90^\circ", ["90 degrees", "90°", r"90^{\circ}", r"90\degree", "90"], ["90 radians", "90 percent", "9°"]),
    (
      r"\$18.90",
      ["18.90 dollars", "18.9", r"18.90~\text{dollars}", "18.90$", "US$18.90"],
      ["18.90 cents", "18.9 €", "18.09 dollars"],
    ),
    (r"6\pi", ["6π", r"6\pi\text{ cm}", r"6\pi\text{ square inches}"], ["6", "6 pi cm", "6 pi"]),
    # Unicode signs.
    (r"2\pi", ["2π", "2 π", "2·π", "2×π"], ["2", "π²", "2pi3"]),
    (r"\sqrt{12}", ["√12", "√(12)", "2√3"], [r"\sqrt12", "√1 2", "√2", "12"]),
    (
      r"[2,\infty)",
      ["[2, ∞)", r"x\ge 2", "x ≥ 2", "2 <= x", r"2\leqslant x"],
      ["x>2", "x≤2", "(2,∞)", r"x\ge -2", "x≥2y"],
    ),
    (r"[-2,7]", [r"-2\le x\le 7", "−2 ≤ x ≤ 7", "7 ≥ x ≥ -2"], [r"-2<x\le7", "-2≤x", "2≤x≤7", "-2≤x≥7", r"x\le7"]),
    (r"(-\infty,3)", ["x<3", "3 > x", "x\\lt 3"], ["x<=3", "x>3", "-3<x"]),
    ("(2,7)", ["(2, 7)"], ["2<x<7"]),  # It may be a point.
    (r"x\ge 2", ["[2,∞)", "x≥2"], ["y≥2", "x>2"]),
    (r"(0,1)\cup(2,3)", ["(0,1)∪(2,3)", "(2,3) ∪ (0,1)"], ["(0,1)(2,3)", "(0,1),(2,3)", "(0,3)"]),
    ("x^2", ["x²", "x ²", "x^{2}"], ["x2", "x³", "2x"]),
    ("x^{12}", ["x¹²"], ["x¹2", "x²", "12x"]),
    (r"\frac{1}{2}", ["½", "{1\\over2}", "{1 \\over 2}", r"\tfrac12"], ["1½", "¼", r"{1\over3}", r"{2\over1}"]),
    ("5/2", ["2½", r"2{1\over2}"], ["21/2", "½2", r"2\cdot{1\over2}"]),
    ("2516_8", ["2516₈"], ["2516₉", "25168"]),
    ("-3", ["−3", "–3", "‐3"], ["3", "−−3", "6÷−2"]),
    # Repeating decimals and groups of digits, exactly.
    (
      "1/3",
      [r"0.\overline{3}", r"0.3\overline{3}", r".\bar{3}", r"{1\over3}"],
      ["0.3", "0.333333333333", r"0.\overline{33}4", r"3\overline{3}"],
    ),
    ("1/6", [r"0.1\overline{6}", r"0.1\overline{66}"], [r"0.\overline{16}", "0.1667", r"0.1\overline{6}7"]),
    (
      "1000000",
      ["1 000 000", r"1\,000\,000", "1{,}000{,}000", "1\u202f000\u202f000", "1~000~000"],
      ["1 000 00", "1 0000 000", "1; 000 000"],
    ),
    ("1, 234", ["1; 234", r"1,\;234"], ["1 234", "1234", "1,234"]),
    ("1, -2", ["1; -2", "-2;1", r"1,\quad -2", "1 or −2"], ["(1;-2)", "1 -2", "-1; 2"]),
    ("(1,-2)", ["(1; -2)", r"\left(1,\,-2\right)", r"\bigl(1,-2\bigr)"], ["1; -2", "(-2;1)"]),
    # Commands.
    (r"\emptyset", [r"\varnothing", "∅"], ["0", r"\{0\}", r"\infty"]),
    (
      r"|x|",
      [r"\lvert x\rvert", r"\left|x\right|", r"\left\lvert x \right\rvert", r"\vert x\vert"],
      ["x", r"\lvert -x^2\rvert"],
    ),
    (r"\{1,2\}", [r"\lbrace 1,2\rbrace"], [r"(1,2)", r"\lbrace 1,3\rbrace"]),
    (
      r"\text{even}",
      [r"\textup{even}", r"\textit{Even}", r"\operatorname{even}", '"even"'],
      ["odd", r"\textit{uneven}"],
    ),
    (
      r"\begin{pmatrix}1&2\\3&4\end{pmatrix}",
      [
        r"\left[\begin{array}{cc}1&2\\3&4\end{array}\right]",
        r"\left(\begin{array}{c|c} 1 & 2 \\ 3 & 4 \end{array}\right)",
      ],
      [r"\left[\begin{array}{cc}1&3\\2&4\end{array}\right]", r"\left|\begin{array}{cc}1&2\\3&4\end{array}\right|"],
    ),
    (
      r"\begin{pmatrix}1\\2\end{pmatrix}",
      [r"\left[\begin{array}{c}1\\2\end{array}\right]"],
      [r"\left[\begin{array}{cc}1&2\end{array}\right]"],
    ),
    # Wrappers.
    (
      "18",
      [
        "= 18",
        "The answer is 18.",
        "**Answer:** 18",
        "Final answer: $18$",
        "`18`",
        r"\fbox{18}",
        f"{FENCE}\n18\n{FENCE}",
      ],
      ["The answer is not 18.", "The answer is 18 or 19.", "18, 19"],
    ),
  ],
  ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_math(gold, right, wrong):
  record = {"problem": "?", "solution": "", "answer": gold}
  assert [answer for answer in right if not solves(HendrycksMath(), record, answer)] == []
  assert [answer for answer in wrong if solves(HendrycksMath(), record, answer)] == []


@pytest.mark.parametrize(
  ("gold", "right", "wrong"),
  [
    (
      "18",
      ["¥18", "₹18", "18€", "18 €", "US$18", "\\$18", "18$", "£ 18"],
      ["¥1 8", "€18€18", "18€19", "X$18", "$-18", "1.8€"],
    ),
    (
      "18",
      ["18cm", "18 cm", "18 cm²", r"18~\text{dollars}", r"18\hspace{2pt}dollars"],
      ["18x", "18 x", "18k", "18²", "18cm3"],
    ),
    (
      "18",
      ["$18/day", "18/day", "18 per day", "18 dollars per day", "18 miles/hour"],
      ["18/2", "18/two", "18 per 2 days", "18/x"],
    ),
    ("18", ["(18)", "$(18)$", "(18) dollars"], ["(18", "(1)(8)", "(18)(18)", "(1,8)", "-(18)"]),
    (
      "18",
      ["= 18", "x = 18", "The answer is 18.", "Answer: $18", "**Answer:** 18 dollars"],
      ["17 = 18", "x = y = 18", "The answer is not 18.", "The answer is 18 or 19.", "It is 18", "18 is 9+9"],
    ),
    (
      "18",
      [r"\textbf{18}", r"\(18\)", "```\n18\n```", '"18"', "$$18$$", "**18** dollars"],
      ["`1` `8`", "$1$8", '"18" "19"', r"\textbf{1}8"],
    ),
    ("18", ["18°", "18 each"], ["18%", "0.18", "1800%", "18 hundredths", "18 sixths", "18 squared", "18 pi"]),
    (
      "18",
      ["18 hundredweight", "18 reams", "18 short-answer questions", "18 laps around the track", "18 gallons"],
      ["18 twelfths", "18 sixteenths", "18 twentieths", "18 crore", "18 tens", "18 doubled", "18 below zero"],
    ),
    ("1/2", ["½", r"{1\over2}", ".5", "½ cup"], ["½½", "1½", r"{1\over2}\over2", "1 2"]),
    (
      "1000000",
      ["1 000 000", "1,000,000", r"1\,000\,000", "1\u00a0000\u00a0000"],
      ["1 000 00", "1 000,000", "1,000 000", "10 00000"],
    ),
    ("1/3", [r"0.\overline{3}"], ["0.3", "0.33", "0.3333333333333333", "0.3..."]),
    ("1100.5", ["1 100.5"], ["1 100/200", "1 100", "1 100 5"]),
    (
      "18",
      ["Answer: **18**", "**Answer: 18**", "**The answer is** **18**."],
      ["Answer: **18", "Answer: **17** **18**"],
    ),
    ("$18", ["18", "18 dollars", "US$18", "18 apples"], ["18 cents", "€18", "18%", "18 hours"]),
  ],
  ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_gsm8k(gold, right, wrong):
  assert [answer for answer in right if not solves(Gsm8k(), {"answer": gold}, answer)] == []
  assert [answer for answer in wrong if solves(Gsm8k(), {"answer": gold}, answer)] == []


@pytest.mark.parametrize(
  ("nums", "target", "right", "wrong"),
  [
    (
      [3, 4, 5],
      17,
      ["3×4+5", "3·4+5", "3⋅4+5", "3∗4+5", r"3\ast4+5", r"3\,*\,4+5"],
      ["3×4×5", "3·5+4", "3××4+5", "3x4+5", "3*4+5!"],
    ),
    (
      [3, 4, 5],
      17,
      [r"\left(3\times4\right)+5", r"\bigl(3*4\bigr)+5", "[3*4]+5", "[(3*4)]+5"],
      ["[3*4)+5", "(3*4]+5", "[3*4+5", "3*[4+5]"],
    ),
    (
      [3, 4, 5],
      17,
      ["$3*4+5$", "$$3*4+5$$", r"\(3*4+5\)", r"\[3*4+5\]", "$ 3*4+5 $."],
      ["$3*4$+$6$", "$3*4+5$ or $3*4+5$", "$3*4-5$"],
    ),
    (
      [3, 4, 5],
      17,
      ["**3*4+5**", "`3*4+5`", "```\n3*4+5\n```", "```python\n3*4+5\n```", '"3*4+5"'],
      ["**3**4+5**", "3**4+5", "`3`*4+5"],
    ),
    (
      [3, 4, 5],
      17,
      ["3(4)+5", "(3)(4)+5", "[3](4)+5", "3*4+5.", "= 3*4+5"],
      ["34+5", "3 4+5", "(3)4+5", "3(4+5)", "3*4+5..6"],
    ),
    (
      [3, 4, 5],
      17,
      ["Answer: 3*4+5", "The solution is 3*4+5."],
      ["17 = 3*4+5", "3*4+5 = 17", "Answer: 3*4+5 or 3*5+4", "not 3*4+5"],
    ),
    ([20, 4], 5, ["20÷4", "20/4", "20⁄4", "20 ∕ 4", r"20 \div 4"], ["4÷20", "20//4", "20÷÷4", "2 0÷4"]),
    (
      [3, 4, 10],
      3,
      ["-3-4+10", "−3−4+10", "10–3–4", "(-3-4)+10", "10+(-3-4)"],
      ["--3-4+10", "+3-4+10", "-3+4+10", "10+-3-4", "3-4-10"],
    ),
    ([1, 2, 4], 2, ["½*4", r"4*{1\over2}", r"\dfrac{1}{2}*4"], ["4½", r"4\frac{1}{2}", "2½*4"]),
    ([3, 2], 9, [], ["3²", "3^2", "3**2"]),
  ],
  ids=lambda value: str(value)[:20],
)
def test_countdown(nums, target, right, wrong):
  record = {"nums": nums, "target": target}
  assert [answer for answer in right if not solves(Countdown(), record, answer)] == []
  assert [answer for answer in wrong if solves(Countdown(), record, answer)] == []


ROWS = ("4321", "1234", "3412", "2143")
CELLS = [" ".join(row) for row in ROWS]


@pytest.mark.parametrize(
  ("right", "wrong"),
  [
    (r"\boxed{#}", r"\boxed{#1}"),
    (r"$\boxed{#}$", r"\boxed{1#}"),
    ("```\n#\n```", "```\n#\n#\n```"),
    ("**#**", "**#**#"),
    ("$#$", "$#4$"),
    ("`#`", "`#`#"),
    ('"#"', '"#" "#"'),
    ("#.", "#.0"),
    ("Solution: #", "Puzzle: 0321003004002100 Solution: #"),
    ("The answer is #.", "The answer is not #."),
    ("**Answer:** #", "Row 1: #"),
    (",".join(GRID["solution"]), ",".join(GRID["solution"][:-1])),
    ("[[4,3,2,1],[1,2,3,4],[3,4,1,2],[2,1,4,3]]", "[[4,3,2,1],[1,2,3,4],[3,4,1,2],[2,1,3,4]]"),
    ('["4321","1234","3412","2143"]', '["4321","1234","3412"]'),
    (
      "\n".join(f"| {' | '.join(row)} |" for row in ROWS),
      "\n".join(f"| {i} | {' | '.join(row)} |" for i, row in enumerate(ROWS)),
    ),
    ("4 3 | 2 1\n1 2 | 3 4\n----+----\n3 4 | 1 2\n2 1 | 4 3", "4 3 - 2 1\n1 2 - 3 4\n3 4 - 1 2\n2 1 - 4 3"),
    (
      r"\begin{bmatrix}4&3&2&1\\1&2&3&4\\3&4&1&2\\2&1&4&3\end{bmatrix}",
      r"\begin{bmatrix}4&3&2&1\\1&2&3&4\\3&4&1&2\\2&1&4&3^2\end{bmatrix}",
    ),
    (
      r"\left[\begin{array}{|cc|cc|}\hline 4&3&2&1\\1&2&3&4\\\hline 3&4&1&2\\2&1&4&3\end{array}\right]",
      r"\begin{array}{cccc}4&3&2&1\\1&2&3&4\\3&4&1&2\\2&1&4&-3\end{array}",
    ),
    ("#", "4321-1234-3412-2143"),
    ("4321 1234 3412 2143", "4321 1234 3412 21.43"),
  ],
  ids=lambda text: ascii(text[:12]),
)
def test_sudoku(right, wrong):
  assert solves(Sudoku(), GRID, right.replace("#", GRID["solution"]))
  assert not solves(Sudoku(), GRID, wrong.replace("#", GRID["solution"]))


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
    *((r"\text{a}{b}", r"\text{a}{b}"), ("$5$ or $6$", "$5$ or $6$"), ("**a** and **b**", "**a** and **b**"), ("", "")),
  ],
)
def test_unwrapped(text, inside):
  assert notation.unwrapped(notation.plain(text)) == inside


@pytest.mark.parametrize(
  ("words", "is_unit"),
  [
    *(("dollars", True), ("square inches", True), ("sq. m", True), ("oranges", True), ("tons", True), ("", True)),
    *(("million", False), ("Dozens", False), ("or so", False), ("miles or km", False), ("a.m.", False), ("PM", False)),
    *(
      ("inches squared", True),
      ("squared", False),
      ("fifths", False),
      ("base eight", False),
      ("pi", False),
      ("points", True),
    ),
  ],
)
def test_units(words, is_unit):
  assert notation.is_unit(words) == is_unit


@pytest.mark.parametrize(
  ("text", "rest", "name"),
  [
    *(("5 cm", "5", "cm"), ("5cm", "5", "cm"), (r"5\text{ m}^2", "5", "m^2"), ("5 square feet", "5", "ft^2")),
    *(("5 miles per hour", "5", "mi/h"), ("5 mph", "5", "mi/h"), (r"5\%", "5", "%"), ("5 per day", "5", "/day")),
    *(
      (r"5\text{ red apples}", "5", ""),
      ("5 m", "5 m", ""),
      ("5 red apples", "5 red apples", ""),
      ("x cm", "x cm", ""),
    ),
    *(("5 square", "5 square", ""), ("5 m/s", "5 m/s", ""), ("5 km/h", "5", "km/h"), ("5/cm/s", "5", "/cm/s")),
  ],
)
def test_split_unit(text, rest, name):
  assert notation.split_unit(text) == (rest, name)


@given(PIECES | st.text())
def test_every_text_is_read(text):
  plain = notation.plain(text)
  assert notation.plain(f" {text}\n") == plain
  assert len(notation.unwrapped(plain)) <= len(plain)
  rest, name = notation.split_unit(plain)
  assert plain.startswith(rest)
  assert not notation.have_different_units(text, text)
  assert isinstance(name, str)
