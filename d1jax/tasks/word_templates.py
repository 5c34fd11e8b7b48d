"""Stories with numbers left open: they are put together from the parts in a text file, and written out as a question
with its solution.

Every number of a problem and of its solution is a whole number of at least 2, so that nouns are always in the plural
and nothing is negative, empty or cut into parts.
"""

import dataclasses
import functools
import itertools
import operator
import re
import string
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_name("word_templates.txt")
"""The parts of stories; its first lines say how one is written."""

LEAST = 2
"""The smallest number of a problem or its solution."""

PEOPLE = (
  *((name, "he") for name in ("Tom", "Ben", "Sam", "Max", "Leo", "Paul")),
  *((name, "she") for name in ("Anna", "Mia", "Lily", "Emma", "Ruth", "Zoe")),
)
"""Names with their pronouns."""

THINGS = ("apples", "pears", "plums", "cookies", "stamps", "coins", "shells", "cards", "marbles", "books")
"""What the people of a story have."""

# A story is held out with its opening and its end: no other split has a story that begins and ends as it does.
_SPLITS = {0: "test", 3: "validation"}
_STRIDE, _PERIOD = 2, 7

_OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}
_EITHER = re.compile(r"\[([^\[\]]*)\]")
_SLOT = re.compile(r"\{([^{}]*)\}")
_EQUATION = re.compile(r"([a-z])=([a-z]|[0-9]+)([-+*/])([a-z]|[0-9]+)")


@dataclasses.dataclass(frozen=True)
class Template:
  """A story with numbers and words left open.

  Attributes:
    name: the names of its parts.
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

    `values` is what `solve` returned; `rng` draws the same number of times for every choice of words.
    """
    people = [PEOPLE[i] for i in rng.permutation(len(PEOPLE))[:3]]
    words = dict(zip("NMK", (name for name, _ in people), strict=True))
    words |= _pronouns(people[0][1]) | {letter: str(value) for letter, value in values.items()}
    words["things"] = THINGS[int(rng.integers(len(THINGS)))]

    def either(match: re.Match[str]) -> str:
      texts = match[1].split("|")
      return texts[int(rng.integers(len(texts)))]

    question = _SLOT.sub(lambda match: words[match[1]], _EITHER.sub(either, self.question))
    solution = [_SLOT.sub(lambda match: _filled(match[1], words), sentence) for sentence in self.solution]
    return question, "\n".join(solution)


@dataclasses.dataclass(frozen=True)
class _Part:
  kind: str
  name: str
  text: str
  ranges: Mapping[str, tuple[int, int]]
  step: str


@functools.cache
def read() -> Sequence[Template]:
  """Return all stories of two to four steps, those with the same opening and end in a row."""
  lines = [line for line in FILE.read_text(encoding="ascii").split("\n") if not line.startswith("#")]
  parts = list(map(_parse, filter(None, "\n".join(lines).strip().split("\n\n"))))
  openings, middles, ends = ([part for part in parts if part.kind == kind] for kind in ("opening", "middle", "end"))
  found = []
  for (i, opening), (j, end) in itertools.product(enumerate(openings), enumerate(ends)):
    split = _SPLITS.get((i + _STRIDE * j) % _PERIOD, "train")
    for between in itertools.chain.from_iterable(itertools.permutations(middles, count) for count in range(3)):
      template = _told(split, (opening, *between, end))
      if len(template.solution) > 1:
        found.append(template)
  return tuple(found)


def _parse(text: str) -> _Part:
  head, told, ranges, *steps = text.strip().split("\n")
  kind, name = head.split()
  pairs = (entry.split() for entry in ranges.split(", "))
  numbers = {letter: (int(span.split("-")[0]), int(span.split("-")[1])) for letter, span in pairs}
  return _Part(kind, name, told, numbers, "".join(steps).removeprefix("- "))


def _told(split: str, parts: Sequence[_Part]) -> Template:
  """Put a story together: each number and each result gets a letter of its own."""
  free = iter(string.ascii_lowercase)
  ranges: dict[str, tuple[int, int]] = {}
  quantity, question, solution = "", [], []
  for part in parts:
    letters = {"s": quantity} | {letter: next(free) for letter in part.ranges}
    ranges |= {letters[letter]: span for letter, span in part.ranges.items()}
    quantity = letters["r"] = next(free) if part.step else letters["a"]
    question.append(_relettered(part.text, letters))
    solution += [_relettered(part.step, letters)] if part.step else []
  return Template("+".join(part.name for part in parts), split, " ".join(question), ranges, tuple(solution))


def _relettered(text: str, letters: Mapping[str, str]) -> str:
  """Give the numbers of a text, and those of its equation, other letters."""
  return re.sub(r"(?<=[{=*/+-])[a-z](?=[}=*/+-])", lambda match: letters[match[0]], text)


def _pronouns(subject: str) -> dict[str, str]:
  return {"he": subject, "He": subject.capitalize()}


def _filled(slot: str, words: Mapping[str, str]) -> str:
  """Write a word, or an equation with its result: `d=a*b` is `3*4=12`."""
  equation = _EQUATION.fullmatch(slot)
  if equation is None:
    return words[slot]
  result, left, sign, right = equation.groups()
  return f"{words.get(left, left)}{sign}{words.get(right, right)}={words[result]}"
