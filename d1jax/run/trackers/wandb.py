"""Weights & Biases: one of its runs per stage, which all attempts share.

Its environment variables set the rest: WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE=offline.
"""

import os
from collections.abc import Mapping
from pathlib import Path

import wandb

from d1jax.run.trackers import Run


class Wandb:
  """A run of Weights & Biases."""

  def __init__(self, run: Run):
    """Starts or resumes the run."""
    self._run = wandb.init(
      project=os.environ.get("WANDB_PROJECT", "d1jax"),
      name=f"{run.name}-{run.stage}",
      group=f"{run.name}-{run.identity}",
      id=f"{run.identity}-{run.stage}",
      resume="allow",
      dir=str(run.workdir) if isinstance(run.workdir, Path) else None,
      config=dict(run.config),
      reinit="finish_previous",
    )

  def log(self, step: int, values: Mapping[str, float]) -> None:
    """Passes metrics on; Weights & Biases keeps those of an earlier attempt."""
    self._run.log(dict(values), step=step)

  def close(self) -> None:
    """Waits until everything is passed on."""
    self._run.finish()


def build(run: Run) -> Wandb:
  """The tracker of a stage."""
  return Wandb(run)
