"""`d1jax.generate`: what it draws, what that depends on, what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import d1jax
from d1jax import keys
from d1jax.data import tokenizer as tokenizers
from d1jax.diffusion.rollout import SamplerSpec
from d1jax.diffusion.sampler import sample
from d1jax.generation.generate import GREEDY, generate, stream
from d1jax.parallel.mesh import make_mesh
from tests import hub

PROMPTS = ["1 + 1 = ?", "Name three rivers.", "Why?", "héllo " * 12]
DRAWN = SamplerSpec(completion_length=12, diffusion_steps=6, block_length=6, temperature=1.0)
SMALL = dataclasses.replace(DRAWN, temperature=0.0)


def tokens(generations) -> np.ndarray:
  return np.stack([one.tokens for one in generations])


def test_the_package_offers_it():
  assert d1jax.generate is generate


@pytest.mark.slow(reason="compiles programs of its own")
def test_draws_are_those_of_the_sampler(model):
  denoiser, params, tokenizer = model.denoiser, model.params, model.tokenizer
  (found,) = generate(model, PROMPTS[:1], spec=DRAWN, seed=3, prefill="so ")
  ids = jnp.asarray([tokenizer.prompt([{"role": "user", "content": PROMPTS[0]}], "so ")], jnp.int32)
  key = keys.purpose_key(jax.random.key(3), keys.Purpose.EVALUATION)
  row = jnp.zeros(1, jnp.int32)
  rollout = sample(denoiser, params, ids, jnp.ones(ids.shape, bool), row, row, key, spec=DRAWN)
  np.testing.assert_array_equal(found.tokens, rollout.completion[0])
  np.testing.assert_array_equal(found.reveal_step, rollout.reveal_step[0])
  assert found.length == int(rollout.completion_mask.sum())
  assert found.text == "so " + tokenizer.decode_all([found.tokens[: found.length].tolist()])[0]
  assert (found.prompt, found.index, found.sample, found.prefill) == (PROMPTS[0], 0, 0, "so ")


@pytest.mark.slow(reason="compiles programs of its own")
def test_batches_buckets_and_company_change_nothing(model):
  together = tokens(generate(model, PROMPTS, spec=DRAWN))
  np.testing.assert_array_equal(together, tokens(generate(model, PROMPTS, spec=DRAWN, batch_size=3)))
  np.testing.assert_array_equal(together, tokens(generate(model, PROMPTS, spec=DRAWN, prompt_buckets=(180, 333))))
  np.testing.assert_array_equal(together[:2], tokens(generate(model, PROMPTS[:2], spec=DRAWN)))


def test_samples_and_seeds_differ_and_their_number_changes_no_draw(model):
  three = generate(model, PROMPTS[:2], spec=DRAWN, samples=3)
  assert [(one.index, one.sample) for one in three] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
  assert len({one.tokens.tobytes() for one in three}) == 6
  one, other = (tokens(generate(model, PROMPTS[:2], spec=DRAWN, seed=seed)) for seed in (0, 1))
  np.testing.assert_array_equal(tokens(three)[::3], one)
  assert (one != other).any(axis=1).all()


def test_ids_stand_for_a_text_and_identities_for_its_place(model):
  written = [model.tokenizer.prompt([{"role": "user", "content": text}], "") for text in PROMPTS[:2]]
  ids = [np.asarray(row, np.int32) for row in written]
  found = generate(model, ids[::-1], spec=DRAWN, identities=[1, 0])
  np.testing.assert_array_equal(tokens(found)[::-1], tokens(generate(model, PROMPTS[:2], spec=DRAWN)))
  assert PROMPTS[1] in found[0].prompt
  for message, prompts, options in (
    ("prompt 1 is token ids, which are taken as they are: leave prefill out", ids, {"prefill": "so "}),
    ("prompt 1 is empty", [ids[0][:0]], {}),
    ("identities must be 2 numbers below 1048576, one a prompt", ids, {"identities": [0, 1 << 20]}),
  ):
    with pytest.raises(ValueError, match=message):
      generate(model, prompts, spec=DRAWN, **options)


def test_a_conversation_is_written_by_the_chat_template(model):
  said = {"role": "user", "content": PROMPTS[0]}
  plain, alone, turns = generate(
    model,
    [PROMPTS[0], [said], [said, {"role": "assistant", "content": "2"}, {"role": "user", "content": "Sure?"}]],
    spec=SMALL,
  )
  np.testing.assert_array_equal(plain.tokens, alone.tokens)
  assert turns.prompt == "Sure?"
  assert (turns.tokens != plain.tokens).any()


@pytest.mark.slow(reason="compiles programs of its own")
def test_a_mesh_changes_no_token(folder, model):
  mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, jax.devices())
  sharded = d1jax.from_pretrained(folder, jnp.float32, mesh=mesh)
  expected = tokens(generate(model, PROMPTS[:3], spec=DRAWN))
  np.testing.assert_array_equal(tokens(generate(sharded, PROMPTS[:3], spec=DRAWN)), expected)


@pytest.mark.slow(reason="compiles programs of its own")
def test_a_program_is_compiled_once_for_a_shape(model):
  compiled = []
  jax.monitoring.register_event_duration_secs_listener(
    lambda name, seconds, **_: compiled.append(name) if name.endswith("backend_compile_duration") else None
  )
  spec = dataclasses.replace(DRAWN, temperature=0.7)
  generate(model, PROMPTS[:2], spec=spec)
  first = len(compiled)
  generate(model, PROMPTS[1:3], spec=spec, seed=5)
  assert 0 < first == len(compiled)
  generate(model, PROMPTS[:3], spec=spec)
  assert len(compiled) > first


def test_texts_come_batch_by_batch(model):
  compiled_for = stream(model, PROMPTS, spec=SMALL, batch_size=2)
  assert [next(compiled_for).index for _ in PROMPTS] == [0, 1, 2, 3]
  with pytest.raises(StopIteration):
    next(compiled_for)


def test_a_row_that_has_ended_early_says_which_tokens_no_step_revealed(model):
  """Every token but one stops: each row ends in its first block."""
  ends = dataclasses.replace(model.denoiser, stop_ids=tuple(range(258)))
  ends = dataclasses.replace(model, denoiser=ends, rollout_denoiser=ends)
  spec = dataclasses.replace(SMALL, early_exit=True)
  (found,) = generate(ends, PROMPTS[:1], spec=spec)
  np.testing.assert_array_equal(found.reveal_step[6:], -1)
  assert sorted(found.reveal_step[:6].tolist()) == [0, 0, 1, 1, 2, 2]
  assert found.length == 1
  (whole,) = generate(ends, PROMPTS[:1], spec=SMALL)
  assert sorted(whole.reveal_step.tolist()) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


@pytest.mark.parametrize(
  ("prompts", "options", "message"),
  [
    ("text", {}, "prompts is one text, 'text'; give a list"),
    ([], {}, "there are no prompts"),
    (["a", " \n"], {}, "prompt 2 is empty"),
    (["a" * 50], {"prompt_buckets": (8, 32)}, "prompt 1 has .* tokens, prompt_buckets hold 32: shorten it"),
    (["a"], {"samples": 0}, "samples is 0; give an integer of at least 1"),
    (["a"], {"batch_size": 0}, "batch_size is 0"),
    (["a"], {"seed": -1}, "seed is -1"),
    (["a"], {"samples": 2}, "samples is 2, but at temperature 0 they are all the same"),
    (["\ud800"], {}, "not Unicode"),
    (["a"], {"prefill": "<|hole|>" * 30, "prompt_buckets": (32,)}, "prompt 1 has"),
  ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_computed(model, prompts, options, message):
  with pytest.raises(ValueError, match=message):
    stream(model, prompts, **options)


def test_blocks_that_the_network_does_not_have_are_refused_before_anything_is_computed(tmp_path):
  model = d1jax.from_pretrained(hub.write(tmp_path / "sdar", "sdar"), block=4)
  with pytest.raises(
    ValueError, match=r"block_length=6 does not divide the network's block of 4 .* use block_length=4"
  ):
    stream(model, ["a"], spec=SMALL)


def test_a_character_without_a_token_is_named(model):
  digits = tokenizers.SentencePieceTokenizer(
    tokenizers.train_sentencepiece(["0123 abc", "abc 3210"] * 9, model_type="char", vocab_size=40)
  )
  model = dataclasses.replace(model, tokenizer=digits)
  with pytest.raises(ValueError, match=r"prompt 2 has characters that the tokenizer does not know: '4', '\\t', 'é';"):
    stream(model, ["12 a", "a4\té4"])
  with pytest.raises(ValueError, match="prompt 1 has characters that the tokenizer does not know: 'z'"):
    stream(model, ["12 a"], prefill="z")
  stream(model, ["12 a"])


def test_a_model_without_a_tokenizer_is_refused(model):
  with pytest.raises(ValueError, match="there is no tokenizer"):
    generate(dataclasses.replace(model, tokenizer=None), ["a"])


@pytest.mark.slow(reason="compiles programs of its own")
def test_without_a_sampler_the_most_probable_tokens_are_taken(model):
  (found,) = generate(model, PROMPTS[:1], prompt_buckets=(64,))
  np.testing.assert_array_equal(found.tokens, generate(model, PROMPTS[:1], spec=GREEDY, seed=7)[0].tokens)
  revealed = found.reveal_step[found.reveal_step >= 0]
  assert set(np.bincount(revealed).tolist()) == {2}
