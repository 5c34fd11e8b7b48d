import pytest

from d1jax.telemetry.alarms import Limits, alarms

LIMITS = Limits(window=4, kl=1.0, entropy=0.01, no_signal=0.9, reward_drop=0.25)
HEALTHY = {"kl": 0.1, "entropy": 0.5, "no_signal": 0.2, "reward": 1.0}


def history(count: int = 8, **last):
  """`count` healthy iterations, then a window with some figures replaced."""
  return [HEALTHY] * count + [HEALTHY | last] * LIMITS.window


def test_a_healthy_run_is_quiet():
  assert alarms(history(), LIMITS) == {}


@pytest.mark.parametrize(
  ("figure", "value", "words"),
  [
    ("kl", 1.5, "KL to the reference 1.50 is above 1.0"),
    ("entropy", 0.002, "entropy 0.0020 is below 0.01"),
    ("no_signal", 0.95, "95% of the groups have equal rewards"),
    ("reward", 0.7, "reward 0.700 has fallen from 1.000"),
  ],
)
def test_each_figure_has_its_alarm(figure, value, words):
  (found,) = alarms(history(**{figure: value}), LIMITS).values()
  assert words in found


@pytest.mark.parametrize(("figure", "value"), [("kl", 1.0), ("entropy", 0.01), ("no_signal", 0.9), ("reward", 0.75)])
def test_a_figure_at_its_limit_is_quiet(figure, value):
  assert alarms(history(**{figure: value}), LIMITS) == {}


def test_several_alarms_at_once():
  assert len(alarms(history(kl=2.0, entropy=0.0, no_signal=1.0, reward=0.0), LIMITS)) == 4


def test_means_are_over_the_last_window_only():
  spike = [HEALTHY | {"kl": 100.0}] * 4 + [HEALTHY] * 4
  assert alarms(spike, LIMITS) == {}
  one = [HEALTHY] * 7 + [HEALTHY | {"kl": 3.0}]
  assert alarms(one, LIMITS) == {}
  assert len(alarms([HEALTHY] * 7 + [HEALTHY | {"kl": 4.0}], LIMITS)) == 1


def test_a_short_history_and_absent_figures_are_quiet():
  assert alarms([HEALTHY | {"kl": 9.0}] * 3, LIMITS) == {}
  assert alarms([], LIMITS) == {}
  assert alarms([{"loss": 1.0}] * 9, LIMITS) == {}


def test_a_reward_that_was_never_positive_cannot_fall():
  assert alarms([HEALTHY | {"reward": 0.0}] * 8, LIMITS) == {}
