"""Trackio, which keeps its figures on this machine unless TRACKIO_SPACE_ID names a place for them: `trackio show`."""

from collections.abc import Mapping

import trackio

from d1jax.run.trackers import Run

PROJECT = "d1jax"


class Trackio:
  """A run of trackio; all attempts of a stage share it."""

  def __init__(self, run: Run):
    """Begins it, or goes on with it."""
    self._run = trackio.init(
      project=PROJECT,
      name=f"{run.name}-{run.stage}-{run.identity}",
      group=f"{run.name}-{run.identity}",
      config=dict(run.config),
      resume="allow",
      embed=False,
    )

  def log(self, step: int, values: Mapping[str, float]) -> None:
    """Hands figures over."""
    self._run.log(dict(values), step=step)

  def close(self) -> None:
    """Waits until all is written."""
    self._run.finish()


def build(run: Run) -> Trackio:
  """The tracker of a stage."""
  return Trackio(run)
