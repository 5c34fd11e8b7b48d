"""Numbers as people write them, read as exact rationals."""

import re
from fractions import Fraction

from d1jax.tasks import arithmetic, notation

MOST_CHARACTERS = 100
"""Longer texts are no numbers; this bounds the time that reading and comparing takes."""

_INTEGER = r"[0-9]|\{\s*-?[0-9]+\s*\}"
_NUMBER = re.compile(
  rf"(?P<sign>{notation.CURRENCY} ?[-+]|[-+]? ?{notation.CURRENCY}?) ?"
  r"(?P<whole>[0-9]{1,3}(?:,[0-9]{3})+|[0-9]*)"
  r"(?:\.(?P<decimals>[0-9]*)(?:\\(?:overline|bar|dot) ?\{(?P<repeated>[0-9]+)\})?(?<!\.)"
  r"|(?P<mixed> [0-9]+)? ?/ ?(?P<below>[0-9]+)"
  rf"| ?\\frac ?(?P<top>{_INTEGER}) ?(?P<bottom>{_INTEGER}))?"
)
_DECIMAL = re.compile(r"([0-9]*)\.([0-9]+)")
_COMMA = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")
_TIMES = re.compile(r"(?<=[0-9)]) ?x ?(?=[0-9(])")
_COUNTED = re.compile(rf"(.*?[^ ]) ({notation.WORDS})(?:\^[23])?")


def parse(text: str, shortest_word: int = 4) -> Fraction | None:
  r"""Read a number exactly; None for anything else, and for more than 100 characters.

  Understood are a sign; a sign of money in front or behind; commas and blanks between groups of three digits; a decimal
  part, also a repeating one (`0.\overline{3}`); a denominator; `\frac{1}{2}` and `\frac12`; mixed numbers,
  `2\frac{1}{2}` and `2 1/2`; parentheses around it; a unit behind (`notation.split_unit`), of which a percent sign is
  one (50% is 50); and all that `notation` takes away. Exponents and sums are not.

  Args:
    text: at most 100 characters.
    shortest_word: other words than units may stand behind the number if they have as many letters. Shorter ones may
      be products of variables.
  """
  if len(text.strip()) > MOST_CHARACTERS:
    return None
  answer = notation.unwrapped(notation.plain(text))
  text, _ = notation.split_unit(answer)
  counted = _COUNTED.fullmatch(text)
  if counted is not None and min(map(len, counted[2].split())) >= shortest_word and notation.is_unit(counted[2]):
    text = counted[1]
  if text != answer:  # `$18$ dollars`
    text = notation.unwrapped(text)
  if text[:1] + text[-1:] in ("()", "{}") and "," not in text:  # (100,101) are two numbers.
    text = text[1:-1]
  match = _NUMBER.fullmatch(text)
  if match is None:
    return None
  whole, decimals, mixed = match["whole"].replace(",", ""), match["decimals"] or "", match["mixed"]
  repeated = match["repeated"] or ""
  if match["top"]:
    top, bottom = int(match["top"].strip("{}")), int(match["bottom"].strip("{}"))
    if whole and (top < 0 or bottom < 0):
      return None
  elif match["below"]:
    if not whole:
      return None
    top, bottom = int(mixed or whole), int(match["below"])
    whole = whole if mixed else ""
  elif repeated:
    # 0.1\overline{6} is (16 - 1) / 90.
    top, bottom = int(decimals + repeated) - int(decimals or 0), (10 ** len(repeated) - 1) * 10 ** len(decimals)
  elif whole or decimals:
    top, bottom = int(decimals or 0), 10 ** len(decimals)
  else:
    return None
  if not bottom:
    return None
  value = int(whole or 0) + Fraction(top, bottom)
  return -value if "-" in match["sign"] else value


def conclusion(text: str, shortest_word: int = 4) -> str:
  r"""Return the last side of an equation whose other sides are equal to it, `18` of `2 \times 9 = 18`, else the text.

  A side is a number, or an expression that `arithmetic.evaluate` computes, in which there may be decimals, signs of
  money and an `x` for a product; with units it is neither. `shortest_word` is that of `parse`.
  """
  *sides, last = text.split("=")
  value = parse(last, shortest_word) if sides else None
  return last.strip() if value is not None and all(_computed(side) == value for side in sides) else text


def _computed(text: str) -> Fraction | None:
  text = _COMMA.sub("", notation.plain(text).replace("\\$", "").replace("$", ""))
  text = _DECIMAL.sub(lambda result: f"({int(result[1] + result[2])}/1{'0' * len(result[2])})", text)
  result = arithmetic.evaluate(arithmetic.translate(_TIMES.sub("*", text)))
  return parse(text) if result is None else result[0]
