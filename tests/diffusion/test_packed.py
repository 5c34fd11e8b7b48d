"""The loss of packed rows, against the same demonstrations in rows of their own."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d1jax.data.packing import Packer
from d1jax.data.pipeline import pad_left
from d1jax.diffusion.corruption import LLADA, NoiseSpec, mask_prompt
from d1jax.diffusion.likelihood import denoising_loss, targets
from d1jax.diffusion.packed import packed_loss
from tests.diffusion import causal

KEY, PROMPT_KEY, DROPOUT_KEY = jax.random.split(jax.random.key(11), 3)
PARAMS = causal.params()
FILL, TURN = causal.STOPS[:2]
RNG = np.random.default_rng(1)
CONTENT = [i for i in range(causal.MASK) if i not in causal.STOPS]
PROMPTS = [RNG.choice(CONTENT, n).tolist() for n in (8, 5, 6, 7, 1, 2)]
ANSWERS = [[*RNG.choice(CONTENT, n).tolist(), TURN, FILL] for n in (2, 5, 2, 5, 2, 5)]
"""Two stop ids each. That of the last answer, behind 2 + 5 tokens, ends a block of 4: what follows is not learned."""
BUCKETS = dict(buckets=(24,), completion_buckets=(8,))


def kept(hidden, keys):
  """What dropout leaves, with the keys of the tokens."""
  return hidden * (0.5 + jax.vmap(jax.vmap(jax.random.uniform))(keys))[..., None]


@functools.cache
def with_dropout(denoiser):
  """A denoiser that scales hidden states by what each token's key says."""

  def encode(*args, dropout, **options):
    return kept(denoiser.encode(*args, **options), dropout)

  def encode_streams(*args, dropout, **options):
    streams = denoiser.encode_streams(*args, **options)
    cut = streams[0].shape[1]
    return kept(streams[0], dropout[:, :cut]), kept(streams[1], dropout[:, cut:])

  streams = {} if denoiser.block is None else {"encode_streams": encode_streams}
  return dataclasses.replace(denoiser, encode=encode, **streams)


@functools.partial(jax.jit, static_argnames=("denoiser", "spec", "share", "tile", "dropped"))
def packed(batch, denoiser, spec, complement, share, tile, dropped):
  ids, *rows = batch
  return packed_loss(
    denoiser,
    PARAMS,
    *rows,
    ids,
    jnp.ones(len(ids)),
    KEY,
    noise=spec,
    complement=complement,
    tile=tile,
    dropout_key=DROPOUT_KEY if dropped else None,
    prompt_key=PROMPT_KEY,
    p_mask_prompt=share,
  )


@functools.partial(jax.jit, static_argnames=("denoiser", "spec", "share", "dropped"))
def alone(prompt, valid, completion, ids, denoiser, spec, complement, share, dropped):
  tokens, weight = targets(denoiser, valid, completion, fill=FILL, rows=1)
  prompt = mask_prompt(PROMPT_KEY, ids, prompt, valid, share, causal.MASK)
  key = DROPOUT_KEY if dropped else None
  given = (prompt, valid, tokens, weight, ids, KEY)
  return denoising_loss(denoiser, PARAMS, *given, noise=spec, complement=complement, dropout_key=key)[0]


FLAT = NoiseSpec((0.3, 0.8), "flat", complementary=True)
CASES = {
  "blocks, next token": (4, 1, {"share": 0.3}),
  "blocks": (4, 0, {}),
  "full attention": (None, 0, {}),
  "one token a block, next token": (1, 1, {}),
  "full attention, next token": (None, 1, {"share": 0.3, "spec": FLAT, "tile": 8}),
  "full attention, complements": (None, 0, {"spec": NoiseSpec((0.001, 0.999)), "complementary": True}),
  "blocks, dropout": (4, 1, {"dropped": True}),
  "blocks, flat, complements": (4, 0, {"spec": FLAT, "complementary": True, "tile": 8}),
  "full attention, dropout": (None, 0, {"dropped": True}),
}


@pytest.mark.few(2, reason="each case compiles programs of its own")
@pytest.mark.parametrize("name", CASES)
def test_a_document_has_the_loss_that_it_has_in_a_row_of_its_own(name):
  block, shift, options = CASES[name]
  spec, share, dropped = options.get("spec", LLADA), options.get("share", 0.0), options.get("dropped", False)
  denoiser = causal.denoiser(block, shift)
  denoiser = with_dropout(denoiser) if dropped else denoiser
  packer = Packer(PROMPTS, ANSWERS, block=block, pad_id=FILL, **BUCKETS)
  rows = packer.rows([3, 2, 0, 1, 5, 4])
  assert any(len(row) > 2 for row in rows)
  batch = packer.batch(rows, len(rows) + 1)
  second = np.arange(len(rows) + 1) % 2 == 0 if options.get("complementary") else None
  found, metrics = packed(batch, denoiser, spec, second, share, options.get("tile"), dropped)
  expected = 0.0
  # A block-causal row has its loss in any bucket; full attention sees padding, and gets none.
  lengths = [8] if block else sorted(set(map(len, ANSWERS)))
  for length in lengths:
    members = [i for i in range(6) if block or len(ANSWERS[i]) == length]
    prompt, valid = pad_left([PROMPTS[i] for i in members], 8, FILL)
    completion = np.full((len(members), length), FILL, np.int32)
    for row, i in enumerate(members):
      completion[row, : len(ANSWERS[i])] = ANSWERS[i]
    place = {record: row for row, records in enumerate(rows) for record in records}
    flags = None if second is None else second[[place[i] for i in members]]
    expected += alone(prompt, valid, completion, np.asarray(members, np.int32), denoiser, spec, flags, share, dropped)
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  assert metrics["masked_ce"] > 0
