"""The notebook: it runs from top to bottom, and what it shows is what a run left.

`python -m tests.test_notebook` runs it with the setting "tiny" and keeps the outputs.
"""

import base64
import hashlib
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import nbformat
import pytest
from absl import flags
from ml_collections import config_flags
from nbclient import NotebookClient
from PIL import Image

from d1jax.run.experiment import check_batches
from d1jax.run.metrics import read_records
from tests import QUICK_TO_COMPILE, jobs

NOTEBOOK = jobs.ROOT / "notebooks" / "d1jax_tpu_demo.ipynb"


def cells(book: nbformat.NotebookNode) -> dict[str, nbformat.NotebookNode]:
  """The cells of code, by name."""
  return {cell.id: cell for cell in book.cells if cell.cell_type == "code"}


def digest(book: nbformat.NotebookNode) -> str:
  return hashlib.sha256("\0".join(cell.source for cell in cells(book).values()).encode()).hexdigest()


def execute(folder: Path, setting: str) -> nbformat.NotebookNode:
  """The notebook after a run in a folder that sees this code, and that keeps what the run leaves."""
  for name in ("configs", "d1jax"):
    (folder / name).symlink_to(jobs.ROOT / name)
  book = nbformat.read(NOTEBOOK, as_version=4)
  environment = os.environ | {"XLA_FLAGS": QUICK_TO_COMPILE if setting == "smoke" else ""}
  environment |= {"D1JAX_DEMO": setting, "JAX_PLATFORMS": "cpu", "IPYTHONDIR": str(folder / "ipython")}
  where = {"metadata": {"path": str(folder)}}
  client = NotebookClient(book, timeout=3600, record_timing=False, coalesce_streams=True, resources=where)
  client.execute(env=environment)
  book.metadata["executed"] = digest(book)
  return book


def printed(cell: nbformat.NotebookNode) -> str:
  return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def shown(cell: nbformat.NotebookNode, kind: str) -> str:
  """The cell's one result of a kind."""
  (found,) = [output.data[kind] for output in cell.outputs if kind in output.get("data", {})]
  return found


def film(book: nbformat.NotebookNode) -> bytes:
  (encoded,) = re.findall(r'src="data:image/gif;base64,([^"]+)"', shown(cells(book)["film"], "text/html"))
  return base64.b64decode(encoded)


def picture(book: nbformat.NotebookNode) -> bytes:
  return base64.b64decode(shown(cells(book)["curves"], "image/png"))


def table(book: nbformat.NotebookNode) -> dict[str, list[str]]:
  """What the table says of each arm."""
  rows = [line.strip("| ").split(" | ") for line in shown(cells(book)["table"], "text/markdown").splitlines()[2:]]
  return {name: numbers for name, *numbers in rows}


@pytest.fixture(scope="module")
def committed():
  return nbformat.read(NOTEBOOK, as_version=4)


SLOW = pytest.mark.slow(reason="a kernel that runs the recipe")


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
  folder = tmp_path_factory.mktemp("notebook")
  return execute(folder, "smoke"), folder / "runs" / "demo-smoke"


@SLOW
def test_it_trains_and_shows_what_the_run_left(executed):
  book, run = executed
  results = json.loads((run / "results.json").read_text())
  assert [(r["stage"], r["iteration"]) for r in read_records(run / "metrics.jsonl")] == [
    *(("sft", i + 1) for i in range(20)),
    *(("grpo", i + 1) for i in range(8)),
  ]
  assert picture(book) == (run / "learning_curves.png").read_bytes()
  arms = zip(table(book).values(), (results[arm] for arm in ("baseline", "before", "after")), strict=True)
  for (solved, interval, cell_accuracy, puzzles), arm in arms:
    assert solved == f"{100 * arm['solved']:.1f}%"
    assert interval == " to ".join(f"{100 * end:.1f}%" for end in arm["solved_interval"])
    assert cell_accuracy == f"{100 * arm['cell_accuracy']:.1f}%"
    assert int(puzzles) == arm["n"] == 88


@SLOW
def test_it_asks_the_model_and_shows_how_the_answer_came(executed):
  book, run = executed
  assert film(book) == (run / "film.gif").read_bytes()
  answer = printed(cells(book)["ask"]).splitlines()[0]
  assert 1 <= len(answer) <= 18
  assert Image.open(io.BytesIO(film(book))).n_frames == 1 + 18 + 1  # hidden, a token each, the end
  assert not cells(book)["llada"].outputs


def test_what_is_committed_is_a_run_of_the_code_that_is_committed(committed):
  nbformat.validate(committed)
  assert committed.metadata["executed"] == digest(committed), "run python -m tests.test_notebook"
  assert [cell.execution_count for cell in cells(committed).values()] == [*range(1, 1 + len(cells(committed)))]
  outputs = [output for cell in cells(committed).values() for output in cell.outputs]
  assert {output.output_type for output in outputs} == {"stream", "execute_result"}
  assert {output.name for output in outputs if output.output_type == "stream"} == {"stdout"}
  assert NOTEBOOK.stat().st_size < 500_000
  assert Image.open(io.BytesIO(picture(committed))).size == (1320, 456)
  assert Image.open(io.BytesIO(film(committed))).n_frames == 20
  texts = "".join(printed(cell) for cell in cells(committed).values())
  assert not re.findall(r"(?<![\w.])/\w+/\S*", texts), "a path of the machine"


def test_the_committed_run_learned_and_its_table_is_the_one_that_it_printed(committed):
  closing = printed(cells(committed)["train"]).partition("Held-out split")[2]
  arms = table(committed)
  for name, (solved, interval, cell_accuracy, puzzles) in arms.items():
    said = name.removeprefix("after ").replace(" and ", " + ")
    (line,) = [line for line in closing.splitlines() if line.startswith(said + "  ")]
    low, high = re.findall(r"[\d.]+(?=%)", interval)
    assert re.findall(r"[\d.]+", line)[:4] == [solved[:-1], low, high, cell_accuracy[:-1]]
    assert puzzles in (line.split()[-1], *re.findall(r"n = (\d+)", closing))
  before, after = (re.findall(r"[\d.]+(?=%)", arms[name][1]) for name in ("after SFT", "after SFT and diffu-GRPO"))
  assert float(after[0]) > float(before[1])


def test_it_fetches_the_repository_and_installs_where_there_is_none(committed, tmp_path, monkeypatch):
  source = cells(committed)["install"].source
  repository = tmp_path / "repository"
  (repository / "configs").mkdir(parents=True)
  (repository / "configs" / "grpo.py").touch()
  git = ["git", "-C", str(repository), "-c", "user.name=a", "-c", "user.email=a@b.c"]
  for arguments in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "A repository"]):
    subprocess.run([*git, *arguments], check=True)
  place = tmp_path / "place"
  place.mkdir()
  monkeypatch.chdir(place)
  with pytest.raises(ValueError, match="set REPOSITORY"):
    exec(source, {"os": os, "REPOSITORY": ""})
  run, calls = subprocess.run, []

  def observed(command, **options):
    calls.append([str(part) for part in command])
    return run(command, **options) if "pip" not in command else None

  monkeypatch.setattr(subprocess, "run", observed)
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "libtpu" or None)
  exec(source, {"os": os, "REPOSITORY": repository.as_uri()})
  assert Path.cwd() == place / "d1jax"
  assert (Path.cwd() / "configs" / "grpo.py").is_file()
  assert calls[-1][1:] == ["-m", "pip", "install", "--quiet", "-r", "requirements.txt", "jax[tpu]"]
  monkeypatch.chdir(place)
  calls.clear()
  exec(source, {"os": os, "REPOSITORY": "nothing is fetched twice"})
  assert not [command for command in calls if "git" in command]


@pytest.mark.parametrize(("chips", "kind"), [(1, ""), (4, ""), (8, ""), (8, ",v5e"), (8, ",v6e"), (8, ",h100")])
def test_the_section_of_llada_sets_fields_that_there_are(chips, kind, committed, monkeypatch):
  fetched, commands = llada(committed, monkeypatch, f"{chips} {15 * chips}\n", kind)
  assert fetched == [("GSAI-ML/LLaDA-8B-Instruct", "LLaDA-8B-Instruct")]
  (*train, config), (*generate, asked) = commands
  assert train == generate == ["-m", "d1jax.main"]
  check_batches(config, chips)
  assert config.model.pretrained == "LLaDA-8B-Instruct"
  assert config.grpo.prompts_per_iteration * config.grpo.num_generations == 12 * chips
  assert config.evaluation.batch_size % chips == 0
  assert asked.checkpoint == config.workdir


def test_the_section_of_llada_stops_where_memory_is_short(committed, monkeypatch):
  with pytest.raises(RuntimeError, match="8 GiB of memory together, LLaDA-8B needs 12"):
    llada(committed, monkeypatch, "1 8\n", "")


def llada(book, monkeypatch, counted: str, kind: str):
  """Runs the section on a machine that counts devices and GiB so: what it fetched, its commands, their configs."""
  fetched, commands = [], []
  hub = types.ModuleType("huggingface_hub")
  hub.snapshot_download = lambda repository, local_dir: fetched.append((repository, local_dir))
  monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
  monkeypatch.chdir(jobs.ROOT)

  def python(*arguments: str) -> None:
    given = ["main", *arguments[2:]]
    monkeypatch.setattr(sys, "argv", given)  # where config_flags looks for fields
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    assert values(given) == ["main"]
    commands.append([*arguments[:2], values.config])

  process = types.SimpleNamespace(run=lambda *_, **__: types.SimpleNamespace(stdout=counted))
  source = cells(book)["llada"].source
  for given, wanted in (("LLADA = False", "LLADA = True"), ('"lora,gsm8k"', f'"lora,gsm8k{kind}"')):
    assert source.count(given) == 1
    source = source.replace(given, wanted)
  exec(source, dict(subprocess=process, sys=sys, Path=Path, python=python))
  return fetched, commands


def test_the_pages_that_it_names_are_there(committed):
  named = set(re.findall(r"docs/\w+\.md", " ".join(cell.source for cell in committed.cells)))
  assert named
  assert [name for name in sorted(named) if not (jobs.ROOT / name).is_file()] == []


def main() -> None:
  with tempfile.TemporaryDirectory() as folder:
    nbformat.write(execute(Path(folder), "tiny"), NOTEBOOK)


if __name__ == "__main__":
  main()
