import pytest

from d1jax import card
from d1jax.diffusion.rollout import SamplerSpec
from d1jax.hub import Snapshot

CONFIG = {
  "task": {"name": "gsm8k"},
  "lora": {"rank": 8, "alpha": 16.0, "targets": ["q_proj", "v_proj"]},
  "seed": 3,
  "grpo": {
    "steps": 400,
    "learning_rate": 3e-6,
    **{part: {"name": name} for part, name in (("estimator", "one_step"), ("loss", "espo"), ("advantage", "mean"))},
  },
}
ARM = {"solved": 0.5, "solved_interval": [0.4, 0.625], "n": 80}
RESULTS = {
  "task": "gsm8k",
  "baseline": ARM | {"solved": 0.0},
  "before": ARM,
  "after": ARM | {"solved": 0.75},
  "device": "8 x H100",
  "revision": {"commit": "c0ffee", "source": "0" * 64},
}
BASE = Snapshot("GSAI-ML/LLaDA-8B-Instruct", "a" * 40)
FACTS = card.Facts("lab/mine", "model", BASE, "grpo", 350, CONFIG, RESULTS, SamplerSpec(256, 128, 32))


def test_a_card_has_facts_results_and_use():
  text = card.write(FACTS)
  front, _, rest = text.removeprefix("---\n").partition("\n---\n")
  assert "base_model: GSAI-ML/LLaDA-8B-Instruct" in front.splitlines()
  for line in (
    "# lab/mine",
    f"| base | GSAI-ML/LLaDA-8B-Instruct, commit {'a' * 40} |",
    "| method | estimator one\\_step, loss espo, advantage mean |",
    "| checkpoint | iteration 350 of 400 |",
    "| trained | LoRA of rank 8, alpha 16.0, on q\\_proj, v\\_proj |",
    "|  | solved | questions |",
    "| constant answer | 0.0 [40.0, 62.5] | 80 |",
    "| start | 50.0 [40.0, 62.5] | 80 |",
    "| this model | 75.0 [40.0, 62.5] | 80 |",
    'model = d1jax.from_pretrained("lab/mine")',
  ):
    assert line in rest.splitlines(), line
  assert "256 tokens in blocks of 32, 128 steps" in rest


def test_an_adapter_says_how_it_is_merged():
  text = card.write(FACTS._replace(form="adapter"))
  assert "base_model_relation: adapter" in text
  assert 'PeftModel.from_pretrained(base, "lab/mine")  # base: GSAI-ML/LLaDA-8B-Instruct' in text
  assert "d1jax export --pretrained=GSAI-ML/LLaDA-8B-Instruct --adapter=lab/mine --output=merged" in text


def test_what_is_not_known_is_not_claimed():
  text = card.write(FACTS._replace(base=None, results=None))
  assert "| base | none: the weights were drawn |" in text
  assert "The run has no results of this checkpoint." in text
  assert "base_model" not in text


def test_a_run_without_a_task_has_a_held_out_loss():
  results = {name: RESULTS[name] for name in ("device", "revision")} | {"held_out": {"held_out_loss": 2.5}}
  assert "Held-out loss of its data: 2.500 nats a token." in card.write(FACTS._replace(results=results))


def test_names_that_others_chose_stay_in_their_cell():
  name = "x\n---\n# | <b>\x1b[2J"
  text = card.write(FACTS._replace(name=name, base=name, config=CONFIG | {"task": {"name": name}}))
  assert text.count("\n---\n") == 1
  assert "\x1b" not in text
  assert "| task | x --- \\# \\| \\<b\\>" in text
  assert '"FOLDER"' in text


@pytest.mark.parametrize("broken", [{}, RESULTS | {"after": ARM | {"solved": None}}])
def test_broken_results_are_an_error_that_the_export_expects(broken):
  with pytest.raises((LookupError, TypeError)):
    card.write(FACTS._replace(results=broken))
