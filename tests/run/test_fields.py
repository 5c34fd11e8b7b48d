"""Fields that are there when they are set: where they go, what they may be, and that the page lists them."""

import pytest

from d1jax.run import fields, parts
from d1jax.run.identity import flatten
from tests import jobs


def chosen(*arguments: str):
  config = jobs.load("grpo", "tiny")
  flags, others = fields.take_flags(arguments)
  fields.choose(config, flags)
  return config, others


def test_a_configuration_shows_few_fields_and_has_all():
  import importlib.util

  spec = importlib.util.spec_from_file_location("grpo", jobs.ROOT / "configs" / "grpo.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  for words in ("", "lora", "full,v5e"):
    shown = module.get_config(words)
    assert len(flatten(shown.to_dict())) <= 95, words
    fields.complete(shown)
    of_mode = {name for name in fields.OPTIONAL if not name.startswith("dpo.")}
    assert of_mode <= set(flatten(shown.to_dict())), words


def test_a_set_field_stays():
  config, _ = chosen("--config.sft.save_every=7")
  fields.complete(config)
  assert (config.sft.save_every, config.grpo.save_every) == (7, None)


@pytest.mark.parametrize(
  ("flag", "path", "value"),
  [
    ("--config.model.unroll=3", ("model", "unroll"), 3),
    ("-config.profile_steps=2:3", ("profile_steps",), "2:3"),
    ("--config.lora.rslora=True", ("lora", "rslora"), True),
    ("--config.rollout.factor=2", ("rollout", "factor"), 2.0),
    ("--config.rules.embed=('fsdp','tensor')", ("rules", "embed"), ("fsdp", "tensor")),
    ("--config.rules.vocab=None", ("rules", "vocab"), None),
    ("--config.task.options.numbers=(3,4)", ("task", "options", "numbers"), (3, 4)),
    ("--config.grpo.reward_weights.solved=2", ("grpo", "reward_weights", "solved"), 2),
    ("--config.grpo.reward_weights=solved=2,constraints=0.5", ("grpo", "reward_weights", "constraints"), 0.5),
    ("--config.grpo.reward_weights={'solved': 2}", ("grpo", "reward_weights", "solved"), 2),
  ],
)
def test_a_flag_sets_a_field(flag, path, value):
  config, others = chosen("main", flag, "--config.seed=1")
  assert others == ["main", "--config.seed=1"]
  for name in path:
    config = config[name]
  assert (config, type(config)) == (value, type(value))


def test_a_value_may_be_an_argument_of_its_own():
  config, others = chosen("--config.model.unroll", "3", "--config.seed", "1")
  assert (config.model.unroll, others) == (3, ["--config.seed", "1"])


@pytest.mark.parametrize(
  ("flag", "message"),
  [
    ("--config.lora.rslora=maybe", "lora.rslora='maybe' must be of the type bool, as its default False is"),
    ("--config.model.unroll=1.5", "model.unroll='1.5' must be of the type int"),
    ("--config.grpo.reward_weights=solved", "write NAME=VALUE, separated by commas, or a dictionary"),
  ],
)
def test_a_wrong_value_is_refused(flag, message):
  with pytest.raises(ValueError, match=message):
    chosen(flag)


@pytest.mark.parametrize("mode", ["eval", "generate"])
def test_the_block_length_of_a_folder_is_set_where_it_is_sampled_with(mode):
  config = jobs.load(mode)
  fields.choose(config, fields.take_flags(["--config.model.block=4"])[0])
  assert config.bare.model.block == 4


def test_a_field_of_another_mode_is_refused():
  flags, _ = fields.take_flags(["--config.grpo.dump_every=1"])
  with pytest.raises(ValueError, match=r"this configuration has no field grpo\.dump_every"):
    fields.choose(jobs.load("sft", "tiny"), flags)


def test_runs_of_older_releases_are_understood():
  config = jobs.load("grpo", "tiny").to_dict()
  config["grpo"]["reward_weights"] = "solved=2,constraints=0.5"
  assert parts.renewed(config)["grpo"]["reward_weights"] == {"solved": 2.0, "constraints": 0.5}


def test_the_page_of_fields_lists_them():
  page = (jobs.ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
  rows = dict(line.strip("| ").split(" | ", 1) for line in page.splitlines() if line.startswith("| `"))
  assert rows == {f"`{name}`": f"`{field.default}` | {field.about}" for name, field in fields.OPTIONAL.items()}
