"""Numbers as people write them, read as exact rationals."""

import re
from fractions import Fraction

MOST_CHARACTERS = 100
"""Longer texts are no numbers; this bounds the time that reading and comparing takes."""

# Words that are no units: behind a number they make it another number, or one of several.
_CHANGING = re.compile(
  r"\b(?:(?:hundred|thousand|million|billion|trillion|dozen|half|halve|quarter|third)s?"
  r"|and|or|to|plus|minus|times|over|[ap]\.?m)(?![A-Za-z])",
  re.IGNORECASE,
)
_CURRENCY = r"(?:\\?\$|£|€)"
_THIN = r"\\[,;:! ]"
_INTEGER = r"[0-9]|\{\s*-?[0-9]+\s*\}"
_NUMBER = re.compile(
  rf"(?P<sign>{_CURRENCY}\s*[-+]|[-+]?\s*{_CURRENCY}?)\s*"
  rf"(?P<whole>[0-9]{{1,3}}(?:(?:,|\{{,\}}|,?{_THIN})[0-9]{{3}})+(?![0-9])|[0-9]*)"
  r"(?:\.(?P<decimals>[0-9]+)"
  rf"|(?:/|(?P<mixed>\s+[0-9]+)/)(?P<below>[0-9]+)"
  rf"|\s*\\[cdt]?frac\s*(?P<top>{_INTEGER})\s*(?P<bottom>{_INTEGER}))?"
  r"(?P<rest>.*)",
  re.DOTALL,
)
_UNIT = re.compile(
  rf"(?:\s|{_THIN})*"
  r"(?:\\?%|\\(?:text|textrm|textnormal|mathrm|mbox)\s*\{(?P<words>[A-Za-z\s.'/-]*)\}(?:\s*\^\s*(?:[23]|\{[23]\}))?)?"
  r"\s*\.?\s*"
)
_QUOTES = (
  *(("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**")),
  *((rf"\{command}{{", "}") for command in ("text", "textbf", "mathbf", "mathrm", "mbox")),
)


def parse(text: str) -> Fraction | None:
  r"""Read a number exactly; None for anything else, and for more than 100 characters.

  Understood are a sign; `$`, `£` or `€` in front; commas, also LaTeX's `{,}` and thin blanks, between groups of three
  digits; a decimal part or a denominator; `\frac{1}{2}` and `\frac12`; mixed numbers, `2\frac{1}{2}` and `2 1/2`; a
  percent sign (50% is 50) or a unit in `\text{}` behind; a full stop at the end; `$...$`, `\(...\)`, `\[...\]`,
  `**...**`, `\text{...}` and the like around it all. Other words are not, nor are exponents and sums.
  """
  text = text.strip()
  if len(text) > MOST_CHARACTERS:
    return None
  found = _NUMBER.fullmatch(unquoted(text.replace("\N{MINUS SIGN}", "-")))
  unit = found and _UNIT.fullmatch(found["rest"])
  if found is None or unit is None or not is_unit(unit["words"] or ""):
    return None
  whole, decimals, mixed = re.sub(r"\D", "", found["whole"]), found["decimals"] or "", found["mixed"]
  if found["top"]:
    top, bottom = int(found["top"].strip("{}")), int(found["bottom"].strip("{}"))
    if whole and (top < 0 or bottom < 0):
      return None
  elif found["below"]:
    if not whole:
      return None
    top, bottom = int(mixed or whole), int(found["below"])
    whole = whole if mixed else ""
  elif whole or decimals:
    top, bottom = int(decimals or 0), 10 ** len(decimals)
  else:
    return None
  if not bottom:
    return None
  value = int(whole or 0) + Fraction(top, bottom)
  return -value if "-" in found["sign"] else value


def unquoted(text: str) -> str:
  r"""Take away `$...$`, `\(...\)`, `\[...\]`, `**...**`, `\text{...}` and the like, with a full stop behind them."""
  for opening, closing in _QUOTES * 2:
    bare = text.removesuffix(".")
    if bare.startswith(opening) and bare.endswith(closing) and len(bare) > len(opening + closing):
      inside = bare[len(opening) : -len(closing)]
      if "}" not in inside.partition("{")[0]:  # Else the braces are two pairs: `\text{A5}_{11}`.
        text = inside.strip()
  return text


def is_unit(words: str) -> bool:
  """Tell whether words may stand behind a number without changing it."""
  return _CHANGING.search(words) is None
