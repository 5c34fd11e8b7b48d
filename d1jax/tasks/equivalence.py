r"""Whether two answers are mathematically the same: by their normal forms, part by part, and by `math-verify`.

`math-verify` (with sympy) sees single expressions only, and only such as the answers of MATH are made of: what is
passed on is bounded in length, depth, digits, exponents and commands, so that verdicts do not depend on how fast a
machine is. It runs in a process of its own (`verifier`) and evaluates nothing that a model wrote but digits.
"""

import functools
import re

from d1jax.tasks import answers, rationals, verifier

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
# Arithmetic that is still to be done; not a sign in front, an exponent, or 3 \times 10^5.
_UNDONE = re.compile(r"[^\s({\[^]\s*(?:[-+*]|\\div|\\(?:cdot|times)(?!\s*10\s*\^))")


def is_equivalent(answer: str, gold: str, problem: str) -> bool:
  """Tell whether an answer is the gold answer.

  Lists, tuples, intervals, unions and matrices are the same when they are of one kind and their entries are, in order
  or, for sets and lists without brackets, in any. Numbers are the same or not. What remains is asked of `math-verify`,
  but not for an answer that is copied from the problem, and not for sums and products where the gold is a number: who
  is asked to compute or to factor something and repeats it has not answered. The verdict is the same in every process;
  what takes too long or too much memory is a no.

  Args:
    answer: what a model wrote, of any length.
    gold: the reference.
    problem: the text in which an answer does not count when it is not the gold answer to the letter.
  """
  if answers.is_same(answer, gold):
    return True
  if max(len(answer), len(gold)) > answers.MOST_CHARACTERS or answers.contradict(answer, gold):
    return False
  if answers.is_copied(answer, problem):
    return False
  return _is_equal(answers.clean(answer), answers.clean(gold), answers.MOST_DEPTH)


def _is_equal(answer: str, gold: str, depth: int) -> bool:
  """Compare answers, or entries of such."""
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
    return _is_askable(entries[0]) and _is_askable(golds[0]) and compare(golds[0], entries[0])
  if kind != wanted_kind or len(entries) != len(golds):
    return False
  if kind in answers.UNORDERED:
    return _is_permutation(entries, golds, depth - 1)
  return all(_is_equal(*pair, depth - 1) for pair in zip(entries, golds, strict=True))


def _is_permutation(entries: list[str], golds: list[str], depth: int) -> bool:
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
    partner = next((entry for entry in remaining if _is_equal(entry, gold, depth)), None)
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
