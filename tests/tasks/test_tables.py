import json
import sys
from pathlib import Path

import pytest

from d1jax import hub
from d1jax.tasks import Countdown, DataError, Gsm8k, HendrycksMath, tables
from tests import hub_server

NAME = "gsm8k/train.jsonl"
ROWS = [{"question": f"Q{n}", "answer": f"It is\n#### {n}"} for n in range(3)]
CARD = """---
configs:
- config_name: main
  data_files:
  - split: train
    path: main/train-*
  - split: test
    path: main/test-*
- config_name: socratic
  data_files:
  - split: train
    path: socratic/train-*
---
"""


@pytest.fixture
def datasets(tmp_path_factory, monkeypatch):
  module = pytest.importorskip("datasets")
  monkeypatch.setattr(module.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
  return module


def write_lines(root: Path, name: str, rows: list) -> None:
  path = root / name
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_parquet(datasets, path: Path, rows: list) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  datasets.Dataset.from_list(rows).to_parquet(path)


def clone(datasets, root: Path) -> None:
  """The repository of GSM8K as `git clone` leaves it."""
  repository = root / "openai/gsm8k"
  write_parquet(datasets, repository / "main/train-00000-of-00001.parquet", ROWS)
  write_parquet(datasets, repository / "main/test-00000-of-00001.parquet", ROWS[:1])
  write_parquet(datasets, repository / "socratic/train-00000-of-00001.parquet", ROWS[2:])
  (repository / "README.md").write_text(CARD)


def read(root, name: str = NAME) -> list:
  return list(tables.read(str(root), name))


def test_json_lines(tmp_path):
  write_lines(tmp_path, NAME, [*ROWS, [1]])
  assert read(tmp_path)[:2] == [("gsm8k/train.jsonl line 1", ROWS[0]), ("gsm8k/train.jsonl line 2", ROWS[1])]
  assert read(tmp_path)[3] == ("gsm8k/train.jsonl line 4", [1])
  assert tables.exists(str(tmp_path), NAME)
  for line in ("{", "[" * 100_000):
    (tmp_path / NAME).write_text(json.dumps(ROWS[0]) + "\n" + line + "\n\n")
    with pytest.raises(DataError, match=r"^gsm8k/train.jsonl line 2: .* is not JSON, expected one object a line"):
      read(tmp_path)


def test_parquet_has_the_rows_of_json_lines(tmp_path, datasets):
  rows = [{"nums": [3, 25, 7], "target": 68}, {"nums": [1, 2, 3, 4], "target": None}]
  write_parquet(datasets, tmp_path / "countdown/train.parquet", rows)
  wanted = [(f"countdown/train.parquet row {number}", row) for number, row in enumerate(rows, start=1)]
  assert read(tmp_path, "countdown/train.jsonl") == wanted
  with pytest.raises(DataError, match=r"^countdown/train.parquet row 2: target is 'None', expected an integer"):
    Countdown(root=str(tmp_path)).records("train")


def test_a_clone_is_read_by_configuration_and_split(tmp_path, datasets):
  clone(datasets, tmp_path)
  assert read(tmp_path) == [(f"openai/gsm8k train row {n}", row) for n, row in enumerate(ROWS, start=1)]
  assert read(tmp_path, "gsm8k/test.jsonl") == [("openai/gsm8k test row 1", ROWS[0])]
  # The question of the clone's test split is no training question.
  task = Gsm8k(root=str(tmp_path), sizes={"validation": 3})
  assert [r["question"] for r in task.records("test")] == ["Q0"]
  assert {r["question"] for r in task.records("train")} <= {"Q1", "Q2"}


def test_files_go_before_parquet_and_parquet_before_a_clone(tmp_path, datasets):
  clone(datasets, tmp_path)
  write_parquet(datasets, tmp_path / "gsm8k/train.parquet", ROWS[1:])
  assert [place for place, _ in read(tmp_path)] == ["gsm8k/train.parquet row 1", "gsm8k/train.parquet row 2"]
  write_lines(tmp_path, NAME, ROWS[:1])
  assert [place for place, _ in read(tmp_path)] == ["gsm8k/train.jsonl line 1"]


@pytest.mark.parametrize("name", tables.PUBLISHED)
def test_the_hub_is_asked_for_what_d1_reads(name, datasets, monkeypatch):
  asked = []
  monkeypatch.setattr(hub, "folder", lambda name, kind: Path("cache") / kind / name)

  def load_dataset(*arguments, **options):
    asked.append((arguments, options))
    return datasets.Dataset.from_list([{"x": 1}])

  monkeypatch.setattr(datasets, "load_dataset", load_dataset)
  repository, configuration, split = tables.PUBLISHED[name]
  assert read("hub", name) == [(f"{repository} {split} row 1", {"x": 1})]
  assert asked == [((f"cache/dataset/hf:{repository}", configuration), {"split": split})]
  assert tables.exists("hub", name)


def test_tasks_read_the_hub(datasets, monkeypatch):
  math = {"problem": "Find $q$.", "solution": "It is $\\boxed{2}$.", "level": 3, "subject": "Algebra"}
  rows = {
    ("openai/gsm8k", "main", "train"): [*ROWS, {"question": "Q", "answer": "seven"}],
    ("openai/gsm8k", "main", "test"): ROWS,
    ("ankner/math-500", None, "train"): [math, {**math, "problem": "Find  $Q$."}],
    ("HuggingFaceH4/MATH-500", None, "test"): [{**math, "problem": "Find $r$.", "answer": "2"}],
    ("Jiayi-Pan/Countdown-Tasks-3to4", None, "train"): [{"target": 68, "nums": [3, 25, 7]}],
  }
  load = lambda name, configuration, split: datasets.Dataset.from_list(rows[name, configuration, split])
  monkeypatch.setattr(datasets, "load_dataset", load)
  monkeypatch.setattr(hub, "folder", lambda name, kind: name.removeprefix("hf:"))
  assert [r["answer"] for r in Gsm8k(root="hub").records("test")] == ["0", "1", "2"]
  with pytest.raises(DataError, match=r"^openai/gsm8k train row 4: answer has 0 marks ####, expected one"):
    Gsm8k(root="hub").records("train")
  answers = [HendrycksMath(root="hub", sizes={"validation": 0}).records(split) for split in ("train", "test")]
  assert [[r["answer"] for r in records] for records in answers] == [["2"], ["2"]]
  (split,) = [s for s in ("demonstrations", "train", "validation", "test") if owns(s)]
  assert list(Countdown(root="hub").records(split)) == [{"target": 68, "nums": [3, 25, 7]}]


def owns(split: str) -> bool:
  try:
    return bool(Countdown(root="hub").records(split))
  except DataError:
    return False


def test_without_the_package_the_error_says_what_to_install(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "datasets", None)
  monkeypatch.setattr(hub, "folder", lambda name, kind: tmp_path)
  (tmp_path / "gsm8k").mkdir()
  (tmp_path / "gsm8k/train.parquet").write_bytes(b"")
  for root, shown in ((tmp_path, "gsm8k/train.parquet"), ("hub", "openai/gsm8k train")):
    with pytest.raises(DataError, match=rf'^{shown}: datasets is not installed: pip install "d1jax\[data\]" brings it'):
      read(root)
  write_lines(tmp_path, NAME, ROWS)
  assert len(read(tmp_path)) == 3


def test_what_cannot_be_read_is_named(tmp_path, datasets, monkeypatch):
  (tmp_path / "gsm8k").mkdir()
  (tmp_path / "gsm8k/train.parquet").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
  with pytest.raises(DataError, match=r"^gsm8k/train.parquet: cannot be read \(.*\); fetch it again"):
    read(tmp_path)
  write_lines(tmp_path, "HuggingFaceH4/MATH-500/other.jsonl", ROWS)
  with pytest.raises(DataError, match=r"^HuggingFaceH4/MATH-500 test: cannot be read \(ValueError: .*split"):
    read(tmp_path, "math/test.jsonl")

  def fail(*arguments, **options):
    raise ConnectionError("Couldn't reach\n the hub")

  monkeypatch.setattr(datasets, "load_dataset", fail)
  with pytest.raises(DataError, match=r"gsm8k/train.parquet: cannot be read \(ConnectionError: Couldn't reach the hub"):
    read(tmp_path)


def test_a_data_set_is_downloaded_from_the_hub(tmp_path, datasets, monkeypatch):
  clone(datasets, tmp_path)
  repository = tmp_path / "openai/gsm8k"
  with hub_server.running(monkeypatch, tmp_path / "cache") as stand_in:
    with pytest.raises(DataError, match=r"^openai/gsm8k train: openai/gsm8k is no folder .*, or point root at a copy$"):
      read("hub")
    stand_in.files["dataset/openai/gsm8k"] = {
      path.relative_to(repository).as_posix(): path.read_bytes() for path in repository.rglob("*") if path.is_file()
    } | {"gsm8k.py": b"raise SystemExit"}
    assert [row for _, row in read("hub")] == ROWS
    assert "gsm8k.py" not in stand_in.fetched()


def test_what_is_not_there_is_named_with_its_places(tmp_path):
  assert not tables.exists(str(tmp_path), NAME)
  places = r"nor gsm8k/train.parquet, nor the repository openai/gsm8k; point root at the folder that holds it"
  places += ", or set root to 'hub' to download it"
  with pytest.raises(DataError, match=rf"^gsm8k/train.jsonl: not found in '{tmp_path}', {places}, or set root to None"):
    read(tmp_path)
  assert not tables.exists("hub", "countdown/test.jsonl")
  with pytest.raises(DataError, match=r"^countdown/test.jsonl: not found in 'hub', nor countdown/test.parquet; point"):
    read("hub", "countdown/test.jsonl")
