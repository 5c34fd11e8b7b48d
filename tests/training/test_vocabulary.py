"""LLaDA's vocabulary of 126,464: no compiled program holds logits of a whole canvas."""

import math
import re

import jax
import jax.numpy as jnp
import pytest

from d1jax.run import experiment as experiments
from d1jax.training import configured, sft
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


def shapes(text: str) -> list[tuple[int, ...]]:
  """Of the arrays of a compiled program."""
  found = re.findall(r"\b(?:f32|bf16|f16|s32|u32|pred)\[([\d,]+)\]", text)
  return [tuple(int(n) for n in shape.split(",")) for shape in found]


def widest(text: str) -> int:
  """The most rows of the vocabulary that any array of a compiled program has, weights and masks left out."""
  rows = [0]
  for shape in shapes(text):
    # The embedding and the head have 512 columns, and 64 on each of the 8 devices.
    if VOCAB in shape and math.prod(shape) // VOCAB not in (64, 512):
      rows.append(math.prod(shape) // VOCAB)
  return max(rows)


@pytest.mark.slow(reason="compiles programs of its own")
def test_the_rollout_unembeds_one_block_at_a_time(experiment):
  config = experiment.config
  rollout = configured.programs(experiment, experiment.optimizer(config.grpo, 1)).tracing(200)["rollout"]
  rows = config.grpo.prompts_per_iteration * config.grpo.num_generations // config.grpo.rollout_chunks // 8
  found = widest(rollout().lower().compile().as_text())
  assert 0 < found <= rows * config.rollout.block_length < rows * (200 + 256)


@pytest.mark.slow(reason="compiles large updates")
def test_the_update_holds_logits_of_a_tile_at_a_time(experiment):
  config = experiment.config
  update = configured.programs(experiment, experiment.optimizer(config.grpo, 1)).tracing(200)["update"]
  text = update().lower().compile().as_text()
  rows = config.grpo.prompts_per_iteration * config.grpo.num_generations // config.grpo.accumulation // 8
  assert (rows * 256, 1, config.grpo.logits_tile) in shapes(text)
  assert widest(text) <= 1, "a mask of forbidden ids, and no logits"


@pytest.mark.slow(reason="compiles large updates")
def test_supervised_fine_tuning_holds_logits_of_a_tile_at_a_time(experiment):
  config = experiment.config
  steps = sft.Steps(experiment.model, configured.fine_tuning(config), experiment.optimizer(config.sft, 1))
  (program,) = steps.compiled.values()
  text = program.as_text()
  assert (config.sft.batch_size // 8 * 256, 1, config.sft.logits_tile) in shapes(text)
  assert widest(text) <= 1, "a mask of forbidden ids, and no logits"


def test_tiles_are_cut_as_the_mesh_cuts_the_head():
  config = jobs.load("grpo", "llada_8b")
  config.update_from_flattened_dict({"mesh.fsdp": 2, "mesh.tensor": 4})
  assert experiments.build(config, None).model.denoiser.vocab_shards == 4


def test_the_reader_of_programs_sees_whole_logits():
  whole = jax.jit(lambda h, w: jnp.sum(jnp.exp(h @ w)))
  h, w = jax.ShapeDtypeStruct((2, 96, 64), jnp.float32), jax.ShapeDtypeStruct((64, VOCAB), jnp.float32)
  assert widest(whole.lower(h, w).compile().as_text()) == 2 * 96
