from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True)
def no_silent_broadcasting() -> Iterator[None]:
  """An operation on arrays of different rank is an error: where it is meant, the code says so."""
  with jax.numpy_rank_promotion("raise"):
    yield
