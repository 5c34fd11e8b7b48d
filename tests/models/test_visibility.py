import itertools

import numpy as np
import pytest

from d1jax.models.visibility import BlockCausal, TwoStreams


def sees(rule, q, k):
  """The masks of BD3-LM: block-causal; or block-diagonal, offset block-causal, and block-causal."""
  if isinstance(rule, BlockCausal):
    return k // rule.block <= q // rule.block
  width = rule.clean - rule.first
  place = lambda i: i if i < rule.clean else (i - rule.clean) % width + rule.first
  copy = lambda i: (i - rule.clean) // width
  q_block, k_block = (place(i) // rule.block for i in (q, k))
  if k >= rule.clean:
    return q >= rule.clean and q_block == k_block and copy(q) == copy(k)
  return k_block < q_block if q >= rule.clean else k_block <= q_block


STREAMS = [
  TwoStreams(*x) for x in ((1, 6, 0), (1, 6, 2), (2, 8, 4), (3, 9, 0), (4, 8, 4), (4, 4, 0), (2, 6, 2, 3), (1, 4, 0, 2))
]


@pytest.mark.parametrize("rule", [*map(BlockCausal, (1, 3, 4, 16)), *STREAMS], ids=str)
def test_a_rule_is_its_definition(rule):
  length = 12 if isinstance(rule, BlockCausal) else rule.clean + rule.copies * (rule.clean - rule.first)
  expected = np.asarray([[sees(rule, q, k) for k in range(length)] for q in range(length)])
  np.testing.assert_array_equal(rule(np.arange(length)[:, None], np.arange(length)[None]), expected)
  for start, queries, keys in itertools.product((0, 1, length // 2), (1, length // 2), (length // 2, length)):
    assert rule.pairs(start, queries, keys) == expected[start : start + queries, :keys].sum()


def test_copies_have_the_positions_that_they_copy():
  assert TwoStreams(2, 6, 2, 2).positions(1, 13).tolist() == [1, 2, 3, 4, 5, 2, 3, 4, 5, 2, 3, 4, 5]


def test_pairs_of_long_canvases():
  """All noisy positions of a long canvas: L^2 / 2 pairs of either stream with the clean one, and L blocks."""
  length, block = 4096, 4
  own = length * block
  assert TwoStreams(block, length, 0).pairs(0, 2 * length, 2 * length) == length**2 + own
  assert BlockCausal(block).pairs(0, length, length) == (length**2 + own) // 2


@pytest.mark.parametrize("shape", [(4, 6, 4), (4, 8, 2), (4, 8, 12)])
def test_streams_that_share_no_grid_are_refused(shape):
  with pytest.raises(ValueError, match=f"first={shape[2]}"):
    TwoStreams(*shape)
