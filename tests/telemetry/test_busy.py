import math
import time

import jax.numpy as jnp
import pytest

from d1jax.telemetry.busy import Busy


def test_programs_that_wait_for_each_other_count_once():
  """Two programs, dispatched at 1 s and 2 s, end at 3 s and 5 s; a third one began at 9 s."""
  busy = Busy()
  busy._spans = [[1.0, 3.0], [2.0, 5.0], [9.0, math.inf]]
  assert busy.idle(0.0, 10.0) == pytest.approx(0.5)
  assert busy.idle(10.0, 12.0) == 0, "it still runs"


def test_a_span_ends_when_the_results_are_there():
  busy = Busy()
  began = time.perf_counter()
  span = busy.watch(jnp.zeros(3))
  while span[1] == math.inf:
    assert time.perf_counter() < began + 20
  assert began <= span[0] <= span[1] <= time.perf_counter()
