import numpy as np
import pytest

from d1jax.intervals import Z, clustered, wilson


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
