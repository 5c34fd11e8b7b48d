"""Alarms: signs of problems in the recent metrics of a run."""

import dataclasses
from collections.abc import Mapping, Sequence


@dataclasses.dataclass(frozen=True)
class Limits:
  """The limits of the alarms; each metric is a mean over the last `window` iterations.

  Attributes:
    window: the number of iterations.
    kl: an alarm above this distance of the policy from the reference, in nats per token.
    entropy: an alarm below this entropy of the policy's samples, in nats per token: it has stopped exploring.
    no_signal: an alarm if more than this share of the groups has equal rewards, from which nothing is learned.
    reward_drop: an alarm if the reward has fallen by more than this share of its best mean.
  """

  window: int = 50
  kl: float = 1.0
  entropy: float = 0.005
  no_signal: float = 0.9
  reward_drop: float = 0.25


def alarms(history: Sequence[Mapping[str, float]], limits: Limits) -> dict[str, str]:
  """A sentence for each alarm, by name; there are none if the history is shorter than a window or lacks a metric."""
  if len(history) < limits.window:
    return {}

  def mean(name: str, end: int) -> float | None:
    values = [h[name] for h in history[max(end - limits.window, 0) : end] if name in h]
    return sum(values) / len(values) if values else None

  found: dict[str, str] = {}
  last = len(history)
  if (kl := mean("kl", last)) is not None and kl > limits.kl:
    found["kl"] = f"KL to the reference {kl:.2f} is above {limits.kl}: lower the learning rate or raise beta"
  if (entropy := mean("entropy", last)) is not None and entropy < limits.entropy:
    found["entropy"] = f"entropy {entropy:.4f} is below {limits.entropy}: the policy no longer explores"
  if (share := mean("no_signal", last)) is not None and share > limits.no_signal:
    found["no_signal"] = f"{share:.0%} of the groups have equal rewards: choose other prompts, or more completions"
  reward = mean("reward", last)
  if reward is not None:
    best = max(
      filter(None, (mean("reward", end) for end in range(limits.window, last + 1, limits.window))),
      default=reward,
    )
    if best > 0 and reward < best * (1 - limits.reward_drop):
      found["reward"] = f"reward {reward:.3f} has fallen from {best:.3f}: the best checkpoint may lie behind"
  return found
