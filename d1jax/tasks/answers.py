r"""Answers to competition problems: their normal form, by which most are compared, and the parts of lists."""

import functools
import re

from d1jax.tasks import latex, rationals

MOST_CHARACTERS = 1000
"""Longer answers have no normal form and equal nothing; the longest of MATH has 159 characters."""

MOST_DEPTH = 8
"""Brackets in more brackets are not taken apart; the answers of MATH have three."""

MOST_ENTRIES = 50
"""Longer lists are not taken apart; those of MATH have nine entries."""

UNORDERED = ("{}", "cup")
"""The kinds of lists whose entries may come in any order."""

_MARKS = (
  *((r"\!", ""), ("{,}", ","), (r"\$", ""), ("$", ""), (r"\%", ""), ("%", ""), (r"\displaystyle", "")),
  *(("\N{DEGREE SIGN}", ""), (r"^\circ", ""), (r"^{\circ}", ""), ("\N{MINUS SIGN}", "-")),
)
_COMMANDS = (
  (re.compile(r"\\(?:left|right)(?![A-Za-z])"), ""),
  (re.compile(r"(?<=[0-9])\\[,;: ](?=[0-9]{3}(?![0-9]))"), ""),
  (re.compile(r"(?<!\\)\\[,;: ]"), " "),
  (re.compile(r"\\[cdt]frac"), r"\\frac"),
  (re.compile(r"\\(?:text|mbox|textnormal|textrm|textbf|mathrm|mathbf)\s*\{"), r"\\text{"),
  (re.compile(r"\s?,?\s?(?:\\text\{\s?,?\s?(?:and|or)\s?\}|\b(?:and|or)\b)\s?"), ", "),
)
_UNIT = re.compile(r"(?<=[^\s({\[,])\s?\\text\{([A-Za-z\s.'/-]+)\}(?:\^(?:[23]|\{[23]\}))?$")
_NAME = re.compile(r"(^|,)\s?([A-Za-z]{1,2})\s?=\s?")
_POINT = re.compile(r"(?:\([A-Za-z](?:\s?,\s?[A-Za-z])*\)\s?=|[A-Za-z]\s?\\in(?![A-Za-z]))\s?(?=[^=]*$)")
_WORDS = re.compile(r"\\text\{([^{}]*)\}")
_BRACED = re.compile(r"([_^])\{([0-9A-Za-z])\}")
_BASED = re.compile(r"\(?([0-9]+)\)?_\{?([0-9]+)\}?")
_THOUSANDS = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")
# Not in `\frac 3 8`.
_BLANK_BETWEEN_DIGITS = re.compile(r"(?<=[0-9])(?<!frac[0-9])(?<!frac [0-9])\s(?=[0-9])")
_MATRIX = re.compile(r"\\begin\{([bpB]?matrix)\}(.*)\\end\{\1\}", re.DOTALL)
_ENCLOSED = re.compile(r"(\\\{|[(\[])(.*)(\\\}|[)\]])", re.DOTALL)
_BRACKETS = ("()", "(]", "[)", "[]", "{}")
_TOKEN = re.compile(r"\\?[(\[{)\]}]|,|\\cup(?![A-Za-z])")


def is_same(answer: str, gold: str) -> bool:
  """Tell whether an answer has the normal form of the gold answer; it may leave out the base of a number."""
  form, wanted = normal_form(answer), normal_form(gold)
  if form is None or wanted is None or have_different_names(answer, gold):
    return False
  based = _BASED.fullmatch(wanted)
  return form == wanted or (based is not None and form == based[1])


def have_different_names(answer: str, gold: str) -> bool:
  """Tell whether both are values with a name, `x = 5` and `y = 5`, and not the same one."""
  left, right = ({name for _, name in _NAME.findall(_plain(text))} for text in (answer, gold))
  return bool(left and right and left != right)


def is_copied(answer: str, problem: str) -> bool:
  """Tell whether an answer stands in the problem, blanks, marks and brackets around it aside."""
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


def clean(text: str) -> str:
  r"""Take away what does not change an answer's value, and keep LaTeX that can be parsed.

  Gone are blanks and full stops at the ends, `$`, `\%`, degrees, `\left` and `\right`, `\!`, a unit in `\text{}` at the
  end, a name before the only equals sign (`x = 5`, `(x, y) = (1, 2)`; also `x = 1, x = 2`) or before `\in`. Blanks of
  any kind become one blank, `\dfrac` and the like `\frac`, `\mbox` and the like `\text`, `and` and `or` a comma.
  """
  text = _plain(text)
  unit = _UNIT.search(text)
  if unit is not None and rationals.is_unit(unit[1]):
    text = text[: unit.start()]
  found = _NAME.findall(text)
  if len(found) == text.count("=") and len({name for _, name in found}) == 1:
    return _NAME.sub(r"\1", text)
  point = _POINT.match(text)
  return text if point is None else text[point.end() :]


def split(text: str) -> tuple[str, list[str]]:
  r"""Take a clean answer apart: its kind and its entries, or `""` and itself.

  Kinds: `()`, `[]`, `(]` and `[)`, in which the order counts; `{}`, which is a list without brackets too, and `\pm`;
  `cup`, a union; `matrix`, with the lengths of its rows. `()` and `{}` around a single entry are taken away.
  """
  for _ in range(MOST_DEPTH):
    text = text.strip()
    matrix = _MATRIX.fullmatch(text)
    if matrix is not None:
      rows = [row.split("&") for row in matrix[2].split(r"\\") if row.strip()]
      return " ".join(["matrix", *(str(len(row)) for row in rows)]), [entry for row in rows for entry in row]
    for mark, kind in ((r"\cup", "cup"), (",", "{}")):
      entries = _pieces(text, mark)
      if 1 < len(entries) <= MOST_ENTRIES:
        return kind, _signed(entries) if kind == "{}" else entries
    found = _ENCLOSED.fullmatch(text)
    kind = found[1][-1] + found[3][-1] if found else ""
    if found is None or kind not in _BRACKETS or not _is_enclosed(text):
      break
    entries = _pieces(found[2], ",")
    if 1 < len(entries) <= MOST_ENTRIES:
      return kind, _signed(entries) if kind == "{}" else entries
    if kind not in ("()", "{}"):
      break
    text = found[2]
  signs = _signed([_THOUSANDS.sub("", text)])
  return ("{}", signs) if len(signs) > 1 else ("", signs)


def _plain(text: str) -> str:
  text = " ".join(text.split())
  for old, new in _MARKS:
    text = text.replace(old, new)
  for pattern, replacement in _COMMANDS:
    text = pattern.sub(replacement, text)
  return rationals.unquoted(text.strip().rstrip(".").strip())


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
    text = latex.normalize(text.replace("=", "==")).replace("==", "=")
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
