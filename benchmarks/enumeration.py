"""A denoiser small enough to be enumerated, and what its samplers and likelihoods are exactly.

Three truths: log p under random order, which the evidence lower bounds bound; the sum of token terms at the states of
a recorded path; the probability of a completion under the real sampler, which reveals the most confident proposals
first. And the gradient of an expected reward.
"""

import dataclasses
import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from d1jax.diffusion.denoiser import Denoiser
from d1jax.diffusion.rollout import Rollout, SamplerSpec
from d1jax.diffusion.schedule import reveal_counts

TOKENS, EMBED, PROMPT, LENGTH = 3, 6, 2, 4
MASK = TOKENS
SCALE = 0.8
"""Of the weights: tokens depend on one another, and are not yet certain."""


def _encode(params: Any, tokens: jax.Array, valid: jax.Array) -> jax.Array:
  """Two layers: a position takes in all valid ones, by weights of their distance."""
  x, length = params["table"][tokens], tokens.shape[1]
  distance = np.arange(length)[:, None] - np.arange(length)[None, :]
  for layer in range(2):
    share = params["distance"][layer][distance + PROMPT + LENGTH - 1][None] * valid[:, None, :]
    x = jnp.tanh(x + jnp.einsum("bij,bjd->bid", share, x) @ params["mix"][layer])
  return x


DENOISER = Denoiser(_encode, lambda params: params["head"], MASK, (), (MASK,), TOKENS + 1)
"""Three tokens and the mask; nothing stops early."""


def draw_params(seed: int) -> dict[str, jax.Array]:
  """Random weights."""
  rng = np.random.default_rng(seed)
  shapes = {
    "table": (TOKENS + 1, EMBED),
    "distance": (2, 2 * (PROMPT + LENGTH) - 1),
    "mix": (2, EMBED, EMBED),
    "head": (EMBED, TOKENS + 1),
  }
  return {name: jnp.asarray(SCALE * rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


class _Transitions(NamedTuple):
  """All that can happen in one step: canvases before and after, proposals (-1: none), which of them are committed."""

  before: np.ndarray
  after: np.ndarray
  proposed: np.ndarray
  committed: np.ndarray


@dataclasses.dataclass(frozen=True)
class Truth:
  """Enumerates a denoiser of `TOKENS` tokens over completions of `spec.completion_length`.

  Canvases are numbered by their digits in base `TOKENS` + 1. Functions of `params` can be differentiated; the choice of
  positions, a function of all proposals, is that of the `params` given here and held fixed.
  """

  params: Any
  spec: SamplerSpec
  prompt: tuple[int, ...] = (0, 1)
  denoiser: Denoiser = DENOISER

  @functools.cached_property
  def canvases(self) -> np.ndarray:
    """All canvases [K C]."""
    return np.asarray(list(itertools.product(range(TOKENS + 1), repeat=self.spec.completion_length)), np.int32)

  @functools.cached_property
  def completions(self) -> np.ndarray:
    """All completions [O C]: the canvases without masks."""
    return self.canvases[(self.canvases != MASK).all(axis=1)]

  def number(self, canvas: np.ndarray) -> np.ndarray:
    """The numbers of canvases [... C]."""
    return canvas @ (TOKENS + 1) ** np.arange(canvas.shape[-1])[::-1]

  def table(self, params: Any, temperature: float = 1.0) -> jax.Array:
    """Log p [K C V] of each token at each position of each canvas."""
    rows, prompt = self.canvases.shape[0], np.asarray(self.prompt, np.int32)
    tokens = jnp.concatenate([jnp.broadcast_to(prompt, (rows, prompt.size)), jnp.asarray(self.canvases)], axis=1)
    hidden = self.denoiser.encode(params, tokens, jnp.ones(tokens.shape, bool))
    hidden = self.denoiser.hidden_predicting(hidden, prompt.size + jnp.arange(self.canvases.shape[1]))
    return jax.nn.log_softmax(self.denoiser.logits(params, hidden) / temperature)

  def by_subset(self, params: Any) -> dict[tuple[bool, ...], jax.Array]:
    """Untempered log p [O C] of each completion's tokens where only a subset of them is shown."""
    table, length = self.table(params), self.spec.completion_length
    found = {}
    for shown in itertools.product((False, True), repeat=length):
      number = self.number(np.where(shown, self.completions, MASK))
      found[shown] = table[number[:, None], np.arange(length)[None, :], self.completions]
    return found

  def by_order(self, params: Any) -> jax.Array:
    """Log p [orders O] of each completion in each order of its tokens, untempered, one token at a time."""
    by_subset, found = self.by_subset(params), []
    for order in itertools.permutations(range(self.spec.completion_length)):
      before = lambda i, order=order: tuple(bool(j in order[: order.index(i)]) for j in range(len(order)))
      found.append(sum(by_subset[before(i)][:, i] for i in order))
    return jnp.stack(found)

  def random_order(self, params: Any) -> jax.Array:
    """Log p [O] under a uniformly random order: the first truth."""
    each = self.by_order(params)
    return jax.nn.logsumexp(each, axis=0) - jnp.log(each.shape[0])

  def lower_bound(self, params: Any) -> jax.Array:
    """The evidence lower bound [O] of `random_order`: the mean over orders of log p."""
    return jnp.mean(self.by_order(params), axis=0)

  def along(self, params: Any, completion: np.ndarray, reveal_step: np.ndarray) -> jax.Array:
    """Tempered log p [B C] of each token at the state in which it was revealed: the second truth, summed."""
    table = self.table(params, self.spec.temperature or 1.0)
    found = []
    for i in range(completion.shape[1]):
      number = self.number(np.where(reveal_step < reveal_step[:, i : i + 1], completion, MASK))
      found.append(table[number, i, completion[:, i]])
    return jnp.stack(found, axis=1)

  @functools.cached_property
  def steps(self) -> list[_Transitions]:
    """What each denoising step of the sampler does to each canvas that it may meet, at a positive temperature."""
    spec, confidence = self.spec, np.asarray(self.table(self.params))
    met, found = {int(self.number(np.full(spec.completion_length, MASK)))}, []
    for block, count in itertools.product(range(spec.blocks), reveal_counts(spec.block_length, spec.steps_per_block)):
      rows = []
      for number in sorted(met):
        canvas = self.canvases[number]
        inside = range(block * spec.block_length, (block + 1) * spec.block_length)
        masked = [i for i in inside if canvas[i] == MASK]
        for tokens in itertools.product(range(TOKENS), repeat=len(masked)):
          proposed = np.full(canvas.shape, -1)
          proposed[masked] = tokens
          best = sorted(masked, key=lambda i: (-confidence[number, i, proposed[i]], i))[:count]
          committed = np.isin(np.arange(canvas.size), best)
          after = int(self.number(np.where(committed, proposed, canvas)))
          rows.append((number, after, proposed, committed))
      found.append(_Transitions(*(np.asarray(x) for x in zip(*rows, strict=True))))
      met = set(found[-1].after.tolist())
    return found

  def sampler(self, params: Any) -> jax.Array:
    """Log p [O] of each completion under the sampler, summed over all that leads to it: the third truth."""
    table = self.table(params, self.spec.temperature)
    reached = jnp.zeros(self.canvases.shape[0]).at[self.steps[0].before[0]].set(1.0)
    for step in self.steps:
      mass = reached[step.before] * jnp.exp(_of(table, step, step.proposed >= 0))
      reached = jnp.zeros_like(reached).at[step.after].add(mass)
    return jnp.log(reached[self.number(self.completions)])

  def paths(self) -> tuple[Rollout, np.ndarray]:
    """Every path that the sampler may take, as one rollout, and the probability [B] of each."""
    table = np.asarray(self.table(self.params, self.spec.temperature), np.float64)
    length = self.spec.completion_length
    states = {(int(self.steps[0].before[0]), (0,) * length): 1.0}
    for index, step in enumerate(self.steps):
      mass = np.exp(np.asarray(_of(table, step, step.proposed >= 0)))
      leaving: dict[int, list[int]] = {}
      for row, number in enumerate(step.before.tolist()):
        leaving.setdefault(number, []).append(row)
      following: dict[tuple[int, tuple[int, ...]], float] = {}
      for (number, steps), probability in states.items():
        for row in leaving[number]:
          taken = tuple(np.where(step.committed[row], index, steps).tolist())
          key = (int(step.after[row]), taken)
          following[key] = following.get(key, 0.0) + probability * mass[row]
      states = following
    numbers, reveals = (np.asarray(x, np.int32) for x in zip(*states, strict=True))
    batch, completion = len(states), self.canvases[numbers]
    ids = jnp.arange(batch, dtype=jnp.int32)
    prompt = jnp.broadcast_to(jnp.asarray(self.prompt, jnp.int32), (batch, len(self.prompt)))
    logp = self.along(self.params, completion, reveals)
    every = lambda x: jnp.ones(x.shape, bool)
    rollout = Rollout(
      ids, ids, prompt, every(prompt), jnp.asarray(completion), every(completion), jnp.asarray(reveals), logp
    )
    return rollout, np.asarray(list(states.values()))

  def reward_gradient(self, reward: np.ndarray) -> Any:
    """The gradient of the expected reward [O], the rule that chooses positions held fixed.

    A proposal that is not committed counts: had it been more confident, another would have been left out.
    """
    return jax.grad(lambda p: jnp.sum(jnp.exp(self.sampler(p)) * reward))(self.params)

  def path_gradient(self, reward: np.ndarray) -> Any:
    """The gradient of the expected reward [O] over paths, the positions of each path held fixed.

    sum over paths of p(path) (reward - its mean) grad sum_k log p(o_k | state that revealed it): REINFORCE with all
    samples, which is what scoring whole trajectories estimates.
    """
    rollout, probability = self.paths()
    completion, steps = np.asarray(rollout.completion), np.asarray(rollout.reveal_step)
    coefficient = probability * self.advantage(completion, reward)
    return jax.grad(lambda p: jnp.sum(coefficient * jnp.sum(self.along(p, completion, steps), axis=1)))(self.params)

  def advantage(self, completion: np.ndarray, reward: np.ndarray) -> np.ndarray:
    """The reward [O] of each of a batch of completions [B C], less the sampler's mean."""
    mean = np.sum(np.exp(np.asarray(self.sampler(self.params), np.float64)) * reward)
    return reward[self.index(completion)] - mean

  def index(self, completion: np.ndarray) -> np.ndarray:
    """Where completions [B C] stand among `completions`."""
    return np.asarray(completion) @ TOKENS ** np.arange(completion.shape[-1])[::-1]


def _of(table: Any, step: _Transitions, counted: np.ndarray) -> Any:
  """The sum of log p over the counted proposals of each transition."""
  places = np.arange(step.proposed.shape[1])[None, :]
  xp = np if isinstance(table, np.ndarray) else jnp
  return xp.where(counted, table[step.before[:, None], places, np.maximum(step.proposed, 0)], 0.0).sum(axis=1)
