import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from d1jax.diffusion.rollout import SamplerSpec, up_to_stop


@pytest.mark.parametrize(
  ("row", "kept"),
  [([5, 2, 6, 7], 2), ([2, 2, 2, 2], 1), ([5, 6, 7, 8], 4), ([5, 6, 7, 2], 4), ([3, 5, 2, 5], 1), ([5, 5, 3, 2], 3)],
)
def test_true_up_to_and_including_the_first_stop(row, kept):
  mask = np.asarray(up_to_stop(jnp.asarray([row], jnp.int32), (2, 3)))
  assert mask.dtype == bool
  assert mask[0].tolist() == [i < kept for i in range(4)]


def test_without_stop_ids_all_counts():
  assert np.asarray(up_to_stop(jnp.zeros((2, 3), jnp.int32), ())).all()


def test_blocks_and_steps():
  spec = SamplerSpec(completion_length=256, diffusion_steps=128, block_length=32)
  assert (spec.blocks, spec.steps_per_block) == (8, 16)
  assert (spec.temperature, spec.cfg_scale, spec.remasking) == (0.9, 0.0, "low_confidence")


def test_forward_passes_count_the_blocks_that_were_computed():
  spec = SamplerSpec(completion_length=12, diffusion_steps=6, block_length=4)
  assert [spec.forward_passes(step) for step in (0, 1, 5)] == [6, 6, 6]
  early = dataclasses.replace(spec, early_exit=True)
  assert [early.forward_passes(step) for step in (0, 1, 2, 3, 5)] == [2, 2, 4, 4, 6]
  assert dataclasses.replace(early, cfg_scale=1.0).forward_passes(2) == 8
  # A block of 4 tokens takes 4 steps at most.
  assert SamplerSpec(12, 30, 4).forward_passes(11) == 12


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"block_length": 5}, "completion_length=12 is not a multiple of block_length=5"),
    ({"block_length": 0}, "block_length=0"),
    ({"diffusion_steps": 4}, "diffusion_steps=4 is not a multiple of the 3 blocks"),
    ({"diffusion_steps": 2}, "diffusion_steps=2 is not a multiple of the 3 blocks"),
    ({"diffusion_steps": 0}, "diffusion_steps=0"),
    ({"diffusion_steps": -3}, "diffusion_steps=-3"),
    ({"completion_length": 0}, "completion_length=0|diffusion_steps"),
    ({"remasking": "confidence"}, "remasking='confidence' is unknown; known: low_confidence, random"),
    ({"temperature": -0.1}, "temperature=-0.1"),
    ({"cfg_scale": -1.0}, "cfg_scale=-1.0"),
  ],
)
def test_a_spec_that_makes_no_sense_is_refused(options, message):
  good = {"completion_length": 12, "diffusion_steps": 6, "block_length": 4}
  SamplerSpec(**good)
  with pytest.raises(ValueError, match=message):
    SamplerSpec(**good | options)
