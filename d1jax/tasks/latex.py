r"""LaTeX answers: what stands in `\boxed{}`, and whether two answers are the same."""

import re
from fractions import Fraction

from d1jax.tasks import rationals

MOST_CHARACTERS = 1000
"""Longer answers equal nothing; the longest of MATH has 159 characters."""

_TOKEN = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_FRACTION = re.compile(r"(-?)\\frac\{(-?[0-9]+)\}\{(-?[0-9]+)\}")
# Words with something behind them, such as `\text{ or } 3`, where a unit would have nothing, or an exponent.
_INNER_WORDS = re.compile(r"\\text\{ ([^{}]*)\}(?!\s*(?:\^\{?[23]\}?)?\s*$)")
_WORDS = re.compile(r"\\(?:text|textbf|textrm|mathrm|mbox)\{([^{}]*)\}")

# What MATH's normaliser replaces before and after it cuts the units.
_FIRST = (
  *(("\n", ""), (r"\!", ""), (r"\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac")),
  *((r"\left", ""), (r"\right", ""), (r"^{\circ}", ""), (r"^\circ", ""), (r"\$", "")),
)
_THEN = ((r"\%", ""), (" .", " 0."), ("{.", "{0."))
# What the strict comparison replaces before.
_MARKS = ((r"\,", ""), (r"\;", ""), (r"\:", ""), ("{,}", ","), (r"\$", ""), ("$", ""), (r"\%", ""), ("%", ""))


def last_box(text: str) -> str | None:
  r"""Return the inside of the last `\boxed{...}` that is closed, or None.

  Of nested boxes the innermost counts; `\{` and `\}` are no braces. Linear time.
  """
  pending: list[tuple[int, bool]] = []
  last, inside = -1, None
  for token in _TOKEN.finditer(text):
    word = token[0]
    if word == "}":
      start, is_box = pending.pop() if pending else (-1, False)
      if is_box and start > last:
        last, inside = start, text[start : token.start()]
    elif word.endswith("{") and word != r"\{":
      pending.append((token.end(), word != "{"))
  return inside


def normalize(text: str) -> str:
  r"""Bring an answer to a common form by the rules of MATH's graders (Hendrycks et al. 2021), quirks included.

  Dropped: line breaks, `\!`, `\left`, `\right`, degrees, `\$`, `\%`, blanks, a unit in `\text{ ` at the right, a name
  of at most two characters before the only `=`. `tfrac` and `dfrac` become `frac`, `\frac12` and `1/2` become
  `\frac{1}{2}`, `\sqrt3` becomes `\sqrt{3}`, `.5` becomes `0.5` and that alone `\frac{1}{2}`.

  Raises:
    ValueError: where those rules give up: two units, `\frac` or `\sqrt` before nothing, a slash between anything but
      integers.
  """
  for old, new in _FIRST:
    text = text.replace(old, new)
  text, *units = text.split(r"\text{ ")
  if len(units) > 1:
    raise ValueError(f"{len(units)} units in {text[:40]!r}, expected one at most")
  for old, new in _THEN:
    text = text.replace(old, new)
  if text.startswith("."):
    text = "0" + text
  name, *values = text.split("=")
  if len(values) == 1 and len(name) <= 2:
    text = values[0]
  text = _brace_roots(text).replace(" ", "")
  text = _brace_fractions(text)
  return r"\frac{1}{2}" if text == "0.5" else _stack_slash(text)


def is_same(answer: str, gold: str) -> bool:
  r"""Tell whether an answer is the gold answer: equal once normalised, or equal as exact rationals.

  Beside what `normalize` does, `$`, `%`, thin blanks, full stops at the end and `\text{}` around the whole are
  dropped, and `\frac{1}{2}`, `1/2`, `0.50` are one number, as are `1,000` and `1000`. A unit is dropped at the end
  alone: `3 \text{ or } 4` is not 3.
  """
  if len(answer) > MOST_CHARACTERS:
    return False
  left, right = _plain(answer), _plain(gold)
  value = _rational(left)
  return bool(left) and (left == right or (value is not None and value == _rational(right)))


def _brace_roots(text: str) -> str:
  head, *tails = text.split(r"\sqrt")
  if not all(tails):
    raise ValueError(f"nothing under a root of {text[:40]!r}")
  return head + "".join(r"\sqrt" + (tail if tail[0] == "{" else f"{{{tail[0]}}}{tail[1:]}") for tail in tails)


def _brace_fractions(text: str) -> str:
  head, *tails = text.split(r"\frac")
  braced = [head]
  for tail in tails:
    if not tail:
      raise ValueError(f"an empty fraction in {text[:40]!r}")
    if tail[0] != "{":
      if len(tail) == 1:
        return text
      below = tail[1:] if tail[1] == "{" else f"{{{tail[1]}}}{tail[2:]}"
      tail = f"{{{tail[0]}}}{below}"
    braced.append(tail)
  return r"\frac".join(braced)


def _stack_slash(text: str) -> str:
  above, *below = text.split("/")
  if len(below) != 1:
    return text
  # Python refuses, with a ValueError too, to read thousands of digits.
  numbers = int(above), int(below[0])
  return r"\frac{{{}}}{{{}}}".format(*numbers) if text == "{}/{}".format(*numbers) else text


def _plain(text: str) -> str:
  for old, new in _MARKS:
    text = text.replace(old, new)
  text = text.strip().rstrip(".").strip()
  text = _INNER_WORDS.sub(r"\1", text)
  words = _WORDS.fullmatch(text)
  text = words[1].strip() if words else text
  try:
    return normalize(text)
  except ValueError:
    return "".join(text.split())


def _rational(text: str) -> Fraction | None:
  found = _FRACTION.fullmatch(text)
  if found is None:
    return rationals.parse(text)
  if len(text) > rationals.MOST_CHARACTERS or not int(found[3]):
    return None
  value = Fraction(int(found[2]), int(found[3]))
  return -value if found[1] else value
