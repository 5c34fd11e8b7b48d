r"""MATH: competition problems whose answer stands in `\boxed{}` (Hendrycks et al. 2021)."""

import dataclasses
import importlib.util
from collections.abc import Mapping, Sequence

from d1jax.errors import missing
from d1jax.tasks import answers, common, d1_evaluation, d1_rewards, equivalence, latex, questions
from d1jax.tasks.base import DataError, Grade, Message, Record

FILE = "math/train.jsonl"
EXTRA_FILE = "math/train_extra.jsonl"
TEST_FILE = "math/test.jsonl"

_INSTRUCTION = (
  "\n\nYou are a math expert. You will be given a question to solve. Solve it step by step. "
  "Wrap the final answer in a \\boxed{}. \n\n"
)

# Unlike d1's prompt for GSM8K: no blank after "{}.", and at the end a quotation mark, a blank and a line break.
_EVALUATION = (
  "You are a math expert. You will be given a question to solve. Solve it step by step. "
  "Wrap the final answer in a \\boxed{}.\n"
  "Respond in the following format:\n<reasoning>\nYour reasoning here\n</reasoning>\n"
  '<answer>\n\\boxed{...}\n</answer>" \n'
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HendrycksMath:
  r"""The MATH task; records are `{"problem": "...", "solution": "... \\boxed{2}.", "answer": "2"}`.

  Records are read: `validation` is one training problem in twenty, chosen by a hash of its text; the others are both
  `train` and `demonstrations` (their solutions are what supervised fine-tuning learns). None of these is a question of
  `test`. Prompts and grades need no files.

  Attributes:
    seed: it has no effect, because nothing is drawn.
    root: the data folder with `math/train.jsonl`; with `math/train_extra.jsonl`, which may be missing, it is the set
      that d1 trains on. The split `test` alone reads `math/test.jsonl` (MATH-500). Parquet, clones of
      `ankner/math-500` and `HuggingFaceH4/MATH-500` in the folder, or "hub" to download these (`tables.read`) serve as
      well; that training set has the further file's rows.
    sizes: records per split, defaults for those not named: 400 for validation, else all. A file may
      have fewer (all are taken) but not none.
  """

  seed: int = 0
  root: str | None = None
  sizes: Mapping[str, int] = dataclasses.field(default_factory=questions.DEFAULT_SIZES.copy, hash=False)

  name = "math"
  splits = common.SPLITS

  def __post_init__(self) -> None:
    if importlib.util.find_spec("math_verify") is None:
      raise ValueError(f"math: {missing('math_verify', 'math')}")
    common.check_integer("math seed", self.seed, 0)
    common.check_root("math", self.root, "")
    object.__setattr__(self, "sizes", common.check_sizes("math", self.sizes, questions.DEFAULT_SIZES))

  def records(self, split: str) -> Sequence[Record]:
    """Return the records of one split; no root or an unknown split raises ValueError, bad rows DataError."""
    common.check_choice("split", split, self.splits)
    files = (FILE, EXTRA_FILE, TEST_FILE)
    return questions.read(self.name, self.root, split, self.sizes[split], files=files, key="problem", parse=_parse)

  def prompt(self, record: Record, style: str) -> tuple[list[Message], str]:
    """Return one user turn and a prefill: d1's texts to the letter, or the problem alone (`terse`).

    `d1` and `terse` have no prefill, `d1_eval` has `<reasoning>`.
    """
    common.check_choice("style", style, common.STYLES)
    problem = record["problem"]
    if style == "d1_eval":
      return [{"role": "user", "content": f"{_EVALUATION}\n\n{problem}"}], common.PREFILL
    content = common.SYSTEM_PROMPT + _INSTRUCTION + problem if style == "d1" else problem
    return [{"role": "user", "content": content}], ""

  def demonstration(self, record: Record, style: str) -> str:
    """Write the reference solution and the boxed answer, tagged; in the style `d1_eval`, what follows the prefill."""
    common.check_choice("style", style, common.STYLES)
    return common.tagged(record["solution"], _box(record["answer"]), style)

  def baseline(self, record: Record, style: str) -> str:
    """Write the most frequent answer of the training problems."""
    common.check_choice("style", style, common.STYLES)
    return common.tagged("I guess.", _box("2"), style)

  def cluster(self, record: Record) -> str:
    """Name the problem."""
    return record["problem"]

  def grade(self, text: str, record: Record, protocol: str = "strict") -> Grade:
    r"""Grade the last answer block, or the whole text: its last `\boxed{}`, or all of it, is the answer.

    Components of `strict`: `correct`, 2.0 when it is the gold (`equivalence.is_equivalent`);
    `box`, 0.5 when something stands in a box; `format`, up to 1.0 (`common.format_score`). Components of `d1`:
    `correctness`, `format` (`d1_rewards.hendrycks_math`). Metrics: `solved` and `well_formed` (something
    in a box), the same under both; under `d1` also `d1_accuracy` (`d1_evaluation.hendrycks_math`).
    """
    common.check_choice("protocol", protocol, common.PROTOCOLS)
    answer, gold = common.final_answer(text), record["answer"]
    box = latex.last_box(answer)
    answer = answer if box is None else box
    solved = gold is not None and equivalence.is_equivalent(answer, gold, record["problem"])
    well_formed = bool(box and box.strip())
    metrics = {"solved": (int(solved), int(gold is not None)), "well_formed": (int(well_formed), 1)}
    if protocol == "d1":
      components = d1_rewards.hendrycks_math(text, record["solution"])
      metrics["d1_accuracy"] = (int(d1_evaluation.hendrycks_math(text, record["answer"])), 1)
    else:
      components = {"correct": 2.0 * solved, "box": 0.5 * well_formed, "format": common.format_score(text)}
    return Grade(components, metrics, answers.normal_form(answer))


def _box(answer: str) -> str:
  return f"\\boxed{{{answer}}}"


def _parse(place: str, found: object) -> Record | None:
  """Check every rule of one row and return its record, or None when its answer and its box are both empty.

  A row without the field `answer` has what its solution boxes.
  """
  row = common.check_fields(place, found, dict.fromkeys(("problem", "solution"), '"..."'))
  row = {"answer": d1_rewards.unbox(str(row["solution"])) or "", **row}
  questions.check_texts(place, row, ("problem", "solution", "answer"), blank=("answer",))
  box = d1_rewards.unbox(row["solution"])
  answer = row["answer"].strip()
  if box is None or box == row["solution"]:
    raise DataError(f"{place}: solution ends with {row['solution'][-40:]!r} and has no closed \\boxed{{...}}")
  if not answer and box.strip():
    raise DataError(f"{place}: answer is blank, but the solution boxes {box[:40]!r}; write it there")
  if not answer:
    return None
  return {"problem": row["problem"], "solution": row["solution"], "answer": answer}
