"""FLOPs of networks, rollouts and updates by formula: what the count of a trace is compared with.

A multiplication and an addition count one each. Norms, rotary turns, softmax and look-ups are left out.
"""

import dataclasses
import math
from typing import NamedTuple

from d1jax.diffusion import replay
from d1jax.diffusion.blocks import window_of
from d1jax.models.lora import LoraSpec
from d1jax.models.transformer import TransformerSize
from d1jax.telemetry.cost import Work


class Parts(NamedTuple):
  """FLOPs of one forward pass, by what is multiplied.

  Attributes:
    projections: with the weights of the blocks.
    attention: scores and mixing, two products of activations.
    head: logits.
    adapters: with both sides of each adapter that stays beside its weight.
  """

  projections: int
  attention: int
  head: int
  adapters: int = 0


def projections(size):
  """(rows, columns) of each weight of a block, by the names that Llama gave them."""
  inner, shared = size.heads * size.head_size, size.key_value_heads * size.head_size
  return {
    "q_proj": (size.embed, inner),
    "k_proj": (size.embed, shared),
    "v_proj": (size.embed, shared),
    "o_proj": (inner, size.embed),
    "gate_proj": (size.embed, size.mlp),
    "up_proj": (size.embed, size.mlp),
    "down_proj": (size.mlp, size.embed),
  }


def products(size, rows, window, canvas, predicted, lora=None):
  """One forward pass of `rows` that encodes `window` positions of a canvas and gives logits of `predicted`.

  With T = rows x window: projections 2 T layers (2 D N H + 2 D K H + 3 D F), attention 4 T layers canvas N H, head
  2 rows predicted D V, adapters 2 T layers rank (in + out) summed over their targets.
  """
  weights, tokens = projections(size), rows * window
  each = 2 * tokens * size.layers
  narrow = sum(sum(weights[name]) for name in lora.targets) * lora.rank if lora else 0
  return Parts(
    projections=each * sum(inner * outer for inner, outer in weights.values()),
    attention=2 * each * canvas * size.heads * size.head_size,
    head=2 * rows * predicted * size.embed * size.vocab,
    adapters=each * narrow,
  )


def forward(size, rows, window, canvas, predicted):
  """One forward pass without adapters."""
  return sum(products(size, rows, window, canvas, predicted))


def backward(passed):
  """The backward pass behind a forward pass.

  Each product has a derivative by either side, of the same size as itself. Where adapters are trained, those by the
  weights of blocks and head are not wanted: these have one.
  """
  once = passed.projections + passed.head
  return 2 * (passed.attention + passed.adapters) + (once if passed.adapters else 2 * once)


@dataclasses.dataclass(frozen=True)
class Model:
  """What the formulas know of a network.

  `merges`: rollouts have its adapters merged into the base. `block`: that of a block-causal network.
  """

  size: TransformerSize
  lora: LoraSpec | None = None
  merges: bool = False
  remat: bool = False
  shift: int = 0
  block: int | None = None


def windows(sampler, canvas, shift):
  """Positions that the passes of each block compute between two over the whole canvas."""
  if sampler.cache == "none":
    return (canvas,) * sampler.blocks
  starts = range(canvas - sampler.completion_length, canvas, sampler.block_length)
  return tuple(window_of(sampler, start, canvas, shift).width for start in starts)


def rollout(model, sampler, canvas, reach):
  """A rollout of all chunks: a pass over the canvas each refresh period, passes over the window in between."""
  times, lora = 2 if sampler.cfg_scale else 1, None if model.merges else model.lora
  total = 0
  for taken, rows_of in zip(reach.steps.tolist(), reach.rows.tolist(), strict=True):
    for steps, rows, window in zip(taken, rows_of, windows(sampler, canvas, model.shift), strict=True):
      refreshes = -(-steps // sampler.refresh_period)
      for width, count in ((canvas, refreshes), (window, steps - refreshes)):
        total += times * count * sum(products(model.size, rows, width, canvas, sampler.block_length, lora))
  made = times * int((reach.steps * reach.rows).sum())
  return Work(total, int(reach.rows[:, 0].sum()) * sampler.completion_length, passes=made)


class Passes(NamedTuple):
  """What one estimate of a sequence costs.

  Attributes:
    number: forward passes; None: one a denoising step that any row took.
    predicted: completion positions that a pass makes logits for; None: all.
    times: 2 where guidance makes each pass two.
    repeated: whether each pass is computed again in the backward pass, so that memory does not grow with their number.
    logits_repeated: whether at least its logits are, of which a part exists at a time.
  """

  number: int | None = 1
  predicted: int | None = None
  times: int = 1
  repeated: bool = True
  logits_repeated: bool = False


def passes(estimator, spec):
  """Those of an estimator with its options."""
  options, times = dict(estimator.bound), 2 if spec.cfg_scale else 1
  if estimator.name == "one_step":
    return Passes(repeated=False)
  if estimator.name == "coupled":
    return Passes(2 * options["samples"] + 1)
  if estimator.name in ("elbo", "sandwich"):
    return Passes(options["samples"])
  if estimator.name == "quadrature":
    return Passes(options["nodes"])
  if estimator.name == "sampled_steps":
    return Passes(options["samples"], spec.block_length, times)
  if estimator.name == "left_to_right":
    return Passes(math.ceil((options.get("top_entropy") or 1.0) * spec.completion_length), 1, times)
  segments = options.get("segments")
  blocks = 1 if segments is None else replay.blocks_spanned(spec, segments)
  return Passes(segments, blocks * spec.block_length, times)


def in_blocks(each, model, spec, visits):
  """The passes of an estimate by a block-causal network, which scores all of its blocks at once, and their copies."""
  width = spec.completion_length + model.block
  if each.predicted is None:
    return each._replace(predicted=width), 1
  # The steps of a block are states that stand behind the clean canvas, as many as `STATES` in a pass.
  reached = [step < last for last in visits for step in range(spec.steps_per_block)]
  copies = math.ceil(len(reached) / math.ceil(len(reached) / replay.STATES))
  taken = [any(reached[first : first + copies]) for first in range(0, len(reached), copies)]
  # Of each block those that a step unmasked; of a next-token network, also the first one. 32 have logits at a time.
  a_step = spec.max_reveal if spec.by_confidence else math.ceil(spec.block_length / spec.steps_per_block)
  most = min(width, copies * (min(model.block, a_step + model.shift) * width // model.block))
  predicted = math.ceil(most / 32) * min(most, 32)
  return each._replace(number=sum(taken), predicted=predicted, repeated=len(taken) > 1, logits_repeated=True), copies


def update(model, sampler, method, canvas, reach, *, tiled):
  """The score and the optimiser steps of an update; `tiled`: logits are computed again in the backward pass.

  A block-causal network encodes the completions, with the tokens that fill their blocks, once more for each state.
  """
  rows, mu, length = int(reach.rows[:, 0].sum()), method.num_iterations, sampler.completion_length
  each = passes(method.estimator, sampler)
  visits = reach.steps.max(axis=0)
  if model.block:
    visits = visits.reshape(-1, model.block // sampler.block_length).max(axis=0)
    each, copies = in_blocks(each, model, sampler, visits)
    canvas += copies * (length + model.block)
  count = each.times * (int(visits.sum()) if each.number is None else each.number)
  policy, reference = (
    times(count, products(model.size, rows, canvas, canvas, each.predicted or length, lora))
    for lora in (model.lora, None)
  )
  old, ref = (mu - 1) * method.scores_old, mu * method.scores_reference
  if not method.estimator.redraws:
    old, ref = min(old, 1), min(ref, 1)
  scored = old + ref
  score = Work(old * sum(policy) + ref * sum(reference), scored * rows * length, passes=scored * rows * count)
  repeated = sum(policy) if each.repeated else 0
  if not each.repeated and each.logits_repeated:
    repeated = policy.head
  made = step(model, policy, repeated + (policy.head if tiled else 0))
  return score, Work(mu * made[0], mu * rows * length, mu * made[1], mu * rows * count)


def fine_tuning(model, rows, canvas, length, *, tiled):
  """One step of supervised fine-tuning on `rows` completions of `length` tokens."""
  policy = products(model.size, rows, canvas, canvas, length, model.lora)
  flops, repeated = step(model, policy, policy.head if tiled else 0)
  return Work(flops, rows * length, repeated, rows)


def times(count, parts):
  return Parts(*(count * each for each in parts))


def step(model, policy, repeated):
  """FLOPs of forward and backward pass, and what is repeated: of a block, the last product is not needed again."""
  if model.remat:
    weights = [inner * outer for inner, outer in projections(model.size).values()]
    repeated += sum(policy) - policy.head - policy.projections * weights[-1] // sum(weights)
  return sum(policy) + backward(policy), repeated
