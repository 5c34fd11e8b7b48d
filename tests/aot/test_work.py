import pytest

from d1jax.aot import command
from d1jax.aot.work import work
from d1jax.models.flops import products
from tests.aot import programs
from tests.aot.cases import Case


def found(**changes):
  programs.devices("v5e:2x4")  # skips without the compiler
  case = Case("v5e:2x4", small=True, full=changes.pop("full", False))
  config = case.config
  for field, value in changes.items():
    config.update_from_flattened_dict({field.replace("__", "."): value})
  experiment, made, width = command.build(config)
  return experiment.model.weights, work(experiment, made, width)


def test_a_rollout_is_a_pass_a_step():
  weights, computed = found()
  each = products(weights.network.size, 48, 128, 128, 12)
  assert computed["rollout"].flops == 6 * sum(each)


def test_adapters_are_merged_when_published():
  computed = found()[1]
  embed, mlp, layers, rank = 512, 1024, 2, 8
  assert computed["publish"].flops == 2 * layers * rank * (3 * embed * embed + embed * mlp), "q, k, v and up"
  assert found(full=True)[1]["publish"].flops == 0


def test_an_update_of_every_weight():
  """Scores under the old weights once (mu = 2) and under the reference twice; three passes' worth for each step."""
  weights, computed = found(full=True)
  size = weights.network.size
  once = products(size, 96, 128, 128, 24)
  assert computed["update"].flops == (1 + 2 + 2 * 3) * sum(once)


@pytest.mark.parametrize(("field", "value"), [("model__remat", False), ("grpo__logits_tile", None)])
def test_what_is_kept_is_not_repeated(field, value):
  assert found(**{field: value})[1]["update"].repeated < found()[1]["update"].repeated
