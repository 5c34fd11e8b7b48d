"""A loss of one's own: the policy gradient without a ratio or a clip. `python -m examples.own_loss` trains with it.

The same file works on the command line: `--config.grpo.loss=examples/own_loss.py`.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

import d1jax
from d1jax import Loss


@dataclasses.dataclass(frozen=True)
class PolicyGradient(Loss):
  """-A log p of each token (REINFORCE)."""

  def __call__(self, terms: Any) -> tuple[Any, dict[str, Any]]:
    """The loss, and the figures that `metrics.jsonl` gets."""
    weights = terms.weights * terms.scores.weight
    logp = jnp.where(weights > 0, terms.scores.logp, 0.0)
    return -jnp.sum(weights * logp * terms.advantages[:, None]), {"logp": jnp.sum(terms.share * logp)}


loss = PolicyGradient


def main(**changes: Any) -> float:
  """Trains for a minute, and returns the share of held-out puzzles that are solved."""
  overrides = {"grpo.loss": __file__, "workdir": "runs/own_loss"} | changes
  return float(d1jax.train("grpo:smoke", overrides)["after"]["solved"])


if __name__ == "__main__":
  main()
