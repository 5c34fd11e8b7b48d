"""Preference tuning: Direct Preference Optimization on lower bounds of log p (VRPO; LLaDA 1.5, arXiv 2505.19223).

DPO (arXiv 2305.18290) needs log p of two answers under the policy and under a reference, which a masked diffusion model
can only bound. VRPO shows that bias and variance of the loss follow from the variance of the *preference score*, and
lowers it in three ways: more masks; each with a noise level of its own; and the same noise levels and masks for policy
and reference. All three are here: `bounds` draws one mask a noise level, and its draws depend on key and answer alone.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from d1jax.data.pairs import PairBatch
from d1jax.diffusion.denoiser import Denoiser, Params
from d1jax.diffusion.elbo import elbo
from d1jax.diffusion.rollout import Rollout, SamplerSpec


def as_rollout(denoiser: Denoiser, batch: PairBatch) -> Rollout:
  """Both answers of each pair as completions, the chosen one first: rows 2 b and 2 b + 1 are those of pair b.

  What stands behind an answer's end is neither scored nor shown, as in the scores of diffu-GRPO. For a block-causal
  network, answers get the tokens that fill whole blocks.
  """
  rows, block = 2 * len(batch.prompt), denoiser.block
  answers = jnp.asarray(batch.answers).reshape(rows, -1)
  width = answers.shape[1]
  if block is not None:
    answers = jnp.pad(answers, ((0, 0), (0, -(-width // block) * block + block - width)))
  mask = jnp.arange(answers.shape[1])[None, :] < jnp.asarray(batch.length).reshape(rows, 1)
  twice = lambda x: jnp.repeat(jnp.asarray(x), 2, axis=0)
  sample_id = 2 * twice(batch.sample_id) + jnp.arange(rows, dtype=jnp.int32) % 2
  zeros = jnp.zeros_like(answers)
  group = twice(batch.sample_id)
  return Rollout(
    sample_id, group, twice(batch.prompt), twice(batch.prompt_valid), answers, mask, zeros, zeros.astype(jnp.float32)
  )


def bounds(
  denoiser: Denoiser,
  params: Params,
  batch: PairBatch,
  key: Key[Array, ""],
  *,
  samples: int,
  tile: int | None = None,
) -> Float[Array, "B 2"]:
  """An estimate of the lower bound of log p of the chosen and of the rejected answer, in nats, summed over tokens.

  It is the mean over `samples` masks, each with its own number l of masked tokens, uniform from 1 to the answer's n:
  n / l times the sum of the log-probabilities of the masked tokens. Policy and reference see the same masks if they get
  the same key. Costs `samples` forward passes over both answers.
  For `tile` see `d1jax.diffusion.likelihood.token_logps`.
  """
  rollout = as_rollout(denoiser, batch)
  width = rollout.completion.shape[1]
  spec = SamplerSpec(width, width, width)  # which this estimator does not read
  scores = elbo(denoiser, params, rollout, spec, key, samples=samples, masking="count", tile=tile)
  return jnp.sum(scores.weight * scores.logp, axis=1).reshape(-1, 2)


def preference_score(policy: Float[Array, "B 2"], reference: Float[Array, "B 2"]) -> Float[Array, "B"]:
  """The score s = (B(y_w) - B_ref(y_w)) - (B(y_l) - B_ref(y_l)) from the `bounds` of policy and reference, in nats.

  It is positive where the policy moved towards the chosen answer, and 0 where policy and reference are the same.
  """
  gain = policy - reference
  return gain[:, 0] - gain[:, 1]


@dataclasses.dataclass(frozen=True)
class Preference:
  """-log sigmoid(beta s), and optionally the chosen answer's loss per token beside it.

  Attributes:
    beta: the weight of the score; a small one lets the policy move far from the reference (LLaDA 1.5: 0.2).
    sft_weight: alpha of `-alpha B(y_w) / n_w`, with n_w the tokens of the chosen answer, as in IRPO (arXiv 2404.19733),
      which trains on right against wrong answers. Without it DPO may lower log p of both answers.

  Raises:
    ValueError: an option is not a number of its range.
  """

  beta: float = 0.2
  sft_weight: float = 0.0

  def __post_init__(self) -> None:
    if not 0 < self.beta < float("inf"):
      raise ValueError(f"beta={self.beta} must be above 0, and not infinite: LLaDA 1.5 has 0.2")
    if not 0 <= self.sft_weight < float("inf"):
      raise ValueError(f"sft_weight={self.sft_weight} must not be negative or infinite: use 0 for none")

  def __call__(
    self,
    policy: Float[Array, "B 2"],
    reference: Float[Array, "B 2"],
    length: Int[Array, "B 2"],
    weight: Float[Array, "B"],
  ) -> tuple[Float[Array, ""], dict[str, Any]]:
    """The loss of a batch or of a micro-batch.

    Args:
      policy: the `bounds` of the policy.
      reference: those of the reference.
      length: the tokens of each answer.
      weight: of each pair in the sum; 1 / B for a mean.

    Returns:
      The loss, and sums over the pairs: `accuracy`, the share with a positive score (a score of 0 is a half); `margin`,
      beta times the score; `chosen_gain` and `rejected_gain`, B - B_ref of each answer in nats.
    """
    score = preference_score(policy, reference)
    loss = -jax.nn.log_sigmoid(self.beta * score) - self.sft_weight * policy[:, 0] / length[:, 0]
    gain = policy - reference
    figures = {
      "accuracy": (jnp.sign(score) + 1) / 2,
      "margin": self.beta * score,
      "chosen_gain": gain[:, 0],
      "rejected_gain": gain[:, 1],
    }
    total = lambda x: jnp.sum(weight * x)
    return total(loss), {name: total(jax.lax.stop_gradient(x)) for name, x in figures.items()}
