"""Eight forced CPU devices, and every jaxtyping annotation of the package checked at run time.

Programs are compiled quickly, to slow code (`tests.QUICK_TO_COMPILE`): compiling is most of what tests do. XLA's own
passes over a program run as always. `XLA_FLAGS` that are set outside come later, and win. What takes long to compile is
compiled once for all tests of a session and the jobs that they start; or of several sessions, if `D1JAX_TEST_CACHE`
names a folder for it.
"""

import os
from pathlib import Path

from tests import QUICK_TO_COMPILE
from tests.session import FOLDER

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
  # Of a flag that is given twice, XLA takes the last.
  (
    QUICK_TO_COMPILE,
    os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=8",
  )
)
# JAX does not lock it: what is read while it is written is not understood, and compiled once more.
os.environ |= {
  "JAX_COMPILATION_CACHE_DIR": os.environ.get("D1JAX_TEST_CACHE", str(FOLDER / "cache")),
  "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
  "HF_HUB_OFFLINE": "1",
  "HF_DATASETS_OFFLINE": "1",
}

import hypothesis
import jax
import jax.numpy as jnp
import pytest
from jaxtyping import install_import_hook

import d1jax
from tests import session, typechecker
from tests.buckets import bucket

__all__ = ["bucket"]

# No deadline: how fast the machine is decides nothing. `make test-slow` asks for the full profile.
hypothesis.settings.register_profile("full", max_examples=60, deadline=None)
hypothesis.settings.register_profile("quick", max_examples=20, deadline=None)
hypothesis.settings.load_profile("quick")

# All rooms but tasks, whose annotations hold no arrays and whose graders run a hundred thousand times.
ROOMS = ("models", "diffusion", "rl", "data", "parallel", "run", "telemetry", "training", "evaluation", "generation")
ROOMS += ("completer", "fingerprint", "intervals", "keys", "microbatch", "model", "optimizer", "publish", "recipe")
ROOMS += ("report", "results", "serving", "source", "state", "weights")
install_import_hook([f"d1jax.{room}" for room in ROOMS], f"{typechecker.__name__}.checked")


def pytest_configure(config: pytest.Config) -> None:
  config.pluginmanager.register(session)


@pytest.fixture(scope="session", autouse=True)
def eight_devices() -> None:
  assert jax.device_count() == 8, "another JAX was initialised before tests/conftest.py"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """A LLaDA of 0.1M parameters with random weights; who changes it copies it first."""
  from tests import hub  # imports what is checked at run time

  return hub.write(tmp_path_factory.mktemp("hub") / "llada", dtype="float32")


@pytest.fixture(scope="session")
def model(folder: Path) -> "d1jax.Model":
  """It, on one device; it keeps what its tests compile."""
  return d1jax.from_pretrained(folder, jnp.float32)


@pytest.fixture(scope="session")
def data_root() -> str:
  default = Path(__file__).parents[1] / "../shared/data"
  root = Path(os.environ.get("D1JAX_DATA", default)).resolve()
  if not (root / "sudoku/train.csv").is_file():
    pytest.skip(f"no data folder at {root}; set D1JAX_DATA to one (see its README)")
  return str(root)
