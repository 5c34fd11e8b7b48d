"""Partial rollouts: what an iteration leaves unfinished goes on in the next ones, under newer weights.

With `partial_age` = k, iteration n completes the rows of its own prompts. In slots that are free meanwhile, rows of the
next k iterations begin (`d1jax.diffusion.continuous.continue_in_slots`). When the last of its own rows has ended, the
others stop at the end of a block; they go on from there after the update. With k = 1, two slots, three rows an
iteration (named by it), and W_n for the weights after n updates:

  weights  W_0             W_1             W_2
  slot 0   0a 0a 0a 0a 0a | 1b 1b 1b 2a 2a | 2a ...
  slot 1   0b 0c 1a 1a 1b | 1c 1c 1c 1c 1c | 2b ...

So a row is trained on once, by the update of its own iteration; it began at most k iterations earlier. Each token keeps
the log-probability of the weights that drew it, which `d1jax.rl.behaviour` reads as that of the behaviour policy.
"""

import collections
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from d1jax import keys
from d1jax.completer import PromptArrays
from d1jax.data.pipeline import PromptBatch
from d1jax.diffusion import layout
from d1jax.diffusion.continuous import Taken, Unfinished, continue_in_slots
from d1jax.diffusion.rollout import Rollout, SamplerSpec
from d1jax.model import Model
from d1jax.parallel import mesh as meshes
from d1jax.parallel.mesh import constrained, place
from d1jax.rl.method import Method
from d1jax.training.shape import Shape


class Course(NamedTuple):
  """How a call went.

  Attributes:
    taken: what its turns took.
    figures: `partial/age`, the mean of the iterations from the one in which a completion began to the one that takes
      it; `partial/carried`, the share of the tokens to be trained on which earlier iterations drew; and
      `partial/unfinished`, the completions that go on in the next iteration.
  """

  taken: Taken
  figures: dict[str, jax.Array]


def check(shape: Shape, sampler: SamplerSpec, method: Method) -> None:
  """Raises a ValueError if rollouts cannot go on in the next iterations, or if that cannot be corrected for."""
  age = shape.partial_age
  if shape.slots is None:
    raise ValueError(
      f"grpo.partial_age={age} goes on with completions that stop in a slot at the end of a block, but"
      " grpo.rollout_slots=None computes all of them at once: set grpo.rollout_slots, or grpo.partial_age=0"
    )
  if shape.chunks > 1:
    raise ValueError(
      f"grpo.partial_age={age} completes the prompts of an iteration in one part, not in grpo.rollout_chunks="
      f"{shape.chunks}: set"
      " grpo.rollout_chunks=1"
    )
  if not method.estimator.replays:
    raise ValueError(
      f"grpo.partial_age={age} draws a completion by several policies, each of which recorded the log p of its tokens,"
      f" but grpo.estimator={method.estimator.name} scores it by one: set grpo.estimator=step_merged without segments,"
      " or sampled_steps"
    )
  if sampler.temperature == 0:
    raise ValueError(
      f"grpo.partial_age={age} takes the probabilities of draws from the rollout, but rollout.temperature=0 takes the"
      " argmax: raise it, or set grpo.partial_age=0"
    )


class Partial:
  """The program that completes the first rows of a queue, compiled once, for the widest prompts."""

  def __init__(self, model: Model, sampler: SamplerSpec, shape: Shape, placement: Any):
    """Defines the program; nothing is compiled yet.

    Args:
      model: network and mesh.
      sampler: the sampler of rollouts.
      shape: of an iteration.
      placement: of finished completions.
    """
    self.model, self.shape, self._sampler, self._placement = model, shape, sampler, placement
    self._width = max(shape.buckets)
    by_row, scalar = model.rollout_by_row, model.rollout_replicated
    self._jitted = jax.jit(
      self._program,
      in_shardings=(model.publisher.placement, by_row, scalar, scalar, scalar),
      out_shardings=(placement, scalar, scalar),
    )
    self._compiled: Any = None

  def _program(
    self, params: Any, prompts: PromptArrays, left: Unfinished, key: jax.Array, number: jax.Array
  ) -> tuple[Rollout, Unfinished, Course]:
    model, (_, valid, sample_id, _) = self.model, prompts
    assert self.shape.slots is not None
    # A row draws as it would if its own iteration, which its id tells, began and completed it.
    own = jax.vmap(lambda n: keys.purpose_key(key, keys.Purpose.ROLLOUT, n))(sample_id // self.shape.rows)
    rollout, after, taken = continue_in_slots(
      model.rollout_denoiser,
      params,
      *prompts,
      own,
      left,
      number,
      spec=self._sampler,
      slots=self.shape.slots,
      row_multiple=model.rollout_ways,
      by_row=lambda x: constrained(x, model.rollout_by_row),
      everywhere=lambda x: constrained(x, model.rollout_replicated),
    )
    first = lambda x: x[: self.shape.rows]
    began = first(left.began)[:, None]
    drawn = (began >= 0) & (first(left.tokens) != model.rollout_denoiser.mask_id)
    known = layout.taken_out(model.rollout_denoiser, first(valid), drawn) & rollout.completion_mask
    figures = {
      "partial/age": jnp.mean(jnp.where(began < 0, 0, number - began).astype(jnp.float32)),
      "partial/carried": jnp.sum(known) / jnp.sum(rollout.completion_mask),
      "partial/unfinished": jnp.sum((after.began >= 0) & ~after.ended),
    }
    return constrained(rollout, model.rollout_by_row), after, Course(taken, figures)

  def abstract_left(self, placement: Any) -> Any:
    """Shapes and types of the rows that a call leaves, at a placement."""
    rows, denoiser = self.shape.partial_age * self.shape.rows, self.model.rollout_denoiser
    made: Any = lambda dtype, *shape: jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=placement)
    active = self._sampler.completion_length + layout.extra(denoiser)
    recorded = [made(dtype, active) for dtype in (jnp.int32, jnp.int32, jnp.float32)]
    of_rows = [made(dtype) for dtype in (jnp.int32, jnp.int32, jnp.bool_)]
    return Unfinished(*recorded, *of_rows)

  def traced(self) -> jax.stages.Traced:
    """The traced program; JAX caches it."""
    model, scalar = self.model, self.model.rollout_replicated
    rows = (self.shape.partial_age + 1) * self.shape.rows
    row = lambda *shape, dtype=jnp.int32: jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=model.rollout_by_row)
    return self._jitted.trace(
      model.publisher.abstract,
      (row(self._width), row(self._width, dtype=jnp.bool_), row(), row()),
      self.abstract_left(scalar),
      jax.ShapeDtypeStruct((), keys.seeded(0).dtype, sharding=scalar),
      jax.ShapeDtypeStruct((), jnp.int32, sharding=scalar),
    )

  def chunk(self, width: int) -> Rollout:
    """The completions of an iteration whose prompts have `width` tokens: shapes, types and placements."""
    found = self.traced().out_info[0]
    cut: Any = lambda x: jax.ShapeDtypeStruct((len(x), width), x.dtype)
    found = found._replace(prompt=cut(found.prompt), prompt_valid=cut(found.prompt_valid))
    rollout: Rollout = meshes.with_placement(found, self._placement)
    return rollout

  def compile(self) -> None:
    """Compiles the program."""
    self._compiled = self.traced().lower().compile()

  def placed_left(self, left: Unfinished | None) -> Unfinished:
    """The rows of a checkpoint, on the host, where the program takes them; None: no row has begun."""
    if left is None:
      left = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), self.abstract_left(None))
      left = left._replace(began=left.began - 1)
    return place(left, self.model.rollout_replicated)

  def __call__(
    self, params: Any, batches: Sequence[PromptBatch], left: Unfinished, key: jax.Array, number: int
  ) -> tuple[Rollout, Unfinished, Course]:
    """Completes the first batch of prompts under published weights.

    Args:
      params: the weights.
      batches: of this iteration and the k next ones.
      left: of the call before, or of `placed_left`.
      key: the run's key, from `Programs.key`.
      number: of the iteration.
    """
    to_width = lambda x: np.pad(x, ((0, 0), (self._width - x.shape[1], 0))) if x.ndim > 1 else x
    prompts = tuple(
      np.concatenate(list(map(to_width, each))) for each in zip(*(b.arrays for b in batches), strict=True)
    )
    placed, scalar = place(prompts, self.model.rollout_by_row), place(np.int32(number), self.model.rollout_replicated)
    rollout, after, course = self._compiled(params, placed, left, key, scalar)
    prompt, valid = place((batches[0].prompt, batches[0].prompt_valid), self._placement)
    return rollout._replace(prompt=prompt, prompt_valid=valid), after, course


class Pool:
  """The rows of an iteration and those that begin before their own one, from call to call.

  Attributes:
    left: the rows that the last call left.
  """

  def __init__(self, partial: Partial, left: Unfinished | None = None):
    """Begins with what a checkpoint holds; None: with no row."""
    self._partial, self._batches = partial, collections.deque[PromptBatch]()
    self.left = partial.placed_left(left)

  def __call__(
    self, params: Any, prompts: Iterator[PromptBatch], key: jax.Array, number: int
  ) -> tuple[PromptBatch, tuple[Rollout], tuple[()], Course]:
    """The batch of iteration `number` and its completions, in one part that no other estimate goes with; it takes the
    batches behind it from `prompts`. See `Partial.__call__`.
    """
    while len(self._batches) <= self._partial.shape.partial_age:
      self._batches.append(next(prompts))
    rollout, self.left, course = self._partial(params, self._batches, self.left, key, number)
    return self._batches.popleft(), (rollout,), (), course
