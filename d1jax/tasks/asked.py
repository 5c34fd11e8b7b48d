"""The units and counts that a question asks for (cm, percent, pairs, how many more): they decide which words may stand
behind an answer.
"""

import functools
import re

from d1jax.tasks import notation

_WORD = r"[A-Za-z][A-Za-z'-]*"
# Words that count, and words that compare; others that change a number (`million` apart) are no part of a question.
_COUNT = re.compile(
  r"(?:times|pair|couple|dozen|score|gross|ten|trio|half|halve|quarter|third|fifth|sixth|tenth|hundredth|hundred|thousand"
  r"|million|billion)s?",
  re.IGNORECASE,
)
_COMPARED = re.compile(r"\b(?:more|less|fewer|over|short|below|above|under)\b", re.IGNORECASE)
_MORE = re.compile(r"\b(?:additional|extra|another)\b", re.IGNORECASE)
# `how many pairs`, `how many more dozen eggs`, `how many left over`, but not `how many socks are in 9 pairs`.
_END = r"(?:is|are|was|were|do|does|did|in|of|per|from|to|than|and|or|how)\b"
_HOW_MANY = re.compile(rf"\b(?:how (?:many|much)|number of|amount of)((?: (?!{_END}){_WORD}){{1,4}})", re.IGNORECASE)
_FILLER = re.compile(r"(?:more|less|fewer|total|extra|additional|full|whole|different|other) ", re.IGNORECASE)
_PERCENT = re.compile(r"percent|per cent|%|\b(?:rate|interest|chance|probability)\b", re.IGNORECASE)
_WHAT_PERCENT = re.compile(r"\b(?:what|how many|which) percent(?:age)?\b", re.IGNORECASE)
_BEHIND = re.compile(rf"(?<=[0-9}}]) ?(?:\\text\{{ ?)?({notation.WORDS}) ?\}}?$")


def without_counts(answer: str, question: str) -> str:
  """Take the words away that the question counts or compares by: `18 more` is 18 where it asks how many more.

  Args:
    answer: what a model wrote, of any length.
    question: what counts is the text after `how many`, `how much` or `number of`; of words that compare, all of its
      last sentence.
  """
  if not _COUNT.search(answer) and not _COMPARED.search(answer):
    return answer
  behind = _BEHIND.search(text := notation.unwrapped(notation.plain(answer)))
  if behind is None:
    return answer
  words = [word for word in behind[1].split() if _singular(word) not in _counts(question)]
  if len(words) == len(behind[1].split()):
    return answer
  number = text[: behind.start()]
  return f"{number} {' '.join(words)}".strip() if words else number


def is_another(answer: str, gold: str, question: str) -> bool:
  """Tell whether an answer has a unit that the question does not ask for, if the gold answer has no unit.

  Examples are percent if the question does not mention percent, minutes if it asks how many hours, and dollars if it
  asks how many cents.
  """
  unit = notation.unit(answer)
  if not unit or notation.unit(gold):
    return False
  if unit == "%":
    return not _PERCENT.search(question)
  wanted = _unit(question)
  return bool(wanted) and notation.are_different(unit.split("/")[0], wanted.split("/")[0])


@functools.lru_cache(64)
def _counts(question: str) -> frozenset[str]:
  words = [word for phrase in _HOW_MANY.findall(question) for word in phrase.split() if _COUNT.fullmatch(word)]
  last = re.split(r"[.?!] ", question.strip())[-1]
  words += [*_COMPARED.findall(last), *(["more"] if _MORE.search(last) else [])]
  return frozenset(map(_singular, words))


@functools.lru_cache(64)
def _unit(question: str) -> str:
  """Name the unit that is asked for last, or "" if it is unknown or the question asks for several."""
  if _WHAT_PERCENT.search(question):
    return "%"
  units = set()
  for phrase in _HOW_MANY.findall(question):
    words = phrase.split()
    while words and _FILLER.match(f"{words[0]} "):
      del words[0]
    names = (notation.unit_of_words(" ".join(words[:count])) for count in range(len(words), 0, -1))
    units.add(next(filter(None, names), ""))
  return units.pop() if len(units) == 1 else ""


def _singular(word: str) -> str:
  return word.lower().removesuffix("s")
