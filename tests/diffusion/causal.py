"""Small block-causal networks, and the denoising loop on them, one prompt at a time and without padding or a cache."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from d1jax.diffusion.denoiser import Denoiser
from d1jax.diffusion.rollout import Rollout, SamplerSpec
from d1jax.diffusion.sampler import sample
from d1jax.diffusion.schedule import reveal_counts
from d1jax.model import build_denoiser
from d1jax.models import transformer
from d1jax.models.layers import TransformerSize
from tests.toy import log_softmax

VOCAB, MASK, STOPS = 19, 17, (3, 5, 8, 12)
SIZE = TransformerSize(vocab=VOCAB, embed=16, heads=2, mlp=24, layers=2, rope_theta=100.0)
NETWORK = transformer.build(SIZE)


@functools.cache
def denoiser(block: int | None, shift: int = 0) -> Denoiser:
  """Id 18 is not known to the tokenizer."""
  built = build_denoiser(NETWORK, mask_id=MASK, stop_ids=STOPS, known_ids=18, shift=shift, block=block)
  names = ("encode", "encode_window", *([] if block is None else ["encode_streams"]))
  parts = {name: _broadcasting(getattr(built, name)) for name in names}
  return dataclasses.replace(built, **parts)


def _broadcasting(function: Any) -> Any:
  """Networks broadcast their weights, which is an error elsewhere."""

  def call(*args: Any, **options: Any) -> Any:
    with jax.numpy_rank_promotion("allow"):
      return function(*args, **options)

  return call


def params(seed: int = 0) -> Any:
  """Weights that are large enough for every token to matter, of a network that is not ill-conditioned."""
  drawn = NETWORK.init(jax.random.key(seed))
  large = jax.tree.map(lambda x: x * (1.5 if x.ndim > 1 else 1.0), drawn)
  return large | {name: 20 * drawn[name] for name in ("embedding", "head")}


def rollout(spec: SamplerSpec, block: int, shift: int = 0) -> Rollout:
  """Four completions, of prompts of different lengths."""
  prompts = [np.random.default_rng(n).integers(4, 17, n).tolist() for n in (5, 3, 4, 1)]
  prompt, valid = np.zeros((4, 5), np.int32), np.zeros((4, 5), bool)
  for row, tokens in enumerate(prompts):
    prompt[row, 5 - len(tokens) :], valid[row, 5 - len(tokens) :] = tokens, True
  ids = jnp.arange(4, dtype=jnp.int32)
  run = jax.jit(functools.partial(sample, denoiser(block, shift), spec=spec))
  return run(params(), jnp.asarray(prompt), jnp.asarray(valid), ids, ids, jax.random.key(5))


def generate(
  prompt: list[int], sample_id: int, spec: SamplerSpec, key: jax.Array, encode: Any, network: Denoiser, weights: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
  """SDAR's loop: all tokens from the prompt's first one to the end of the last block; a block at a time.

  Args:
    prompt: ids.
    sample_id: of the draws.
    spec: the sampler; a row ends after the block with its first stop id.
    key: of the draws.
    encode: `network.encode`, jitted.
    network: the block-causal network.
    weights: its weights.

  Returns:
    The tokens behind the prompt, the number of the step that unmasked each of them (-1: none did), its
    log-probability, and the passes made.
  """
  size, part = network.block or 1, spec.block_length
  total = -(-(len(prompt) + spec.completion_length) // size) * size
  x = np.concatenate([prompt, np.full(total - len(prompt), network.mask_id)]).astype(np.int32)
  # The blocks are counted from the one before the first that is behind the whole prompt.
  before = (-(-len(prompt) // size) - 1) * size
  step_of, logp_of, passes = np.full(total, -1), np.full(total, np.nan), 0

  def predictions(counter: int, places: list[int]) -> dict[int, tuple[float, int, float]]:
    """For each place: the confidence, the token, and its log-probability."""
    logits = np.asarray(network.logits(weights, encode(weights, jnp.asarray(x[None]), jnp.ones((1, total), bool))))[0]
    step_key = jax.random.fold_in(jax.random.fold_in(key, sample_id), counter)
    uniform, order = (
      np.asarray(jax.random.uniform(jax.random.fold_in(step_key, stream), (spec.completion_length + size,)))
      for stream in (0, 1)
    )
    found = {}
    for i in places:
      row = logits[i - network.shift].astype(np.float64)
      tempered = log_softmax(row / (spec.temperature or 1))
      token, logp = int(np.argmax(row)), 0.0
      if spec.temperature:
        token = int(np.searchsorted(np.cumsum(np.exp(tempered)), uniform[i - before], side="right"))
        logp = tempered[token]
      confidence = {"random": order[i - before]}.get(spec.remasking, np.exp(log_softmax(row)[token]))
      found[i] = -i if spec.schedule == "sequential" else confidence, token, logp
    return found

  def reveal(counter: int, places: list[int], found: dict[int, tuple[float, int, float]]) -> None:
    for i in places:
      _, x[i], logp_of[i] = found[i]
      step_of[i] = counter

  for start in range(len(prompt) // size * size, total, part):
    block = (start - before) // part
    if any(x[i] in network.stop_ids for i in range(len(prompt), start)) and spec.early_exit:
      break
    if network.shift and start % size == 0 and x[start] == network.mask_id:
      counter = block * spec.steps_per_block
      reveal(counter, [start], predictions(counter, [start]))
    for step in range(spec.steps_per_block):
      holes = [i for i in range(start, start + part) if x[i] == network.mask_id]
      if not holes:
        break
      counter, passes = block * spec.steps_per_block + step, passes + 1
      found = predictions(counter, holes)
      ranked = sorted(holes, key=lambda i: -found[i][0])
      if spec.schedule in ("static", "sequential"):
        count = int(reveal_counts(part, spec.steps_per_block)[step])
      elif spec.schedule == "threshold":
        count = max(1, min(spec.max_reveal, sum(found[i][0] >= spec.threshold for i in ranked)))
      else:
        count = 0
        while count < len(ranked) and found[ranked[count]][0] >= 1 - spec.factor / (count + 2):
          count += 1
        count = max(1, min(spec.max_reveal, count))
      reveal(counter, ranked[:count], found)
  return x[len(prompt) :], step_of[len(prompt) :], logp_of[len(prompt) :], passes
