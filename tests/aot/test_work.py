import pytest

from tests.aot import programs
from tests.aot.cases import Case
from tests.aot.test_command import analysis
from tests.telemetry.formulas import products


def found(name, **changes):
  """Sizes of the network, and the work of a program."""
  programs.devices("v5e:2x4")  # skips without the compiler
  case = Case("v5e:2x4", small=True, full=changes.pop("full", False))
  config = case.config
  for field, value in changes.items():
    config.update_from_flattened_dict({field.replace("__", "."): value})
  made = analysis(config)
  return made.experiment.model.network.size, made.work(name, made.tracing[name]())


def test_a_rollout_is_a_pass_a_step():
  size, work = found("rollout")
  assert work.flops == 6 * sum(products(size, 48, 128, 128, 12))


def test_a_rollout_that_may_end_early_is_counted_to_its_end():
  size, work = found("rollout", rollout__schedule="threshold", rollout__cache="dual")
  canvas, window = (sum(products(size, 48, width, 128, 12)) for width in (128, 12))
  assert work.flops == 2 * (canvas + 11 * window)


def test_adapters_are_merged_when_published():
  embed, mlp, layers, rank = 512, 1024, 2, 8
  assert found("publish")[1].flops == 2 * layers * rank * (3 * embed * embed + embed * mlp), "q, k, v and up"
  assert found("publish", full=True)[1].flops == 0


def test_an_update_of_every_weight():
  """Scores under the old weights once (mu = 2) and under the reference twice; three passes' worth for each step."""
  size, work = found("update", full=True)
  assert work.flops == (1 + 2 + 2 * 3) * sum(products(size, 96, 128, 128, 24))


@pytest.mark.parametrize(("field", "value"), [("model__remat", False), ("grpo__logits_tile", None)])
def test_what_is_kept_is_not_repeated(field, value):
  assert found("update", **{field: value})[1].repeated < found("update")[1].repeated
