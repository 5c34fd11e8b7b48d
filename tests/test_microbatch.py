import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d1jax.microbatch import split_rows, sum_over_parts

BATCH = {"x": jnp.arange(24.0).reshape(12, 2), "y": jnp.arange(12)}


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 12])
def test_part_m_holds_every_parts_th_row_from_m(parts):
  split = split_rows(BATCH, parts)
  for m in range(parts):
    np.testing.assert_array_equal(split["x"][m], BATCH["x"][m::parts])
    np.testing.assert_array_equal(split["y"][m], BATCH["y"][m::parts])


def test_a_split_that_does_not_divide_is_refused():
  with pytest.raises(ValueError, match="5 micro-batches do not divide a batch of 12 rows"):
    split_rows(BATCH, 5)


@pytest.mark.parametrize("parts", [1, 3])
def test_a_sum_over_parts_is_the_sum_over_the_batch(parts):
  function = lambda part: {"s": jnp.sum(part["x"] ** 2, axis=0), "n": jnp.sum(part["y"])}
  total = jax.jit(lambda b: sum_over_parts(function, split_rows(b, parts)))(BATCH)
  np.testing.assert_array_equal(total["s"], function(BATCH)["s"])
  assert int(total["n"]) == 66
  assert total["n"].dtype == BATCH["y"].dtype


def test_one_part_at_a_time():
  jaxpr = str(jax.make_jaxpr(lambda b: sum_over_parts(lambda p: p["y"].sum(), split_rows(b, 4)))(BATCH))
  assert "scan" in jaxpr
