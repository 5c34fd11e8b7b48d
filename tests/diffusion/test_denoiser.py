import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from tests import toy


def test_forbidden_ids_have_no_probability_and_the_others_keep_their_logits():
  params = toy.params()
  hidden = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, toy.EMBED)), jnp.float32)
  found = np.asarray(toy.DENOISER.logits(params, hidden))
  raw = np.asarray(hidden @ toy.head(params))
  allowed = [i for i in range(toy.VOCAB) if i not in toy.FORBIDDEN]
  np.testing.assert_array_equal(found[..., allowed], raw[..., allowed])
  assert np.isneginf(found[..., list(toy.FORBIDDEN)]).all()
  assert found.dtype == np.float32


def test_the_head_is_cast_to_what_the_network_computes_in_and_logits_are_float32():
  params = toy.params()
  hidden = jnp.asarray(np.random.default_rng(0).normal(size=(3, toy.EMBED)), jnp.bfloat16)
  found = toy.DENOISER.logits(params, hidden)
  exact = np.asarray(hidden, np.float64) @ np.asarray(params["head"].astype(jnp.bfloat16), np.float64)
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found[:, :11], exact[:, :11], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("shift", "read"), [(0, [2, 1]), (1, [1, 0])])
def test_a_position_is_predicted_by_itself_or_by_its_neighbour(shift, read):
  hidden = jnp.arange(24.0).reshape(2, 4, 3)
  found = dataclasses.replace(toy.DENOISER, shift=shift).hidden_predicting(hidden, jnp.asarray([2, 1]))
  np.testing.assert_array_equal(found, hidden[:, read])


@pytest.mark.parametrize(
  ("field", "value"),
  [("mask_id", 13), ("mask_id", -1), ("stop_ids", (2, 13)), ("forbidden_ids", (11, 13)), ("stop_ids", (-1,))],
)
def test_ids_beyond_the_vocabulary_are_refused(field, value):
  with pytest.raises(ValueError, match=f"{field}=.*outside the vocabulary of 13"):
    dataclasses.replace(toy.DENOISER, **{field: value})


def test_the_mask_must_be_forbidden():
  with pytest.raises(ValueError, match="must hold the mask 11"):
    dataclasses.replace(toy.DENOISER, forbidden_ids=(12,))


def test_no_stop_ids_are_allowed():
  assert dataclasses.replace(toy.DENOISER, stop_ids=()).stop_ids == ()


def test_a_block_needs_its_functions():
  with pytest.raises(ValueError, match="block=0 must be at least 1"):
    dataclasses.replace(toy.DENOISER, block=0)
  with pytest.raises(ValueError, match="block=4 needs encode_streams"):
    dataclasses.replace(toy.DENOISER, block=4)
