import numpy as np
import pytest

from d1jax.diffusion.schedule import reveal_counts


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
