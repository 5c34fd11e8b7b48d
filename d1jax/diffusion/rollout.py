"""The record of a rollout, and the static description of the sampler that made it."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
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
    early_exit: stop after a block once every row of the batch has a stop id; what is left becomes the first stop id.
      Up to and including each row's first stop id the tokens are the same.
  """

  completion_length: int
  diffusion_steps: int
  block_length: int
  temperature: float = 0.9
  cfg_scale: float = 0.0
  remasking: str = "low_confidence"
  early_exit: bool = False

  def __post_init__(self) -> None:
    if min(self.block_length, self.completion_length) < 1 or self.completion_length % self.block_length:
      raise ValueError(
        f"completion_length={self.completion_length} is not a multiple of block_length={self.block_length}"
      )
    if self.diffusion_steps < self.blocks or self.diffusion_steps % self.blocks:
      raise ValueError(
        f"diffusion_steps={self.diffusion_steps} is not a multiple of the {self.blocks} blocks of a completion"
        f" (completion_length={self.completion_length}, block_length={self.block_length})"
      )
    if self.remasking not in ("low_confidence", "random"):
      raise ValueError(f"remasking={self.remasking!r} is unknown; known: low_confidence, random")
    if self.temperature < 0 or self.cfg_scale < 0:
      raise ValueError(f"temperature={self.temperature} and cfg_scale={self.cfg_scale} must not be negative")

  @property
  def blocks(self) -> int:
    """The number of blocks of a completion."""
    return self.completion_length // self.block_length

  @property
  def steps_per_block(self) -> int:
    """Denoising steps of one block."""
    return self.diffusion_steps // self.blocks

  def forward_passes(self, last_step: int) -> int:
    """The forward passes of a batch whose last token was committed at this step, counted from 0; two each if guided."""
    per_block = min(self.steps_per_block, self.block_length)  # a step that reveals nothing is not taken
    blocks = last_step // per_block + 1 if self.early_exit else self.blocks
    return blocks * per_block * (2 if self.cfg_scale else 1)


class Rollout(NamedTuple):
  """Prompts and what the policy made of them. Shapes: B batch, P prompt length, C completion length.

  Attributes:
    sample_id: identifies the sample in the whole run; every draw is keyed by it.
    group_id: the same for the completions of one prompt, which are neighbours in the batch.
    prompt: left-padded token ids.
    prompt_valid: false at padding.
    completion: token ids.
    completion_mask: true up to and including the first stop id; what lies behind is neither graded nor trained.
    reveal_step: the denoising step, from 0, that committed the token.
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
