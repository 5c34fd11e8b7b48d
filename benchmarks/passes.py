"""Forward passes of an estimate of log p, counted in its trace."""

from typing import Any

import jax
import jax.numpy as jnp

from d1jax.diffusion.denoiser import Denoiser
from d1jax.diffusion.rollout import Rollout, SamplerSpec
from d1jax.rl.estimators import Estimator
from d1jax.telemetry import flops

ENCODE = "d1jax.encode"


@jax.named_scope(ENCODE)
def _encode(params: Any, tokens: jax.Array, valid: jax.Array) -> jax.Array:
  return jnp.tanh(params["table"][tokens] @ params["mix"])


DENOISER = Denoiser(_encode, lambda params: params["head"], mask_id=3, stop_ids=(), forbidden_ids=(3,), vocab=4)


def of(estimator: Estimator, spec: SamplerSpec) -> tuple[int, int]:
  """Those that estimate one completion, and those that its gradient computes again."""
  params = {"table": jnp.ones((4, 2)), "mix": jnp.ones((2, 2)), "head": jnp.ones((2, 4))}
  ids, row = jnp.zeros(1, jnp.int32), jnp.zeros((1, spec.completion_length), jnp.int32)
  prompt = (row[:, :1], row[:, :1] == 0)
  rollout = Rollout(ids, ids, *prompt, row, row == 0, row, row.astype(jnp.float32))

  def estimate(params: Any, rollout: Rollout) -> jax.Array:
    return jnp.sum(estimator(DENOISER, params, rollout, spec, jax.random.key(0)).logp)

  counted = flops.count(jax.jit(jax.value_and_grad(estimate)).trace(params, rollout))
  number = flops.total(counted.values()).passes
  return number, number if any(found.repeated for scopes, found in counted.items() if ENCODE in scopes) else 0
