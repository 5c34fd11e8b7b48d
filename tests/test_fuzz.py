"""Every reader of what comes from outside, on files that are damaged at random: it reads them, or says why in one line.

Slow because hypothesis tries many damages of each reader; each that was ever found is a quick test of its own
beside the reader.
"""

import dataclasses
import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from d1jax.data import demonstrations
from d1jax.errors import RunError
from d1jax.evaluation import generations, items
from d1jax.models import families, load, peft, transformer
from d1jax.run import identity, metrics
from d1jax.run.checkpoint import Checkpoints
from d1jax.source import inspect
from d1jax.tasks.countdown import Countdown
from d1jax.tasks.gsm8k import Gsm8k
from d1jax.tasks.hendrycks_math import HendrycksMath
from d1jax.tasks.sudoku import Sudoku
from tests import hub
from tests.models import folders
from tests.run.test_checkpoint import abstract, state

pytestmark = pytest.mark.slow(reason="many random damages of each reader")

EXAMPLES = 60

REPLACEMENTS = [
  b"",
  b"[]",
  b"{}",
  b"null",
  b"0",
  b'"text"',
  b"[" * 100_000,
  b'{"a":' * 50_000,
  b"\xff\xfe",
  b"\x00" * 64,
]
VALUES: list[Any] = [
  None,
  True,
  -1,
  0,
  2**31,
  2**40,
  10**30,
  1e999,
  -0.5,
  "",
  "text",
  "\ud800",
  [],
  {},
  [[]],
  {"a": {}},
]


@dataclasses.dataclass(frozen=True)
class Damage:
  """One damage of one file: what kind, where (a share of the file), and with what."""

  kind: str
  where: float
  size: int
  content: bytes
  value: Any

  def apply(self, content: bytes) -> bytes:
    at = int(self.where * len(content))
    if self.kind == "replace":
      return self.content
    if self.kind == "cut":
      return content[:at]
    if self.kind == "lose":
      return content[:at] + content[at + self.size :]
    if self.kind == "overwrite":
      return content[:at] + self.content[:64] + content[at + len(self.content[:64]) :]
    if self.kind == "insert":
      return content[:at] + self.content[:64] + content[at:]
    return self._value(content)

  def _value(self, content: bytes) -> bytes:
    """Another value at some place of a JSON text, or of one of its lines; other content stays as it is."""
    lines = content.split(b"\n")
    for texts in ([content], lines):
      number = int(self.where * len(texts)) % len(texts)
      try:
        tree = json.loads(texts[number])
      except ValueError:
        continue
      changed = json.dumps(self._changed(tree, self.size)).encode()
      return b"\n".join([*texts[:number], changed, *texts[number + 1 :]])
    return content

  def _changed(self, tree: Any, seed: int) -> Any:
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree))) if isinstance(tree, list) else []
    if not keys or seed % 7 == 0:
      return self.value
    key, copy = keys[seed % len(keys)], tree.copy()
    copy[key] = self._changed(tree[key], seed // 7)
    return copy


damages = st.builds(
  Damage,
  st.sampled_from(["replace", "cut", "lose", "overwrite", "insert", "value", "value", "value"]),
  st.floats(0, 1, exclude_max=True),
  st.integers(0, 10**6),
  st.one_of(st.sampled_from(REPLACEMENTS), st.binary(min_size=1, max_size=64)),
  st.sampled_from(VALUES),
)


def model(folder: Path) -> None:
  hub.write(folder)


def read_model(folder: Path) -> None:
  source = inspect(folder)
  load.check(folder, transformer.build(source.size, dtype=np.float32))
  source.tokenizer.decode_all([source.tokenizer.prompt([{"role": "user", "content": "héllo 12"}], "")])


def adapter(folder: Path) -> None:
  shutil.copytree(Path(__file__).parent / "models/goldens/llama_qv", folder, dirs_exist_ok=True)


@functools.cache
def network() -> transformer.Network:
  """Of the adapter's base."""
  with tempfile.TemporaryDirectory() as folder:
    config = folders.CONFIGS["llama"](folders.SIZES["llama"], "float32")
    (Path(folder) / "config.json").write_text(json.dumps(config))
    return transformer.build(families.describe(Path(folder)).size)


def rows(name: str, *lines: Any) -> Callable[[Path], None]:
  def write(folder: Path) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / name).write_text(text + "\n")

  return write


def numbered(row: dict[str, Any], field: str, change: Callable[[int], Any]) -> list[dict[str, Any]]:
  """Rows that differ in a field, enough for each split to get some."""
  return [row | {field: change(i)} for i in range(40)]


def puzzles() -> list[str]:
  records = Sudoku(sizes={"train": 40}).records("train")
  return ["Puzzle,Solution", *(f"{r['puzzle']},{r['solution']}" for r in records)]


GSM8K = {"question": "What is 2 + 3?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"}
MATH = {"problem": "What is $1+1$?", "solution": r"It is $\boxed{2}$.", "answer": "2"}
TRACE = {"question": "1+1?", "solution": "2", "thinking_trajectories": ["one and one"], "attempt": "2"}
RUN = {"mode": "grpo", "workdir": "w", "sft": {"steps": 2}, "grpo": {"steps": 4, "learning_rate": 1e-3}}
RECORD = {"stage": "grpo", "iteration": 1, "seconds": 0.5, "loss": 1.0, "reward": 0.1}
ITEM = items.Item(
  task="gsm8k",
  length=8,
  temperature=0.0,
  seed=0,
  sample=0,
  index=0,
  question="q",
  cluster="c",
  record=GSM8K,
  text="5",
  answer="5",
  reward=1.0,
  metrics={"solved": (1, 1)},
)
D1 = {"generations": [{"question": "q", "generations": "<answer>5</answer>", "ground_truth": 5.0}], "gen_length": 8}
COUNTDOWN = {"target": 7, "nums": [3, 4, 5]}


def checkpoint(folder: Path) -> None:
  checkpoints = Checkpoints(folder / "sft", writes=True)
  for step in (1, 2):
    said = {"config": {}, "base": None, "seconds": 1.0, "data": {"next_index": step}}
    checkpoints.save(step, state(step), said, 0.5)
  checkpoints.close()


def read_checkpoint(folder: Path) -> None:
  Checkpoints(folder / "sft").best_evaluated(abstract())


READERS: dict[str, tuple[Callable[[Path], None], Callable[[Path], Any]]] = {
  "model": (model, read_model),
  "adapter": (adapter, lambda f: peft.load(f, network())),
  "sft": (rows("x.jsonl", TRACE, TRACE), lambda f: demonstrations.read(f / "x.jsonl")),
  "sft.math": (rows("x.jsonl", MATH, MATH), lambda f: demonstrations.read(f / "x.jsonl")),
  "generations": (rows("g.jsonl", {"record": GSM8K, "text": "5"}), lambda f: generations.read(f / "g.jsonl", "gsm8k")),
  "generations.d1": (rows("g.json", D1), lambda f: generations.read(f / "g.json", "gsm8k")),
  "items": (rows("i.jsonl", ITEM.line(), ITEM.line(), ITEM.line()), lambda f: items.read(f / "i.jsonl")),
  "config.json": (rows("config.json", RUN), lambda f: identity.holds_run(f, RUN)),
  "splits.json": (rows("splits.json", {"test": {"n": 1}}), lambda f: identity.check_splits(f, RUN, {"test": {"n": 1}})),
  "checkpoint": (checkpoint, read_checkpoint),
  "metrics.jsonl": (rows("metrics.jsonl", RECORD, RECORD), lambda f: metrics.read_records(f / "metrics.jsonl")),
  "gsm8k": (
    rows("gsm8k/train.jsonl", *numbered(GSM8K, "question", "What is {} + 3?".format)),
    lambda f: Gsm8k(root=str(f)).records("train"),
  ),
  "math": (
    rows("math/train.jsonl", *numbered(MATH, "problem", "What is {}?".format)),
    lambda f: HendrycksMath(root=str(f)).records("train"),
  ),
  "sudoku": (rows("sudoku/train.csv", *puzzles()), lambda f: Sudoku(root=str(f)).records("train")),
  "countdown": (
    rows("countdown/train.jsonl", *numbered(COUNTDOWN, "nums", lambda i: [3, 4, i + 1])),
    lambda f: Countdown(root=str(f)).records("train"),
  ),
}


@pytest.mark.parametrize("reader", READERS)
def test_damaged_files_are_read_or_refused_in_one_line(reader, tmp_path_factory):
  write, read = READERS[reader]
  good = tmp_path_factory.mktemp("good")
  write(good)
  files = sorted(path.relative_to(good) for path in good.rglob("*") if path.is_file())
  read(good)  # what is not damaged is read

  @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
  @given(st.sampled_from(files), damages)
  def check(name: Path, damage: Damage) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    shutil.copytree(good, folder, dirs_exist_ok=True)
    (folder / name).write_bytes(damage.apply((good / name).read_bytes()))
    message = ""
    try:
      read(folder)
    except (ValueError, RunError) as error:
      message = str(error)
    finally:
      shutil.rmtree(folder)
    assert "\n" not in message

  check()
