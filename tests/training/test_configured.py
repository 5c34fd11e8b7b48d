import itertools
import runpy

import pytest

from configs.methods import METHODS
from d1jax.diffusion.rollout import SamplerSpec
from d1jax.rl.shaping import UNSHAPED, Shaping
from d1jax.run import inputs, parts, run_tokenizer
from d1jax.run.identity import flatten
from d1jax.training import configured
from tests import jobs
from tests.telemetry import formulas

SIZES, TASKS = ("tiny", "smoke", "llada_8b"), ("sudoku", "countdown", "gsm8k", "math")


@pytest.mark.parametrize("task", ["sudoku", "countdown", "gsm8k", "math", "sudoku,math"])
@pytest.mark.parametrize("size", ["tiny", "llada_8b"])
@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_is_a_word(name, size, task):
  config = jobs.load("grpo", f"{size},{task},{name}")
  built = configured.method(config.grpo, SamplerSpec(**config.rollout))
  passes = formulas.passes(built.estimator, SamplerSpec(**config.rollout))
  assert passes.number is None or passes.number > 0
  assert isinstance(config.grpo.learning_rate, float)
  found, rollout = flatten(config.to_dict()), config.rollout.to_dict()
  own = flatten(METHODS[name].fields(rollout))
  papers = [flatten(METHODS[name].paper(rollout, one)) for one in task.split(",")]
  for field, value in own.items():
    trained = size != "tiny" and any(field in paper for paper in papers)
    assert found[field] == value or trained, field
  if size == "tiny":
    assert config.grpo.learning_rate == jobs.load("grpo", f"tiny,{task}").grpo.learning_rate


@pytest.mark.parametrize("words", ["tiny", "smoke,countdown", "llada_8b,math", "llada_8b,gsm8k,v5e"])
def test_d1_is_what_there_is_without_a_word(words):
  named, plain = (jobs.load("grpo", each) for each in (f"{words},d1", words))
  for config in (named, plain):
    parts.complete(config)
  assert named.to_dict() == plain.to_dict()


def test_the_documented_passes_are_those_of_the_words():
  rows = [line.split("|")[1:-1] for line in (jobs.ROOT / "docs" / "methods.md").read_text(encoding="utf-8").split("\n")]
  start = next(i for i, row in enumerate(rows) if row and row[0].strip() == "K of a word")
  names = [cell.strip(" `") for cell in rows[start][1:]]
  assert names == list(METHODS)
  for words, *cells in rows[start + 2 : start + 5]:
    for name, cell in zip(names, cells, strict=True):
      config = jobs.load("grpo", f"{words.strip(' `')},{name}")
      sampler = SamplerSpec(**config.rollout)
      assert formulas.passes(configured.method(config.grpo, sampler).estimator, sampler).number == int(cell), (
        words,
        name,
      )


def warm_up(config):
  """Its share of the optimiser steps."""
  return config.grpo.warmup_steps / (config.grpo.steps * config.grpo.num_iterations)


@pytest.mark.parametrize("size", SIZES)
def test_no_word_lengthens_the_share_of_the_warm_up(size):
  """Of any tasks in a mix; d1's share is 13% of sudoku's steps and less of the others'."""
  load = runpy.run_path(str(jobs.ROOT / "configs" / "grpo.py"))["get_config"]
  share = {task: warm_up(load(f"{size},{task}")) for task in TASKS}
  for tasks in itertools.chain.from_iterable(itertools.combinations(TASKS, n) for n in range(1, len(TASKS) + 1)):
    for name in METHODS:
      config = load(",".join((size, *tasks, name)))
      assert warm_up(config) <= max(share[task] for task in tasks), (tasks, name)
      assert warm_up(config) <= 0.5


@pytest.mark.parametrize(
  ("words", "warmup_steps"),
  [
    ("sudoku", 500),
    ("sudoku,coupled", 125),  # mu 2 for 8
    ("countdown,wd1", 180),  # mu 12 for 8
    ("sudoku,agrpo", 62),  # mu 1 for 8, rounded down
    ("sudoku,tracerl", 0),  # as its authors have it
    ("gsm8k,sudoku,agrpo", 62),
  ],
)
def test_the_warm_up_is_counted_in_the_optimiser_steps_of_the_method(words, warmup_steps):
  assert jobs.load("grpo", f"llada_8b,{words}").grpo.warmup_steps == warmup_steps


def test_a_mix_has_room_for_the_largest_of_each_field():
  config = jobs.load("grpo", "llada_8b,sudoku,gsm8k,math,stepmerge")
  assert (config.rollout.completion_length, config.rollout.diffusion_steps) == (512, 256)
  assert (config.rollout.temperature, config.grpo.estimator.segments, config.grpo.num_iterations) == (0.9, 16, 12)


def test_small_models_of_word_problems_are_block_causal():
  config = jobs.load("grpo", "small,word_problems")
  assert config.to_dict() == jobs.load("grpo", "small,word_problems,block").to_dict()
  for words in ("small,word_problems,stepmerge", "small,sudoku,word_problems", "tiny,word_problems,block"):
    SamplerSpec(**jobs.load("grpo", words).rollout)
  assert jobs.load("grpo", "small,word_problems,wd1").grpo.learning_rate == config.grpo.learning_rate


@pytest.mark.slow(reason="trains a tokenizer")
def test_word_problems_fit_the_small_preset():
  config = jobs.load("grpo", "small,word_problems")
  task = inputs.build_task(config)
  tokenizer = run_tokenizer.train(task, config.task.style, **config.tokenizer)
  for split in task.splits:
    for record in task.records(split):
      prompt = tokenizer.prompt(*task.prompt(record, config.task.style))
      completion = tokenizer.completion(task.demonstration(record, config.task.style))
      assert len(prompt) <= max(config.data.prompt_buckets)
      assert len(completion) <= config.rollout.completion_length
  asked = record["question"]
  assert tokenizer.decode_all([tokenizer.prompt(*task.prompt(record, "terse"))]) == [asked]
  assert len(prompt) < 2 * len(asked.split()), "words are pieces"


def test_one_method_at_a_time():
  with pytest.raises(ValueError, match="preset words wd1, spg exclude each other"):
    jobs.load("grpo", "tiny,wd1,spg")


def shaping(words="tiny", **fields):
  config = jobs.load("grpo", words)
  config.task.sizes.update(demonstrations=4, train=4, validation=4, test=4)
  config.grpo.update(fields)
  task = inputs.build_task(config)
  return configured.shaping(config.grpo, task, config.task.protocol, SamplerSpec(**config.rollout))


def test_rewards_are_the_tasks_where_nothing_is_said():
  assert shaping() == UNSHAPED


def test_weights_are_of_the_components_of_every_task():
  weights = {"constraints": 0.5, "well_formed": 2.0, "overlong": 0.1}
  found = shaping(
    "tiny,sudoku,countdown", reward_weights={"constraints": 0.5, "well_formed": 2, "overlong": 0.1}, overlong=4
  )
  assert found == Shaping(weights, overlong=4)


def test_a_weight_of_nothing_is_refused():
  with pytest.raises(ValueError, match="names 'well_formed', which is no component; known: constraints, solved"):
    shaping(reward_weights={"well_formed": 2})
