"""95% intervals for shares of clustered observations, for means over seeds and for paired differences; pass@k."""

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import special

Z = 1.959963984540054
"""The 97.5% point of the standard normal distribution."""


class Share(NamedTuple):
  """A pooled share with its interval.

  Attributes:
    value: the sum of numerators / the sum of denominators.
    low: the lower end of the 95% interval.
    high: the upper end.
    n: number of observations.
  """

  value: float
  low: float
  high: float
  n: int


class Mean(NamedTuple):
  """A mean of one value per seed.

  Attributes:
    value: the mean.
    interval: the ends of its 95% interval; None for one seed, from which the spread cannot be estimated.
    n: number of seeds.
  """

  value: float
  interval: tuple[float, float] | None
  n: int


class Difference(NamedTuple):
  """A difference of two shares with its 95% interval, in [-1, 1].

  Attributes:
    difference: the second share minus the first.
    low: the lower end of the interval.
    high: the upper end.
  """

  difference: float
  low: float
  high: float


def wilson(share: float, n: float) -> tuple[float, float]:
  """Wilson's score interval for a share of n independent observations; n need not be a whole number."""
  centre = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
  half = Z / (1 + Z * Z / n) * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
  return (max(centre - half, 0.0) if share > 0 else 0.0), (min(centre + half, 1.0) if share < 1 else 1.0)


def clustered(numerators: Sequence[float], denominators: Sequence[float], clusters: Sequence[Hashable]) -> Share:
  """A ratio of sums in [0, 1] with an interval that treats clusters, not observations, as independent.

  The variance is the linearised one of a ratio over clusters (Cochran, Sampling Techniques, 3rd ed., section 6.3, with
  G / (G - 1)). Wilson's interval is computed with the number of independent observations that would have that variance;
  where the share is 0 or 1, no variance can be seen, and this number is at least one per cluster.
  There is one numerator, one denominator and one cluster an observation; the sum of the denominators is positive.
  """
  index = _numbered(clusters)
  top = np.bincount(index, np.asarray(numerators, float))
  bottom = np.bincount(index, np.asarray(denominators, float))
  total, count = bottom.sum(), len(bottom)
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


def over_seeds(values: Sequence[float]) -> Mean:
  """The mean of one share per seed, with Student's t interval cut to [0, 1].

  The seeds are the observations here: the interval says where the mean over many seeds would lie on these questions.

  Raises:
    ValueError: there are no values.
  """
  if not values:
    raise ValueError("no values to average: give one a seed")
  mean, count = float(np.mean(values)), len(values)
  if count == 1:
    return Mean(mean, None, 1)
  half = float(special.stdtrit(count - 1, 0.975) * np.std(values, ddof=1)) / math.sqrt(count)
  return Mean(mean, (max(mean - half, 0.0), min(mean + half, 1.0)), count)


def mcnemar(only_first: int, only_second: int) -> float:
  """McNemar's exact two-sided p value (Biometrics 12, 1947) for two systems on the same questions.

  Args:
    only_first: pairs that only the first system answers correctly.
    only_second: pairs that only the second answers correctly. Pairs on which both agree do not matter.

  Returns:
    The probability of a split at least as uneven if both sides were equally likely; 1 without pairs.
  """
  count = only_first + only_second
  return min(2 * float(special.bdtr(min(only_first, only_second), count, 0.5)), 1.0) if count else 1.0


def paired_difference(first: Sequence[float], second: Sequence[float], clusters: Sequence[Hashable]) -> Difference:
  """The difference of two shares over the same questions; clusters, not pairs, are treated as independent.

  Agresti and Min's interval (Statistics in Medicine 24, 2005: Wald's after half a pair is added to each cell of the
  2x2 table) is computed with the number of independent pairs that would have the variance between clusters, as in
  `clustered`; where all pairs differ alike, no variance can be seen, and this number is one per cluster.
  There are two outcomes, each 0 or 1, and one cluster a pair.

  Raises:
    ValueError: there are no pairs.
  """
  if not len(first) == len(second) == len(clusters) > 0:
    raise ValueError(f"{len(first)}, {len(second)} outcomes and {len(clusters)} clusters: give one of each a pair")
  change = np.asarray(second, float) - np.asarray(first, float)
  pairs, mean, square = len(change), float(np.mean(change)), float(np.mean(change**2))
  sums = np.bincount(_numbered(clusters), change - mean)
  count, spread = len(sums), square - mean**2
  effective = float(count)
  if count > 1 and spread > 0:
    variance = count / (count - 1) * float(np.sum(sums**2)) / pairs**2
    effective = min(spread / variance + 1, pairs) if variance > 0 else pairs
  centre = effective * mean / (effective + 2)
  half = Z * math.sqrt(((effective * square + 1) / (effective + 2) - centre**2) / (effective + 2))
  return Difference(mean, max(centre - half, -1.0), min(centre + half, 1.0))


def pass_at(n: int, correct: int, k: int) -> float:
  """The probability that k of a question's n samples, drawn without replacement, include a correct one.

  This is the unbiased estimator of pass@k of Chen et al. 2021 (arXiv 2107.03374), 1 - C(n - correct, k) / C(n, k). It
  is computed in whole numbers with one division at the end, and is exact except for the rounding of that division.

  Raises:
    ValueError: unless 0 <= correct <= n and 1 <= k <= n.
  """
  if not (0 <= correct <= n and 1 <= k <= n):
    raise ValueError(f"pass@{k} of {correct} correct in {n} samples: correct lies in 0..n and k in 1..n")
  ways = math.comb(n, k)
  return (ways - math.comb(n - correct, k)) / ways


def _numbered(clusters: Sequence[Hashable]) -> np.ndarray:
  """Clusters as numbers from 0, in the order of their first appearance."""
  numbers = {name: number for number, name in enumerate(dict.fromkeys(clusters))}
  return np.asarray([numbers[name] for name in clusters], int)
