import json

import pytest

from d1jax import generation_config
from d1jax.diffusion.rollout import SamplerSpec
from d1jax.files import FileError

LENGTHS = {"max_new_tokens": 18, "block_length": 18, "steps": 6}


def read(folder, **keys):
  (folder / generation_config.FILE).write_text(json.dumps(keys))
  return generation_config.read_sampler(folder)


@pytest.mark.parametrize(
  "sampler",
  [
    SamplerSpec(18, 6, 18, temperature=4.0),
    SamplerSpec(256, 128, 32, cache="prefix", cfg_scale=1.5, remasking="random"),
    SamplerSpec(64, 64, 8, schedule="threshold", threshold=0.8, max_reveal=8),
    SamplerSpec(64, 64, 8, schedule="factor", factor=2.0),
  ],
)
def test_what_is_written_is_read(sampler, tmp_path):
  found = read(tmp_path, eos_token_id=3, **generation_config.keys_of(sampler))
  changed = {"temperature": 0.0, "cache": "none", "early_exit": True}
  assert vars(found) == vars(sampler) | changed


@pytest.mark.parametrize("keys", [{}, {"temperature": 0.7, "max_new_tokens": 2048}, {"steps": 8, "block_length": 4}])
def test_files_of_others_say_nothing(keys, tmp_path):
  assert generation_config.read_sampler(tmp_path) is None
  assert read(tmp_path, **keys) is None


@pytest.mark.parametrize(
  ("keys", "message"),
  [
    ({"steps": "6"}, "steps is '6', expected a whole number from 1 to 65536"),
    ({"steps": True}, "steps is True"),
    ({"max_new_tokens": 10**9}, "max_new_tokens is 1000000000, expected"),
    (
      {"block_length": 7},
      "completion_length=18 is not a multiple of block_length=7: take 14 or 21; correct it, or remove max_new_tok",
    ),
    ({"factor": float("inf")}, "factor is inf, expected a finite number"),
    ({"remasking": 3}, "remasking is 3, expected the type str"),
    ({"schedule": "fast"}, "schedule='fast' is unknown"),
    ({"cfg_scale": -1}, "temperature=0.0 and cfg_scale=-1.0 must not be negative"),
  ],
)
def test_values_that_cannot_be_are_named(keys, message, tmp_path):
  with pytest.raises(FileError, match=f"generation_config.json: {message}"):
    read(tmp_path, **(LENGTHS | keys))
