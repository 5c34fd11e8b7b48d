"""`d1jax.log_likelihood`: what it scores, what that depends on, what it refuses."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import d1jax
from d1jax import keys
from d1jax.diffusion.answers import Answers, answer_logps
from d1jax.evaluation.likelihood import log_likelihood, scored
from d1jax.parallel.mesh import make_mesh
from tests import hub

PROMPTS = [list(b"What is 2 + 2?"), list(b"Name a river in the north."), list(b"Why"), list(b"A?")]
ANSWERS = [list(b" four"), list(b" the Elbe, I think"), list(b"!"), list(b" B")]
BUCKETS = {"prompt_buckets": (16, 32), "answer_buckets": (8, 24)}
score = functools.partial(log_likelihood, samples=4, strata=2, **BUCKETS)


def logps(found) -> np.ndarray:
  return np.asarray([one.logp for one in found])


@pytest.fixture(scope="module")
def found(model):
  return score(model, PROMPTS, ANSWERS, check_greedy=True)


@pytest.mark.slow(reason="compiles programs of its own")
def test_it_is_the_estimate_of_each_request_alone(model, found):
  assert d1jax.log_likelihood is log_likelihood
  key = keys.purpose_key(keys.seeded(0), keys.Purpose.LIKELIHOOD)
  for index, one in enumerate(found):
    answers = Answers(
      jnp.asarray([PROMPTS[index]]),
      jnp.ones((1, len(PROMPTS[index])), bool),
      jnp.asarray([ANSWERS[index]]),
      jnp.asarray([len(ANSWERS[index])]),
      jnp.asarray([index]),
    )
    estimates = np.asarray(answer_logps(model.denoiser, model.params, answers, key, samples=4, strata=2))[0]
    assert one.logp == pytest.approx(estimates.mean(), rel=1e-4)
    assert one.tokens == len(ANSWERS[index])
    error = 0.0 if one.tokens == 1 else estimates.std(ddof=1) / math.sqrt(2)
    assert one.error == pytest.approx(error, rel=1e-2, abs=1e-4)
    assert one.greedy is False


@pytest.mark.slow(reason="compiles programs of its own")
def test_batches_buckets_order_and_company_change_nothing_and_programs_are_compiled_once(model, found):
  one_at_a_time = dict(scored(model, PROMPTS, ANSWERS, samples=4, strata=2, batch_size=1, prompt_buckets=(40,)))
  np.testing.assert_allclose(logps([one_at_a_time[i] for i in range(4)]), logps(found), rtol=1e-4)
  programs = lambda: sum(program._cache_size() for program in model.programs.values())
  compiled = programs()
  again = score(model, PROMPTS[::-1], ANSWERS[::-1], identities=[3, 2, 1, 0])
  np.testing.assert_allclose(logps(again)[::-1], logps(found), rtol=1e-4)
  assert programs() == compiled
  assert [one.greedy for one in again] == [None] * 4


@pytest.mark.slow(reason="compiles programs for a mesh")
def test_a_mesh_changes_no_mask(folder, found):
  mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  sharded = d1jax.from_pretrained(folder, jnp.float32, mesh=mesh)
  np.testing.assert_allclose(logps(score(sharded, PROMPTS, ANSWERS)), logps(found), rtol=1e-4)


def test_texts_are_written_by_the_template_and_end_as_answers_do(model):
  ids = model.tokenizer.prompt([{"role": "user", "content": "hi"}], "")
  turns = [{"role": "user", "content": "hi"}]
  several = score(model, ["hi", turns, ids], ["é!", "é!", model.tokenizer.completion("é!")], identities=[0, 0, 0])
  assert len({round(one.logp, 4) for one in several}) == 1


@pytest.mark.slow(reason="compiles programs of its own")
def test_blocks_of_one_token_are_exact(tmp_path):
  folder = hub.write(tmp_path / "sdar", "sdar", dtype="float32")
  model = d1jax.from_pretrained(folder, jnp.float32, block=1)
  (one,) = score(model, PROMPTS[:1], ANSWERS[:1])
  whole = jnp.asarray([PROMPTS[0] + ANSWERS[0]])
  total = 0.0
  for place in range(len(PROMPTS[0]), whole.shape[1]):
    tokens = whole[:, : place + 1].at[0, place].set(model.denoiser.mask_id)
    hidden = model.denoiser.encode(model.params, tokens, jnp.ones(tokens.shape, bool))
    total += float(jax.nn.log_softmax(model.denoiser.logits(model.params, hidden))[0, place, whole[0, place]])
  assert one.logp == pytest.approx(total, rel=1e-4)
  assert one.error == 0


@pytest.mark.parametrize(
  ("prompts", "answers", "options", "message"),
  [
    ([[5]], [[]], {}, "answer 1 has no tokens; write something"),
    ([[5]] * 2, [[5]], {}, "there are 2 prompts and 1 answers; give one answer a prompt"),
    ("hi", ["a"], {}, "prompts and answers are lists"),
    ([[5] * 33], [[5]], {}, "prompt 1 has 33 tokens, prompt_buckets hold 32: shorten it, or raise them"),
    ([[5]], [[5] * 25], {}, "answer 1 has 25 tokens, answer_buckets hold 24"),
    ([[5]], [[261]], {}, "request 1 has the id 261, which has no probability"),
    ([[-1]], [[5]], {}, "request 1 has the id -1"),
    ([[5]], [[5]], {"samples": 0}, "samples"),
    ([[5]], [[5]], {"samples": 6, "strata": 4}, "samples=6 masks do not fall into sets of strata=4"),
    ([[5]], [[5]], {"cfg_scale": -1.0}, r"cfg_scale=-1\.0 must not be negative"),
    ([[5]], [[5]], {"identities": [-1]}, "the identity -1 of request 1 must be from 0 to"),
  ],
)
def test_what_cannot_be_scored_is_refused_before_anything_is_computed(model, prompts, answers, options, message):
  with pytest.raises(ValueError, match=message):
    score(model, prompts, answers, **options)
