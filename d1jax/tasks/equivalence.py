r"""Whether two answers are mathematically the same: by their normal forms, part by part, and by `math-verify`.

`math-verify` (with sympy) sees single expressions only, and only such as the answers of MATH are made of: its input is
bounded in length, depth, digits, exponents and commands, so that verdicts do not depend on the speed of a machine. It
runs in a process of its own (`verifier`) and evaluates nothing that a model wrote but digits.
"""

import functools
import re

from d1jax.tasks import answers, asked, notation, rationals, verifier

MOST_CHARACTERS = 200
"""Longer expressions are not passed on."""

MOST_UNMATCHED = 4
"""Of lists without an order, entries whose normal forms have no partner; with more of them lists are not the same."""

CACHED = 1 << 14
"""Verdicts that a process remembers: the completions of one question often agree."""

_COMMAND = re.compile(r"\\([A-Za-z]+|.|$)")
_KNOWN = re.compile(
  r"frac|sqrt|pi|theta|alpha|beta|gamma|phi|infty|cdot|times|div|(?:arc)?(?:sin|cos|tan)|cot|sec|csc|log|ln|leq?|geq?"
  r"|lt|gt|neq?"
)
_EXPRESSION = re.compile(r"(?=.*[A-Za-z0-9\\])[A-Za-z0-9 +\-*/^_=<>()\[\]{}|,.!\\]+")
# A backslash stands for a command.
_REFUSED = re.compile(
  r"[A-Za-z]{4}"  # Words would be products of letters.
  r"|[0-9]{16}"
  r"|[0-9.]\s*[eE]\s*[-+]?[0-9]"  # A number in a few characters can have a billion digits,
  r"|(?<![0-9])[0-9]{3,}\s*!|(?<![0-9\s])\s*!|!\s*!|\^\s*[0-9]+\s*!"  # as can a factorial but of two digits,
  r"|\^\s*\{?\s*[-+]?\s*[0-9]{4}"  # a power of four digits
  r"|\^\s*\{(?:[^{}]|\{[^{}]*\})*\{?[^{}]*[\^!]"  # or one of a power,
  r"|\^\s*(?:[^{}]|\{[^{}]*\})\s*\^|[0-9]\s*\^[^()]*\)\s*\^"  # or a power of a power.
  r"|[)\]}|]\s*\^\s*\{?\s*[-+]?\s*[0-9]{2}"  # A power of a sum may be multiplied out.
  # Misread: 204_5 as 204, 2(3) and 4{10} as the mixed numbers 5 and 14.
  r"|[0-9]\s*_|[0-9]\s+[0-9]|[0-9]\s*\(\s*[0-9./]+\s*\)|(?<!\\)[0-9]\{[0-9./]+\}"
)
# What may stand for a number on the left: `x`, `a_{10}`, `f(2)`, `AB`, `\\angle ABC`, `\\theta`, `Area`. All of these
# are letters; `2x`, `-x`, `x^2` and `\\sqrt{x}` are not what was asked for, unless the problem says so.
_NAME = re.compile(
  r"(?:m ?)?(?:\\(?:angle|overline|vec|text|theta|alpha|beta|gamma|phi)(?![A-Za-z]) ?)?\{?[A-Za-z ]*\}?'{0,2}"
  r"(?:_\{?[A-Za-z0-9]+\}?)?|[A-Wa-w](?:_[0-9])?\([A-Za-z0-9,. \-]+\)"
)
_ASKED = re.compile(r"\$([^$=]{1,100})\$")
# math-verify reads `R` as `r`, `E` as Euler's number and `I` as the imaginary unit.
_LETTER = re.compile(r"\\[A-Za-z]+|[A-Za-z]")
_OTHERS = "qwkhjuvstpogmnlzyxcba"
_CAPITALS = re.compile(r"(?<![A-Za-z\\])[A-Z]{2,}")
# Arithmetic that is still to be done; not a sign in front, an exponent, or 3 \times 10^5.
_UNDONE = re.compile(r"[^\s({\[^]\s*(?:[-+*]|\\div|\\(?:cdot|times)(?!\s*10\s*\^))")


def is_equivalent(answer: str, gold: str, problem: str) -> bool:
  """Tell whether an answer is the gold answer.

  Lists, tuples, intervals, unions and matrices are the same when they are of one kind and their entries are, in order
  or, for sets and lists without brackets, in any. Numbers are the same or not. If these do not decide, `math-verify`
  does, but not for an answer that is copied from the problem, and not for sums and products if the gold answer is a
  number: to repeat a sum that the problem asks to compute is not an answer. The verdict is the same in every process;
  what takes too long or too much memory is a no.

  Args:
    answer: what a model wrote, of any length.
    gold: the reference.
    problem: the text in which an answer does not count when it is not the gold answer to the letter.
  """
  if max(len(answer), len(gold)) > answers.MOST_CHARACTERS or asked.is_another(answer, gold, problem):
    return False
  answer = asked.without_counts(answer, problem)
  if answers.is_same(answer, gold):
    return True
  if answers.contradict(answer, gold) or answers.is_copied(answer, problem):
    return False
  return _is_equal(answers.clean(answer), answers.clean(gold), problem, answers.MOST_DEPTH)


def _is_equal(answer: str, gold: str, problem: str, depth: int) -> bool:
  """Compare clean answers, or entries of such."""
  if "=" in answer and "=" not in gold and not answers.split(answer)[0]:
    conclusion = _conclusion(answer, problem)
    return conclusion is not None and _is_equal(conclusion, gold, problem, depth)
  if answers.is_same(answer, gold):
    return True
  form, wanted = answers.normal_form(answer), answers.normal_form(gold)
  if form is None or wanted is None or depth == 0 or answers.contradict(answer, gold):
    return False
  if rationals.parse(wanted) is not None and (rationals.parse(form) is not None or _UNDONE.search(answer)):
    return False
  # A number is passed on in its normal form: `300,000` would be taken apart.
  kind, entries = ("", [form]) if rationals.parse(form) is not None else answers.split(answer)
  wanted_kind, golds = ("", [wanted]) if rationals.parse(wanted) is not None else answers.split(gold)
  if not kind and not wanted_kind:
    return _is_equal_expression(entries[0], golds[0])
  if kind != wanted_kind or len(entries) != len(golds):
    return False
  # `x = 2, y = 1` is not `1, 2`, which is a set of roots or the values of x and y.
  are_named = len({entry.strip()[0] for entry in entries if "=" in entry}) > 1 and not any("=" in g for g in golds)
  if kind in answers.UNORDERED and not are_named:
    return _is_permutation(entries, golds, problem, depth - 1)
  return all(_is_equal(*pair, problem, depth - 1) for pair in zip(entries, golds, strict=True))


def _is_equal_expression(answer: str, gold: str) -> bool:
  if sorted(_CAPITALS.findall(answer)) != sorted(_CAPITALS.findall(gold)):
    return False
  if not _is_askable(answer) or not _is_askable(gold):
    return False
  letters = {*_LETTER.findall(answer), *_LETTER.findall(gold)}
  names: dict[str, str] = {}
  for letter in sorted(letters):
    if letter.isupper() and (letter.lower() in letters or letter in "EI"):
      free = next((other for other in _OTHERS if not {other, other.upper()} & {*letters, *names.values()}), None)
      if free is None:
        return False
      names[letter] = free
  if names:
    answer, gold = (_LETTER.sub(lambda found: names.get(found[0], found[0]), text) for text in (answer, gold))
  return compare(gold, answer)


def _conclusion(answer: str, problem: str) -> str | None:
  """Return the last side of an equation if the others are its name, what the problem asks for, or equal to it."""
  first, *others, last = [side.strip() for side in answer.split("=")]
  is_name = _NAME.fullmatch(first) and notation.is_unit(_COMMAND.sub("", first))  # `half` is none.
  if is_name or "".join(first.split()) in _asked(problem):
    return last if all(_is_equal_side(side, last) for side in others) else None
  return last if all(_is_equal_side(side, last) for side in (first, *others)) else None


def _is_equal_side(side: str, last: str) -> bool:
  if answers.is_same(side, last) or rationals.conclusion(f"{side}={last}") == last:
    return True
  form, wanted = answers.normal_form(side), answers.normal_form(last)
  are_numbers = None not in (rationals.parse(form or ""), rationals.parse(wanted or ""))
  return not are_numbers and _is_equal_expression(side, last)


@functools.lru_cache(64)
def _asked(problem: str) -> frozenset[str]:
  """List the formulas of a problem that say no number, such as `2x+3y`, without their blanks."""
  formulas = ("".join(text.split()) for text in _ASKED.findall(problem))
  return frozenset(text for text in formulas if re.search("[A-Za-z]", text))


def _is_permutation(entries: list[str], golds: list[str], problem: str, depth: int) -> bool:
  remaining, unmatched = list(entries), []
  for gold in golds:
    partner = next((entry for entry in remaining if answers.is_same(entry, gold)), None)
    if partner is None:
      unmatched.append(gold)
    else:
      remaining.remove(partner)
  if len(unmatched) > MOST_UNMATCHED:
    return False
  for gold in unmatched:
    partner = next((entry for entry in remaining if _is_equal(entry, gold, problem, depth)), None)
    if partner is None:
      return False
    remaining.remove(partner)
  return True


def _is_askable(text: str) -> bool:
  """Tell whether an expression is one that `math-verify` reads rightly, and soon."""
  if len(text) > MOST_CHARACTERS or not _EXPRESSION.fullmatch(text):
    return False
  if not all(map(_KNOWN.fullmatch, _COMMAND.findall(text))):
    return False
  depth, deepest = 0, 0
  for character in text:
    depth += (character in "([{") - (character in ")]}")
    deepest = max(deepest, depth)
  return deepest <= answers.MOST_DEPTH and not _REFUSED.search(_COMMAND.sub(r"\\", text))


@functools.lru_cache(CACHED)
def compare(gold: str, answer: str) -> bool:
  """Ask `math-verify`, once for each pair of expressions."""
  return verifier.shared.ask(gold, answer)
