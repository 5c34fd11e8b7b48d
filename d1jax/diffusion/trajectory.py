"""Estimators of log p along a path of reveals: the one that the rollout took, parts of it, or left to right.

They score the guided, tempered distribution from which tokens are drawn, for the order of reveals that is given.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from d1jax import keys
from d1jax.diffusion.denoiser import Denoiser, Params
from d1jax.diffusion.layout import block_of
from d1jax.diffusion.likelihood import Scores
from d1jax.diffusion.replay import Visit, replay, revealed_at, score_visits, steps_of
from d1jax.diffusion.rollout import Rollout, SamplerSpec


def step_merged(
  denoiser: Denoiser,
  params: Params,
  rollout: Rollout,
  spec: SamplerSpec,
  key: Key[Array, ""],
  *,
  segments: int | None = None,
) -> Scores:
  """The path in `segments` runs of steps: the tokens revealed in a run are all scored at the state where it starts
  (d2's StepMerge, arXiv 2509.21474; shrink S / N of TraceRL, arXiv 2509.06949).

  log p = sum_n sum_{k revealed in run n} log p(o_k | state before run n). One segment is one pass over masks alone:
  d1's estimate at the sampler's temperature. None makes each step a segment: the trajectory itself. The estimator draws
  nothing, so that all inner steps of an update score the same states. It costs a forward pass a segment, two with
  guidance.

  Raises:
    ValueError: the rollout has no reveal steps, or segments do not divide the steps.
  """
  del key
  return Scores(replay(denoiser, params, rollout, spec, segments), rollout.completion_mask.astype(jnp.float32))


def sampled_steps(
  denoiser: Denoiser,
  params: Params,
  rollout: Rollout,
  spec: SamplerSpec,
  key: Key[Array, ""],
  *,
  samples: int,
) -> Scores:
  """Some steps of the path, drawn for each row (AGRPO, arXiv 2510.04019): unbiased for the sum over all.

  Of a row's T steps that revealed tokens up to the stop id, min(`samples`, T) are drawn without replacement; their
  tokens weigh T / min(`samples`, T), the others 0. Costs `samples` forward passes, two each with guidance. With a
  block-causal network `step_merged` scores all steps in as many passes as a block has steps.

  Raises:
    ValueError: samples below 1, or the rollout has no reveal steps.
  """
  if samples < 1:
    raise ValueError(f"samples={samples} must be at least 1: each is a denoising step that is scored")
  revealed, scored = revealed_at(denoiser, rollout, spec), rollout.completion_mask
  # A row with 6 steps whose tokens up to the stop id were revealed at steps [0, 0, 3, 5] has T = 3. `taken` is true at
  # 0, 3 and 5; the uniforms of other steps become 2, so that `argsort` puts taken steps first, in random order. With 2
  # samples it may draw steps 5 and 0: their three tokens weigh 3 / 2, the token of step 3 weighs 0.
  steps = steps_of(denoiser, rollout, spec)
  counted = jnp.where(scored, revealed, steps)
  rows = jnp.arange(scored.shape[0])[:, None]
  taken = jnp.zeros((scored.shape[0], steps + 1), bool).at[rows, counted].set(True)[:, :steps]
  uniform = keys.uniforms(keys.sample_keys(key, rollout.sample_id), steps)
  drawn = jnp.argsort(jnp.where(taken, uniform, 2.0), axis=1)[:, :samples].astype(jnp.int32)

  def visit(index: Int[Array, ""]) -> Visit:
    step = drawn[:, index]
    start = step // spec.steps_per_block * spec.block_length
    return Visit(revealed < step[:, None], counted == step[:, None], start)

  passes = drawn.shape[1]
  logp = score_visits(denoiser, params, rollout, spec, visit, passes, width=spec.block_length)
  total = jnp.sum(taken, axis=1)
  chosen = jnp.any(counted[:, :, None] == drawn[:, None, :], axis=2)
  weight = chosen * (total / jnp.minimum(passes, total))[:, None]
  return Scores(logp, weight.astype(jnp.float32))


def left_to_right(
  denoiser: Denoiser,
  params: Params,
  rollout: Rollout,
  spec: SamplerSpec,
  key: Key[Array, ""],
  *,
  top_entropy: float | None = None,
) -> Scores:
  """The autoregressive order (JustGRPO, arXiv 2601.15165): log p = sum_k log p(o_k | q, o_<k, masks).

  This is the distribution that a rollout with `block_length` 1 draws from. It costs a forward pass a token, two with
  guidance; with a block-causal network as many as a block has tokens.

  Args:
    denoiser: the mask predictor.
    params: its parameters.
    rollout: prompts and completions.
    spec: only its temperature and its guidance are read.
    key: not read.
    top_entropy: the share of each row's tokens, rounded up, that are scored; the others weigh 0. The paper takes the
      tokens of the highest entropy; here it is those of the least `reveal_logp`, whose negative estimates the entropy
      from one draw. It is recorded, so that old, current and reference score the same tokens.

  Raises:
    ValueError: top_entropy outside (0, 1], or at temperature 0, where every `reveal_logp` is 0.
  """
  del key
  scored = rollout.completion_mask
  batch, length = scored.shape
  if top_entropy is None:
    order, chosen = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length)), scored
  else:
    if not 0 < top_entropy <= 1:
      raise ValueError(
        f"top_entropy={top_entropy} is a share of the tokens: give a number above 0 and at most 1, or None for all"
      )
    if spec.temperature == 0:
      raise ValueError(
        f"top_entropy={top_entropy} depends on reveal_logp, which is 0 at temperature 0: raise the temperature, or set"
        " top_entropy to None"
      )
    most = math.ceil(top_entropy * length)
    order = jnp.argsort(jnp.where(scored, rollout.reveal_logp, jnp.inf), axis=1, stable=True).astype(jnp.int32)
    order = order[:, :most]
    wanted = jnp.ceil(top_entropy * jnp.sum(scored, axis=1)).astype(jnp.int32)
    ranked = (jnp.arange(most)[None, :] < wanted[:, None]).astype(bool)
    rows = jnp.arange(batch)[:, None]
    chosen = jnp.zeros(scored.shape, bool).at[rows, order].set(ranked)
  places = jnp.arange(length)[None, :]
  if denoiser.block is not None:  # the tokens at the same place in their blocks are scored at once
    places = block_of(denoiser, rollout.prompt_valid, length, 1) % denoiser.block
    order = jnp.broadcast_to(jnp.arange(denoiser.block, dtype=jnp.int32), (batch, denoiser.block))

  def visit(index: Int[Array, ""]) -> Visit:
    place = order[:, index]
    return Visit(places < place[:, None], chosen & (places == place[:, None]), place)

  width = 1 if denoiser.block is None else length // denoiser.block
  logp = score_visits(denoiser, params, rollout, spec, visit, order.shape[1], width=width)
  return Scores(logp, chosen.astype(jnp.float32))
