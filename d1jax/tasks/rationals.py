"""Numbers as people write them, read as exact rationals."""

import re
from fractions import Fraction

MOST_CHARACTERS = 100
"""Longer texts are no numbers; this bounds the time that reading and comparing takes."""

_CURRENCY = r"(?:\\?\$|£|€)"
_NUMBER = re.compile(
  rf"(?P<sign>[-+]?{_CURRENCY}?|{_CURRENCY}[-+])\s*"
  r"(?P<whole>[0-9]{1,3}(?:,[0-9]{3})+|[0-9]*)"
  r"(?:\.(?P<decimals>[0-9]+)|/(?P<below>[0-9]+))?"
  r"(?:\s*\\?%)?\.?"
)
_QUOTES = (("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))


def parse(text: str) -> Fraction | None:
  r"""Read a number exactly; None for anything else, and for more than 100 characters.

  A sign, commas between groups of three digits, a decimal part or a denominator, `$`, `£` or `€` in front, a percent
  sign behind (50% is 50), a full stop at the end and LaTeX's `$...$`, `\(...\)`, `\[...\]` around it are understood;
  units, words, exponents and sums are not.
  """
  text = text.strip()
  if len(text) > MOST_CHARACTERS:
    return None
  for opening, closing in _QUOTES:
    if text.startswith(opening) and text.endswith(closing) and len(text) > len(opening + closing):
      text = text[len(opening) : -len(closing)].strip()
      break
  found = _NUMBER.fullmatch(text.replace("\N{MINUS SIGN}", "-"))
  if found is None:
    return None
  whole, decimals, below = found["whole"].replace(",", ""), found["decimals"] or "", found["below"]
  if not whole and (not decimals or below is not None):
    return None
  if below is not None and not int(below):
    return None
  value = Fraction(int(whole + decimals), int(below) if below is not None else 10 ** len(decimals))
  return -value if "-" in found["sign"] else value
