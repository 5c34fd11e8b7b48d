"""`benchmarks.methods`: its cost, the settings of a method, the best of them, what a stop leaves, and the table."""

import itertools
import json

import pytest

from benchmarks import method_plan, methods
from benchmarks.method_plan import SUBSET, Plan, Setting
from tests import looks

SMALL = Plan(("wd1",), (1, 4), 3, 2, 100, 200)


def figures(validation=0.2, solved=0.3, seconds_each=0.5):
  """Those of a made-up run, of 7 passes an iteration."""
  row = {"iterations": 10, "passes": 70, "seconds": 5.0, "seconds_each": seconds_each, "validation": validation}
  row |= {"solved": solved, "solved_interval": [0.2, 0.4], "n": 880, "curve": [(35, 2.5, 0.1), (70, 5.0, validation)]}
  return row


def test_the_plans_keep_to_their_time_and_a_longer_one_is_refused():
  plan, _ = methods.chosen_plan([])
  assert plan == Plan()
  hours = sum(method_plan.seconds_of(plan).values()) / 3600
  assert hours == pytest.approx(3.8, abs=0.1)
  assert 10 < sum(method_plan.seconds_of(methods.chosen_plan(["--subset"])[0]).values()) / 60 < 16
  assert methods.chosen_plan(["--subset", "--mus", "1", "4"])[0].mus == (1, 4)
  with pytest.raises(SystemExit, match=r"takes \d\.\d hours .* or use --hours=(\d+\.\d)") as refused:
    methods.chosen_plan(["--passes=2000"])
  remedy = str(refused.value).rpartition(" ")[2]
  assert methods.chosen_plan(["--passes=2000", remedy])[0].passes == 2000


def test_each_method_is_tuned_as_much_as_the_others():
  for mu in (1, 4):
    found = {name: method_plan.settings(name, mu, 9) for name in method_plan.METHODS}
    for each in found.values():
      assert len(set(each)) == 9
      shared = [setting[:3] for setting in each]
      assert shared == [setting[:3] for setting in found["d1"]], "only a method's own number differs"
      assert shared[0] == (1.0, 6e-4, 4)
    array = [(*setting[:3], setting.own) for setting in found["d1"]]
    for first, second in itertools.combinations(zip(*array, strict=True), 2):
      assert len(set(zip(first, second, strict=True))) == 9, "every pair of levels comes once"
  own = {name: method_plan.own_levels(name, 4) for name in method_plan.METHODS}
  assert own["espo"] == ("epsilon", (0.2, 0.08, 0.4))
  assert own["wd1"] is own["spg"] is own["justgrpo"] is None
  assert method_plan.own_levels("d1", 1) == ("beta", (0.0, 0.01, 0.04)), "no clip binds in a single step"
  assert method_plan.own_levels("gdpo", 1) is None
  with pytest.raises(ValueError, match="--settings=10: there are 1 to 9"):
    method_plan.settings("d1", 1, 10)


@pytest.mark.parametrize(
  ("name", "mu", "own", "expected"),
  [
    ("d1", 1, ("beta", 0.0), 4 + 3),
    ("d1", 1, ("beta", 0.04), 4 + 3 + 1),  # the reference
    ("d1", 4, ("epsilon", 0.5), 4 + 4 * 3 + 3),  # the old policy at three steps
    ("wd1", 4, None, 4 + 4 * 3),
    ("stepmerge", 4, ("epsilon", 0.5), 4 + 4 * 2 * 3 + 2 + 4 * 2),  # recorded states are scored once; passes again
  ],
)
def test_an_iteration_has_so_many_passes(name, mu, own, expected):
  config, chosen = method_plan.configuration(SMALL, name, mu, Setting(0.7, 1e-4, 16, own))
  assert method_plan.passes_an_iteration(config) == expected
  assert chosen["grpo.prompts_per_iteration"] * chosen["grpo.num_generations"] == 256
  assert (config.rollout.temperature, config.grpo.num_iterations) == (0.7, mu)


def test_a_stop_loses_no_cell_that_is_done(tmp_path, monkeypatch):
  """Cells are computed once, in any number of attempts; the last one ends with a table and curves."""
  ran: list[tuple] = []

  def run(preset, fields):
    if len(ran) == stop:
      raise KeyboardInterrupt
    ran.append((preset, fields.get("workdir", fields.get("output")), fields.get("grpo.steps")))
    if preset == "export.py":
      fields["output"].mkdir()

  monkeypatch.setattr(methods, "run", run)
  monkeypatch.setattr(methods, "read", lambda workdir, stage, each=0: figures())
  monkeypatch.setattr(methods, "passes_an_iteration", lambda config: 7)
  for stop in (5, 12, 23, None):
    lines = methods.Lines(tmp_path / "lines.jsonl")
    if stop is None:
      methods.execute(SMALL, tmp_path, lines)
    else:
      with pytest.raises(KeyboardInterrupt):
        methods.execute(SMALL, tmp_path, lines)
      with (tmp_path / "lines.jsonl").open("a") as file:
        file.write('{"cell": "cut o')
  finals = len(SMALL.pairs) * SMALL.seeds
  assert len(ran) == len(set(ran)) == 3 * 2 + len(SMALL.pairs) * 3 + 2 + 2 * finals
  trained = [steps for _, workdir, steps in ran if workdir.name == "final-wd1-4-1"]
  assert trained == [28, 29], "200 passes of 7; then on to 200 / 7 halves of a second"
  assert len(methods.Lines(tmp_path / "lines.jsonl").found) == len(ran) - 3, "an export has none"
  written = methods.table(SMALL, lines)
  assert "| start | " in written
  assert "| `wd1` | 4 | T 1, rate 0.0006, group 4 | 10 |" in written
  figure = methods.plot(SMALL, lines)
  assert len(figure.axes) == 4
  looks.check(figure)


def test_the_best_setting_and_what_equal_cost_allows_it(tmp_path):
  lines = methods.Lines(tmp_path / "lines.jsonl")
  for number, validation in enumerate((0.2, 0.5, 0.5)):
    lines.add(f"tuning-wd1-4-{number}", figures(validation, seconds_each=0.25))
    lines.add(f"tuning-d1-1-{number}", figures(0.5 - validation, seconds_each=0.1))
  chosen = methods.best(SMALL, "wd1", 4, lines)
  assert chosen["cell"] == "tuning-wd1-4-1", "of equal ones the first"
  assert methods.budget(SMALL, lines) == pytest.approx(200 / 7 * 0.1)
  assert methods.lengths(SMALL, chosen, 2.0) == [("seconds", 8), ("passes", 28)]
  assert json.loads((tmp_path / "lines.jsonl").read_text().splitlines()[-1])["cell"] == "tuning-d1-1-2"


@pytest.mark.parametrize(
  ("values", "shown", "verdict"),
  [
    ([0.1, 0.12, 0.11], "+11.0 (+8.5 to +13.5)", "yes"),
    ([-0.1, -0.12, -0.11], "-11.0 (-13.5 to -8.5)", "no"),
    ([0.1, -0.1], "+0.0 (-100.0 to +100.0)", "open"),
    ([0.1], "+10.0", ""),
  ],
)
def test_a_gain_is_one_if_its_interval_is_above_0(values, shown, verdict):
  assert methods.percent(values, signed=True) == (shown, verdict)


def test_the_subset_is_a_part_of_the_whole():
  assert set(SUBSET.methods) < set(Plan().methods)
  assert SUBSET.pairs == [(name, 1) for name in ("d1", "wd1", "spg", "stepmerge")]
