"""The record of a rollout, and the static description of the sampler that made it."""

import dataclasses
import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


@dataclasses.dataclass(frozen=True)
class SamplerSpec:
  """What a sampler does, apart from weights and keys; static under jit.

  Attributes:
    completion_length: C, tokens a completion.
    diffusion_steps: S, denoising steps of a whole completion.
    block_length: tokens a block; blocks are finished from left to right.
    temperature: of the draws; 0 takes the argmax. Confidence is never tempered.
    cfg_scale: w of classifier-free guidance, l_un + (w + 1)(l_cond - l_un); 0 is none.
    remasking: `low_confidence` reveals the most probable proposals first, `random` in random order.
    early_exit: a row is finished after the block that holds its first stop id. When all rows of a batch are finished
      the batch ends, and a batch of long completions shrinks when half of its rows are; the masks that are left become
      the first stop id. The tokens of a row up to and including its first stop id are the same as without.
    cache: which keys and values are reused from the last refresh, a forward pass over the whole canvas. `none`: every
      pass is a refresh, which is exact. `prefix`: those before the active block; `dual`: those outside of it (both
      Fast-dLLM, arXiv 2505.22618). `window`: those outside of the block and its neighbours (dInfer, arXiv 2510.08666).
    refresh_every: steps from one refresh to the next; None: the first step of each block is the only refresh.
    look_behind: tokens before the block that `window` computes again at each step.
    look_ahead: tokens behind the block that `window` computes again at each step.
    schedule: how many tokens a step reveals. `static`: as many as follow from `diffusion_steps`. `sequential`: as many,
      from left to right, whatever the confidence (SDAR). `threshold`: all whose
      confidence is at least `threshold`. `factor`: the n most confident, for the largest n such that the n-th has at
      least the confidence 1 - factor / (n + 1). The last two (both Fast-dLLM) reveal from 1 to `max_reveal` tokens a
      step until the block is full, whatever `diffusion_steps` is.
    threshold: of the schedule of that name.
    factor: of the schedule of that name.
    max_reveal: the most tokens a step, if the schedule is not static.
  """

  completion_length: int
  diffusion_steps: int
  block_length: int
  temperature: float = 0.9
  cfg_scale: float = 0.0
  remasking: str = "low_confidence"
  early_exit: bool = False
  cache: str = "none"
  refresh_every: int | None = None
  look_behind: int = 16
  look_ahead: int = 16
  schedule: str = "static"
  threshold: float = 0.9
  factor: float = 1.0
  max_reveal: int = 4

  def __post_init__(self) -> None:
    if min(self.block_length, self.completion_length) < 1:
      raise ValueError(
        f"completion_length={self.completion_length} and block_length={self.block_length} must be at least 1"
      )
    if beyond := self.completion_length % self.block_length:
      near = {
        max(self.completion_length - beyond, self.block_length),
        self.completion_length - beyond + self.block_length,
      }
      raise ValueError(
        f"completion_length={self.completion_length} is not a multiple of block_length={self.block_length}: take"
        f" {' or '.join(map(str, sorted(near)))}"
      )
    if self.diffusion_steps < self.blocks or self.diffusion_steps % self.blocks:
      raise ValueError(
        f"diffusion_steps={self.diffusion_steps} is not a multiple of the {self.blocks} blocks of a completion"
        f" (completion_length={self.completion_length}, block_length={self.block_length})"
      )
    if self.remasking not in ("low_confidence", "random"):
      raise ValueError(f"remasking={self.remasking!r} is unknown; known: low_confidence, random")
    if not (0 <= self.temperature < math.inf and 0 <= self.cfg_scale < math.inf):
      raise ValueError(
        f"temperature={self.temperature} and cfg_scale={self.cfg_scale} must not be negative or infinite"
      )
    self._check_cache()
    self._check_schedule()

  def _check_cache(self) -> None:
    if self.cache not in ("none", "prefix", "dual", "window"):
      raise ValueError(f"cache={self.cache!r} is unknown; known: none, prefix, dual, window")
    if self.refresh_every is not None and self.cache == "none":
      raise ValueError(f"refresh_every={self.refresh_every} needs a cache: set cache, or leave refresh_every out")
    if self.refresh_every is not None and self.refresh_every < 1:
      raise ValueError(f"refresh_every={self.refresh_every} must be at least 1, or None for once a block")
    if min(self.look_behind, self.look_ahead) < 0:
      raise ValueError(f"look_behind={self.look_behind} and look_ahead={self.look_ahead} must not be negative")

  def _check_schedule(self) -> None:
    if self.schedule not in ("static", "sequential", "threshold", "factor"):
      raise ValueError(f"schedule={self.schedule!r} is unknown; known: static, sequential, threshold, factor")
    if self.schedule != "static" and self.remasking != "low_confidence":
      raise ValueError(f"schedule={self.schedule!r} chooses tokens itself: use remasking='low_confidence' with it")
    if not 0 < self.threshold <= 1:
      raise ValueError(f"threshold={self.threshold} must be a probability, above 0 and at most 1")
    if self.factor <= 0:
      raise ValueError(f"factor={self.factor} must be positive")
    if self.max_reveal < 1:
      raise ValueError(f"max_reveal={self.max_reveal} must be at least 1")

  def with_cache(self, cache: str) -> "SamplerSpec":
    """The same sampler with another cache. With `none` it has no `refresh_every` either, which only a cache has."""
    return dataclasses.replace(self, cache=cache, refresh_every=None if cache == "none" else self.refresh_every)

  def for_block(self, block: int | None) -> "SamplerSpec":
    """The same sampler for a block-causal network: its blocks are not longer than the network's, completions are whole
    blocks, and a step unmasks as many tokens as before. None: the sampler itself.
    """
    if block is None:
      return self
    size = self.block_length if block % self.block_length == 0 else block
    length = -(-self.completion_length // block) * block
    steps = length // size * min(size, max(1, round(size * self.diffusion_steps / self.completion_length)))
    return dataclasses.replace(self, completion_length=length, block_length=size, diffusion_steps=steps)

  def resized(self, length: int, block: int, per_step: float | None = None) -> "SamplerSpec":
    """The same sampler for completions and blocks of other lengths.

    A step unmasks `per_step` tokens; None: as many as before.
    """
    per_step = per_step or self.completion_length / self.diffusion_steps
    steps = length // max(block, 1) * max(1, round(block / per_step))
    return dataclasses.replace(self, completion_length=length, block_length=block, diffusion_steps=steps)

  def greedy(self) -> "SamplerSpec":
    """The same sampler at temperature 0 and without a cache: what validations complete with."""
    return dataclasses.replace(self.with_cache("none"), temperature=0.0)

  @property
  def blocks(self) -> int:
    """The number of blocks of a completion."""
    return self.completion_length // self.block_length

  @property
  def steps_per_block(self) -> int:
    """The most denoising steps that a block takes: those of `diffusion_steps`, but never more than one a token. If
    confidence decides, it is one a token. Step s of block b is recorded as `b * steps_per_block + s`.
    """
    static = self.diffusion_steps // self.blocks
    return self.block_length if self.by_confidence else min(static, self.block_length)

  @property
  def by_confidence(self) -> bool:
    """Whether confidence decides how many tokens a step reveals."""
    return self.schedule in ("threshold", "factor")

  @property
  def refresh_period(self) -> int:
    """Steps from one pass over the whole canvas to the next, within a block."""
    return 1 if self.cache == "none" else min(self.refresh_every or self.steps_per_block, self.steps_per_block)

  def steps_taken(self, reveal_step: np.ndarray) -> np.ndarray:
    """The denoising steps that a batch took in each block, from the recorded steps [B W] of all its rows."""
    # A step's number is its block's times `steps_per_block`, plus its own in the block. Tokens of blocks that the batch
    # never came to have the number 0, which is a step of the first block, as is every batch's first step.
    block, within = np.divmod(np.asarray(reveal_step).ravel(), self.steps_per_block)
    taken = np.zeros(np.shape(reveal_step)[1] // self.block_length, int)
    np.maximum.at(taken, block, within + 1)
    return taken

  def forward_passes(self, reveal_step: np.ndarray) -> int:
    """The forward passes, full or windowed, that a batch took, from the recorded steps [B C] of all its rows. With
    guidance each step is two.
    """
    return int(self.steps_taken(reveal_step).sum()) * (2 if self.cfg_scale else 1)


class Rollout(NamedTuple):
  """Prompts and the completions that the policy sampled. Shapes: B batch, P prompt length, C recorded tokens: the
  completion length and, for a block-causal network, the tokens that fill the last block (`d1jax.diffusion.layout`).

  Attributes:
    sample_id: identifies the sample in the whole run; the keys of its draws are made of it.
    group_id: the same for the completions of one prompt, which are neighbours in the batch.
    prompt: left-padded token ids.
    prompt_valid: false at padding.
    completion: token ids.
    completion_mask: true up to and including the first stop id, within the completion length; the other tokens are
      neither graded nor trained.
    reveal_step: the denoising step, from 0, at which the token replaced its mask.
    reveal_logp: its log-probability under the guided, tempered distribution that it was drawn from.
  """

  sample_id: Int[Array, "B"]
  group_id: Int[Array, "B"]
  prompt: Int[Array, "B P"]
  prompt_valid: Bool[Array, "B P"]
  completion: Int[Array, "B C"]
  completion_mask: Bool[Array, "B C"]
  reveal_step: Int[Array, "B C"]
  reveal_logp: Float[Array, "B C"]


def up_to_stop(completion: Int[Array, "B C"], stop_ids: tuple[int, ...]) -> Bool[Array, "B C"]:
  """True up to and including the first stop id of each row; all true where there is none."""
  stops = jnp.isin(completion, jnp.asarray(stop_ids, completion.dtype))
  return jnp.cumsum(stops, axis=1) - stops == 0
