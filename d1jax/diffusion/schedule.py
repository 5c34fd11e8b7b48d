"""How many tokens each denoising step reveals."""

import numpy as np


def reveal_counts(masked: int, steps: int) -> np.ndarray:
  """Tokens to reveal at each of `steps` steps, `masked` in all; a remainder goes to the earliest steps (LLaDA's
  generate.py).

  With more steps than tokens the schedule has one step a token: the steps that would reveal nothing are left out.

  Returns:
    int32 array of min(steps, masked) counts.
  """
  if masked < 1 or steps < 1:
    raise ValueError(f"cannot spread {masked} tokens over {steps} steps: both must be at least 1")
  steps = min(steps, masked)
  base, remainder = divmod(masked, steps)
  return np.asarray([base + (i < remainder) for i in range(steps)], np.int32)
