"""Word problems of GSM8K's kind by rule: two to four steps of + - * / over small numbers, told in short stories."""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from d1jax.tasks import common, word_templates
from d1jax.tasks.base import DataError, Record
from d1jax.tasks.gsm8k import Gsm8k
from d1jax.tasks.word_templates import Template

DEFAULT_SIZES = {"demonstrations": 1000, "train": 8000, "validation": 400, "test": 1000}

_FEWEST, _MOST = 2, 4

# How many fifths of the numbers of a template for training a split owns.
_FIFTHS = ("demonstrations", "demonstrations", "train", "train", "train")

# A template whose numbers are not new in so many blocks of draws has no more problems.
_BLOCKS, _BLOCK = 100, 40


@dataclasses.dataclass(frozen=True, kw_only=True)
class WordProblems(Gsm8k):
  """The task of word problems; records are `{"question", "solution", "answer", "template", "steps"}`.

  Prompts, demonstrations, the baseline and grades are GSM8K's. No other split has a story that begins and ends as one
  of `validation` or `test`; `demonstrations` and `train` share stories, but a hash of a story and its numbers decides
  which of the two has that problem. No split has a story twice with the same numbers. All stories are made of the same
  parts: what is new in a test question is the story that the known sentences make, so that solving it asks for reading
  which numbers belong together, and not for new words or a new operation.

  All numbers, those of the solution included, are whole and at least 2. Some questions have a number that does not
  matter. A split takes its stories in turn, in a new order each round, and a larger size keeps the records of a smaller
  one.

  Attributes:
    seed: seeds the draws.
    root: it has no effect, because everything is generated.
    sizes: records per split, defaults for those not named.
    steps: the range (first, last) of how many steps a solution has; 2 to 4 exist.
    largest: no number of a problem or its solution is larger.
    worked: the share of demonstrations whose solution shows its steps; the others say the answer alone, as most people
      do. Reinforcement learning can then find out that steps pay.
  """

  sizes: Mapping[str, int] = dataclasses.field(default_factory=DEFAULT_SIZES.copy, hash=False)
  steps: tuple[int, int] = (_FEWEST, _MOST)
  largest: int = 999
  worked: float = 1.0

  name = "word_problems"

  def __post_init__(self) -> None:
    common.check_integer("word_problems seed", self.seed, 0)
    common.check_root("word_problems", self.root)
    object.__setattr__(self, "sizes", common.check_sizes("word_problems", self.sizes, DEFAULT_SIZES))
    object.__setattr__(self, "steps", common.check_range("word_problems steps", self.steps, _FEWEST, _MOST))
    common.check_integer("word_problems largest", self.largest, word_templates.LEAST)
    common.check_share("word_problems worked", self.worked)

  def records(self, split: str) -> Sequence[Record]:
    """Return the records of one split; an unknown one raises ValueError, too few DataError."""
    common.check_choice("split", split, self.splits)
    drawn = _draw(split, self.seed, self.sizes[split], self.steps, self.largest)
    if split != "demonstrations" or self.worked == 1:
      return drawn
    rng = np.random.default_rng((self.seed, len(common.SPLITS)))
    shown = rng.random(len(drawn)) < self.worked
    return tuple(
      record if steps else {**record, "solution": f"The answer is {record['answer']}."}
      for record, steps in zip(drawn, shown, strict=True)
    )

  def cluster(self, record: Record) -> str:
    """Name the story, since a model that can solve one problem of it can often solve all."""
    return record["template"]


def _owner(template: Template, numbers: Sequence[int]) -> str:
  """Name the split that a template with these numbers belongs to."""
  if template.split != "train":
    return template.split
  digest = hashlib.sha256(f"{template.name} {' '.join(map(str, numbers))}".encode()).digest()
  return _FIFTHS[int.from_bytes(digest[:8], "big") % len(_FIFTHS)]


@functools.lru_cache(maxsize=16)
def _draw(split: str, seed: int, count: int, steps: tuple[int, int], largest: int) -> Sequence[Record]:
  """Draw `count` problems of a split, each pair of a template and its numbers once."""
  source = "train" if split == "demonstrations" else split
  templates = [
    one for one in word_templates.read() if one.split == source and steps[0] <= len(one.solution) <= steps[1]
  ]
  rng = np.random.default_rng((seed, common.SPLITS.index(split)))
  seen: set[tuple[str, tuple[int, ...]]] = set()
  drawn: list[Record] = []

  def draws(template: Template) -> Iterator[dict[str, int]]:
    firsts, lasts = np.array(list(template.ranges.values())).T
    for _ in range(_BLOCKS):
      for row in rng.integers(firsts, lasts + 1, size=(_BLOCK, len(firsts))).tolist():
        yield dict(zip(template.ranges, row, strict=True))

  def attempt(template: Template) -> Record | None:
    for numbers in draws(template):
      values = template.solve(numbers, largest)
      needed = tuple(numbers[letter] for letter in template.needed)
      if values is not None and (template.name, needed) not in seen and _owner(template, needed) == split:
        seen.add((template.name, needed))
        question, solution = template.write(values, rng)
        answer = str(values[template.equations[-1][0]])
        told = {"template": template.name, "steps": len(template.solution)}
        return {"question": question, "solution": solution, "answer": answer, **told}
    return None

  while len(drawn) < count:
    left = [templates[place] for place in rng.permutation(len(templates)).tolist()]
    if not left:
      raise DataError(
        f"word_problems: sizes[{split!r}] is {count}, but only {len(drawn)} problems were found with {steps[0]} to"
        f" {steps[1]} steps and numbers up to {largest}; lower the size or widen steps or largest"
      )
    found = [attempt(template) for template in left]
    templates = [template for template, record in zip(left, found, strict=True) if record is not None]
    drawn += [record for record in found if record is not None]
  return tuple(drawn[:count])
