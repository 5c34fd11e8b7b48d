"""Eight forced CPU devices, and every jaxtyping annotation of the package checked at run time.

Programs are compiled without LLVM's optimisations, which halves the time of the suite; XLA's own passes run as
always. Set `XLA_FLAGS=--xla_backend_optimization_level=2` to test what a user runs. What takes long to compile is
compiled once for all tests of a worker and the jobs that they start.
"""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
  # Of a flag that is given twice, XLA takes the last.
  (
    "--xla_backend_optimization_level=0",
    os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=8",
  )
)
CACHE = tempfile.mkdtemp(prefix="d1jax-tests-")
"""Compiled programs; a folder for each worker, since JAX does not lock it."""
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
os.environ |= {"JAX_COMPILATION_CACHE_DIR": CACHE, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}

import jax
import pytest
from jaxtyping import install_import_hook

from tests import typechecker

# All rooms but tasks, whose annotations hold no arrays and whose graders run a hundred thousand times.
ROOMS = ("models", "diffusion", "rl", "data", "parallel", "training", "evaluation", "generation", "intervals")
ROOMS += ("fingerprint", "keys", "microbatch", "report", "state")
install_import_hook([f"d1jax.{room}" for room in ROOMS], f"{typechecker.__name__}.checked")


@pytest.fixture(scope="session", autouse=True)
def eight_devices() -> None:
  assert jax.device_count() == 8, "another JAX was initialised before tests/conftest.py"


@pytest.fixture(scope="session")
def data_root() -> str:
  default = Path(__file__).parents[1] / "../shared/data"
  root = Path(os.environ.get("D1JAX_DATA", default)).resolve()
  if not (root / "sudoku/train.csv").is_file():
    pytest.skip(f"no data folder at {root}; set D1JAX_DATA to one (see its README)")
  return str(root)
