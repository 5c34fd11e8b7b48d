"""GSM8K: grade-school word problems whose answer is a number (Cobbe et al. 2021)."""

import dataclasses
import re
from collections.abc import Mapping, Sequence

from d1jax.tasks import common, d1_rewards, latex, questions, rationals
from d1jax.tasks.base import DataError, Grade, Message, Record

FILE = "gsm8k/train.jsonl"
TEST_FILE = "gsm8k/test.jsonl"

_GOLD = "####"
_CALCULATOR = re.compile(r"<<[^<>]*>>")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gsm8k:
  """The GSM8K task; records are `{"question": "...", "solution": "...", "answer": "1,080"}`.

  Records are read: `validation` is one training question in twenty, chosen by a hash of its text; the others are both
  `train` and `demonstrations` (their solutions are what supervised fine-tuning learns). Prompts and grades need no
  files.

  Attributes:
    seed: of no effect, nothing is drawn.
    root: the data folder with `gsm8k/train.jsonl` and, for the split `test` alone, `gsm8k/test.jsonl`.
    sizes: records per split, defaults for those not named: 400 for validation, else all. A file may
      have fewer (all are taken) but not none.
  """

  seed: int = 0
  root: str | None = None
  sizes: Mapping[str, int] = dataclasses.field(default_factory=questions.DEFAULT_SIZES.copy, hash=False)

  name = "gsm8k"
  splits = common.SPLITS

  def __post_init__(self) -> None:
    common.check_integer("gsm8k seed", self.seed, 0)
    common.check_root("gsm8k", self.root, "")
    object.__setattr__(self, "sizes", common.check_sizes("gsm8k", self.sizes, questions.DEFAULT_SIZES))

  def records(self, split: str) -> Sequence[Record]:
    """Return the records of one split; no root or an unknown split raises ValueError, bad rows DataError."""
    common.check_choice("split", split, self.splits)
    return questions.read(
      self.name, self.root, split, self.sizes[split], files=(FILE, TEST_FILE), key="question", parse=_parse
    )

  def prompt(self, record: Record, style: str) -> tuple[list[Message], str]:
    """Return one user turn and no prefill: d1's text to the letter, or the question alone (`terse`)."""
    common.check_choice("style", style, common.STYLES)
    question = record["question"]
    content = f"{common.SYSTEM_PROMPT}\n\n{question}" if style == "d1" else question
    return [{"role": "user", "content": content}], ""

  def demonstration(self, record: Record, style: str) -> str:
    """Write the reference solution, without its calculator marks, and the number, tagged in both styles."""
    common.check_choice("style", style, common.STYLES)
    return common.tagged(record["solution"], record["answer"])

  def baseline(self, record: Record, style: str) -> str:
    """Write the most frequent answer of the training questions."""
    common.check_choice("style", style, common.STYLES)
    return common.tagged("I guess.", "4")

  def cluster(self, record: Record) -> str:
    """Name the question."""
    return record["question"]

  def grade(self, text: str, record: Record, protocol: str = "strict") -> Grade:
    r"""Grade the last answer block, or the whole text: its last `\boxed{}`, or all of it, must be a number.

    Components of `strict`: `correct`, 2.0 when it equals the gold as an exact number (`2,125`, `$2125`, `2125.0` and
    `2125.` are one); `number`, 0.5 when it is a number; `format`, up to 1.0 (`common.format_score`). Components of
    `d1`: `xmlcount`, `soft_format`, `strict_format`, `int`, `correctness` (`d1_rewards.gsm8k`). Metrics, the same
    under both: `solved` and `well_formed` (a number).
    """
    common.check_choice("protocol", protocol, common.PROTOCOLS)
    answer = common.final_answer(text)
    box = latex.last_box(answer)
    value = rationals.parse(answer if box is None else box)
    solved = value is not None and value == rationals.parse(record["answer"])
    if protocol == "d1":
      components = d1_rewards.gsm8k(text, record["answer"])
    else:
      components = {
        "correct": 2.0 * solved,
        "number": 0.5 * (value is not None),
        "format": common.format_score(text),
      }
    return Grade(components, {"solved": (int(solved), 1), "well_formed": (int(value is not None), 1)})


def _parse(place: str, line: str) -> Record:
  """Check every rule of one row and return its record."""
  row = common.parse_object(place, line, {"question": '"..."', "answer": f'"... {_GOLD} 7"'})
  questions.check_texts(place, row, ("question", "answer"))
  solution, *golds = row["answer"].split(_GOLD)
  if len(golds) != 1:
    raise DataError(f"{place}: answer has {len(golds)} marks {_GOLD}, expected one before the number")
  gold = golds[0].strip()
  if rationals.parse(gold) is None:
    raise DataError(f"{place}: {gold[:40]!r} behind {_GOLD} is not a number, expected one such as 72 or 1,080")
  return {"question": row["question"], "solution": _CALCULATOR.sub("", solution).strip(), "answer": gold}
