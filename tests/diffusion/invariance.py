"""What every estimator keeps to."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from d1jax.diffusion.rollout import SamplerSpec
from d1jax.parallel.mesh import RULES, make_mesh, sharding
from tests import toy

PARAMS = toy.params()
SPEC = SamplerSpec(completion_length=6, diffusion_steps=6, block_length=3)


def recorded(batch: int = 8):
  """A made-up rollout of `SPEC` with reveal steps, one stop id at least, and no two rows alike."""
  rollout = toy.rollout(batch)
  rng = np.random.default_rng(0)
  steps = [np.concatenate([rng.permutation(3), 3 + rng.permutation(3)]) for _ in range(batch)]
  logp = -jnp.asarray(rng.uniform(0.1, 3, rollout.completion.shape), jnp.float32)
  return rollout._replace(reveal_step=jnp.asarray(steps, jnp.int32), reveal_logp=logp)


def check_rows_stand_alone(estimator: Any, *, draws: bool = True, shows_the_rest: bool = False) -> None:
  """Scores depend on nothing but a row's own id, prompt and completion, and on that up to the stop id alone where the
  states that are scored do not show the rest.
  """
  score = jax.jit(lambda rollout: estimator(toy.DENOISER, PARAMS, rollout, SPEC, jax.random.key(5)))
  rollout = recorded()
  base = jax.device_get(score(rollout))
  mask = np.asarray(rollout.completion_mask)
  assert not mask.all()
  assert (np.asarray(base.weight)[~mask] == 0).all()
  assert (np.asarray(base.weight)[mask] > 0).any()

  def same(found: Any, order: Any = slice(None)) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(base), strict=True):
      np.testing.assert_allclose(np.asarray(a)[mask[order]], b[order][mask[order]], rtol=2e-5, atol=2e-5)

  order = np.random.default_rng(1).permutation(8)
  same(score(jax.tree.map(lambda x: x[order], rollout)), order)
  if not shows_the_rest:
    same(score(rollout._replace(completion=jnp.where(mask, rollout.completion, 7))))
  renamed = score(rollout._replace(sample_id=rollout.sample_id + 8))
  assert (np.abs(renamed.logp - base.logp)[mask].max() > 1e-3) == draws
  wide = rollout._replace(
    prompt=jnp.pad(rollout.prompt, ((0, 0), (4, 0)), constant_values=5),
    prompt_valid=jnp.pad(rollout.prompt_valid, ((0, 0), (4, 0))),
  )
  mesh = make_mesh({"data": 4, "fsdp": 2, "tensor": 1}, jax.devices())
  same(score(jax.device_put(wide, sharding(mesh, RULES, "batch"))))


def gradient_bytes(estimator: Any) -> int:
  """Temporary memory of value and gradient."""
  rollout = recorded()

  def total(params: Any) -> jax.Array:
    scores = estimator(toy.DENOISER, params, rollout, SPEC, jax.random.key(0))
    return jnp.sum(scores.weight * (scores.logp if scores.upper is None else scores.logp + scores.upper))

  return jax.jit(jax.value_and_grad(total)).lower(PARAMS).compile().memory_analysis().temp_size_in_bytes
