import jax.numpy as jnp
import numpy as np
import pytest

from d1jax.diffusion.rollout import SamplerSpec
from d1jax.diffusion.schedule import confident_count, rank_descending, reveal_counts
from tests.diffusion.naive import how_many


def llada(masked: int, steps: int) -> list[int]:
  """get_num_transfer_tokens of LLaDA's generate.py."""
  base, remainder = masked // steps, masked % steps
  counts = [base] * steps
  for i in range(remainder):
    counts[i] += 1
  return counts


@pytest.mark.parametrize("masked", [1, 2, 5, 8, 18, 31, 32])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 16, 32, 40])
def test_lladas_rule_without_the_steps_that_reveal_nothing(masked, steps):
  counts = reveal_counts(masked, steps)
  assert counts.tolist() == [n for n in llada(masked, steps) if n]
  assert counts.dtype == np.int32
  assert counts.sum() == masked
  assert counts.min() >= 1
  assert (np.diff(counts) <= 0).all()
  assert counts.max() - counts.min() <= 1


def test_a_remainder_goes_to_the_earliest_steps():
  assert reveal_counts(18, 4).tolist() == [5, 5, 4, 4]


@pytest.mark.parametrize(("masked", "steps"), [(0, 1), (1, 0), (-1, 2), (4, -1)])
def test_nothing_to_spread_is_an_error(masked, steps):
  with pytest.raises(ValueError, match=f"{masked} tokens over {steps} steps"):
    reveal_counts(masked, steps)


def test_ranks_descend_and_ties_go_left():
  scores = jnp.asarray([[0.5, -jnp.inf, 0.7, 0.5, -jnp.inf], [0.0, 0.0, 0.0, 0.0, 1.0]])
  assert rank_descending(scores).tolist() == [[1, 3, 0, 2, 4], [1, 2, 3, 4, 0]]
  random = np.random.default_rng(0).integers(0, 6, (50, 9)).astype(np.float32)
  expected = np.argsort(np.argsort(-random, axis=1, kind="stable"), axis=1)
  np.testing.assert_array_equal(rank_descending(jnp.asarray(random)), expected)


@pytest.mark.parametrize("max_reveal", [1, 2, 5, 8])
@pytest.mark.parametrize(
  "options",
  [{"schedule": "threshold", "threshold": t} for t in (0.2, 0.6, 0.9, 1.0)]
  + [{"schedule": "factor", "factor": f} for f in (0.2, 0.7, 1.0, 2.5)],
  ids=str,
)
def test_confident_counts(options, max_reveal):
  spec = SamplerSpec(8, 8, 8, max_reveal=max_reveal, **options)
  rng = np.random.default_rng(max_reveal)
  confidence = rng.beta(1, 0.3, (200, 8)).astype(np.float32)
  masked = rng.random((200, 8)) < 0.7
  masked[:, 3] = True
  rank = rank_descending(jnp.where(masked, jnp.log(confidence), -jnp.inf))
  found = np.asarray(confident_count(spec, jnp.log(confidence), rank, jnp.asarray(masked)))
  for row in range(200):
    holes = sorted(np.exp(np.log(confidence[row][masked[row]])).tolist(), reverse=True)
    # A row may be asked for more than it has; what it has is all then.
    assert min(found[row], len(holes)) == how_many(spec, holes, 0)
  assert found.min() >= 1
  assert found.max() <= max_reveal


def test_a_failing_confidence_ends_the_factors_run_although_a_later_one_would_pass():
  """With factor 1 the bounds are 1/2, 2/3, 3/4, 4/5: of 0.9, 0.66 the second fails, of 0.9, 0.7, 0.74 the third."""
  spec = SamplerSpec(4, 4, 4, schedule="factor", max_reveal=4)
  confidence = jnp.asarray([[0.66, 0.9, 0.66, 0.1], [0.9, 0.7, 0.74, 0.1], [0.4, 0.3, 0.2, 0.1], [0.9] * 4])
  rank = rank_descending(confidence)
  counts = confident_count(spec, jnp.log(confidence), rank, jnp.ones((4, 4), bool))
  assert counts.tolist() == [1, 2, 1, 4]
