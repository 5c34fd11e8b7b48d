"""Prompts in, texts out: `d1jax.generate(model, ["What is 2 + 2?"])`."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from d1jax import generation_config, keys
from d1jax.completer import Completer
from d1jax.data.pipeline import bucket_for, pad_left
from d1jax.data.tokenizer import Tokenizer
from d1jax.diffusion.blocks import check
from d1jax.diffusion.layout import lead
from d1jax.diffusion.rollout import SamplerSpec
from d1jax.model import Model
from d1jax.parallel import mesh as meshes
from d1jax.state import Params
from d1jax.tasks.base import Message
from d1jax.tasks.common import check_integer

Prompt = str | Sequence[Message] | Int[np.ndarray, "_"]
"""A user's message, or a conversation, which the chat template writes; or token ids, which are taken as they are."""

GREEDY = SamplerSpec(completion_length=128, diffusion_steps=64, block_length=32, temperature=0.0, early_exit=True)
"""Unmasks the two most probable tokens in each step."""

PROMPT_BUCKETS = (64, 128, 256, 512, 1024, 2048, 4096)
"""The prompt lengths that are compiled."""

MOST_SEEDS = 1 << 32
"""The number of seeds: JAX uses 32 bits of a seed and silently drops the others."""

MOST_PROMPTS = 1 << 20
"""The number of prompts whose draws differ from each other."""


@dataclasses.dataclass(frozen=True, eq=False)
class Generation:
  """One completion of one prompt.

  Attributes:
    prompt: the last message of the user.
    index: the prompt's index in the list.
    sample: the number of this completion of the prompt, from 0.
    prefill: the given start of the answer.
    text: the answer: the prefill, and the completion up to the first stop id.
    tokens: the ids of the completion, including those after the stop.
    length: the number of tokens up to and including the first stop id; all tokens if there is none.
    reveal_step: the denoising step, from 0, that unmasked each token; -1 if the row had ended before.
  """

  prompt: str
  index: int
  sample: int
  prefill: str
  text: str
  tokens: Int[np.ndarray, "C"]
  length: int
  reveal_step: Int[np.ndarray, "C"]


def generate(
  model: Model,
  prompts: Sequence[Prompt],
  *,
  max_tokens: int | None = None,
  temperature: float | None = None,
  tokens_per_step: int | None = None,
  samples: int = 1,
  seed: int = 0,
  prefill: str = "",
  spec: SamplerSpec | None = None,
  **options: Any,
) -> list[Generation]:
  """Completes prompts: `generate(model, ["Name a river."], temperature=0.7, max_tokens=64)`.

  Args:
    model: network, tokenizer and mesh.
    prompts: texts or conversations, which the tokenizer's chat template writes, or arrays of token ids.
    max_tokens: the tokens of an answer, a multiple of the block length if they are more; None: those of `spec`.
    temperature: of the draws; 0 is greedy; None: that of `spec`.
    tokens_per_step: the tokens that a denoising step unmasks: 1 is slow and best; None: as many as with `spec`.
    samples: the number of completions of each prompt.
    seed: the seed of the draws.
    prefill: the start of each answer.
    spec: the sampler, with all its options; None: the default of `stream`.
    options: `params`, `identities`, `batch_size` and `prompt_buckets`, see `stream`.

  Returns:
    One `Generation` per sample: first those of the first prompt, then those of the second, and so on.

  Raises:
    ValueError: a prompt or an option cannot be used.
  """
  changes = Changes(max_tokens, temperature, tokens_per_step)
  return list(
    stream(model, prompts, spec=spec, changes=changes, samples=samples, seed=seed, prefill=prefill, **options)
  )


class Changes(NamedTuple):
  """What a caller wants otherwise than a sampler has it; None: as it is.

  Attributes:
    max_tokens: the tokens of an answer.
    temperature: of the draws.
    tokens_per_step: the tokens that a denoising step unmasks.
  """

  max_tokens: int | None = None
  temperature: float | None = None
  tokens_per_step: int | None = None

  def of(self, spec: SamplerSpec) -> SamplerSpec:
    """The changed sampler; with another length, it keeps the tokens per step.

    Raises:
      ValueError: a value is not allowed.
    """
    for name, value in (("max_tokens", self.max_tokens), ("tokens_per_step", self.tokens_per_step)):
      if value is not None:
        check_integer(name, value, 1)
    length = spec.completion_length if self.max_tokens is None else self.max_tokens
    block = min(spec.block_length, length)
    if length % block:
      raise ValueError(
        f"max_tokens={length} is no multiple of the block length {block}: take"
        f" {max(length // block, 1) * block} or {-(-length // block) * block}"
      )
    if self.max_tokens is not None or self.tokens_per_step is not None:
      spec = spec.resized(length, block, self.tokens_per_step)
    return dataclasses.replace(
      spec, temperature=spec.temperature if self.temperature is None else float(self.temperature)
    )


UNCHANGED = Changes()


def stream(
  model: Model,
  prompts: Sequence[Prompt],
  *,
  params: Params | None = None,
  spec: SamplerSpec | None = None,
  changes: Changes = UNCHANGED,
  prefill: str = "",
  samples: int = 1,
  seed: int = 0,
  identities: Sequence[int] | None = None,
  batch_size: int = 16,
  prompt_buckets: Sequence[int] = PROMPT_BUCKETS,
) -> Iterator[Generation]:
  """Completes prompts batch by batch, and yields each completion when its batch is done.

  One program is compiled for each sampler and shape of a batch. A draw depends only on the seed, the prompt's index in
  the list and the sample's number.

  Args:
    model: network, tokenizer and mesh.
    prompts: texts or conversations, which the tokenizer's chat template writes, or arrays of token ids.
    params: the weights, from `Model.publish`; None: the weights with which the model starts.
    spec: the sampler; None: see `default_sampler`.
    changes: of the sampler.
    prefill: the start of each answer.
    samples: the number of completions of each prompt.
    seed: the seed of the draws.
    identities: a number below 2**20 for each prompt, by which its draws are known; None: its index in the list.
    batch_size: the number of completions per batch.
    prompt_buckets: the prompt lengths that are compiled; a batch is padded to the smallest one that holds it.

  Raises:
    ValueError: a prompt or an option cannot be used; it is raised before anything is computed.
  """
  for name, value, least in (("samples", samples, 1), ("seed", seed, 0), ("batch_size", batch_size, 1)):
    check_integer(name, value, least)
  if seed >= MOST_SEEDS:
    raise ValueError(f"seed is {seed}; give one below {MOST_SEEDS}")
  if not prompt_buckets:
    raise ValueError("prompt_buckets is empty; give a length at least")
  for length in prompt_buckets:
    check_integer("a length of prompt_buckets", length, 1)
  block = model.denoiser.block
  spec = changes.of(default_sampler(model) if spec is None else spec)
  check(model.rollout_denoiser, spec)
  if samples > 1 and spec.temperature == 0 and spec.remasking != "random":
    raise ValueError(f"samples is {samples}, but at temperature 0 they are all the same: set a temperature, like 0.9")
  tokenizer = model.tokenizer
  if tokenizer is None:
    raise ValueError("there is no tokenizer; put tokenizer.json, or its parts, beside the model's config.json")
  encoded = _encode(tokenizer, prompts, prefill, max(prompt_buckets))
  said = [_said(tokenizer, prompt) for prompt in prompts]
  identities = range(len(prompts)) if identities is None else identities
  if len(identities) != len(prompts) or not all(0 <= i < MOST_PROMPTS for i in identities):
    raise ValueError(f"identities must be {len(prompts)} numbers below {MOST_PROMPTS}, one a prompt")
  completer, ways = Completer.of(model, keys.Purpose.EVALUATION), model.rollout_ways
  key, step = meshes.place((keys.seeded(seed), np.int32(0)), model.rollout_replicated)
  rows = [(index, number) for index in range(len(encoded)) for number in range(samples)]
  size = min(-(-batch_size // ways), -(-len(rows) // ways)) * ways

  def batches() -> Iterator[Generation]:
    weights = model.params if params is None else params
    for first in range(0, len(rows), size):
      own = rows[first : first + size]
      filled = [own[i % len(own)] for i in range(size)]
      width = bucket_for(max(len(encoded[index]) for index, _ in own), prompt_buckets)
      tokens, valid = pad_left([encoded[index] for index, _ in filled], width or 0, tokenizer.pad_id)
      sample_id = np.asarray([number * MOST_PROMPTS + identities[index] for index, number in filled], np.int32)
      placed = meshes.place((tokens, valid, sample_id, sample_id), model.rollout_by_row)
      rollout = completer(spec, weights, placed, key, step)
      completion, mask, reveal_step = jax.device_get((rollout.completion, rollout.completion_mask, rollout.reveal_step))
      begins = np.zeros(size, int) if block is None else lead(block, np.sum(valid, axis=1))
      shown = tokenizer.decode_all([row[keep].tolist() for row, keep in zip(completion, mask, strict=True)])
      for row, (index, number) in enumerate(own):
        yield Generation(
          prompt=said[index],
          index=index,
          sample=number,
          prefill=prefill,
          text=prefill + shown[row],
          tokens=completion[row, : spec.completion_length],
          length=int(mask[row].sum()),
          reveal_step=_revealed(reveal_step[row], int(begins[row]), spec),
        )

  return batches()


def default_sampler(model: Model) -> SamplerSpec:
  """What a model's folder says in generation_config.json, or else `GREEDY`; with the blocks of a block-causal network.

  Raises:
    ValueError: generation_config.json is broken.
  """
  source = model.weights.source
  found = generation_config.read_sampler(source.folder) if source else None
  return (found or GREEDY).for_block(model.denoiser.block)


def _encode(tokenizer: Tokenizer, prompts: Sequence[Prompt], prefill: str, longest: int) -> list[list[int]]:
  """The ids of prompts; a ValueError if one is empty, too long or has characters without a token."""
  if isinstance(prompts, str):
    raise ValueError(f"prompts is one text, {prompts[:40]!r}; give a list of texts")
  if not prompts:
    raise ValueError("there are no prompts; give one text at least")
  encoded = []
  for number, prompt in enumerate(prompts, start=1):
    if isinstance(prompt, np.ndarray):
      if prefill:
        raise ValueError(f"prompt {number} is token ids, which are taken as they are: leave prefill out")
      encoded.append(_checked(prompt.tolist(), number, longest))
      continue
    turns: list[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    written = "".join(turn["content"] for turn in turns)
    if not written.strip():
      raise ValueError(f"prompt {number} is empty; write something")
    unknown = tokenizer.unknown(written + prefill)
    if unknown:
      raise ValueError(
        f"prompt {number} has characters that the tokenizer does not know: {', '.join(map(repr, unknown))};"
        " write it as the model was trained to read it"
      )
    encoded.append(_checked(tokenizer.prompt(turns, prefill), number, longest))
  return encoded


def _checked(ids: list[int], number: int, longest: int) -> list[int]:
  if not ids:
    raise ValueError(f"prompt {number} is empty; write something")
  if len(ids) > longest:
    raise ValueError(f"prompt {number} has {len(ids)} tokens, prompt_buckets hold {longest}: shorten it, or raise them")
  return ids


def _said(tokenizer: Tokenizer, prompt: Prompt) -> str:
  if isinstance(prompt, np.ndarray):
    return tokenizer.decode_all([prompt.tolist()])[0]
  return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def _revealed(reveal_step: Int[np.ndarray, "W"], first: int, spec: SamplerSpec) -> Int[np.ndarray, "C"]:
  """The recorded steps, with -1 for blocks that were not computed: step 0 unmasks only tokens of the first block.

  `first` is the place of the completion among the columns that the sampler's blocks cover.
  """
  behind = first + np.arange(reveal_step.size) >= spec.block_length
  return np.where(behind & (reveal_step == 0), -1, reveal_step)[: spec.completion_length]
