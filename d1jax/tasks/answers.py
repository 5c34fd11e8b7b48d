r"""Answers to competition problems: their normal form, by which most are compared, and the parts of lists."""

import functools
import re

from d1jax.tasks import latex, notation, rationals

MOST_CHARACTERS = 1000
"""Longer answers have no normal form and equal nothing; the longest of MATH has 159 characters."""

MOST_DEPTH = 8
"""Brackets in more brackets are not taken apart; the answers of MATH have three."""

MOST_ENTRIES = 50
"""Longer lists are not taken apart; those of MATH have nine entries."""

UNORDERED = ("{}", "cup")
"""The kinds of lists whose entries may come in any order."""

_COMMANDS = (
  (
    re.compile(
      rf"(?<![0-9])\b{notation.CURRENCY}(?=[0-9])|(?<![0-9])\\?\$|\\?\$(?![0-9])|(?:\\?%|\^\\circ)(?! ?[0-9])"
    ),
    "",
  ),
  (re.compile(r" ?,? ?(?:\\text\{ ?,? ?(?:and|or) ?\}|\b(?:and|or)\b) ?|;"), ", "),
)
# A sign between digits, `5%0`; MATH's normaliser would make it 50.
_PARTED = re.compile(r"(?:%|\$|\^\\circ) ?[0-9]")
_NAME = re.compile(r"(^|,)\s?([A-Za-z]{1,2})\s?=\s?")
_POINT = re.compile(r"(?:\([A-Za-z](?:\s?,\s?[A-Za-z])*\)\s?=|[A-Za-z]\s?\\in(?![A-Za-z]))\s?(?=[^=]*$)")
_WORDS = re.compile(r"\\text\{([^{}]*)\}")
_BRACED = re.compile(r"([_^])\{([0-9A-Za-z])\}")
_BASED = re.compile(r"\(?([0-9]+)\)?_\{?([0-9]+)\}?")
_THOUSANDS = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")
# Not in `\frac 3 8`.
_BLANK_BETWEEN_DIGITS = re.compile(r"(?<=[0-9])(?<!frac[0-9])(?<!frac [0-9])\s(?=[0-9])")
_MATRIX = re.compile(r"\\begin\{([bpB]?matrix)\}(.*)\\end\{\1\}", re.DOTALL)
_ARRAY = re.compile(
  r"(?:\[|\() ?\\begin\{((?:small)?matrix|array)\}(?: ?\{[clr| ]*\})?(.*)\\end\{\1\} ?(?:\]|\))", re.DOTALL
)
_RELATION = re.compile(r" ?(<|>|\\[lg]e(?![A-Za-z])) ?")
_BOUND = re.compile(r"(?:[0-9+\-*/.^(){} ]|\\[A-Za-z]+)+")
_ENCLOSED = re.compile(r"(\\\{|[(\[])(.*)(\\\}|[)\]])", re.DOTALL)
_BRACKETS = ("()", "(]", "[)", "[]", "{}")
_TOKEN = re.compile(r"\\?[(\[{)\]}]|,|\\cup(?![A-Za-z])")


def is_same(answer: str, gold: str) -> bool:
  """Tell whether an answer has the normal form of the gold answer; it may leave out the base of a number or a unit."""
  form, wanted = normal_form(answer), normal_form(gold)
  if form is None or wanted is None or contradict(answer, gold):
    return False
  based = _BASED.fullmatch(wanted)
  return form == wanted or (based is not None and form == based[1])


def contradict(answer: str, gold: str) -> bool:
  """Tell whether both answers have a name or a unit, and these differ: `x = 5` and `y = 5`, or `5 cm` and `5 m`."""
  left, right = (_names(_plain(text)) for text in (answer, gold))
  return bool(left and right and left != right) or notation.have_different_units(answer, gold)


def is_copied(answer: str, problem: str) -> bool:
  """Tell whether the problem contains the answer, apart from blanks, marks and brackets around it."""
  if len(answer) > MOST_CHARACTERS:
    return False
  text = _plain(answer)
  kind, entries = split(text)
  return "".join((text if kind else entries[0]).split()) in _squeezed(problem)


def normal_form(text: str) -> str | None:
  r"""Write an answer so that equal answers are, mostly, equal texts; None for a blank or too long one.

  A number becomes a whole number or a quotient of two (`rationals.parse`: `1,000`, `0.50` and `\frac{1}{2}` are `1000`,
  `1/2` and `1/2`), a list a list of normal forms, sorted where the order does not count; everything else what MATH's
  normaliser makes of `clean(text)`, words in small letters.
  """
  return None if len(text) > MOST_CHARACTERS else _normal_form(text)


@functools.lru_cache(notation.REMEMBERED)
def clean(text: str) -> str:
  r"""Take away what does not change an answer's value, and keep LaTeX that can be parsed.

  Gone is what `notation` takes away: blanks and full stops at the ends, wrappers, a unit at the end; also `$`, `\%`,
  degrees, and a name before the only equals sign (`x = 5`, `(x, y) = (1, 2)`, but not `(y, x)`; also `x = 1, x = 2`) or
  before `\in`.
  `and`, `or` and semicolons become commas, inequalities intervals, signs and blanks what `notation.plain` writes.
  """
  text = _plain(text)
  text, _ = notation.split_unit(text)
  _, interval = _as_interval(text)
  if interval:
    return interval
  names = _NAME.findall(text)
  if len(names) == text.count("=") and len({name for _, name in names}) == 1:
    return _NAME.sub(r"\1", text)
  point = _POINT.match(text)
  letters = re.findall("[A-Za-z]", point[0]) if point is not None and point[0][0] == "(" else []
  return text if point is None or letters != sorted(letters) else text[point.end() :]


def split(text: str) -> tuple[str, list[str]]:
  r"""Take a clean answer apart: its kind and its entries, or `""` and itself.

  Kinds: `()`, `[]`, `(]` and `[)`, in which the order counts; `{}`, which is a list without brackets too, and `\pm`;
  `cup`, a union; `matrix`, with the lengths of its rows. `()` and `{}` around a single entry are taken away.
  """
  for _ in range(MOST_DEPTH):
    text = text.strip()
    matrix = _MATRIX.fullmatch(text) or _ARRAY.fullmatch(text)
    if matrix is not None:
      rows = [row.split("&") for row in matrix[2].split(r"\\") if row.strip()]
      return " ".join(["matrix", *(str(len(row)) for row in rows)]), [entry for row in rows for entry in row]
    for mark, kind in ((r"\cup", "cup"), (",", "{}")):
      entries = _pieces(text, mark)
      if 1 < len(entries) <= MOST_ENTRIES:
        return kind, _signed(entries) if kind == "{}" else entries
    match = _ENCLOSED.fullmatch(text)
    kind = match[1][-1] + match[3][-1] if match else ""
    if match is None or kind not in _BRACKETS or not _is_enclosed(text):
      break
    entries = _pieces(match[2], ",")
    if 1 < len(entries) <= MOST_ENTRIES:
      return kind, _signed(entries) if kind == "{}" else entries
    if kind not in ("()", "{}"):
      break
    text = match[2]
  signs = _signed([_THOUSANDS.sub("", text)])
  return ("{}", signs) if len(signs) > 1 else ("", signs)


@functools.lru_cache(notation.REMEMBERED)
def _plain(text: str) -> str:
  text = notation.plain(text)
  for pattern, replacement in _COMMANDS:
    text = pattern.sub(replacement, text)
  goes_on = text.endswith("...") and text.strip(".")  # `0.333...` is not `0.333`.
  return notation.unwrapped(text if goes_on else text.strip().rstrip("."))


def _names(text: str) -> set[str]:
  variable, _ = _as_interval(text)
  return {variable} if variable else {name for _, name in _NAME.findall(text)}


def _as_interval(text: str) -> tuple[str, str]:
  r"""Write the inequalities that bound a letter by numbers as an interval; returns the letter and the interval.

  `x \ge 2` is `[2,\infty)` and `-2 \le x < 7` is `[-2,7)`. Two empty texts for anything else, and for `2 < x < 7`: the
  interval `(2,7)` cannot be told from a point.
  """
  sides = [side.strip() for side in _RELATION.split(text)]
  values, signs = sides[::2], sides[1::2]
  candidates = values[1:2] if len(values) == 3 else values
  letter = next((side for side in candidates if len(side) == 1 and side.isalpha()), "")
  if not letter or len(values) not in (2, 3):
    return "", ""
  lower: list[tuple[str, bool]] = []
  upper: list[tuple[str, bool]] = []
  for left, sign, right in zip(values, signs, values[1:], strict=False):
    value = left if right == letter else right
    if not _BOUND.fullmatch(value):
      return "", ""
    bounds = lower if (sign in ("<", r"\le")) == (right == letter) else upper
    bounds.append((value, sign in "<>"))
  low, is_open_below = lower[0] if lower else (r"-\infty", True)
  high, is_open_above = upper[0] if upper else (r"\infty", True)
  is_point = is_open_below and is_open_above and r"\infty" not in low + high
  if max(len(lower), len(upper)) > 1 or is_point:
    return "", ""
  return letter, f"{'(' if is_open_below else '['}{low},{high}{')' if is_open_above else ']'}"


@functools.lru_cache(256)
def _squeezed(problem: str) -> str:
  return "".join(_plain(problem).split())


@functools.lru_cache(64)
def _normal_form(text: str) -> str | None:
  return _form(clean(text), MOST_DEPTH) or None


def _form(text: str, depth: int) -> str:
  value = rationals.parse(text)
  if value is not None:
    return str(value)
  kind, entries = split(text) if depth else ("", [text])
  if not kind:
    return _scalar(entries[0])
  forms = [_form(entry.strip(), depth - 1) for entry in entries]
  if kind in UNORDERED:
    forms.sort()
  return f"{kind[0]}{','.join(forms)}{kind[1]}" if len(kind) == 2 else f"{kind}({','.join(forms)})"


def _scalar(text: str) -> str:
  text = _BLANK_BETWEEN_DIGITS.sub("~", text)
  text = _BRACED.sub(r"\1\2", _WORDS.sub(r"\1", text))
  try:
    # Of what stands before a single equals sign it drops two characters: `2x = 6` would be 6.
    text = (
      "".join(text.split()) if _PARTED.search(text) else latex.normalize(text.replace("=", "==")).replace("==", "=")
    )
  except ValueError:
    text = "".join(text.split())
  value = rationals.parse(text)
  if value is not None:
    return str(value)
  based = _BASED.fullmatch(text)
  if based is not None:
    return f"{based[1]}_{based[2]}"
  return text.lower() if len(text) > 2 and text.isalpha() else text


def _pieces(text: str, mark: str) -> list[str]:
  """Cut a text at the marks that stand outside of all brackets."""
  pieces, depth, start = [], 0, 0
  for token in _TOKEN.finditer(text):
    word = token[0]
    if word == mark and depth == 0:
      pieces.append(text[start : token.start()])
      start = token.end()
    depth += (word[-1] in "([{") - (word[-1] in ")]}")
  return [*pieces, text[start:]]


def _is_enclosed(text: str) -> bool:
  """Tell whether the bracket that a text starts with closes at its end."""
  depth = 0
  for token in _TOKEN.finditer(text):
    depth += (token[0][-1] in "([{") - (token[0][-1] in ")]}")
    if depth <= 0:
      return token.end() == len(text)
  return False


def _signed(entries: list[str]) -> list[str]:
  r"""Write both values of each entry with one `\pm`."""
  values = []
  for entry in entries:
    signs = "+-" if entry.count(r"\pm") == 1 else ""
    values += [entry.replace(r"\pm", sign).strip().removeprefix("+") for sign in signs] or [entry]
  return values
