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


def test_a_block_has_no_more_steps_than_tokens():
  assert SamplerSpec(12, 30, 4).steps_per_block == 4
  # Where confidence decides, it may take a step a token, whatever `diffusion_steps` says.
  assert SamplerSpec(12, 3, 4, schedule="threshold").steps_per_block == 4


@pytest.mark.parametrize(
  ("options", "steps", "passes"),
  [
    ({}, [[0, 1, 1, 0, 2, 2, 3, 3, 5, 5, 4, 4]], 6),
    # The second block was reached by one row, the third by none.
    ({"early_exit": True}, [[0, 1, 1, 0, 2, 2, 3, 3, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]], 4),
    ({"early_exit": True, "cfg_scale": 1.0}, [[0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0]], 4),
    # Each block goes on until its slowest row is full: 2, 4 and 1 steps.
    ({"schedule": "factor"}, [[0, 0, 0, 0, 4, 5, 6, 7, 8, 8, 8, 8], [1, 0, 1, 0, 4, 4, 4, 4, 8, 8, 8, 8]], 7),
    ({"schedule": "threshold", "early_exit": True}, [[0, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]], 3),
  ],
  ids=str,
)
def test_forward_passes_are_read_off_the_recorded_steps(options, steps, passes):
  spec = SamplerSpec(completion_length=12, diffusion_steps=6, block_length=4, **options)
  assert spec.forward_passes(np.asarray(steps)) == passes


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
    ({"cache": "full"}, "cache='full' is unknown; known: none, prefix, dual, window"),
    ({"refresh_every": 2}, "refresh_every=2 needs a cache"),
    ({"refresh_every": 0, "cache": "dual"}, "refresh_every=0 must be at least 1"),
    ({"look_behind": -1}, "look_behind=-1 and look_ahead=16 must not be negative"),
    ({"look_ahead": -2}, "look_ahead=-2"),
    ({"schedule": "cosine"}, "schedule='cosine' is unknown; known: static, sequential, threshold, factor"),
    (
      {"schedule": "threshold", "remasking": "random"},
      "schedule='threshold' chooses tokens itself: use remasking='low_confidence'",
    ),
    ({"threshold": 0.0}, "threshold=0.0 must be a probability"),
    ({"threshold": 1.1}, "threshold=1.1"),
    ({"factor": 0.0}, "factor=0.0 must be positive"),
    ({"max_reveal": 0}, "max_reveal=0 must be at least 1"),
  ],
)
def test_a_spec_that_makes_no_sense_is_refused(options, message):
  good = {"completion_length": 12, "diffusion_steps": 6, "block_length": 4}
  SamplerSpec(**good)
  with pytest.raises(ValueError, match=message):
    SamplerSpec(**good | options)


def test_another_cache_keeps_all_that_is_not_the_caches():
  spec = SamplerSpec(18, 6, 18, cache="window", refresh_every=2, look_ahead=3, schedule="factor", factor=0.5)
  assert spec.with_cache("none") == SamplerSpec(18, 6, 18, look_ahead=3, schedule="factor", factor=0.5)
  assert spec.with_cache("dual") == SamplerSpec(
    18, 6, 18, cache="dual", refresh_every=2, look_ahead=3, schedule="factor", factor=0.5
  )
