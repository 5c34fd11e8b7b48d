"""The estimator that scores the states which a rollout went through."""

from jaxtyping import Array, Key

from d1jax.diffusion.denoiser import Denoiser, Params
from d1jax.diffusion.likelihood import Scores
from d1jax.diffusion.replay import replay
from d1jax.diffusion.rollout import Rollout, SamplerSpec


def trajectory(denoiser: Denoiser, params: Params, rollout: Rollout, spec: SamplerSpec, key: Key[Array, ""]) -> Scores:
  """Token k scores log p(o_k | state in which the rollout revealed it), guided and tempered as it was drawn (the
  trajectory of TraceRL, arXiv 2509.06949).

  The order in which the sampler chose to reveal is taken as given. Draws nothing, so that all inner steps of an update
  score the same states; costs a forward pass a denoising step.
  """
  del key
  return Scores(replay(denoiser, params, rollout, spec), rollout.completion_mask.astype("float32"))
