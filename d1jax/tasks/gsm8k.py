"""GSM8K: grade-school word problems whose answer is a number (Cobbe et al. 2021)."""

import dataclasses
import re
from collections.abc import Mapping, Sequence

from d1jax.tasks import asked, common, d1_evaluation, d1_rewards, latex, notation, questions, rationals
from d1jax.tasks.base import DataError, Grade, Message, Record

FILE = "gsm8k/train.jsonl"
TEST_FILE = "gsm8k/test.jsonl"

_EVALUATION = (
  "You are a math expert. You will be given a question to solve. Solve it step by step. "
  "Wrap the final answer in a \\boxed{}. \n"
  "Respond in the following format:\n<reasoning>\nYour reasoning here\n</reasoning>\n"
  "<answer>\n\\boxed{...}\n</answer>"
)
SHORTEST_WORD = 2
"""The least letters of a word that may follow a number; single letters may be variables."""

_GOLD = "####"
_OPEN_BOX = re.compile(r"\\?boxed\s*\{")
_NAME = re.compile(r"([A-Za-z]+) ?")
_CALCULATOR = re.compile(r"<<[^<>]*>>")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gsm8k:
  """The GSM8K task; records are `{"question": "...", "solution": "...", "answer": "1,080"}`.

  Records are read: `validation` is one training question in twenty, chosen by a hash of its text; the others are both
  `train` and `demonstrations` (their solutions are what supervised fine-tuning learns). None of these is a question of
  `test`. Prompts and grades need no files.

  Attributes:
    seed: it has no effect, because nothing is drawn.
    root: the data folder with `gsm8k/train.jsonl` and, for the split `test` alone, `gsm8k/test.jsonl`; Parquet, a
      clone of `openai/gsm8k` in the folder, or "hub" to download that (`tables.read`) serve as well.
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
    """Return one user turn and a prefill: d1's texts to the letter, or the question alone (`terse`).

    `d1` and `terse` have no prefill, `d1_eval` has `<reasoning>`.
    """
    common.check_choice("style", style, common.STYLES)
    question = record["question"]
    if style == "d1_eval":
      return [{"role": "user", "content": f"{_EVALUATION}\n\n{question}"}], common.PREFILL
    content = f"{common.SYSTEM_PROMPT}\n\n{question}" if style == "d1" else question
    return [{"role": "user", "content": content}], ""

  def demonstration(self, record: Record, style: str) -> str:
    """Write the reference solution, without its calculator marks, and the number, tagged in all styles.

    In the style `d1_eval`, what follows the prefill; the number stands in a box and has no commas, which end a number
    for d1's evaluation.
    """
    return _format(record["solution"], record["answer"], style)

  def baseline(self, record: Record, style: str) -> str:
    """Write the most frequent answer of the training questions."""
    return _format("I guess.", "4", style)

  def cluster(self, record: Record) -> str:
    """Name the question."""
    return record["question"]

  def grade(self, text: str, record: Record, protocol: str = "strict") -> Grade:
    r"""Grade the last answer block, or the whole text: its last `\boxed{}`, or all of it, must be a number.

    Components of `strict`: `correct`, 2.0 when it equals the gold as an exact number (`2,125`, `$2125`, `2125.0` and
    `2125.` are one); `number`, 0.5 when it is a number; `format`, up to 1.0 (`common.format_score`). Components of
    `d1`: `xmlcount`, `soft_format`, `strict_format`, `int`, `correctness` (`d1_rewards.gsm8k`). Metrics: `solved` and
    `well_formed` (a number), the same under both; under `d1` also `d1_accuracy` (`d1_evaluation.gsm8k`).
    """
    common.check_choice("protocol", protocol, common.PROTOCOLS)
    gold, question = record["answer"], record.get("question", "")
    answer = asked.without_counts(_answer(text), question)
    value = rationals.parse(answer, SHORTEST_WORD)
    solved = value is not None and gold is not None and value == rationals.parse(gold)
    solved = solved and not notation.have_different_units(answer, gold) and not asked.is_another(answer, gold, question)
    metrics = {"solved": (int(solved), int(gold is not None)), "well_formed": (int(value is not None), 1)}
    if protocol == "d1":
      components = d1_rewards.gsm8k(text, record["answer"])
      metrics["d1_accuracy"] = (int(d1_evaluation.gsm8k(text, d1_evaluation.gsm8k_gold(gold))), 1)
    else:
      components = {
        "correct": 2.0 * solved,
        "number": 0.5 * (value is not None),
        "format": common.format_score(text),
      }
    return Grade(components, metrics, None if value is None else str(value))


def _answer(text: str) -> str:
  r"""Return what a completion answers with: all of its last box, of its answer block, or of itself; "" if that is long.

  In front of it there may be one name (`x = 5`), an expression that is equal to it (`2 * 9 = 18`), or `Answer:` and the
  like; behind it a unit of up to four words. A box that an answer block leaves open ends with the block. With a second
  number it is no number, nor is any other sentence: `It is 18`.
  """
  answer = common.final_answer(text)
  box = latex.last_box(answer)
  answer = (answer if box is None else box).strip()
  if len(answer) > rationals.MOST_CHARACTERS:
    return ""
  opened = _OPEN_BOX.match(answer) if box is None and len(answer) < len(text.strip()) else None
  if opened is not None:
    is_closed = answer.count("}") == answer.count("{")
    answer = answer[opened.end() :].removesuffix("}" if is_closed else "")
  answer = notation.unwrapped(notation.plain(answer))
  first, *rest = answer.split("=")
  name = _NAME.fullmatch(first) if rest else None
  if name is not None and notation.is_unit(name[1]):  # Not `half = 18`.
    answer = answer[len(first) + 1 :]
  return rationals.conclusion(answer, SHORTEST_WORD)


def _format(reasoning: str, answer: str, style: str) -> str:
  common.check_choice("style", style, common.STYLES)
  if style == "d1_eval":
    answer = f"\\boxed{{{answer.replace(',', '')}}}"
  return common.tagged(reasoning, answer, style)


def _parse(place: str, found: object) -> Record:
  """Check every rule of one row and return its record."""
  row = common.check_fields(place, found, {"question": '"..."', "answer": f'"... {_GOLD} 7"'})
  questions.check_texts(place, row, ("question", "answer"))
  solution, *golds = row["answer"].split(_GOLD)
  if len(golds) != 1:
    raise DataError(f"{place}: answer has {len(golds)} marks {_GOLD}, expected one before the number")
  gold = golds[0].strip()
  if rationals.parse(gold) is None:
    raise DataError(f"{place}: {gold[:40]!r} behind {_GOLD} is not a number, expected one such as 72 or 1,080")
  return {"question": row["question"], "solution": _CALCULATOR.sub("", solution).strip(), "answer": gold}
