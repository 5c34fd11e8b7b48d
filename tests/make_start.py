"""Writes `tests/start`: a small LLaDA folder that knows the format of terse 4x4 Sudoku answers, and not more.

Tests of diffu-GRPO, evaluation and generation start from it instead of training their own (`jobs.started`). Run
`python -m tests.make_start` where the layout of folders or what the tests ask of it changes.
"""

import shutil
import tempfile
from pathlib import Path

from d1jax import export, recipe
from tests import hub, jobs


def main() -> None:
  with tempfile.TemporaryDirectory() as scratch:
    base, run = Path(scratch) / "base", Path(scratch) / "run"
    hub.write(base, "llada", dtype="bfloat16", embed=32, heads=2, kv_heads=2, head_size=16, mlp=64, layers=2)
    fields = {"model__pretrained": str(base), "sft__steps": 300, "task__sizes__demonstrations": 64}
    recipe.run(jobs.started(run, "sft", **fields))
    exporting = jobs.load("export")
    exporting.update(checkpoint=str(run), output=str(Path(scratch) / "start"))
    made = export.run(exporting)
    shutil.rmtree(jobs.START, ignore_errors=True)
    shutil.copytree(made, jobs.START)


if __name__ == "__main__":
  main()
