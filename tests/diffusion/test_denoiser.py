import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from d1jax.diffusion.denoiser import predicts_itself, predicts_next
from tests import toy


def test_forbidden_ids_have_no_probability_and_the_others_keep_their_logits():
  params = toy.params()
  hidden = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, toy.EMBED)), jnp.float32)
  found = np.asarray(toy.DENOISER.logits(params, hidden))
  raw = np.asarray(toy.unembed(params, hidden))
  allowed = [i for i in range(toy.VOCAB) if i not in toy.FORBIDDEN]
  np.testing.assert_array_equal(found[..., allowed], raw[..., allowed])
  assert np.isneginf(found[..., list(toy.FORBIDDEN)]).all()
  assert found.dtype == np.float32


def test_lladas_positions_predict_themselves():
  hidden = jnp.arange(24.0).reshape(2, 4, 3)
  np.testing.assert_array_equal(predicts_itself(hidden, jnp.asarray([2, 0])), hidden[:, [2, 0]])


def test_a_shifted_position_is_predicted_by_its_neighbour():
  hidden = jnp.arange(24.0).reshape(2, 4, 3)
  np.testing.assert_array_equal(predicts_next(hidden, jnp.asarray([3, 1])), hidden[:, [2, 0]])


@pytest.mark.parametrize(
  ("field", "value"),
  [("mask_id", 13), ("mask_id", -1), ("stop_ids", (2, 13)), ("forbidden_ids", (11, 13)), ("stop_ids", (-1,))],
)
def test_ids_beyond_the_vocabulary_are_refused(field, value):
  with pytest.raises(ValueError, match=f"{field}=.*outside the vocabulary of 13"):
    dataclasses.replace(toy.DENOISER, **{field: value})


def test_the_mask_must_be_forbidden():
  with pytest.raises(ValueError, match="lacks the mask 11"):
    dataclasses.replace(toy.DENOISER, forbidden_ids=(12,))


def test_no_stop_ids_are_allowed():
  assert dataclasses.replace(toy.DENOISER, stop_ids=()).stop_ids == ()
