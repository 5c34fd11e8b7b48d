"""Reinforcement learning for diffusion language models, on JAX."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from d1jax.generation.generate import generate
  from d1jax.model import from_pretrained

__all__ = ["from_pretrained", "generate"]


def __getattr__(name: str) -> Any:
  """Imports what the package's top offers when it is first asked for: flags are read without waiting for JAX."""
  if name == "from_pretrained":
    from d1jax.model import from_pretrained

    return from_pretrained
  if name == "generate":
    from d1jax.generation.generate import generate

    return generate
  raise AttributeError(f"module 'd1jax' has no attribute {name!r}")
