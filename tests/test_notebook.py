"""The notebook: it runs from top to bottom, and what it shows is what a run left.

`python -m tests.test_notebook` runs it in full and keeps the outputs.
"""

import base64
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

from d1jax.run.metrics import read_records
from tests import QUICK_TO_COMPILE, jobs

NOTEBOOK = jobs.ROOT / "notebooks" / "d1jax_tpu_demo.ipynb"


def cells(book: nbformat.NotebookNode) -> dict[str, nbformat.NotebookNode]:
  """The cells of code, by name."""
  return {cell.id: cell for cell in book.cells if cell.cell_type == "code"}


def digest(book: nbformat.NotebookNode) -> str:
  return hashlib.sha256("\0".join(cell.source for cell in cells(book).values()).encode()).hexdigest()


def replaced(book: nbformat.NotebookNode, name: str, old: str, new: str) -> None:
  cell = cells(book)[name]
  assert cell.source.count(old) == 1
  cell.source = cell.source.replace(old, new)


def execute(book: nbformat.NotebookNode, folder: Path, **environment: str) -> None:
  """Runs the notebook in a folder that sees this code and this environment, and that keeps what the run leaves."""
  for name in ("configs", "d1jax", "requirements.txt"):
    (folder / name).symlink_to(jobs.ROOT / name)
  (folder / ".venv").symlink_to(sys.prefix)
  own = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "IPYTHONDIR": str(folder / "ipython")} | environment
  where = {"metadata": {"path": str(folder)}}
  client = NotebookClient(book, timeout=3600, record_timing=False, coalesce_streams=True, resources=where)
  client.execute(env=own)


def printed(cell: nbformat.NotebookNode) -> str:
  return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def shown(cell: nbformat.NotebookNode, kind: str) -> str:
  """The cell's one result of a kind."""
  (found,) = [output.data[kind] for output in cell.outputs if kind in output.get("data", {})]
  return found


def film(book: nbformat.NotebookNode) -> Image.Image:
  (encoded,) = re.findall(r'src="data:image/gif;base64,([^"]+)"', shown(cells(book)["ask"], "text/html"))
  return Image.open(io.BytesIO(base64.b64decode(encoded)))


def picture(book: nbformat.NotebookNode, name: str) -> Image.Image:
  return Image.open(io.BytesIO(base64.b64decode(shown(cells(book)[name], "image/png"))))


def table(book: nbformat.NotebookNode) -> dict[str, list[str]]:
  """What the table says of each arm."""
  rows = [line.strip("| ").split(" | ") for line in shown(cells(book)["table"], "text/markdown").splitlines()[2:]]
  return {name: numbers for name, *numbers in rows}


@pytest.fixture
def committed():
  return nbformat.read(NOTEBOOK, as_version=4)


@pytest.mark.slow(reason="a kernel, and two commands in processes of their own")
def test_it_asks_trains_and_shows_what_the_run_left(committed, tmp_path):
  book, run = committed, tmp_path / "runs" / "colab-smoke"
  replaced(book, "settings", 'SETTING = "tiny"', 'SETTING = "smoke"')
  small = [flag for flag in jobs.flags(run, **jobs.BRIEF) if not flag.startswith(("--config=", "--config.workdir="))]
  replaced(book, "train", '"train", SETTING,', f'"train", SETTING, *{small},')
  # As `jobs.start` has it: what other tests have compiled for the same run is read.
  execute(book, tmp_path, XLA_FLAGS=QUICK_TO_COMPILE, JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
  assert "\nright\n" in printed(cells(book)["ask"])
  assert film(book).n_frames == 1 + 18 + 1  # hidden, a token each, the end

  assert [(r["stage"], r["iteration"]) for r in read_records(run / "metrics.jsonl")] == [
    *(("sft", i + 1) for i in range(40)),
    *(("grpo", i + 1) for i in range(6)),
  ]
  assert picture(book, "train").size == (990, 374)
  results = json.loads((run / "results.json").read_text())
  arms = zip(table(book).values(), (results[arm] for arm in ("baseline", "before", "after")), strict=True)
  for (solved, interval, cell_accuracy, puzzles), arm in arms:
    assert solved == f"{100 * arm['solved']:.1f}%"
    assert interval == " to ".join(f"{100 * end:.1f}%" for end in arm["solved_interval"])
    assert cell_accuracy == f"{100 * arm['cell_accuracy']:.1f}%"
    assert int(puzzles) == arm["n"] == 24
  assert re.match(r"Of 24 puzzles, diffu-GRPO solved \d+ that SFT failed", printed(cells(book)["puzzles"]))


def names_of(book: nbformat.NotebookNode, run: Path) -> dict:
  """The functions of the cell that trains, without a training; pictures are figures."""
  names = {"RUN": run, "Path": Path, "Image": object}
  functions = cells(book)["train"].source.partition("\ntrain(")[0]
  exec(f"{functions}\npicture = lambda figure: figure", names)
  return names


def test_the_curve_grows_while_it_trains(committed, tmp_path):
  curves = names_of(committed, tmp_path)["curves"]
  points = lambda: [
    [*zip(*line.get_data(), strict=True)] for axes in curves(tmp_path, "said").axes for line in axes.lines
  ]
  assert points() == [[(1, 0), (1, 1)], []], "the end of SFT alone"
  (tmp_path / "config.json").write_text('{"sft": {"steps": 2}, "grpo": {"steps": 3}}')
  lines = [
    '{"stage": "sft", "iteration": 1}',
    '{"stage": "sft", "iteration": 2, "validation": 0.25}',
    '{"stage": "grpo", "iteration": 1, "reward": 0.5, "validation": 0.5}',
    '{"stage": "grpo", "iteration": 2, "reward": 1.5}',
    '{"stage": "grpo", "iter',
  ]
  (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
  assert points() == [[(2, 25)], [(3, 50)], [(2, 0), (2, 1)], [(1, 0.5), (2, 1)]]


def test_puzzles_are_those_that_sft_failed_and_their_errors_are_marked(committed, tmp_path, capsys):
  record = {"puzzle": "0300413012003420", "solution": "2314413212433421"}
  lines = {True: [record["solution"]] * 3 + ["x"], False: ["2314413212443421", record["solution"], "23", "x"]}
  (tmp_path / "completions").mkdir()
  for name, late in (("before", False), ("after", True)):
    answers = [{"record": record, "text": t, "metrics": {"solved": [t == record["solution"], 1]}} for t in lines[late]]
    (tmp_path / f"completions/{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in answers))
  names, figures = names_of(committed, tmp_path), []
  exec(cells(committed)["puzzles"].source, names | {"display": figures.append})
  assert capsys.readouterr().out == "Of 4 puzzles, diffu-GRPO solved 2 that SFT failed, and failed 0 that SFT solved.\n"
  first, second, nothing, solved, _, _ = figures[0].axes
  marked = lambda axes, color: "".join(text.get_text() for text in axes.texts if text.get_color() == color)
  assert (marked(first, names["RED"]), marked(second, names["RED"])) == ("4", "?" * 14)
  assert marked(first, "#aaaaaa") == marked(solved, "#aaaaaa") == record["puzzle"].replace("0", "")
  assert [axes.get_title() for axes in (first, second, nothing, solved)] == [
    *("after SFT: 1 wrong", "after SFT: 14 wrong", "", "after diffu-GRPO: right")
  ]


def test_what_is_committed_is_a_run_of_the_code_that_is_committed(committed):
  nbformat.validate(committed)
  assert committed.metadata["executed"] == digest(committed), "run python -m tests.test_notebook"
  assert [cell.execution_count for cell in cells(committed).values()] == [*range(1, 1 + len(cells(committed)))]
  outputs = [output for cell in cells(committed).values() for output in cell.outputs]
  assert {output.output_type for output in outputs} == {"stream", "execute_result", "display_data"}
  assert {output.name for output in outputs if output.output_type == "stream"} == {"stdout"}
  assert NOTEBOOK.stat().st_size < 500_000
  assert picture(committed, "train").size == (990, 374)
  assert film(committed).n_frames == 20
  texts = "".join(printed(cell) for cell in cells(committed).values())
  assert not re.findall(r"(?<![\w.])/\w+/\S*", texts), "a path of the machine"


def test_the_committed_run_learned(committed):
  before, after = (
    re.findall(r"[\d.]+(?=%)", table(committed)[name][1]) for name in ("after SFT", "after SFT and diffu-GRPO")
  )
  assert float(after[0]) > float(before[1])
  won, lost = map(int, re.findall(r"(?:solved|failed) (\d+)", printed(cells(committed)["puzzles"])))
  assert won > 3 * lost
  assert picture(committed, "puzzles").size == (792, 572)


class Process:
  """A command that is noted down and not run, but for `git clone`, which leaves a repository."""

  asked: ClassVar[list[list[str]]] = []

  def __init__(self, command, **_):
    self.asked.append([str(part) for part in command])
    self.stdout, self.returncode = (), 0
    if command[0] == "git":
      repository(Path(command[-1]))

  def __enter__(self):
    return self

  def __exit__(self, *_):
    pass


def repository(folder: Path) -> None:
  (folder / "d1jax").mkdir(parents=True)
  (folder / "d1jax/recipe.py").touch()


@pytest.mark.parametrize(
  ("given", "devices", "home", "installed"),
  [
    ("url", "", "d1jax", ["-r", "requirements.txt"]),
    ("clone", "nvidia-smi", "", ["-r", "requirements.txt", "jax[cuda12]"]),
    ("zip", "/dev/vfio/", "unpacked/d1jax-main", ["-r", "requirements.txt", "jax[tpu]"]),
    ("wheel", "/dev/accel", "", ["d1jax-0.1.0-py3-none-any.whl[train,eval]", "jax[tpu]"]),
  ],
)
def test_it_installs_what_it_finds(given, devices, home, installed, committed, tmp_path, monkeypatch, capsys):
  if given == "clone":
    repository(tmp_path)
  elif given == "zip":
    with zipfile.ZipFile(tmp_path / "d1jax-main.zip", "w") as archive:
      archive.writestr("d1jax-main/d1jax/recipe.py", "")
  elif given == "wheel":
    (tmp_path / "d1jax-0.1.0-py3-none-any.whl").touch()
  monkeypatch.setattr(Process, "asked", [])
  monkeypatch.setattr(subprocess, "Popen", Process)
  monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=0))
  monkeypatch.setattr(shutil, "which", lambda name: devices == name)
  monkeypatch.setattr("glob.glob", lambda pattern: [pattern] if devices and pattern.startswith(devices) else [])
  monkeypatch.chdir(tmp_path)
  names = {"Path": Path, "REPOSITORY": "https://example.org/d1jax" if given == "url" else ""}
  for _ in range(2):  # a cell that runs again finds what it made
    exec(cells(committed)["install"].source, names)
    assert Path.cwd() == tmp_path / home
  environment, pip = Process.asked[-2:]
  assert environment[1:] == ["-m", "venv", "--without-pip", ".venv"]
  assert pip[1:6] == ["-m", "pip", "--python", str(Path.cwd() / ".venv/bin/python"), "install"]
  assert [part.removeprefix(f"{tmp_path}/") for part in pip[8:]] == installed
  assert ("git" in [command[0] for command in Process.asked]) == (given == "url")


def test_without_code_it_says_what_to_do_and_the_project_has_one_address(committed, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  names: dict = {}
  exec(cells(committed)["settings"].source, names)
  project = tomllib.loads((jobs.ROOT / "pyproject.toml").read_text())["project"]
  assert names["REPOSITORY"] == project.get("urls", {}).get("Repository", "")
  with pytest.raises(ValueError, match="there is no d1jax here: set REPOSITORY above; or put a zip"):
    exec(cells(committed)["install"].source, names | {"REPOSITORY": ""})


def test_the_pages_that_it_names_are_there(committed):
  named = set(re.findall(r"(?:docs|notebooks)/\w+\.\w+", " ".join(cell.source for cell in committed.cells)))
  assert {"docs/llada.md", "docs/tasks.md"} <= named
  assert [name for name in sorted(named) if not (jobs.ROOT / name).is_file()] == []


def main() -> None:
  book = nbformat.read(NOTEBOOK, as_version=4)
  with tempfile.TemporaryDirectory() as folder:
    execute(book, Path(folder))
  book.metadata["executed"] = digest(book)
  nbformat.write(book, NOTEBOOK)


if __name__ == "__main__":
  main()
