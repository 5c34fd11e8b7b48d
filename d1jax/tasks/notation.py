r"""How models write answers: one table of signs, blanks, commands, wrappers and units, which all `strict` graders read.

`plain` writes signs and blanks in one way, `unwrapped` takes away what stands around an answer, `split_unit` the unit
behind it. None of them changes a value: what they cannot read stays as it is, and is then no number, no expression and
no grid.
"""

import functools
import re
import unicodedata

_MOST_WRAPPERS = 8

REMEMBERED = 64
"""Texts that a process remembers what it made of: the stages of a grader ask for the same ones again."""

# The replacement of each sign; the blank after a command separates it from letters.
_SIGNS = str.maketrans(
  dict.fromkeys("\u2212\u2010\u2011\u2013\ufe63", "-")  # Minus sign, hyphens, en dash.
  | dict.fromkeys("\u200b\u2060\ufeff", "")  # Blanks without a width.
  | dict.fromkeys("\u201c\u201d", '"')
  | dict.fromkeys("\u2018\u2019", "'")
  | dict.fromkeys("\u2044\u2215", "/")
  | dict.fromkeys("×✕⨯", r"\times ")
  | dict.fromkeys("·⋅∙", r"\cdot ")
  | dict.fromkeys("≤⩽", r"\le ")
  | dict.fromkeys("≥⩾", r"\ge ")
  | {"\u2217": "*", "÷": r"\div ", "≠": r"\ne ", "±": r"\pm ", "√": r"\sqrt ", "°": r"^\circ", "∞": r"\infty "}
  | {"∪": r"\cup ", "∈": r"\in ", "∅": r"\emptyset ", "π": r"\pi ", "θ": r"\theta ", "φ": r"\phi "}
  | {"\u03b1": r"\alpha ", "β": r"\beta ", "\u03b3": r"\gamma "}
  | {
    sign: r"\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", sign).split("\u2044"))
    for sign in "¼½¾⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"
  }
)
_RAISED = re.compile("[⁰¹²³\u2074-\u2079⁺⁻]+")
_LOWERED = re.compile("[\u2080-\u2089]+")
# A root without brackets is that of the whole number after it; \sqrt12 would be the root of 1, times 2.
_ROOT = re.compile(r"√ ?(?:\(([^()]*)\)|([0-9]+(?:\.[0-9]+)?|[A-Za-zπθ]))")

_END = r"(?![A-Za-z])"
_SPECIAL = re.compile(r"[\\~<>]|\{,\}")
_COMMANDS = (
  (re.compile(r"\{,\}"), ","),
  (re.compile(rf"\\(?:!|(?:negthinspace|displaystyle|textstyle){_END})"), ""),
  (re.compile(rf"\\(?:left|right){_END}\.?|\\[bB]igg?[lrm]?{_END}"), ""),
  (re.compile(r"(?<!\\)\\[()\[\]]"), ""),
  (re.compile(r"(?<!\\)\\[,;:> ]|\\hspace\*? ?\{[^{}]*\}"), " "),
  # A tie, but in front of a number `about`.
  (re.compile(r"(?<=[A-Za-z0-9)\]},;:.|])~|~(?![~ ]*(?:[-+$£€¥₹.0-9]|\\\$|\\frac|\\sqrt|\\pi))"), " "),
  (re.compile(rf"\\(?:q?quad|enspace|(?:thin|med|thick)space){_END}"), " "),
  (re.compile(r"\\[cdt]frac"), r"\\frac"),
  (
    re.compile(r"\\(?:text(?:normal|rm|bf|it|up|sf|sl|tt)?|[mh]box|math(?:rm|bf|it|sf|tt)|operatorname\*?) ?\{"),
    r"\\text{",
  ),
  (re.compile(rf"\\[lr]?vert{_END}"), "|"),
  (re.compile(rf"\\varnothing{_END}"), r"\\emptyset"),
  (re.compile(rf"\\lbrace{_END}"), r"\\{"),
  (re.compile(rf"\\rbrace{_END}"), r"\\}"),
  (re.compile(rf"\\leq(?:slant)?{_END}|<="), r"\\le "),
  (re.compile(rf"\\geq(?:slant)?{_END}|>="), r"\\ge "),
  (re.compile(rf"\\lt{_END}"), "<"),
  (re.compile(rf"\\gt{_END}"), ">"),
  (re.compile(rf"\\ast{_END}"), "*"),
  (re.compile(rf"\\degree{_END}|\^ ?\{{ ?\\circ ?\}}"), r"^\\circ"),
  # Not in \sqrt{1 \over 2} and x^{1 \over 2}, which need their braces.
  (re.compile(rf"(?<![A-Za-z\\}}\]^_])\{{([^{{}}]*)\\over{_END}([^{{}}]*)\}}"), r"\\frac{\1}{\2}"),
)
# 1 000 000; neither two numbers such as 10 20, nor 1 100/200 or \frac 1 200.
_GROUPED = re.compile(r"(?<![0-9.,])(?<![0-9] )(?<!frac )[1-9][0-9]{0,2}(?: [0-9]{3})+(?![0-9])(?! ?(?:/|\\frac))")

_LEAD = re.compile(
  r"(?:\*\*)?(?:(?:so|thus|hence|therefore),? )?(?:(?:the|my|our) )?(?:(?:final|correct) )?(?:answer|solution|result)"
  r"(?:\*\*)? ?(?::|=|(?:is|are)\b) ?:?(?:\*\*)?|=(?!=)",
  re.IGNORECASE,
)
_FENCE = re.compile(r"```(?:[A-Za-z]{2,} )?(.*)```")
_MARKS = ("$", "**", "`", '"', "'")
_BRACED = (r"\text{", r"\boxed{", r"\fbox{")
_FIRST = "$*`\"'\\="  # What a layer starts with, if not with a letter.

CURRENCY = r"(?:(?:US|CA|AU|NZ|HK)?\\?\$|[£€¥₹])"
"""A pattern of the signs of money, before a number or after it."""

WORDS = r"[A-Za-z][A-Za-z.'/-]*(?: [A-Za-z][A-Za-z.'/-]*){0,3}"
"""A pattern of up to four words."""

# Words that are no units. Behind a number they make it another one (`dozen`, `pairs`), one of several, its negative or
# its bound (`less`, `short`, `loss`), an approximation, or no answer (`wrong`). `asked` says where some are harmless.
_CHANGING = re.compile(
  r"\b(?:(?:hundred|thousand|[a-z]*illion)(?:th)?s?|mil|mn|bn|thou|(?:lakh|crore|myriad)s?|grand|gross|tens"
  r"|(?:pair|couple|score|duo|trio|quartet|doz|prs?|dozen)s?"
  r"|(?:half|halve|quarter|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|eleventh|twelfth)s?"
  r"|[a-z]+t(?:een|ie)ths?|halved|(?:doubl|tripl|quadrupl)e[ds]?|[a-z]*fold|twice|thrice|divided|multiplied"
  r"|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|[a-z]+teen"
  r"|(?:twen|thir|for|fif|six|seven|eigh|nine)ty"
  r"|and|or|to|not|none|never|is|plus|minus|negative|times|over|least|most|[ap]\.?m|but|except|without"
  r"|more|less|fewer|short(?!-)|shy|under|below|above|loss(?:es)?|deficit|debts?|overdrawn|opposite|inverse|reciprocal"
  r"|approx(?:imately)?|roughly|nearly|almost|circa|ish|repeating|recurring"
  r"|wrong|incorrect|false|impossible|unknown|maybe|perhaps|possibly|probably|unless|if|instead|otherwise"
  r"|squared|cubed|powers?|factorial|choose|mod|modulo|remainder|base|binary|octal|decimal|hexadecimal|hex"
  r"|pi|theta|alpha|beta|gamma|phi|infinity|sqrt|root|log|ln|sin|cos|tan)(?![A-Za-z])"
  r"|^ ?(?:about|around)\b|\b(?:about|around)$",  # But `laps around the track`.
  re.IGNORECASE,
)
# The name of each unit, and its other names; an "s" may follow those of two letters or more.
_NAMES = r"""
mm millimeter millimetre | cm centimeter centimetre | m meter metre | km kilometer kilometre
in inch inches | ft foot feet | yd yard | mi mile | acre
s sec second | min minute | h hr hour | day | week | month | year
mg milligram | g gram | kg kilogram | lb pound £ | oz ounce | ton
ml milliliter millilitre | l liter litre | gal gallon
$ dollar usd | cent | € euro | ¥ yen | ₹ rupee
% percent | ^\circ degree deg | rad radian | unit | mi/h mph | km/h kph kmh
"""
_UNITS = {word: names.split()[0] for names in re.split(r"[|\n]", _NAMES) for word in names.split()}
_UNITS |= {f"{word}s": name for word, name in _UNITS.items() if len(word) > 1}
_POWERS = {"square": "2", "sq": "2", "squared": "2", "cubic": "3", "cu": "3", "cubed": "3"}
_PER = re.compile(r" ?/ ?|(?:^| )per ")
_POWER = r"((?: ?\^ ?(?:[23]|\{[23]\}))?)"
_TEXT_UNIT = re.compile(rf"(?<=[^\s({{\[,]) ?\\text\{{([A-Za-z .'/-]+)\}}{_POWER}$")
_BARE_UNIT = re.compile(rf"(?<=[0-9}}]) ?(\\?%|{CURRENCY}|\^\\circ|(?:/ ?)?{WORDS}){_POWER}$")
_LETTER = re.compile(r"(?:/ ?)?[A-Za-z](?![A-Za-z$\\])")
_BRACE = re.compile(r"(?<!\\)[{}]")
_MONEY = re.compile(rf"[-+]? ?({CURRENCY})")


@functools.lru_cache(REMEMBERED)
def plain(text: str) -> str:
  r"""Write signs, blanks and commands in one way: LaTeX's, and one blank where there are blanks of any kind.

  `×`, `≥`, `√12`, `½` and `x²` become `\times`, `\ge`, `\sqrt{12}`, `\frac{1}{2}` and `x^{2}`. `~`, `\quad`, `\,` and
  the like become blanks; `\left`, `\right`, `\(` and `\)` go. `\dfrac12` and `{1\over2}` become `\frac12` and
  `\frac{1}{2}`, `\textbf`, `\operatorname` and the like `\text`. Blanks between groups of three digits go: `1 000 000`.
  """
  text = " ".join(text.split())
  if not text.isascii():
    text = _ROOT.sub(lambda root: rf"\sqrt{{{root[1] or root[2]}}}", text)
    text = _RAISED.sub(lambda digits: f"^{_braced(digits[0])}", text)
    text = _LOWERED.sub(lambda digits: f"_{_braced(digits[0])}", text)
    text = text.translate(_SIGNS)
  if _SPECIAL.search(text):
    for pattern, replacement in _COMMANDS:
      text = pattern.sub(replacement, text)
    text = " ".join(text.split())
  return _GROUPED.sub(lambda number: number[0].replace(" ", ""), text)


@functools.lru_cache(REMEMBERED)
def unwrapped(text: str) -> str:
  r"""Take away what stands around a plain text, in up to eight layers.

  `$...$`, `**...**`, code fences, quotation marks, `\text{...}`, `\boxed{...}`; a full stop behind; `=`, `Answer:`,
  `The solution is` and the like in front.
  """
  text = text.strip()
  for _ in range(_MOST_WRAPPERS):
    text = (
      text if text.endswith("..") else text.removesuffix(".").rstrip()
    )  # The dots in `0.3...` mean that digits follow.
    inside = _inside(text)
    if inside is None:
      break
    text = inside.strip()
  return text


def is_unit(words: str) -> bool:
  """Tell whether words may follow a number without changing it."""
  return bool(_canonical(words, "")) or _CHANGING.search(words) is None


@functools.lru_cache(REMEMBERED)
def split_unit(text: str) -> tuple[str, str]:
  r"""Take the unit from the end of a plain text; also returns its name, which equal units share, or "" if unknown.

  Any words that are no number serve in `\text{}`, and may have an exponent. Without it only known units do, behind a
  digit or a brace, and no single letters, which may be variables: `5 cm`, `28 percent`, `90^\circ`, but not `5 m`.
  """
  match = _TEXT_UNIT.search(text)
  if match is not None and is_unit(match[1]):
    return text[: match.start()], _canonical(match[1], match[2])
  match = _BARE_UNIT.search(text)
  name = "" if match is None or _LETTER.match(match[1]) else _canonical(match[1], match[2])
  return (text[: match.start()], name) if match is not None and name else (text, "")


def have_different_units(left: str, right: str) -> bool:
  """Tell whether both answers have known units that differ: `5 cm` and `5 m`, but not `5 cm` and `5 units`."""
  names = unit(left), unit(right)
  return all(names) and are_different(*names)


def are_different(left: str, right: str) -> bool:
  """Tell whether two names of units (`unit`) are not the same; `unit` may be any of the same power."""
  (one, *power), (other, *other_power) = (name.split("^") for name in (left, right))
  return power != other_power or (one != other and "unit" not in (one, other))


def unit_of_words(words: str) -> str:
  """Name the unit that words such as `square feet` are; "" if they are none that is known."""
  return _canonical(words, "")


@functools.lru_cache(REMEMBERED)
def unit(text: str) -> str:
  """Name the unit of an answer, which follows it or, for money, precedes it; "" for no unit or an unknown one."""
  text = unwrapped(plain(text))
  if text.count("$") % 2 == 0:  # Mathematics, not money: `$5$ cm`.
    text = text.replace("$", "")
  money = _MONEY.match(text)
  return split_unit(text)[1] or (_canonical(money[1], "") if money else "")


def _braced(digits: str) -> str:
  """Write raised or lowered digits as ordinary ones, in braces."""
  return f"{{{unicodedata.normalize('NFKC', digits)}}}"


def _inside(text: str) -> str | None:
  """Take away one layer; None if there is none."""
  if not text or not (text[0].isalpha() or text[0] in _FIRST):
    return None
  for layer in (_LEAD.match(text), _FENCE.fullmatch(text)):
    if layer is not None:
      # One pair of `**` around all of it, as in `**Answer: 18**`, or around the answer.
      opened = "**" if layer[0].count("**") == 1 else ""
      return layer[1] if layer.re is _FENCE else opened + text[layer.end() :]
  for mark in _MARKS:
    inside = text[len(mark) : -len(mark)].strip()
    is_pair = text.startswith(mark) and text.endswith(mark)
    # One layer or several, but not `$5$ or $6$`.
    if inside and is_pair and (mark not in inside or (inside.startswith(mark) and inside.endswith(mark))):
      return inside
  for command in _BRACED:
    inside = text[len(command) : -1]
    if inside and text.startswith(command) and text.endswith("}") and _is_balanced(inside):
      return inside
  return None


def _is_balanced(text: str) -> bool:
  """Tell whether no brace closes that was not opened before; `A5}_{11` is what stands in two pairs."""
  depth = 0
  for brace in _BRACE.findall(text):
    depth += 1 if brace == "{" else -1
    if depth < 0:
      return False
  return True


def _canonical(words: str, power: str) -> str:
  """Name a unit such as `square feet` (`ft^2`) or `miles per hour` (`mi/h`); "" for an unknown one."""
  words = words.lower().replace(".", "").replace("per cent", "percent").strip().lstrip("\\")
  if words.endswith("$"):
    return "$"
  names: list[str] = []
  for place, side in enumerate(_PER.split(words)):
    tokens = side.split()
    raised = [_POWERS[token] for token in tokens if token in _POWERS]
    unit = " ".join(token for token in tokens if token not in _POWERS)
    is_bare_rate = not tokens and place == 0  # `per day`
    if (unit not in _UNITS and not is_bare_rate) or len(raised) > 1:
      return ""
    names.append("^".join([_UNITS.get(unit, ""), *raised]))
  exponent = "".join(digit for digit in power if digit in "23")
  return "^".join(["/".join(names), *exponent]) if any(names) else ""
