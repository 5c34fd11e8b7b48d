"""Writes the page of a run while it trains; a failure is a warning, and the run goes on."""

import logging
from collections.abc import Callable
from pathlib import Path

from d1jax.errors import RunError, line_of
from d1jax.evaluation.evaluator import Evaluation
from d1jax.page import html, picture, run_files, samples
from d1jax.parallel import multihost
from d1jax.rl.prompts import Prompts
from d1jax.run.workdir import Folder, folder, write_atomically

NAME = "report.html"

log = logging.getLogger(__name__)


class Page:
  """The page of one run. Only process 0 writes."""

  def __init__(self, workdir: Folder, compare: str | None = None):
    """Keeps the run's folder; `compare` is another run's, which the page shows beside this one."""
    self._workdir, self._compare = workdir, compare
    self._failures: set[str] = set()

  def check(self, mode: str) -> None:
    """Raises a RunError if the other run cannot be compared with a run of this mode."""
    if self._compare:
      check_other(self._workdir, mode, self._compare, "config.report.compare")

  def keep(self, stage: str, iteration: int, found: Evaluation, prompts: Prompts) -> None:
    """Stores the samples of a validation, whose evaluation traces them."""

    def store() -> None:
      samples.append(self._workdir, samples.of(stage, iteration, found, prompts.prefills, prompts.tokenizer))

    self._try(samples.NAME, store)

  def draw(self) -> None:
    """Writes the page anew from what is in the folder."""
    self._try(NAME, lambda: write_atomically(self._workdir / NAME, drawn(self._workdir, self._compare).encode()))

  def close(self) -> None:
    """Writes the page, and the picture of the learning curves, at the end of a run."""
    self.draw()
    self._try(picture.NAME, lambda: picture.write(self._workdir))

  def _try(self, name: str, write: Callable[[], None]) -> None:
    """Writes on process 0; any failure is a warning, which is said once."""
    if not multihost.is_main():
      return
    try:
      write()
    except Exception as error:
      said = f"{self._workdir / name} is not written ({type(error).__name__}: {line_of(error)}); the run goes on"
      if said not in self._failures:
        self._failures.add(said)
        log.warning("%s", said)


def drawn(workdir: Folder, compare: str | None) -> str:
  """The page of the run in a folder, beside that of another one if there is one.

  Raises:
    RunError: a folder holds no run.
  """
  return html.render(run_files.read(workdir), run_files.read(folder(compare)) if compare else None)


def check_other(workdir: Folder, mode: str, compare: str, field: str) -> None:
  """Checks that two runs can be drawn side by side.

  The folder of the one run, whose mode is `mode`, may be new. `field` is what the message calls the field with the name
  of the other run's folder.

  Raises:
    RunError: there is no other run, it has another mode, or it is the same.
  """
  other = folder(compare)
  if _place(other) == _place(workdir):
    raise RunError(f"{field}={compare} is this run itself: name the work directory of another run")
  try:
    config = run_files.read_config(other)
  except RunError as error:
    raise RunError(f"{field}: {error}") from error
  if config["mode"] != mode:
    raise RunError(f"{field}={compare} is a run of the mode {config['mode']}, this one of {mode}: name one of {mode}")


def _place(path: Folder) -> Folder:
  return path.resolve() if isinstance(path, Path) else path
