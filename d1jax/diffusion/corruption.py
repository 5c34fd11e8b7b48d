"""The forward process q(x_t | x_0): each token becomes a mask with probability t, independently."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from d1jax import keys

_TIME_STREAM, _MASK_STREAM = 0, 1
EPSILON = 1e-3
"""The least masking probability (LLaDA and d1): it bounds the weight 1/t by 1000."""


WEIGHTINGS = ("inverse", "flat")
"""How the masked tokens of a row are weighted: by 1 / t, or by 1 / (their number)."""


@dataclasses.dataclass(frozen=True)
class NoiseSpec:
  """How supervised fine-tuning masks completions, and weighs the masked tokens.

  Attributes:
    mask_ratio: the range from which a row's masking probability t is drawn, evenly.
    weighting: `inverse` weighs masked tokens by 1 / t, which makes the loss a bound of the likelihood (LLaDA, SDAR);
      `flat` takes the mean over the masked tokens of a row (LLaDA2, arXiv 2512.15745).
    complementary: each row comes twice, and the second copy masks what the first one does not (LLaDA2, Fast-dLLM v2):
      every token is learned once.

  Raises:
    ValueError: the range is not one, or the weights have no bound.
  """

  mask_ratio: tuple[float, ...] = (EPSILON, 1.0)
  weighting: str = "inverse"
  complementary: bool = False

  def __post_init__(self) -> None:
    if len(self.mask_ratio) != 2 or not 0 < self.mask_ratio[0] <= self.mask_ratio[1] <= 1:
      raise ValueError(f"mask_ratio={self.mask_ratio} must be two numbers, 0 < least <= most <= 1: use (0.001, 1.0)")
    if self.weighting not in WEIGHTINGS:
      raise ValueError(f"weighting={self.weighting!r} is unknown; known: {', '.join(WEIGHTINGS)}")
    if self.complementary and self.weighting == "inverse" and self.mask_ratio[1] > 1 - EPSILON:
      raise ValueError(
        f"complementary=True masks the second copy with probability 1 - t and weighs it by 1 / (1 - t), which has no"
        f" bound for mask_ratio={self.mask_ratio}: use mask_ratio=({self.mask_ratio[0]}, {1 - EPSILON}), or"
        " weighting='flat'"
      )


LLADA = NoiseSpec()
"""The noise of LLaDA and d1, and of SDAR."""


class Corrupted(NamedTuple):
  """Noisy completions: the tokens, where they were masked, and each row's masking probability t.

  Masks behind what a row learns are among the tokens, but not among the masked ones, which count.
  """

  tokens: Int[Array, "B C"]
  masked: Bool[Array, "B C"]
  time: Float[Array, "B"]


def noise(
  key: Key[Array, ""], sample_id: Int[Array, "B"], length: int
) -> tuple[Float[Array, "B"], Float[Array, "B length"]]:
  """Uniforms in [0, 1) for a mask: one for each row, which gives its time, and one for each completion position."""
  per_sample = keys.sample_keys(key, sample_id)
  time = keys.uniforms(keys.fold(per_sample, _TIME_STREAM), 1)[:, 0]
  return time, keys.uniforms(keys.fold(per_sample, _MASK_STREAM), length)


def corrupt(
  key: Key[Array, ""],
  sample_id: Int[Array, "B"],
  completion: Int[Array, "B C"],
  mask_id: int,
  spec: NoiseSpec = LLADA,
  *,
  learned: Bool[Array, "B C"] | None = None,
  complement: Bool[Array, "B"] | None = None,
) -> Corrupted:
  """Draws t a row, by default ~ U(EPSILON, 1), and masks each token with probability t (LLaDA, section 2.2; d1's SFT).

  Args:
    key: of the draws.
    sample_id: of each row.
    completion: clean tokens.
    mask_id: the mask.
    spec: the range of t.
    learned: the tokens that a row of a block-causal network learns. Then at least one of them is masked (SDAR), the one
      with the least uniform; all other tokens are masked too, because the network is to know nothing of them, but they
      do not count. None: all tokens.
    complement: rows that mask what the draw does not mask, with probability 1 - t.
  """
  time, uniform = noise(key, sample_id, completion.shape[1])
  least, most = spec.mask_ratio
  time = least + (most - least) * time
  masked = uniform < time[:, None]
  if learned is not None:
    masked = masked | (uniform <= jnp.min(jnp.where(learned, uniform, 1.0), axis=1, keepdims=True))
  if complement is not None:
    masked = masked ^ complement[:, None]
    time = jnp.where(complement, 1 - time, time)
  hidden = masked
  if learned is not None:
    masked, hidden = masked & learned, masked | ~learned
  return Corrupted(jnp.where(hidden, mask_id, completion), masked, time)


def mask_prompt(
  key: Key[Array, ""],
  sample_id: Int[Array, "B"],
  prompt: Int[Array, "B P"],
  prompt_valid: Bool[Array, "B P"],
  p_mask_prompt: float,
  mask_id: int,
) -> Int[Array, "B P"]:
  """Masks each prompt token with probability `p_mask_prompt`, but never padding (d1, section 3.2: q -> q').

  Prompts are padded on the left. Uniform number i belongs to the token at distance i from the prompt's end, so that a
  prompt has the same masks in a bucket of 128 tokens and in one of 256.
  """
  uniform = keys.uniforms(keys.sample_keys(key, sample_id), prompt.shape[1])[:, ::-1]
  return jnp.where(prompt_valid & (uniform < p_mask_prompt), mask_id, prompt)
