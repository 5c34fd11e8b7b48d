"""95% intervals for shares whose observations come in clusters."""

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

Z = 1.959963984540054
"""The 97.5% point of the standard normal distribution."""


class Share(NamedTuple):
  """A pooled share with its interval.

  Attributes:
    value: sum of numerators / sum of denominators.
    low: lower end of the 95% interval.
    high: its upper end.
    n: number of observations.
  """

  value: float
  low: float
  high: float
  n: int


def wilson(share: float, n: float) -> tuple[float, float]:
  """Wilson's score interval of a share of n independent observations; n need not be whole."""
  centre = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
  half = Z / (1 + Z * Z / n) * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
  return (max(centre - half, 0.0) if share > 0 else 0.0), (min(centre + half, 1.0) if share < 1 else 1.0)


def clustered(numerators: Sequence[float], denominators: Sequence[float], clusters: Sequence[Hashable]) -> Share:
  """A ratio of sums in [0, 1] with an interval that treats clusters, not observations, as independent.

  The variance is the linearised one of a ratio over clusters (Cochran, Sampling Techniques, 3rd ed., section 6.3, with
  G / (G - 1)); Wilson's interval is taken at the number of independent observations with that variance, at least one a
  cluster where the share is 0 or 1 and no variance can be seen.

  Args:
    numerators: one an observation.
    denominators: one an observation, positive in sum.
    clusters: one an observation.
  """
  names = {name: index for index, name in enumerate(dict.fromkeys(clusters))}
  index = np.asarray([names[name] for name in clusters], int)
  top = np.bincount(index, np.asarray(numerators, float))
  bottom = np.bincount(index, np.asarray(denominators, float))
  total, count = bottom.sum(), len(names)
  if not total > 0:
    raise ValueError(f"the denominators of {len(numerators)} observations add up to {total}")
  share = float(top.sum() / total)
  effective = float(count)
  if count > 1 and 0 < share < 1:
    variance = count / (count - 1) * float(np.sum((top - share * bottom) ** 2)) / total**2
    # n independent observations estimate their own variance as share (1 - share) / (n - 1).
    effective = min(share * (1 - share) / variance + 1, total) if variance > 0 else total
  low, high = wilson(share, effective)
  return Share(share, low, high, len(numerators))
