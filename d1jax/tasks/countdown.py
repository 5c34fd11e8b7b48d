"""Countdown: reach a target from given numbers with + - * /, each number used exactly once."""

import dataclasses
import functools
import hashlib
import itertools
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from d1jax.tasks import arithmetic, common, d1_evaluation, d1_rewards, held_out, latex, notation, tables
from d1jax.tasks.base import DataError, Grade, Message, Record

FILE = "countdown/train.jsonl"
TEST_FILE = "countdown/test.jsonl"
DEFAULT_SIZES = {"demonstrations": 2000, "train": 8000, "validation": 400, "test": 1000}

_INSTRUCTION = (
  "\nUsing only the numbers {nums}, create an arithmetic expression that evaluates to exactly "
  "{target}. You must use all numbers from the list, and each number must be used exactly once. "
  "You may use the operations +, -, *, and / as needed. After reasoning, provide only your final "
  "expression inside <answer></answer> tags without including an equals sign or the target "
  "number. For example, if the numbers are [2, 3, 4] and the target is 5, a valid answer is: "
  "<answer>\n2*4-3\n</answer>"
)
# d1 has no blank between "}" and "Respond".
_EVALUATION = (
  "Using only the provided numbers, create an arithmetic expression that evaluates to exactly the provided target "
  "number. You may use the operations +, -, *, and / as needed, but each number must be used exactly once. Think "
  "step-by-step. After reasoning, provide only your final expression inside \\boxed{} tags without including an equals "
  "sign or the target number. For example: \\boxed{a + b * c}"
  "Respond in the following format:\n<reasoning>\nYour reasoning here\n</reasoning>\n"
  "<answer>\n\\boxed{...}\n</answer>"
)

_LIST = re.compile(r"[0-9]{1,9}(, ?[0-9]{1,9})*")

# How many tenths of all multisets of numbers a split owns.
_TENTHS = ("test", "validation", "demonstrations", "demonstrations", *["train"] * 6)

# A target is redrawn after 20 blocks of 250 draws of numbers, or 500 searches, in vain; after 20
# targets in vain the problems are taken to be exhausted.
_BLOCKS, _BLOCK, _SEARCHES, _TARGETS = 20, 250, 500, 20

_Problem = tuple[tuple[int, ...], int, str]

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Countdown:
  """The Countdown task; records are `{"nums": [3, 25, 7], "target": 68, "expression": "..."}`.

  A hash of the sorted numbers decides the split, so that no multiset of numbers occurs in two
  splits, whatever the seeds and sizes; those of d1's published test problems (`held_out`) are all
  for `test`. Problems of a split are distinct, and a larger size keeps the records of a smaller one.

  Attributes:
    seed: seeds the draws of generated problems.
    root: a data folder with `countdown/train.jsonl`, or None to generate; Parquet, a clone of
      `Jiayi-Pan/Countdown-Tasks-3to4` in the folder, or "hub" to download that (`tables.read`)
      serve as well. Records read from it have no `expression`: the demonstration searches for one.
      Where `countdown/test.jsonl` exists, in the same fields or in d1's (`{"input": "30,100,93",
      "output": "23"}`), it is the split `test`, and no other split has numbers of it.
    sizes: records per split, defaults for those not named. A file may have fewer (all are taken)
      but not none.
    numbers: the range (first, last) of how many numbers a problem has, drawn uniformly. Rows of a
      file with fewer or more are left out.
    largest: generated numbers are uniform in 1..largest, repeats allowed, redrawn until the
      target can be reached.
    targets: generated targets are uniform in this range (first, last).
  """

  seed: int = 0
  root: str | None = None
  sizes: Mapping[str, int] = dataclasses.field(default_factory=DEFAULT_SIZES.copy, hash=False)
  numbers: tuple[int, int] = (3, 4)
  largest: int = 99
  targets: tuple[int, int] = (10, 100)

  name = "countdown"
  splits = common.SPLITS

  def __post_init__(self) -> None:
    common.check_integer("countdown seed", self.seed, 0)
    common.check_root("countdown", self.root)
    object.__setattr__(self, "sizes", common.check_sizes("countdown", self.sizes, DEFAULT_SIZES))
    numbers = common.check_range("countdown numbers", self.numbers, 2, arithmetic.MOST_NUMBERS)
    object.__setattr__(self, "numbers", numbers)
    common.check_integer("countdown largest", self.largest, 1)
    object.__setattr__(self, "targets", common.check_range("countdown targets", self.targets, 1, None))

  def records(self, split: str) -> Sequence[Record]:
    """Return the records of one split; an unknown one raises ValueError, too few DataError."""
    common.check_choice("split", split, self.splits)
    count = self.sizes[split]
    if self.root is not None:
      name = TEST_FILE if split == "test" and tables.exists(self.root, TEST_FILE) else FILE
      return common.take_rows(name, split, _read(self.root, name, split, self.numbers), count)
    drawn = _draw(split, self.seed, count, self.numbers, self.largest, self.targets)
    return tuple({"nums": list(nums), "target": target, "expression": expression} for nums, target, expression in drawn)

  def prompt(self, record: Record, style: str) -> tuple[list[Message], str]:
    """Return one user turn and a prefill, `<reasoning>` in the style `d1_eval` and else none.

    `d1` and `d1_eval` are d1's texts to the letter, `terse` the numbers and the target as words:
    `3 25 7 = 68`. In terse answers too every number, operator and parenthesis is a word, so a
    vocabulary of the numbers and eight signs is enough; digits are never split, `2 5` is not 25.
    """
    common.check_choice("style", style, common.STYLES)
    nums, target = list(record["nums"]), record["target"]
    if style == "d1_eval":
      question = f"Numbers: {nums}\nTarget: {target}"
      return [{"role": "user", "content": f"{_EVALUATION}\n\n{question}"}], common.PREFILL
    if style == "d1":
      content = common.SYSTEM_PROMPT + _INSTRUCTION.format(nums=nums, target=target)
    else:
      content = f"{' '.join(map(str, nums))} = {target}"
    return [{"role": "user", "content": content}], ""

  def demonstration(self, record: Record, style: str) -> str:
    """Write an expression that reaches the target; a DataError if there is none.

    In the style `d1_eval` it stands in a box, and the text is what follows the prefill.
    """
    nums, target = record["nums"], record["target"]
    expression = record.get("expression") or arithmetic.solve(nums, target)
    if expression is None:
      raise DataError(
        f"countdown: no expression over {list(nums)} reaches {target}; take the problem out of the demonstrations"
      )
    return _format(f"{expression} = {target}, and each number is used once.", expression, style)

  def baseline(self, record: Record, style: str) -> str:
    """Write the sum of all numbers."""
    expression = "+".join(map(str, record["nums"]))
    return _format("I add all the numbers.", expression, style)

  def cluster(self, record: Record) -> str:
    """Name the numbers in ascending order."""
    return _key(record["nums"])

  def grade(self, text: str, record: Record, protocol: str = "strict") -> Grade:
    r"""Grade the last answer block, or the whole text: its last `\boxed{}`, or all of it, must be an expression.

    The signs and wrappers of `notation` are read, `\frac{4}{2}`, `[3*4]` and `3(4)`; an equation is no expression.

    Components of `strict`: `correct`, 1.0 when the expression uses exactly the given numbers and
    equals the target; `well_formed`, 0.1 when it uses exactly the numbers but misses. Component of
    `d1`: `countdown`. Metrics: `solved` and `well_formed` (exactly the numbers, hit or miss), the same
    under both; under `d1` also `d1_accuracy` (`d1_evaluation.countdown`). A division by zero is not well formed.
    """
    common.check_choice("protocol", protocol, common.PROTOCOLS)
    expression = _expression(common.final_answer(text))
    parsed = arithmetic.evaluate(expression)
    well_formed = parsed is not None and sorted(parsed[1]) == sorted(record["nums"])
    solved = parsed is not None and well_formed and parsed[0] == record["target"]
    metrics = {"solved": (int(solved), 1), "well_formed": (int(well_formed), 1)}
    if protocol == "d1":
      components = {"countdown": d1_rewards.countdown(text, record["nums"], record["target"])}
      metrics["d1_accuracy"] = (int(d1_evaluation.countdown(text, record["nums"], record["target"])), 1)
    else:
      components = {"correct": float(solved), "well_formed": 0.1 if well_formed and not solved else 0.0}
    return Grade(components, metrics, None if parsed is None else "".join(expression.split()))


def _format(reasoning: str, expression: str, style: str) -> str:
  common.check_choice("style", style, common.STYLES)
  if style == "terse":
    return " ".join(arithmetic.words(expression))
  return common.tagged(reasoning, f"\\boxed{{{expression}}}" if style == "d1_eval" else expression, style)


def _expression(answer: str) -> str:
  """Return the last box of an answer, or all of it, with plain signs and no wrapper."""
  text = latex.boxed_or_whole(answer)
  if len(text) > arithmetic.MOST_CHARACTERS:
    return text
  return arithmetic.translate(notation.unwrapped(notation.plain(text)))


def _key(nums: Sequence[int]) -> str:
  return " ".join(map(str, sorted(nums)))


@functools.lru_cache(maxsize=2**14)  # of few small numbers the same ones are drawn often
def _owner(key: str) -> str:
  """Name the split that a multiset of numbers, written as `_key` does, belongs to."""
  digest = hashlib.sha256(key.encode()).digest()
  if digest[:8].hex() in held_out.listed("countdown"):
    return "test"
  return _TENTHS[int.from_bytes(digest[:8], "big") % len(_TENTHS)]


@functools.lru_cache(maxsize=16)
def _draw(
  split: str,
  seed: int,
  count: int,
  numbers: tuple[int, int],
  largest: int,
  targets: tuple[int, int],
) -> tuple[_Problem, ...]:
  """Draw `count` distinct problems of a split as (nums, target, expression).

  The rule behind the public set: how many numbers and the target are drawn first, then the
  numbers, again until the target can be reached (and the split owns them and they are new).
  """
  rng = np.random.default_rng((seed, common.SPLITS.index(split)))
  drawn: list[_Problem] = []
  seen, in_vain = set(), set()

  def fresh(length: int, target: int) -> Iterator[tuple[tuple[int, ...], str]]:
    for _ in range(_BLOCKS):
      for nums in rng.integers(1, largest + 1, size=(_BLOCK, length)).tolist():
        key = _key(nums)
        if _owner(key) == split and (key, target) not in seen:
          yield tuple(nums), key

  def attempt() -> _Problem | None:
    length = int(rng.integers(numbers[0], numbers[1] + 1))
    target = int(rng.integers(targets[0], targets[1] + 1))
    for nums, key in itertools.islice(fresh(length, target), _SEARCHES):
      if (key, target) in in_vain:
        continue
      expression = arithmetic.solve(nums, target)
      if expression is not None:
        return nums, target, expression
      in_vain.add((key, target))
    return None

  while len(drawn) < count:
    problem = next(filter(None, (attempt() for _ in range(_TARGETS))), None)
    if problem is None:
      raise DataError(
        f"countdown: sizes[{split!r}] is {count}, but only {len(drawn)} problems were found with "
        f"{numbers[0]} to {numbers[1]} numbers up to {largest} and targets {targets[0]} to "
        f"{targets[1]}; lower the size or widen numbers, largest or targets"
      )
    seen.add((_key(problem[0]), problem[1]))
    drawn.append(problem)
  return tuple(drawn)


def _read(root: str, name: str, split: str, numbers: tuple[int, int]) -> Sequence[Record]:
  """Read the split's rows in the order of a file, each problem once; all rows of the test file are one split."""
  rows = [_parse(place, row) for place, row in tables.read(root, name)]
  fitting = [row for row in rows if numbers[0] <= len(row["nums"]) <= numbers[1]]
  distinct: dict[tuple[str, int], Record] = {}
  for row in fitting:
    distinct.setdefault((_key(row["nums"]), row["target"]), row)
  test_numbers: set[str] = set()
  if name == FILE and tables.exists(root, TEST_FILE):
    test_numbers = {_key(_parse(place, row)["nums"]) for place, row in tables.read(root, TEST_FILE)}
  problems = [row for row in distinct.values() if _key(row["nums"]) not in test_numbers]
  if len(problems) < len(rows):
    _log.warning(
      "%s: left out %d problems without %d to %d numbers, %d repeated ones and %d with numbers of %s",
      name,
      len(rows) - len(fitting),
      *numbers,
      len(fitting) - len(distinct),
      len(distinct) - len(problems),
      TEST_FILE,
    )
  return tuple(row for row in problems if name == TEST_FILE or _owner(_key(row["nums"])) == split)


def _parse(place: str, value: object) -> dict[str, Any]:
  """Check every rule of one row and return it; other keys are dropped."""
  if isinstance(value, dict) and "input" in value and "nums" not in value:
    value = _of_d1(place, value)
  row = common.check_fields(place, value, {"nums": "[...]", "target": "..."})
  nums, target = row["nums"], row["target"]
  if not isinstance(nums, list) or not all(type(n) is int and n > 0 for n in nums):
    raise DataError(f"{place}: nums is {str(nums)[:60]}, expected a list of positive integers")
  if not 2 <= len(nums) <= arithmetic.MOST_NUMBERS:
    raise DataError(f"{place}: nums has {len(nums)} numbers, expected 2 to {arithmetic.MOST_NUMBERS}")
  if type(target) is not int:
    raise DataError(f"{place}: target is {str(target)[:60]!r}, expected an integer")
  return {"nums": nums, "target": target}


def _of_d1(place: str, raw: dict[str, Any]) -> dict[str, Any]:
  """Convert a row of d1's test file into a record."""
  row = common.check_fields(place, raw, {"input": '"30,100,93"', "output": '"23"'})
  for field, example in (("input", "30,100,93"), ("output", "23")):
    value = str(row[field])
    if not _LIST.fullmatch(value) or (field == "output" and "," in value):
      raise DataError(f"{place}: {field} is {value[:40]!r}, expected a text such as {example!r}")
  return {"nums": [int(number) for number in str(row["input"]).split(",")], "target": int(row["output"])}
