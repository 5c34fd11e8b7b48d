import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data_root() -> str:
  default = Path(__file__).parents[2] / "../shared/data"
  root = Path(os.environ.get("D1JAX_DATA", default)).resolve()
  if not (root / "sudoku/train.csv").is_file():
    pytest.skip(f"no data folder at {root}; set D1JAX_DATA to one (see its README)")
  return str(root)
