"""The first lines of a run: its devices, versions, parameters and folder; and what takes long before it trains."""

import contextlib
import logging
import math
import os
import platform
import sys
import time
from collections.abc import Iterator

import jax

from d1jax.model import Model
from d1jax.models.transformer import parameter_count
from d1jax.parallel import chips
from d1jax.run.workdir import Folder
from d1jax.version import __version__

log = logging.getLogger(__name__)


def say(model: Model, workdir: Folder) -> None:
  """Prints the first lines, and warns if the machine has an accelerator that JAX does not see."""
  devices, weights = model.weights.mesh.devices.flatten(), model.weights
  whole = parameter_count(weights.network)
  trained = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(weights.abstract_trainable))
  several = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
  print(
    f"d1jax {__version__}, jax {jax.__version__}, Python {platform.python_version()}, on {len(devices)} x"
    f" {devices[0].device_kind}{several}"
  )
  print(
    f"{workdir}: {count(whole)} parameters" + (f", of which {count(trained)} are trained" if trained < whole else "")
  )
  if devices[0].platform == "cpu" and not os.environ.get("JAX_PLATFORMS") and (found := chips.attached()):
    name = "a TPU" if found == "tpu" else "an NVIDIA GPU"
    log.warning(
      "this machine has %s, but JAX sees only the CPU: stop, run make setup JAX=%s, and start again (docs/install.md)",
      name,
      found,
    )


def count(number: float) -> str:
  """A large number in a few characters: `0.2M`, `8.0B`."""
  return f"{number / 1e9:.1f}B" if number >= 1e9 else f"{number / 1e6:.1f}M"


@contextlib.contextmanager
def timed(what: str, *, on_stderr: bool = False) -> Iterator[None]:
  """Prints what is being done, and behind it how long it took: `compiling the steps of sft ... 8 s`.

  Args:
    what: is being done.
    on_stderr: whether it is said on standard error; otherwise on standard output.
  """
  print(f"{what} ...", end="", flush=True, file=sys.stderr if on_stderr else None)
  began, ended = time.monotonic(), " stopped"
  try:
    yield
    ended = f" {time.monotonic() - began:.0f} s"
  finally:
    print(ended, flush=True, file=sys.stderr if on_stderr else None)
