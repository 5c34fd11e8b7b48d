"""Values that make no sense are refused with field, value and what it must be, before anything is read."""

import re

import pytest

from d1jax.errors import RunError
from d1jax.run import limits
from d1jax.run.identity import flatten
from tests.jobs import load

NAN, INF = float("nan"), float("inf")

WRONG = [
  *(("grpo", f"{stage}.learning_rate", value) for stage in ("sft", "grpo") for value in (NAN, INF, -1.0)),
  *(("grpo", "grpo.max_grad_norm", value) for value in (NAN, -1.0)),
  ("grpo", "grpo.max_grad_norm", 0.0),
  ("grpo", "grpo.weight_decay", NAN),
  *(("grpo", "sft.ema_decay", value) for value in (1.0, NAN, -0.5)),
  *(("grpo", f"grpo.{name}", 0) for name in ("save_every", "patience")),
  ("grpo", "grpo.max_skipped_steps", -1),
  ("grpo", "grpo.b1", 2.0),
  ("grpo", "grpo.b2", NAN),
  ("grpo", "sft.b2", 1.0),
  ("grpo", "rollout.temperature", NAN),
  ("grpo", "rollout.temperature", INF),
  ("grpo", "rollout.cfg_scale", NAN),
  *(("grpo", f"{stage}.p_mask_prompt", value) for stage in ("sft", "grpo") for value in (2.0, NAN, -1.0)),
  ("grpo", "grpo.warmup_steps", -1),
  ("grpo", "grpo.dump_every", -1),
  ("grpo", "evaluation.batch_size", -5),
  ("grpo", "model.block", 0),
  ("grpo", "model.block", 2.5),
  ("grpo", "model.unroll", 0),
  ("grpo", "model.unroll", -1),
  *(("grpo", f"model.overrides.{name}", 0) for name in ("layers", "mlp", "embed", "heads")),
  *(("grpo", "model.overrides.rope_theta", value) for value in (NAN, 0.0)),
  ("grpo", "sft.logits_tile", 0),
  ("grpo", "grpo.logits_tile", -1),
  ("grpo", "tokenizer.vocab_size", 0),
  ("grpo", "grpo.reward_weights.solved", "much"),
  ("grpo", "data.prompt_buckets", ("a",)),
  ("grpo", "evaluation.prompt_buckets", (33.5,)),
  ("grpo", "sft.completion_buckets", ()),
  ("grpo", "sft.prompt_buckets", (0,)),
  ("grpo", "sft.mask_ratio", (0.5, 1.5)),
  ("grpo", "sft.grow", (0, 4)),
  ("grpo", "sft.mask_noise_steps", -1),
  *(("grpo", "cpu_devices", value) for value in (0, -1)),
  *(("grpo", "seed", value) for value in (2**32, 2**40, 2**70, -1)),
  ("grpo", "lora.alpha", INF),
  ("grpo", "lora.dropout", 1.0),
  ("grpo", "task.sizes.test", -1),
  ("eval", "seeds", (2**40,)),
  ("eval", "seeds", ()),
  ("eval", "temperatures", (NAN,)),
  ("eval", "samples", 0),
  ("eval", "cfg_scale", INF),
  ("eval", "cpu_devices", -1),
  ("eval", "tokens_per_step", 0),
  ("generate", "seed", 2**40),
  ("generate", "length", 10**10),
  ("eval", "lengths", (2**31,)),
  ("grpo", "rollout.completion_length", 2**31),
  ("generate", "temperature", NAN),
  ("generate", "cfg_scale", NAN),
  ("generate", "cpu_devices", -1),
  ("generate", "batch_size", 0),
  ("generate", "samples", 0),
  ("export", "cpu_devices", 0),
]


@pytest.mark.parametrize(("name", "field", "value"), WRONG, ids=lambda x: str(x))
def test_a_value_that_makes_no_sense_is_refused(name, field, value):
  config = load(name)
  limits.check(config)
  config.unlock()
  with config.ignore_type():
    config.update_from_flattened_dict({field: value})
  expected = f"{field}={value!r} must" if value != () else f"{field} is empty"
  with pytest.raises(ValueError, match=f"^{re.escape(expected)}") as caught:
    limits.check(config)
  assert "\n" not in str(caught.value)


WORDS = [
  "",
  "smoke",
  "countdown",
  "small,word_problems",
  "llada_8b",
  "llada_8b,gsm8k,full,v5p",
  "llada_8b,sudoku,tracerl",
  "sudoku,countdown",
]


@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("name", ["grpo", "sft"])
def test_presets_make_sense(name, words):
  limits.check(load(name, words))


OTHERS = [("eval", ""), ("eval", "llada_8b"), ("generate", ""), ("aot", "llada_8b")]
OTHERS += [("distill", words) for words in ("", "smoke,block", "lora,gsm8k,v5e")]
OTHERS += [("dpo", words) for words in ("", "smoke,block", "small,word_problems", "lora,gsm8k,v5e")]


@pytest.mark.parametrize(("name", "words"), OTHERS)
def test_other_configurations_make_sense(name, words):
  limits.check(load(name, words))


def test_every_limit_is_of_a_field():
  known = {
    name
    for config in ("grpo", "dpo", "distill", "eval", "generate", "serve", "aot")
    for name in limits.flatten(load(config).to_dict())
  }
  assert limits.TABLE.keys() <= known


@pytest.mark.parametrize(
  ("limit", "expected"),
  [
    (limits.COUNT, "a whole number of at least 1"),
    (limits.SEED, "a whole number of at least 0 and at most 4294967295"),
    (limits.POSITIVE, "a finite number above 0"),
    (limits.DECAY, "a finite number of at least 0 and below 1"),
    (limits.REAL, "a finite number"),
    (limits.MAYBE_COUNT, "a whole number of at least 1, or None"),
  ],
)
def test_a_limit_says_what_a_number_must_be(limit, expected):
  assert str(limit) == expected


@pytest.mark.parametrize("name", ["grpo", "sft", "eval", "generate", "export", "aot"])
def test_every_path_that_must_be_local_is_refused_in_a_bucket(name):
  names = [field for field in flatten(load(name).to_dict()) if field in limits.LOCAL]
  assert names
  for field in names:
    config = load(name)
    config.update_from_flattened_dict({field: "gs://bucket/x"})
    with pytest.raises(
      RunError, match=rf"config\.{field}=gs://bucket/x is no path of this machine, which {field} must"
    ):
      limits.check(config)
