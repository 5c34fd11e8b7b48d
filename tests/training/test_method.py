import pytest

from d1jax.diffusion.rollout import SamplerSpec
from d1jax.rl.presets import METHODS
from d1jax.rl.shaping import UNSHAPED, Shaping
from d1jax.training import experiment as experiments
from d1jax.training import method
from tests import jobs


@pytest.mark.parametrize("task", ["sudoku", "countdown", "gsm8k", "math", "sudoku,math"])
@pytest.mark.parametrize("size", ["tiny", "llada_8b"])
@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_is_a_word(name, size, task):
  config = jobs.load("grpo", f"{size},{task},{name}")
  built = method.build(config.grpo, SamplerSpec(**config.rollout))
  assert built.spec.passes.number is None or built.spec.passes.number > 0
  assert isinstance(config.grpo.learning_rate, float)
  own = METHODS[name].fields(config.rollout.to_dict())
  papers = [METHODS[name].paper(config.rollout.to_dict(), one) for one in task.split(",")]
  for section, fields in own.items():
    for field, value in fields.items():
      trained = size != "tiny" and any(field in paper[section] for paper in papers)
      assert config[section][field] == value or trained, field
  if size == "tiny":
    assert config.grpo.learning_rate == jobs.load("grpo", f"tiny,{task}").grpo.learning_rate


@pytest.mark.parametrize("words", ["tiny", "smoke,countdown", "llada_8b,math", "llada_8b,gsm8k,v5e"])
def test_d1_is_what_there_is_without_a_word(words):
  assert jobs.load("grpo", f"{words},d1").to_dict() == jobs.load("grpo", words).to_dict()


def test_one_method_at_a_time():
  with pytest.raises(ValueError, match="preset words wd1, spg exclude each other"):
    jobs.load("grpo", "tiny,wd1,spg")


def shaping(words="tiny", **fields):
  config = jobs.load("grpo", words)
  config.task.sizes.update(demonstrations=4, train=4, validation=4, test=4)
  config.grpo.update(fields)
  task = experiments.build_task(config)
  return method.shaping(config.grpo, task, config.task.protocol, SamplerSpec(**config.rollout))


def test_rewards_are_the_tasks_where_nothing_is_said():
  assert shaping() == UNSHAPED


def test_weights_are_of_the_components_of_every_task():
  weights = {"constraints": 0.5, "well_formed": 2.0, "overlong": 0.1}
  found = shaping("tiny,sudoku,countdown", reward_weights="constraints=0.5,well_formed=2,overlong=0.1", overlong=4)
  assert found == Shaping(weights, overlong=4)


def test_a_weight_of_nothing_is_refused():
  with pytest.raises(ValueError, match="names 'well_formed', which is no component; known: constraints, solved"):
    shaping(reward_weights="well_formed=2")
