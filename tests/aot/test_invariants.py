import jax
import jax.numpy as jnp
import pytest

from d1jax.aot import collectives, hlo, invariants
from tests.aot import programs

gather = lambda x: jax.lax.all_gather(x, "a", tiled=True)


def layers(x, w):
  """Products with gathered weights; their results are added between devices."""
  layer = lambda x, w: (jnp.tanh(jax.lax.psum(x @ gather(w), "b")), None)
  return jax.lax.scan(layer, x, w.reshape(2, 32, 128))[0]


def kinds(platform, function, *shapes):
  program = hlo.parse(programs.compiled(platform, function, *shapes).as_text())
  again = invariants.repeated(program)
  exchanged = [each for each in collectives.find(program, 8) if each.in_loop]
  return {each.kind for each in exchanged if each.name in again}, {each.kind for each in exchanged}


@pytest.mark.parametrize("platform", programs.PLATFORMS)
def test_weights_that_stay_are_told_from_activations(platform):
  def function(x, w):
    return jax.lax.fori_loop(0, 3, lambda i, x: layers(x, w) + i, x)

  assert kinds(platform, function, (64, 128), (8 * 64, 128)) == ({"all-gather"}, {"all-gather", "all-reduce"})


@pytest.mark.parametrize("platform", programs.PLATFORMS)
def test_weights_that_change_are_not_repeated(platform):
  def function(x, w):
    step = lambda i, xw: (layers(*xw), xw[1] + jnp.sum(xw[0]))
    return jax.lax.fori_loop(0, 3, step, (x, w))

  again, everything = kinds(platform, function, (64, 128), (8 * 64, 128))
  assert not again
  assert everything == {"all-gather", "all-reduce"}


@pytest.mark.parametrize("platform", programs.PLATFORMS)
def test_outside_of_loops_nothing_is_repeated(platform):
  assert kinds(platform, lambda x: jnp.sin(gather(x))[:8] + x, (64, 128)) == (set(), set())
