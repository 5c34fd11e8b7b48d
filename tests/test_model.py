"""`d1jax.from_pretrained`: a folder as a model."""

import json
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import d1jax
from d1jax.diffusion.likelihood import one_step
from d1jax.diffusion.rollout import SamplerSpec
from d1jax.diffusion.sampler import sample
from d1jax.models import load
from d1jax.parallel.mesh import make_mesh
from d1jax.source import inspect
from tests import hub
from tests.models import folders

FAMILIES = ("llada", "dream", "qwen2", "llama")
NEW = ("a2d_qwen3", "sdar", "fast_dllm_qwen", "illada")


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
  root = tmp_path_factory.mktemp("hub")
  return {family: hub.write(root / family, family, dtype="float32") for family in FAMILIES + NEW}


def hidden_and_logits(denoiser, params, tokens):
  valid = jnp.ones(tokens.shape, bool)
  positions = jnp.arange(2, tokens.shape[1])
  hidden = denoiser.encode(params, tokens, valid)
  return hidden, denoiser.logits(params, denoiser.hidden_predicting(hidden, positions))


@pytest.mark.few(1, reason="each case compiles programs of its own")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_samples_and_scores(folder_of, family):
  model = d1jax.from_pretrained(folder_of[family], jnp.float32)
  denoiser, params, tokenizer = model.denoiser, model.params, model.tokenizer
  messages = [{"role": "user", "content": "1 + 1 = ?"}]
  ids = tokenizer.prompt(messages, "")
  prompt = jnp.asarray([ids, ids], jnp.int32)
  row = jnp.arange(2, dtype=jnp.int32)
  spec = SamplerSpec(completion_length=8, diffusion_steps=4, block_length=4)
  valid = jnp.ones(prompt.shape, bool)
  rollout = sample(denoiser, params, prompt, valid, row, row, jax.random.key(0), spec=spec)
  drawn = np.asarray(rollout.completion)
  assert not np.isin(drawn, denoiser.forbidden_ids).any()
  assert drawn.max() < tokenizer.vocab
  scores = one_step(denoiser, params, rollout, spec, jax.random.key(1), p_mask_prompt=0.1)
  assert np.isfinite(np.asarray(scores.logp)).all()
  assert tokenizer.decode_all(drawn.tolist())


@pytest.mark.parametrize(("family", "shift"), [("llada", 0), ("dream", 1), ("qwen2", 1), ("llama", 1)])
def test_a_causal_family_predicts_the_next_token(folder_of, family, shift):
  model = d1jax.from_pretrained(folder_of[family], jnp.float32)
  denoiser, params = model.denoiser, model.params
  tokens = jax.random.randint(jax.random.key(0), (2, 9), 0, 250)
  hidden, logits = hidden_and_logits(denoiser, params, tokens)
  np.testing.assert_array_equal(logits, denoiser.logits(params, hidden[:, 2 - shift : 9 - shift]))


def test_attention_sees_both_ways_in_a_causal_start(folder_of):
  model = d1jax.from_pretrained(folder_of["llama"], jnp.float32)
  denoiser, params = model.denoiser, model.params
  tokens = jax.random.randint(jax.random.key(0), (1, 9), 0, 250)
  changed = tokens.at[0, -1].set((tokens[0, -1] + 1) % 250)
  valid = jnp.ones(tokens.shape, bool)
  a, b = (denoiser.encode(params, t, valid) for t in (tokens, changed))
  assert (np.abs(np.asarray(a - b)).max(-1) > 1e-4).all()


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_a_causal_start_gets_a_mask(folder_of, tmp_path, family):
  model = d1jax.from_pretrained(folder_of[family], jnp.float32)
  denoiser, params, tokenizer = model.denoiser, model.params, model.tokenizer
  assert denoiser.mask_id == tokenizer.mask_id == 262, "the first id behind the tokenizer's"
  assert params["embedding"].shape[0] == 264, "an unused row is there for it"
  tight = hub.write(tmp_path / "tight", family, vocab=262, dtype="float32")
  model = d1jax.from_pretrained(tight, jnp.float32)
  denoiser, params = model.denoiser, model.params
  assert (denoiser.mask_id, denoiser.vocab) == (262, 384)
  stored = np.asarray(load.load(tight, jnp.float32).params["embedding"])
  np.testing.assert_array_equal(params["embedding"][:262], stored)
  np.testing.assert_allclose(params["embedding"][262], stored.mean(0), atol=1e-6)
  assert set(range(263, 384)) < set(denoiser.forbidden_ids)


def test_ids_without_a_meaning_are_never_drawn(folder_of):
  model = d1jax.from_pretrained(folder_of["llada"], jnp.float32)
  denoiser, tokenizer = model.denoiser, model.tokenizer
  assert (denoiser.vocab, tokenizer.vocab) == (264, 262)
  assert denoiser.forbidden_ids == (261, 262, 263)
  assert denoiser.stop_ids == (258,)


def test_a_folder_without_a_tokenizer(tmp_path):
  folder = hub.write(tmp_path / "bare")
  for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
    (folder / name).unlink(missing_ok=True)
  model = d1jax.from_pretrained(folder)
  denoiser, tokenizer = model.denoiser, model.tokenizer
  assert tokenizer is None
  assert (denoiser.mask_id, denoiser.stop_ids, denoiser.forbidden_ids) == (261, (258,), (261,))


def test_a_tokenizer_larger_than_the_embedding_is_an_error(tmp_path):
  folder = hub.write(tmp_path / "other", vocab=200)
  path = folder / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | {"mask_token_id": 3, "eos_token_id": 4, "pad_token_id": 4}))
  with pytest.raises(ValueError, match="262 ids, the embedding 200 rows"):
    inspect(folder)


@pytest.mark.parametrize("ids", [200 + 128, 10**9], ids=str)
def test_a_new_mask_far_behind_the_embedding_makes_no_vocabulary_of_its_size(tmp_path, ids):
  """The vocabulary grows for a mask and a few added tokens, not to whatever a file claims."""
  folder = hub.write(tmp_path / "other", vocab=200)
  folders.edit_config(folder, mask_token_id=ids, eos_token_id=4, pad_token_id=4, vocab_size=ids + 1)
  with pytest.raises(ValueError, match=f"{ids + 1} ids, the embedding 200 rows: these files are of two models"):
    inspect(folder)


@pytest.mark.parametrize(
  ("family", "chosen", "block", "shift"),
  [
    ("a2d_qwen3", None, None, 0),
    ("a2d_qwen3", 32, 32, 0),
    ("sdar", 4, 4, 0),
    ("fast_dllm_qwen", None, 4, 1),
    ("fast_dllm_qwen", 8, 8, 1),  # grown
    ("illada", None, None, 0),
    ("qwen2", 1, 1, 1),
    ("llada", 16, 16, 0),
  ],
)
def test_the_block_length_and_the_ids_of_a_folder(folder_of, family, chosen, block, shift):
  """The mask is token 261 of the tokenizer, and generation_config.json names two stop ids."""
  denoiser = d1jax.from_pretrained(folder_of[family], jnp.float32, block=chosen).denoiser
  assert (denoiser.block, denoiser.shift) == (block, shift)
  if family in NEW:
    assert (denoiser.mask_id, denoiser.stop_ids, denoiser.forbidden_ids) == (261, (260, 258), (261, 262, 263))


def test_a_causal_qwen3_becomes_what_sdar_and_dllm_start_from(tmp_path):
  """With the model_type alone: it predicts a token at its own position, and has a new mask."""
  folder = hub.write(tmp_path / "qwen3", "qwen3")
  folders.edit_config(folder, model_type="a2d-qwen3")
  denoiser = d1jax.from_pretrained(folder, block=4).denoiser
  assert (denoiser.block, denoiser.shift, denoiser.mask_id) == (4, 0, 262)


def test_a_block_length_that_nobody_states_is_asked_for(folder_of, tmp_path):
  """And both remedies work."""
  message = r"sdar is block-causal, but config.json has no block_size: set model.block .*, or write \"block_size\" into"
  with pytest.raises(ValueError, match=message):
    d1jax.from_pretrained(folder_of["sdar"])
  assert d1jax.from_pretrained(folder_of["sdar"], block=4).denoiser.block == 4
  folder = hub.write(tmp_path / "sdar", "sdar")
  folders.edit_config(folder, block_size=8)
  assert d1jax.from_pretrained(folder).denoiser.block == 8
  folder = hub.write(tmp_path / "fast", "fast_dllm_qwen")
  folders.edit_config(folder, bd_size=None)
  with pytest.raises(ValueError, match=r"fast_dllm_qwen is block-causal, but config.json has no bd_size"):
    d1jax.from_pretrained(folder)
  for block in (0, -4):
    with pytest.raises(ValueError, match=f"block={block} must be at least 1"):
      d1jax.from_pretrained(folder, block=block)


@pytest.mark.parametrize("family", ["sdar", "fast_dllm_qwen", "illada"])
def test_a_mask_that_nobody_names_is_asked_for(tmp_path, family):
  """A model that was trained with a mask gets no new one; the remedy works."""
  folder = hub.write(tmp_path / "hub", family)
  path = folder / "tokenizer_config.json"
  path.write_bytes(path.read_bytes().replace(hub.MASKS[family].encode(), b"<|hole|>").replace(b"mask_token", b"a"))
  for _ in range(2):
    with pytest.raises(ValueError, match=f"names the mask with which this {family} was trained; write mask_token_id"):
      inspect(folder)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):  # the same without a tokenizer
      (folder / name).unlink(missing_ok=True)
  folders.edit_config(folder, mask_token_id=261)
  assert inspect(folder).ids.mask_id == 261


@pytest.mark.parametrize(
  ("vocab", "changes", "message"),
  [
    (264, {"mask_token_id": 264}, r"mask_token_id=264 is outside the tokenizer \(262 ids\) and .*vocab_size=264"),
    (264, {"mask_token_id": -1}, "mask_token_id=-1 is outside the tokenizer"),
    (256, {"eos_token_id": 4, "pad_token_id": 4}, "mask_token_id=261 is beyond the 256 rows of the vocabulary"),
  ],
)
def test_a_mask_beyond_the_vocabulary_is_refused(tmp_path, vocab, changes, message):
  folder = hub.write(tmp_path / "hub", "sdar", vocab=vocab)
  folders.edit_config(folder, **changes)
  with pytest.raises(ValueError, match=message):
    inspect(folder)


@pytest.mark.parametrize(
  ("key", "family"),
  [("n_layers", "llada"), ("embedding_size", "llada"), ("d_model", "llada"), ("vocab_size", "qwen2")],
)
def test_a_claimed_size_takes_no_memory(tmp_path, key, family):
  folder = hub.write(tmp_path / "other", family)
  folders.edit_config(folder, **{key: 10**9})
  tracemalloc.start()
  try:
    with pytest.raises(ValueError, match=f"{key}=1000000000 is more than the safetensors hold"):
      d1jax.from_pretrained(folder)
    assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
  finally:
    tracemalloc.stop()


@pytest.mark.slow(reason="compiles programs of its own")
@pytest.mark.few(1, reason="each case compiles programs of its own")
@pytest.mark.parametrize("quantize", [None, "int8", "nf4"])
def test_a_mesh_changes_where_weights_live_and_nothing_else(tmp_path, quantize):
  folder = hub.write(tmp_path / "dream", "dream", dtype="float32", embed=128, head_size=64)
  mesh = make_mesh({"data": 1, "fsdp": 2, "tensor": 2}, jax.devices()[:4])
  tokens = jax.random.randint(jax.random.key(0), (4, 9), 0, 250)
  here = d1jax.from_pretrained(folder, jnp.float32, quantize=quantize)
  there = d1jax.from_pretrained(folder, jnp.float32, quantize=quantize, mesh=mesh)
  for a, b in zip(jax.tree.leaves(here.params), jax.tree.leaves(there.params), strict=True):
    np.testing.assert_array_equal(np.asarray(a.astype(jnp.float32)), np.asarray(b.astype(jnp.float32)))
  held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(there.params["blocks"]["mlp"]))
  assert 4 * held == sum(x.nbytes for x in jax.tree.leaves(here.params["blocks"]["mlp"]))
  run = lambda p: jax.jit(lambda params, t: hidden_and_logits(p.denoiser, params, t)[1])(p.params, tokens)
  np.testing.assert_allclose(run(here), run(there), atol=1e-5)


def test_a_quantised_model_is_not_trained_without_adapters_and_is_with_them(tmp_path):
  """The remedy that the message names works."""
  folder = hub.write(tmp_path / "llada", dtype="float32", embed=64)
  with pytest.raises(ValueError, match=r"quantised weights \(int8\) are not trained: give adapters, such as lora=Lora"):
    d1jax.from_pretrained(folder, quantize="int8").train_state(d1jax.adamw(1e-3, 1))
  model = d1jax.from_pretrained(folder, quantize="int8", lora=d1jax.Lora(64, 128))
  state = model.train_state(d1jax.adamw(1e-3, 1))
  assert {leaf.dtype for leaf in jax.tree.leaves(state.trainable)} == {jnp.dtype("float32")}
