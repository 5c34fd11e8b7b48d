"""Trackio stores metrics on this machine, unless TRACKIO_SPACE_ID names another place; `trackio show` opens them."""

from collections.abc import Mapping

import trackio

from d1jax.run.trackers import Run

PROJECT = "d1jax"


class Trackio:
  """A run of trackio; all attempts of a stage share it."""

  def __init__(self, run: Run):
    """Starts or resumes the run."""
    self._run = trackio.init(
      project=PROJECT,
      name=f"{run.name}-{run.stage}-{run.identity}",
      group=f"{run.name}-{run.identity}",
      config=dict(run.config),
      resume="allow",
      embed=False,
    )

  def log(self, step: int, values: Mapping[str, float]) -> None:
    """Passes metrics on."""
    self._run.log(dict(values), step=step)

  def close(self) -> None:
    """Waits until everything is written."""
    self._run.finish()


def build(run: Run) -> Trackio:
  """The tracker of a stage."""
  return Trackio(run)
