"""The face of the package: its names, and the loop of one's own that the notebook and docs/library.md write with them.

`python -m tests.test_library` runs the notebook in full and keeps its outputs.
"""

import ast
import hashlib
import io
import re
import subprocess
import sys
from contextlib import redirect_stdout

import nbformat
import pytest
from nbclient import NotebookClient

import d1jax
from tests import jobs

NOTEBOOK = jobs.ROOT / "notebooks" / "own_loop.ipynb"
LOOP = ("model", "fine-tuning", "loop")


def cells() -> dict[str, nbformat.NotebookNode]:
  return {cell.id: cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"}


def digest() -> str:
  return hashlib.sha256("\0".join(cell.source for cell in cells().values()).encode()).hexdigest()


def imported(source: str) -> set[str]:
  return {alias.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import) for alias in node.names}


def test_every_name_of_the_package_is_there_and_documented():
  assert dir(d1jax) == sorted(d1jax.__all__)
  for name in d1jax.__all__:
    assert getattr(d1jax, name).__doc__, name
  with pytest.raises(AttributeError, match="no attribute 'nothing'"):
    _ = d1jax.nothing
  with open(jobs.ROOT / "docs" / "library.md", encoding="utf-8") as page:
    text = page.read()
  assert [name for name in d1jax.__all__ if f"`d1jax.{name}" not in text and f"d1jax.{name}" not in text] == []


def test_the_package_is_imported_without_jax():
  code = "import sys, d1jax; sys.exit('jax' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_loop_of_ones_own_is_short_and_needs_nothing_else():
  own = cells()
  assert {name for cell in LOOP for name in imported(own[cell].source)} == {"d1jax", "jax", "optax"}
  assert len([line for line in own["loop"].source.splitlines() if line.strip()]) <= 30


def test_the_notebook_shows_what_its_cells_print_and_that_they_learn():
  assert nbformat.read(NOTEBOOK, as_version=4).metadata["executed"] == digest(), "run python -m tests.test_library"
  printed = "".join(output.text for output in cells()["evaluation"].outputs)
  low, high = ([float(x) for x in re.findall(r"([\d.]+)%", line)] for line in printed.splitlines())
  assert low[2] < high[1], "the intervals of before and after are apart"


@pytest.mark.slow(reason="compiles programs of its own")
def test_the_notebook_runs():
  sources = [cell.source for cell in cells().values()]
  short = "\n".join(sources)
  for whole, part in (
    ("FINE_TUNING_STEPS, STEPS = 1000, 300", "FINE_TUNING_STEPS, STEPS = 5, 3"),
    ('sizes={"demonstrations": 24}', 'sizes={"demonstrations": 24, "test": 40}'),
    ("prompts=64", "prompts=4"),
  ):
    assert short.count(whole) == 1
    short = short.replace(whole, part)
  said = io.StringIO()
  with redirect_stdout(said):
    exec(compile(short, NOTEBOOK.name, "exec"), {"__name__": "own_loop"})
  assert re.search(r"after diffu-GRPO +solved +\d+\.\d%", said.getvalue())
  assert "'surprise'" in said.getvalue(), "the figure of the notebook's own loss"
  assert "'solved_interval'" in said.getvalue(), "of its own task"


def main() -> None:
  book = nbformat.read(NOTEBOOK, as_version=4)
  where = {"metadata": {"path": str(jobs.ROOT)}}
  NotebookClient(book, timeout=3600, record_timing=False, coalesce_streams=True, resources=where).execute()
  book.metadata["executed"] = digest()
  nbformat.write(book, NOTEBOOK)


if __name__ == "__main__":
  main()
