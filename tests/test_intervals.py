import itertools
import math
import statistics
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from d1jax.intervals import Z, clustered, mcnemar, over_seeds, paired_difference, pass_at, wilson


@pytest.mark.parametrize(
  ("share", "n", "low", "high"),
  [  # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
    (81 / 263, 263, 0.2553, 0.3662),
    (15 / 148, 148, 0.0624, 0.1605),
    (0 / 20, 20, 0.0000, 0.1611),
    (1 / 29, 29, 0.0061, 0.1718),
  ],
)
def test_wilson_against_published_values(share, n, low, high):
  np.testing.assert_allclose(wilson(share, n), (low, high), atol=5e-5)


def test_wilson_solves_its_equation():
  for share in (0.03, 0.4, 0.99):
    for bound in wilson(share, 57):
      assert abs(share - bound) == pytest.approx(Z * np.sqrt(bound * (1 - bound) / 57), rel=1e-9)


def test_wilson_of_none_and_all_mirror_each_other():
  low, high = wilson(0.0, 30)
  assert low == 0
  np.testing.assert_allclose(wilson(1.0, 30), (1 - high, 1.0), atol=1e-12)


@pytest.mark.parametrize("hits", [0, 1, 13, 39, 40])
def test_singletons_are_wilsons(hits):
  outcomes = [1] * hits + [0] * (40 - hits)
  found = clustered(outcomes, [1] * 40, range(40))
  assert found.value == hits / 40
  assert found.n == 40
  np.testing.assert_allclose((found.low, found.high), wilson(hits / 40, 40), atol=1e-12)


def test_correlated_clusters_widen_and_the_extreme_is_one_observation_a_cluster():
  outcomes = [1, 0, 1, 1, 0, 0, 1, 0, 1, 0] * 4
  alone = clustered(outcomes, [1] * 40, range(40))
  same = clustered(np.repeat(outcomes, 5).tolist(), [1] * 200, np.repeat(np.arange(40), 5).tolist())
  np.testing.assert_allclose((same.low, same.high), (alone.low, alone.high), atol=1e-12)
  pretending = clustered(np.repeat(outcomes, 5).tolist(), [1] * 200, range(200))
  assert same.high - same.low > 1.9 * (pretending.high - pretending.low)
  assert same.n == pretending.n == 200


@pytest.mark.parametrize("value", [0, 1])
def test_extremes_count_clusters(value):
  found = clustered([4 * value] * 12, [4] * 12, [i // 2 for i in range(12)])
  assert found.value == value
  np.testing.assert_allclose((found.low, found.high), wilson(float(value), 6), atol=1e-12)


def test_ratio_of_sums_not_mean_of_ratios_and_names_may_be_anything_hashable():
  found = clustered([1, 9], [2, 10], ["a", ("b", 1)])
  assert found.value == 10 / 12
  assert found.low < found.value < found.high


def test_one_cluster_is_one_observation():
  found = clustered([3], [10], ["only"])
  np.testing.assert_allclose((found.low, found.high), wilson(0.3, 1), atol=1e-12)


def test_order_does_not_matter():
  a = clustered([1, 0, 1, 0], [1, 1, 1, 1], "xxyz")
  b = clustered([0, 1, 0, 1], [1, 1, 1, 1], "zyxx")
  np.testing.assert_allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("count", [0, 2])
def test_nothing_to_divide_by_is_an_error(count):
  with pytest.raises(ValueError, match=f"denominators of {count} observations"):
    clustered([0] * count, [0] * count, range(count))


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_the_interval_covers_the_truth_in_95_of_100(share):
  """100 clusters of 1 to 5 observations with a common success rate Beta(share s, (1 - share) s): correlation 1/3."""
  rng = np.random.default_rng(0)
  covered, naive, trials = 0, 0, 1000
  for _ in range(trials):
    sizes = rng.integers(1, 6, 100)
    hits = rng.binomial(sizes, rng.beta(2 * share, 2 * (1 - share), 100))
    found = clustered(hits.tolist(), sizes.tolist(), range(100))
    covered += found.low <= share <= found.high
    low, high = wilson(hits.sum() / sizes.sum(), float(sizes.sum()))
    naive += low <= share <= high
  assert 0.93 <= covered / trials <= 0.975
  assert naive / trials < 0.9


def test_over_seeds_is_students_interval():
  values = [0.71, 0.68, 0.74, 0.70]
  found = over_seeds(values)
  # 3.182446 is the 97.5% point of Student's t at 3 degrees of freedom, from any printed table.
  half = 3.182446305284263 * statistics.stdev(values) / 2
  assert found.value == pytest.approx(0.7075)
  assert found.interval == pytest.approx((0.7075 - half, 0.7075 + half), rel=1e-9)
  assert found.interval == pytest.approx(stats.t.interval(0.95, 3, 0.7075, stats.sem(values)), rel=1e-9)
  assert found.n == 4


def test_over_seeds_of_one_seed_has_no_interval_and_shares_stay_shares():
  assert over_seeds([0.3]) == (0.3, None, 1)
  assert over_seeds([0.01, 0.05]).interval[0] == 0
  assert over_seeds([0.99, 0.95]).interval[1] == 1
  with pytest.raises(ValueError, match="one a seed"):
    over_seeds([])


def test_over_seeds_covers_the_truth_in_95_of_100():
  rng = np.random.default_rng(0)
  found = [over_seeds(row).interval for row in rng.normal(0.5, 0.02, (4000, 3)).tolist()]
  assert 0.94 <= np.mean([low <= 0.5 <= high for low, high in found]) <= 0.96


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 0), (0, 5), (3, 3), (10, 2), (17, 31)])
def test_mcnemar_sums_the_binomial(first, second):
  count, smaller = first + second, min(first, second)
  tail = sum(Fraction(math.comb(count, i), 2**count) for i in range(smaller + 1))
  assert mcnemar(first, second) == pytest.approx(float(min(2 * tail, 1)), rel=1e-12)
  assert mcnemar(second, first) == mcnemar(first, second)


def test_mcnemar_of_many_pairs():
  assert mcnemar(500, 500) == 1
  assert mcnemar(5000, 4000) < 1e-24


def test_paired_difference_is_agresti_and_mins():
  """Approval of a prime minister by 1,600 voters in two surveys (Agresti, Categorical Data Analysis, table 10.1)."""
  first = [1] * 794 + [1] * 150 + [0] * 86 + [0] * 570
  second = [1] * 794 + [0] * 150 + [1] * 86 + [0] * 570
  found = paired_difference(first, second, range(1600))
  assert found.difference == -64 / 1600
  assert (round(found.low, 2), round(found.high, 2)) == (-0.06, -0.02)  # as printed there
  centre = -64 / 1602
  half = Z * math.sqrt(((150 + 86 + 1) / 1602 - centre**2) / 1602)
  assert (found.low, found.high) == pytest.approx((centre - half, centre + half), rel=1e-9)


def test_paired_difference_mirrors_and_ignores_order():
  first, second, clusters = [1, 0, 0, 1, 0], [0, 1, 1, 1, 1], "aabbc"
  found = paired_difference(first, second, clusters)
  back = paired_difference(second, first, clusters)
  np.testing.assert_allclose(back, (-found.difference, -found.high, -found.low), atol=1e-12)
  turned = paired_difference(first[::-1], second[::-1], clusters[::-1])
  np.testing.assert_allclose(turned, found, atol=1e-12)


def test_paired_difference_of_copies_counts_clusters():
  first, second = [1, 0, 0, 1, 0, 1, 1, 0] * 5, [1, 1, 0, 0, 1, 1, 1, 1] * 5
  alone = paired_difference(first, second, range(40))
  copies = paired_difference(
    np.repeat(first, 4).tolist(), np.repeat(second, 4).tolist(), np.repeat(range(40), 4).tolist()
  )
  np.testing.assert_allclose(copies, alone, atol=1e-12)


@pytest.mark.parametrize(("first", "second", "value"), [(0, 0, 0), (1, 1, 0), (0, 1, 1), (1, 0, -1)])
def test_paired_difference_without_variance_still_has_an_interval(first, second, value):
  found = paired_difference([first] * 12, [second] * 12, [i // 2 for i in range(12)])
  alone = paired_difference([first] * 6, [second] * 6, range(6))
  assert found == alone
  assert found.difference == value
  assert found.low <= value <= found.high
  assert found.high - found.low > 0.3
  assert -1 <= found.low <= found.high <= 1


def test_paired_difference_needs_pairs():
  with pytest.raises(ValueError, match="0, 0 outcomes and 0 clusters"):
    paired_difference([], [], [])
  with pytest.raises(ValueError, match="2, 1 outcomes"):
    paired_difference([1, 0], [1], [0, 1])


@pytest.mark.parametrize(("before", "after"), [(0.2, 0.3), (0.5, 0.5)])
def test_the_paired_interval_covers_the_truth_in_95_of_100(before, after):
  """100 clusters of 1 to 5 pairs; four in five outcomes of a cluster share its difficulty."""
  rng = np.random.default_rng(0)
  covered, naive, trials = 0, 0, 1000
  for _ in range(trials):
    clusters = np.repeat(np.arange(100), rng.integers(1, 6, 100))
    hard = [
      np.where(rng.random(len(clusters)) < 0.8, rng.random(100)[clusters], rng.random(len(clusters))) for _ in range(2)
    ]
    first = (hard[0] < before).astype(int).tolist()
    second = (np.where(rng.random(len(clusters)) < 0.5, *hard) < after).astype(int).tolist()
    found = paired_difference(first, second, clusters.tolist())
    covered += found.low <= after - before <= found.high
    found = paired_difference(first, second, range(len(clusters)))
    naive += found.low <= after - before <= found.high
  assert 0.93 <= covered / trials <= 0.97
  assert naive / trials < 0.9


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_counts_the_subsets_with_a_correct_sample(n):
  for correct in range(n + 1):
    outcomes = [1] * correct + [0] * (n - correct)
    for k in range(1, n + 1):
      subsets = list(itertools.combinations(outcomes, k))
      assert pass_at(n, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-15)


def test_pass_at_one_is_the_share_and_large_counts_do_not_round_away():
  assert pass_at(2000, 1, 1) == 1 / 2000
  assert pass_at(10**6, 1, 2) == 2 / 10**6
  assert pass_at(2000, 1000, 1000) == 1.0
  assert pass_at(2000, 1, 1000) == 0.5
  assert pass_at(4, 0, 4) == 0.0


def test_pass_at_is_unbiased():
  """The mean over binomial counts is 1 - (1 - p)^k."""
  n, p = 12, 0.3
  for k in (1, 4, 12):
    mean = sum(stats.binom.pmf(c, n, p) * pass_at(n, c, k) for c in range(n + 1))
    assert mean == pytest.approx(1 - (1 - p) ** k, rel=1e-12)


@pytest.mark.parametrize(("n", "correct", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5), (0, 0, 1)])
def test_pass_at_refuses_what_cannot_be(n, correct, k):
  with pytest.raises(ValueError, match=f"pass@{k} of {correct} correct in {n} samples"):
    pass_at(n, correct, k)
