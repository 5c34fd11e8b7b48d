import math

import jax
import pytest

from d1jax.errors import RunError
from d1jax.parallel.mesh import RULES
from d1jax.publish import Publisher
from d1jax.run import experiment as experiments
from tests import jobs

NARROW = {"embed": 256, "heads": 8, "mlp": 512, "layers": 2}


def matrices(tree):
  """The part of each matrix of the network that a device holds."""
  large = [x for x in jax.tree.leaves(tree) if math.prod(x.shape) >= 256 * 256]
  return {math.prod(x.sharding.shard_shape(x.shape)) / math.prod(x.shape) for x in large}


@pytest.mark.parametrize(
  ("words", "updates", "rollouts", "rows"),
  [
    ("v5e", 1 / 8, 1 / 4, 48 / 2),
    ("v6e", 1 / 8, 1, 48 / 8),
    ("v5p", 1, 1, 48 / 8),
    ("h100", 1, 1, 48 / 8),
    ("v5p,full", 1 / 8, 1, 48 / 8),
    ("h100,full", 1 / 8, 1, 48 / 8),
  ],
)
def test_a_large_model_is_laid_out_for_eight_chips(words, updates, rollouts, rows):
  """What a chip has of each matrix, and its rows of a rollout's chunk of 48 completions."""
  config = jobs.load("grpo", f"llada_8b,{words}")
  config.update_from_flattened_dict({f"model.overrides.{field}": size for field, size in NARROW.items()})
  experiment = experiments.build(config, None)
  experiments.check_batches(config, experiment.model.ways)
  weights = experiment.model.weights
  state = weights.abstract_state(experiment.optimizer(config.grpo, 1))
  publisher = Publisher(weights, state.trainable)
  assert (weights.lora is None) == ("full" in words)
  assert weights.quantized is None
  assert matrices(state.trainable if "full" in words else weights.abstract_frozen().base) == {updates}
  assert matrices(publisher.abstract) == {rollouts}
  assert experiment.model.rollout_by_row.shard_shape((48,)) == (rows,)
  assert (publisher.received_bytes == 0) == (updates == rollouts)


@pytest.mark.parametrize(
  ("stage", "changes", "expected"),
  [
    ("sft", {"sft.batch_size": 6}, "smaller parts: --config.sft.accumulation=3"),
    ("sft", {"sft.batch_size": 16, "sft.accumulation": 8}, "smaller parts: --config.model.remat=True"),
    ("sft", {"sft.batch_size": 16, "sft.accumulation": 8, "model.remat": True}, "more devices"),
    ("grpo", {"grpo.rollout_chunks": 8}, "smaller parts: --config.grpo.accumulation=2"),
    ("grpo", {}, "smaller parts: --config.grpo.accumulation=2 --config.grpo.rollout_chunks=4"),
  ],
)
def test_what_memory_asks_for_is_allowed(tmp_path, stage, changes, expected):
  config = jobs.small(tmp_path)
  config.update_from_flattened_dict({"model.remat": False, **changes})
  experiments.check_batches(config, 2)
  remedy = experiments.smaller_parts(config, stage, 2)
  assert remedy == expected
  for word in (word for word in remedy.split() if word.startswith("--config.")):
    name, _, value = word.removeprefix("--config.").partition("=")
    config.update_from_flattened_dict({name: {"True": True}.get(value) or int(value)})
  experiments.check_batches(config, 2)


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_training_every_weight_takes_sixteen_of_the_small_chips(chip):
  config = jobs.load("grpo", f"llada_8b,full,{chip}")
  assert config.mesh.fsdp * config.mesh.tensor == 16


@pytest.mark.parametrize(
  ("name", "words", "message"),
  [
    ("grpo", "llada_8b,v5e,v6e", "preset words v5e, v6e exclude each other: name one of v5e, v6e, v5p, h100"),
    ("grpo", "v5e", "preset word v5e is for lora and full: name one of them too"),
    (
      "grpo",
      "tiny,full,h100",
      "preset words tiny, full exclude each other: name one of tiny, smoke, small, lora, full",
    ),
    ("eval", "llada_8b,v5e,h100", "preset words v5e, h100 exclude each other"),
    ("eval", "full", "unknown preset word 'full'"),
  ],
)
def test_words_that_do_not_go_together_are_refused(name, words, message):
  with pytest.raises(ValueError, match=message):
    jobs.load(name, words)


def test_a_mix_of_tasks_keeps_its_layout():
  one, mixed = jobs.load("grpo", "llada_8b,gsm8k,full,v5e"), jobs.load("grpo", "llada_8b,gsm8k,math,full,v5e")
  for field in ("mesh", "rules", "rollout_rules", "lora", "model"):
    assert mixed[field].to_dict() == one[field].to_dict()


def test_supervised_fine_tuning_has_the_layout_of_updates():
  sft, grpo = jobs.load("sft", "llada_8b,v5e"), jobs.load("grpo", "llada_8b,v5e")
  assert sft.mesh.to_dict() == grpo.mesh.to_dict()
  assert sft.rules.to_dict() == grpo.rules.to_dict()


def test_an_evaluation_has_the_layout_of_rollouts():
  evaluation, grpo = jobs.load("eval", "llada_8b,gsm8k,v5e"), jobs.load("grpo", "llada_8b,v5e")
  assert evaluation.tasks == ("gsm8k",)
  assert evaluation.mesh.to_dict() == grpo.mesh.to_dict()
  assert evaluation.bare.rules.to_dict() == grpo.rules.to_dict() | grpo.rollout_rules.to_dict()
  trained = grpo.to_dict()
  for config in (trained, {k: v for k, v in trained.items() if k != "rollout_rules"}):
    restored = experiments.of_checkpoint(config, evaluation)
    assert restored.rules.to_dict() == {**RULES, **trained["rules"], **config.get("rollout_rules", {})}
    assert not restored.rollout_rules


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({}, None),
    ({"rollout.completion_length": 19}, None),
    (
      {"data.prompt_buckets": (30, 33)},
      r"canvas of 33 \(data.prompt_buckets\) \+ 18 \(rollout.completion_length\) tokens does not divide over 4 devices",
    ),
    (
      {"sft.completion_buckets": (18,)},
      r"33 \(sft.prompt_buckets\) \+ 18 \(sft.completion_buckets\) .*: let both be multiples of 4",
    ),
  ],
)
def test_a_canvas_is_shared_evenly(tmp_path, changes, message):
  fine = {"data.prompt_buckets": (30,), "sft.completion_buckets": (19, 23)}
  config = jobs.small(tmp_path)
  config.update_from_flattened_dict(fine | changes)
  ways = 1 if changes.get("rollout.completion_length") else 4
  if message is None:
    experiments.check_lengths(config, ways)
  else:
    with pytest.raises(ValueError, match=message):
      experiments.check_lengths(config, ways)


@pytest.mark.slow(reason="draws thousands of problems by search")
def test_tiny_countdown_has_all_its_problems_and_room_for_their_answers():
  config = jobs.load("grpo", "tiny,countdown")
  experiment = experiments.build(config, None)
  for split, count in config.task.sizes.items():
    records = experiment.task.records(split)
    assert len(records) == count
    lengths = [len(experiment.tokenizer.completion(experiment.task.demonstration(r, "terse"))) for r in records]
    assert max(lengths) <= config.rollout.completion_length


def test_greedy_rollouts_are_refused_where_groups_are_compared(tmp_path):
  config = jobs.small(tmp_path, rollout__temperature=0.0)
  with pytest.raises(ValueError, match=r"rollout\.temperature=0 gives every prompt the same answer"):
    experiments.check_start(config)
  config.rollout.remasking = "random"  # orders differ, and with them answers
  experiments.check_start(config)
  experiments.check_start(jobs.small(tmp_path, "sft", rollout__temperature=0.0))


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_split_without_questions_is_named(tmp_path, split):
  experiment = experiments.build(jobs.small(tmp_path, **{f"task__sizes__{split}": 0}), None)
  with pytest.raises(ValueError, match=rf"the split {split} holds no question: let task\.sizes\.{split} be at least 1"):
    experiment.prompts(split)


@pytest.mark.parametrize("field", ["model.pretrained", "data.root", "task.module", "sft.data"])
def test_what_must_be_local_is_refused_in_a_bucket(tmp_path, field):
  config = jobs.small(tmp_path, **{field.replace(".", "__"): "gs://bucket/x"})
  with pytest.raises(RunError, match=rf"config\.{field}=gs://bucket/x is no path of this machine"):
    experiments.build(config, None)


def test_the_task_of_somebody_elses_run_is_left_out(tmp_path):
  tokenizer = experiments.build(jobs.small(tmp_path), None).tokenizer
  (tmp_path / "task.py").write_text("raise SystemExit(0)")
  config = jobs.small(tmp_path, task__module=str(tmp_path / "task.py"))
  experiment = experiments.build(config, tokenizer, with_task=False)
  with pytest.raises(RuntimeError, match="without its task"):
    experiment.task.records("test")
