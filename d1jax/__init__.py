"""Reinforcement learning for diffusion language models, on JAX.

Names are imported when they are first used, so that `import d1jax` takes no time and starts no device.
docs/library.md walks through them; `d1jax.train`, or `d1jax train` on the command line, runs the whole recipe.
"""

import importlib
from typing import TYPE_CHECKING, Any

from d1jax.version import __version__

if TYPE_CHECKING:
  from d1jax import tasks
  from d1jax.diffusion.denoiser import Denoiser
  from d1jax.diffusion.rollout import Rollout
  from d1jax.diffusion.rollout import SamplerSpec as Sampler
  from d1jax.diffusion.sampler import sample
  from d1jax.evaluation.evaluator import evaluate
  from d1jax.evaluation.likelihood import log_likelihood
  from d1jax.generation.generate import generate
  from d1jax.model import Model, from_pretrained, from_scratch
  from d1jax.models.lora import LoraSpec as Lora
  from d1jax.optimizer import adamw
  from d1jax.parallel.mesh import make_mesh
  from d1jax.presets import train
  from d1jax.rl import advantage as advantages
  from d1jax.rl import losses
  from d1jax.rl.estimators import Estimator, estimator
  from d1jax.rl.losses import ClippedToken, Loss
  from d1jax.rl.method import Method
  from d1jax.rl.prompts import Prompts
  from d1jax.rl.update import update
  from d1jax.run.run_tokenizer import train as train_tokenizer
  from d1jax.run.trackers import Tracker
  from d1jax.training.sft import sft_step

_PLACES = {
  "ClippedToken": "d1jax.rl.losses",
  "Denoiser": "d1jax.diffusion.denoiser",
  "Estimator": "d1jax.rl.estimators",
  "Lora": "d1jax.models.lora:LoraSpec",
  "Loss": "d1jax.rl.losses",
  "Method": "d1jax.rl.method",
  "Model": "d1jax.model",
  "Prompts": "d1jax.rl.prompts",
  "Rollout": "d1jax.diffusion.rollout",
  "Sampler": "d1jax.diffusion.rollout:SamplerSpec",
  "Tracker": "d1jax.run.trackers",
  "adamw": "d1jax.optimizer",
  "advantages": "d1jax.rl.advantage:",
  "estimator": "d1jax.rl.estimators",
  "evaluate": "d1jax.evaluation.evaluator",
  "from_pretrained": "d1jax.model",
  "from_scratch": "d1jax.model",
  "generate": "d1jax.generation.generate",
  "log_likelihood": "d1jax.evaluation.likelihood",
  "losses": "d1jax.rl.losses:",
  "make_mesh": "d1jax.parallel.mesh",
  "sample": "d1jax.diffusion.sampler",
  "sft_step": "d1jax.training.sft",
  "tasks": "d1jax.tasks:",
  "train": "d1jax.presets",
  "train_tokenizer": "d1jax.run.run_tokenizer:train",
  "update": "d1jax.rl.update",
}
"""Where each name is defined: `MODULE`, `MODULE:NAME` if it has another name there, `MODULE:` if it is the module."""

__all__ = [
  "ClippedToken",
  "Denoiser",
  "Estimator",
  "Lora",
  "Loss",
  "Method",
  "Model",
  "Prompts",
  "Rollout",
  "Sampler",
  "Tracker",
  "__version__",
  "adamw",
  "advantages",
  "estimator",
  "evaluate",
  "from_pretrained",
  "from_scratch",
  "generate",
  "log_likelihood",
  "losses",
  "make_mesh",
  "sample",
  "sft_step",
  "tasks",
  "train",
  "train_tokenizer",
  "update",
]


def __getattr__(name: str) -> Any:
  """Imports a name when it is first used."""
  if name not in _PLACES:
    raise AttributeError(f"module 'd1jax' has no attribute {name!r}")
  module, colon, inner = _PLACES[name].partition(":")
  found = importlib.import_module(module)
  return found if colon and not inner else getattr(found, inner or name)


def __dir__() -> list[str]:
  """The names above."""
  return sorted(__all__)
