"""Log-probabilities of completions at the states that a rollout went through, or at states that the caller gives."""

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from d1jax.diffusion.blocks import guided
from d1jax.diffusion.denoiser import Denoiser, Params
from d1jax.diffusion.draw import log_prob
from d1jax.diffusion.layout import block_of, predicting, predicting_states
from d1jax.diffusion.rollout import Rollout, SamplerSpec
from d1jax.diffusion.schedule import reveal_counts
from d1jax.microbatch import sum_over_parts

EACH_STEP = "d1jax.each_step"
"""The scope of what is computed for each denoising step that a row took, and for no other."""


CHUNK = 32
"""The tokens of a row of a block-causal network whose logits exist at the same time."""

STATES = 4
"""The states of a row of a block-causal network that one forward pass encodes behind one clean canvas, at most."""


class Visit(NamedTuple):
  """One state of each row, and the tokens that are scored at it.

  Attributes:
    known: completion tokens that the network sees; the others are masks. A block-causal network also sees all tokens of
      earlier blocks.
    scored: tokens that are scored; with full attention all of them are at `start` or behind it.
    start: the first completion position for which logits are computed; not read for a block-causal network, where a
      visit scores tokens of all blocks.
  """

  known: Bool[Array, "B C"]
  scored: Bool[Array, "B C"]
  start: Int[Array, "B"]


def steps_of(denoiser: Denoiser, rollout: Rollout, spec: SamplerSpec) -> int:
  """The number of denoising steps that a rollout may have taken."""
  return rollout.completion.shape[1] // spec.block_length * spec.steps_per_block


def revealed_at(denoiser: Denoiser, rollout: Rollout, spec: SamplerSpec) -> Int[Array, "B C"]:
  """The step that revealed each token. Tokens that were never revealed have the step after the last one; they lie
  behind the block of the stop id, in a rollout with early exit.

  Raises:
    ValueError: the rollout has no reveal steps.
  """
  if rollout.reveal_step is None:
    raise ValueError(
      "reveal_step=None: this estimator scores the states that a rollout went through, but the rollout did not record"
      " them: sample it with d1jax.diffusion.sampler, or use an estimator that draws masks of its own (one_step, elbo)"
    )
  # A token that was never revealed has the recorded step 0. Only tokens of block 0 can really have it: with two steps a
  # block, a token of block 1 has step 2 or 3, so that a 0 there means "never". Block 0 is always completed.
  earliest = spec.steps_per_block * _blocks(denoiser, rollout, spec.block_length)
  return jnp.where(rollout.reveal_step >= earliest, rollout.reveal_step, steps_of(denoiser, rollout, spec))


def _blocks(denoiser: Denoiser, rollout: Rollout, size: int) -> Int[Array, "#B C"]:
  return block_of(denoiser, rollout.prompt_valid, rollout.completion.shape[1], size)


def score_visits(
  denoiser: Denoiser,
  params: Params,
  rollout: Rollout,
  spec: SamplerSpec,
  visit: Callable[[Int[Array, ""]], Visit],
  count: int,
  *,
  width: int,
  windows: int = 1,
) -> Float[Array, "B C"]:
  """The sum over visits 0..count-1 of the log p, guided and tempered, of the tokens that each visit scores; no token is
  scored by two.

  With full attention a visit is one exact forward pass, whose logits exist for `width` tokens of a row from `start` on
  at a time, `windows` times. The visits of a block-causal network are states of the same canvas: up to `STATES` of them
  share one pass, as evenly as they can. Each scores at most `width` tokens of a row, and logits exist for `CHUNK` of
  the tokens that are scored at a time; `windows` is not read.

  At temperature 0 the tempered distribution is a point mass, and the untempered one is used instead. If there are
  several passes, the activations of each are computed again in the backward pass. A pass in which no row scores a token
  costs nothing.
  """
  length = rollout.completion.shape[1]
  passes, together = passes_of(denoiser.block, count)
  if denoiser.block is not None:
    most = min(length, together * width)
    width, windows = min(CHUNK, most), -(-most // CHUNK)

  def window(hidden: tuple[Float[Array, "B C D"], ...], places: Int[Array, "B W"]) -> Float[Array, "B C"]:
    within = jnp.minimum(places, length - 1)  # places beyond the end fill the last window
    at = lambda x: jnp.take_along_axis(x, within[..., None], axis=1)
    logits = denoiser.logits(params, at(hidden[0]))
    if spec.cfg_scale:
      logits = guided(logits, denoiser.logits(params, at(hidden[1])), spec.cfg_scale)
    logp = log_prob(logits / (spec.temperature or 1), jnp.take_along_axis(rollout.completion, within, axis=1))
    if denoiser.block is None:
      return jax.vmap(jax.lax.dynamic_update_slice)(jnp.zeros(rollout.completion.shape), logp, places[:, :1])
    rows = jnp.arange(len(places))[:, None]
    return jnp.zeros(rollout.completion.shape).at[rows, places].set(logp, mode="drop")

  def chosen(visited: Visit, n: Int[Array, ""]) -> Int[Array, "B W"]:
    if denoiser.block is None:
      return (visited.start + n * width)[:, None] + jnp.arange(width)[None, :]
    scored_first = jnp.argsort(~visited.scored, axis=1, stable=True)
    return jnp.take(scored_first, n * width + jnp.arange(width), axis=1, mode="fill", fill_value=length)

  blind = jnp.full_like(rollout.prompt, denoiser.mask_id)
  prompts = (rollout.prompt, blind) if spec.cfg_scale else (rollout.prompt,)

  def score(visited: Visit) -> Float[Array, "B C"]:
    known = jnp.where(visited.known, rollout.completion, denoiser.mask_id)
    hidden = tuple(
      predicting(denoiser, params, prompt, rollout.prompt_valid, known, rollout.completion) for prompt in prompts
    )
    return logps(hidden, visited)

  def score_states(visited: Visit) -> Float[Array, "B C"]:
    """Of visits [S B C]."""
    known = jnp.where(visited.known, rollout.completion, denoiser.mask_id)
    states = tuple(
      predicting_states(denoiser, params, prompt, rollout.prompt_valid, known, rollout.completion) for prompt in prompts
    )
    hidden = tuple(jnp.sum(jnp.where(visited.scored[..., None], each, 0), axis=0) for each in states)
    return logps(hidden, Visit(visited.known[0], jnp.any(visited.scored, axis=0), visited.start[0]))

  def logps(hidden: tuple[Float[Array, "B C D"], ...], visited: Visit) -> Float[Array, "B C"]:
    one = jax.checkpoint(lambda n: window(hidden, chosen(visited, n)), prevent_cse=False)
    return jnp.where(visited.scored, sum_over_parts(one, jnp.arange(windows)), 0.0)

  def part(index: Int[Array, ""]) -> Float[Array, "B C"]:
    nothing = lambda _: jnp.zeros(rollout.completion.shape)
    if denoiser.block is None:
      visited = visit(index)
      return jax.lax.cond(jnp.any(visited.scored), score, nothing, visited)
    each = index * together + jnp.arange(together)
    visited = jax.vmap(visit)(each)
    visited = visited._replace(scored=visited.scored & (each < count)[:, None, None])
    return (
      jax.lax.cond(jnp.any(visited.scored), score_states, nothing, visited) if passes > 1 else score_states(visited)
    )

  if denoiser.block is not None and passes == 1:
    return part(jnp.int32(0))
  # The checkpoint is around the branches of `cond`: inside them, each visit would keep the weights for the backward
  # pass.
  return sum_over_parts(jax.checkpoint(part, prevent_cse=False), jnp.arange(passes))


def passes_of(block: int | None, visits: int) -> tuple[int, int]:
  """The forward passes that score so many visits, and the visits of each; the last one may have fewer.

  Args:
    block: that of a block-causal network; None: full attention.
    visits: states of a row.
  """
  passes = visits if block is None else -(-visits // STATES)
  return passes, -(-visits // passes)


def blocks_spanned(spec: SamplerSpec, segments: int) -> int:
  """The most blocks in which one segment reveals tokens, if the steps are cut into `segments` equal runs.

  With 2 blocks of 3 steps and 2 segments, each segment is one block: 1. With 3 segments of 2 steps, the second has the
  last step of block 0 and the first of block 1: 2.
  """
  steps = spec.blocks * spec.steps_per_block
  run, block_of = steps // segments, lambda step: step // spec.steps_per_block
  return max(block_of(first + run - 1) - block_of(first) for first in range(0, steps, run)) + 1


def replay(
  denoiser: Denoiser, params: Params, rollout: Rollout, spec: SamplerSpec, segments: int | None = None
) -> Float[Array, "B C"]:
  """Log p of each completion token, guided and tempered, at the state in which the rollout revealed it.

  The states are those that the rollout recorded. Each is encoded again by one exact forward pass, whatever cache the
  rollout used. For a rollout in exact mode the result equals `reveal_logp`, up to rounding; for a cached one it is the
  log p of the exact model. Gradients flow; see `score_visits` for memory, temperature 0, and steps that no row took.

  Args:
    denoiser: the mask predictor.
    params: its parameters.
    rollout: whose path is scored.
    spec: of the sampler that made it.
    segments: the number of equal runs of steps into which the path is cut; the tokens of a run are all scored at its
      first state. None: each step is a run. Runs of a block-causal network lie within its blocks.

  Returns:
    The log-probabilities; 0 at tokens that were never revealed (behind the block of the stop id, with early exit). Only
    tokens of `Rollout.completion_mask` count.

  Raises:
    ValueError: the rollout has no reveal steps, or segments do not divide the steps.
  """
  steps = spec.blocks * spec.steps_per_block
  if segments is None:
    segments = steps
  if segments < 1 or steps % segments:
    raise ValueError(
      f"segments={segments} does not divide the {steps} denoising steps of a completion ({spec.blocks} blocks of"
      f" {spec.steps_per_block}): use a divisor of {steps}, or None for every step"
    )
  revealed, run = revealed_at(denoiser, rollout, spec), steps // segments
  if denoiser.block is not None:
    return _replay_blocks(denoiser, params, rollout, spec, revealed, run)
  windows = blocks_spanned(spec, segments)

  def visit(index: Int[Array, ""]) -> Visit:
    first = index * run
    start = jnp.minimum(first // spec.steps_per_block, spec.blocks - windows) * spec.block_length
    rows = jnp.broadcast_to(start, rollout.completion.shape[:1])
    return Visit(revealed < first, (revealed >= first) & (revealed < first + run), rows)

  with jax.named_scope(EACH_STEP) if run == 1 else contextlib.nullcontext():
    return score_visits(denoiser, params, rollout, spec, visit, segments, width=spec.block_length, windows=windows)


def _replay_blocks(
  denoiser: Denoiser,
  params: Params,
  rollout: Rollout,
  spec: SamplerSpec,
  revealed: Int[Array, "B C"],
  run: int,
) -> Float[Array, "B C"]:
  """The path of a block-causal network (TraceRL, arXiv 2509.06949): visit i scores, in all blocks at once, the tokens
  that their block's steps `i * run` to `(i + 1) * run - 1` revealed. At most `block` visits, whatever the length, and
  one forward pass for `STATES` of them.
  """
  # With blocks of 4 and two steps a block, block 2 has the steps 4 and 5. A token of block 2 that step 5 revealed is
  # scored by visit 1, together with those that step 1 revealed in block 0 and step 3 in block 1.
  size = denoiser.block or 1
  steps = size // spec.block_length * spec.steps_per_block
  if steps % run:
    raise ValueError(
      f"segments={spec.blocks * spec.steps_per_block // run} makes runs of {run} denoising steps, which do not divide"
      f" the {steps} steps of a block of the network: use None for every step, or a number that gives runs of a divisor"
    )
  never = revealed == steps_of(denoiser, rollout, spec)
  within = jnp.where(never, steps, revealed - _blocks(denoiser, rollout, size) * steps)

  def visit(index: Int[Array, ""]) -> Visit:
    first = index * run
    return Visit(within < first, (within >= first) & (within < first + run), jnp.zeros(len(within), jnp.int32))

  a_step = spec.max_reveal if spec.by_confidence else int(reveal_counts(spec.block_length, spec.steps_per_block)[0])
  most = min(size, run * a_step + denoiser.shift) * (rollout.completion.shape[1] // size)
  with jax.named_scope(EACH_STEP) if run == 1 else contextlib.nullcontext():
    return score_visits(denoiser, params, rollout, spec, visit, steps // run, width=most)
