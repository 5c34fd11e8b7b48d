"""LLaDA's vocabulary of 126,464: no compiled program holds logits of a whole canvas."""

import math
import re

import jax
import jax.numpy as jnp
import pytest

from d1jax.training import experiment as experiments
from d1jax.training import grpo, sft
from tests import jobs

VOCAB = 126464


@pytest.fixture(scope="module")
def experiment():
  """The 8B preset at d1's batch, with one narrow layer; nothing is run."""
  config = jobs.load("grpo", "llada_8b")
  config.update_from_flattened_dict(
    {"model.overrides.embed": 512, "model.overrides.heads": 8, "model.overrides.mlp": 512, "model.overrides.layers": 1}
  )
  config.sft.steps = 1
  return experiments.build(config, None)


def widest(text: str) -> int:
  """The most rows of the vocabulary that any array of a compiled program has, weights left out."""
  rows = [0]
  for shape in re.findall(r"\b(?:f32|bf16|f16|s32|u32|pred)\[([\d,]+)\]", text):
    sizes = [int(n) for n in shape.split(",")]
    # The embedding and the head have 512 columns, and 64 on each of the 8 devices.
    if VOCAB in sizes and sorted(sizes) not in ([64, VOCAB], [512, VOCAB]):
      rows.append(math.prod(sizes) // VOCAB)
  return max(rows)


def test_the_rollout_unembeds_one_block_at_a_time(experiment):
  config = experiment.config
  rollout, _ = grpo.Programs(experiment, experiment.optimizer(config.grpo, 1)).lowering(200)
  rows = config.grpo.prompts_per_iteration * config.grpo.num_generations // config.grpo.rollout_chunks // 8
  found = widest(rollout().compile().as_text())
  assert 0 < found <= rows * config.rollout.block_length < rows * (200 + 256)


def test_the_update_unembeds_a_chunk_at_a_time(experiment):
  config = experiment.config
  _, update = grpo.Programs(experiment, experiment.optimizer(config.grpo, 1)).lowering(200)
  rows = config.grpo.prompts_per_iteration * config.grpo.num_generations // config.grpo.accumulation // 8
  found = widest(update().compile().as_text())
  assert 0 < found <= rows * config.grpo.logits_chunk < rows * 256


def test_supervised_fine_tuning_unembeds_a_chunk_at_a_time(experiment):
  config = experiment.config
  steps = sft.Steps(experiment, experiment.optimizer(config.sft, 1))
  (program,) = steps.compiled.values()
  found = widest(program.as_text())
  assert 0 < found <= config.sft.batch_size // 8 * config.sft.logits_chunk < config.sft.batch_size // 8 * 256


def test_the_reader_of_programs_sees_whole_logits():
  whole = jax.jit(lambda h, w: jnp.sum(jnp.exp(h @ w)))
  h, w = jax.ShapeDtypeStruct((2, 96, 64), jnp.float32), jax.ShapeDtypeStruct((64, VOCAB), jnp.float32)
  assert widest(whole.lower(h, w).compile().as_text()) == 2 * 96
