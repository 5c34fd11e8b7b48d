"""Stories with numbers left open: they are read from a text file, and written out as a question with its solution.

Every number of a problem and of its solution is a whole number of at least 2, so that nouns are always in the plural
and nothing is negative, empty or cut into parts.
"""

import dataclasses
import functools
import operator
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_name("word_templates.txt")
"""The stories; its first lines say how one is written."""

LEAST = 2
"""The smallest number of a problem or its solution."""

PEOPLE = (
  *((name, "he") for name in ("Tom", "Ben", "Sam", "Max", "Leo", "Paul")),
  *((name, "she") for name in ("Anna", "Mia", "Lily", "Emma", "Ruth", "Zoe")),
)
"""Names with their pronouns."""

LISTS: Mapping[str, Sequence[str]] = {
  "fruits": ("apples", "pears", "plums", "lemons"),
  "cakes": ("cakes", "cookies", "muffins", "pies"),
  "stamps": ("stamps", "coins", "shells", "cards", "marbles"),
  "pens": ("pens", "pencils", "notebooks", "rulers"),
  "books": ("books", "games", "toys"),
  "hens": ("hens", "ducks"),
  "roses": ("roses", "tulips", "trees"),
}
"""Words that stand for one another in a story; without the last letter they are in the singular."""

_OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}
_EITHER = re.compile(r"\[([^\[\]]*)\]")
_SLOT = re.compile(r"\{([^{}]*)\}")
_EQUATION = re.compile(r"([a-z])=([a-z]|[0-9]+)([-+*/])([a-z]|[0-9]+)")


@dataclasses.dataclass(frozen=True)
class Template:
  """A story with numbers and words left open.

  Attributes:
    name: what it is called.
    split: `train` (for demonstrations too), `validation` or `test`.
    question: the text with its slots.
    ranges: the first and last value of each number, by its letter.
    solution: a sentence a step, each with one equation; the last one gives the answer.
  """

  name: str
  split: str
  question: str
  ranges: Mapping[str, tuple[int, int]]
  solution: Sequence[str]

  @functools.cached_property
  def equations(self) -> Sequence[tuple[str, str, str, str]]:
    """Of each step the letter of its result, and left side, sign and right side: `("d", "a", "*", "b")`."""
    return tuple(_EQUATION.findall(sentence)[0] for sentence in self.solution)

  @functools.cached_property
  def needed(self) -> Sequence[str]:
    """The letters of the numbers that the solution uses; the others distract."""
    used = {side for _, left, _, right in self.equations for side in (left, right)}
    return tuple(letter for letter in self.ranges if letter in used)

  def solve(self, numbers: Mapping[str, int], largest: int) -> dict[str, int] | None:
    """Return the numbers with the results of the steps; None if one is no whole number from 2 to `largest`."""
    values = dict(numbers)
    for result, left, sign, right in self.equations:
      a, b = (values[side] if side.isalpha() else int(side) for side in (left, right))
      if sign == "/" and a % b:
        return None
      values[result] = _OPERATIONS[sign](a, b)
      if not LEAST <= values[result] <= largest:
        return None
    return values if max(values.values()) <= largest else None

  def write(self, values: Mapping[str, int], rng: np.random.Generator) -> tuple[str, str]:
    """Write the question and its solution, a line a step, with names, words and alternatives by chance.

    Args:
      values: what `solve` returned.
      rng: draws the same number of times for every choice of words.
    """
    people = [PEOPLE[i] for i in rng.permutation(len(PEOPLE))[:3]]
    words = dict(zip("NMK", (name for name, _ in people), strict=True))
    words |= _pronouns(people[0][1]) | {letter: str(value) for letter, value in values.items()}
    for name, listed in LISTS.items():
      word = listed[int(rng.integers(len(listed)))]
      words |= {name: word, name[:-1]: word[:-1]}

    def either(match: re.Match[str]) -> str:
      texts = match[1].split("|")
      return texts[int(rng.integers(len(texts)))]

    question = _SLOT.sub(lambda match: words[match[1]], _EITHER.sub(either, self.question))
    solution = [_SLOT.sub(lambda match: _filled(match[1], words), sentence) for sentence in self.solution]
    return question, "\n".join(solution)


@functools.cache
def read() -> Sequence[Template]:
  """Return all templates in the order of the file."""
  lines = [line for line in FILE.read_text(encoding="ascii").split("\n") if not line.startswith("#")]
  return tuple(map(_parse, filter(None, "\n".join(lines).strip().split("\n\n"))))


def _parse(text: str) -> Template:
  head, question, ranges, *solution = text.strip().split("\n")
  split, name = head.split()
  pairs = (entry.split() for entry in ranges.split(", "))
  numbers = {letter: (int(span.split("-")[0]), int(span.split("-")[1])) for letter, span in pairs}
  return Template(name, split, question, numbers, tuple(line.removeprefix("- ") for line in solution))


def _pronouns(subject: str) -> dict[str, str]:
  return {"he": subject, "He": subject.capitalize()}


def _filled(slot: str, words: Mapping[str, str]) -> str:
  """Write a word, or an equation with its result: `d=a*b` is `3*4=12`."""
  equation = _EQUATION.fullmatch(slot)
  if equation is None:
    return words[slot]
  result, left, sign, right = equation.groups()
  return f"{words.get(left, left)}{sign}{words.get(right, right)}={words[result]}"
