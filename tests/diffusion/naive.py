"""The denoising loop of LLaDA and its cached kin, one prompt at a time in NumPy, on the toy network."""

from typing import Any, NamedTuple

import jax
import numpy as np

from d1jax.diffusion.rollout import SamplerSpec
from tests import toy


class Path(NamedTuple):
  """One canvas and how its completion came about; `exact_logp` scores it by forward passes over the whole canvas."""

  canvas: np.ndarray
  reveal_step: np.ndarray
  reveal_logp: np.ndarray
  exact_logp: np.ndarray
  passes: list[int]


class Network:
  """The toy in float64, with what each layer mixes kept between passes."""

  def __init__(self, params: Any, attend: np.ndarray) -> None:
    self.params = {name: np.asarray(p, np.float64) for name, p in params.items()}
    self.attend, self.kept = attend, [np.zeros((len(attend), toy.EMBED)) for _ in range(2)]

  def logits(self, tokens: np.ndarray, first: int, width: int) -> np.ndarray:
    """Of the rows from `first` on; NaN elsewhere."""
    rows = np.arange(first, first + width)
    distance = rows[:, None] - np.arange(len(tokens))[None]
    share = np.exp(-0.4 * np.abs(distance) + 0.05 * distance) * self.attend
    share /= share.sum(-1, keepdims=True)
    x = self.params["table"][tokens[rows]]
    for kept in self.kept:
      kept[rows] = x
      x = np.tanh(x + share @ kept @ self.params["mix"])
    found = np.full((len(tokens), toy.VOCAB), np.nan)
    found[rows] = toy.allowed(x @ self.params["head"])
    return found


def rows_of(spec: SamplerSpec, start: int, length: int, shift: int) -> tuple[int, int]:
  """The first row of a cached pass, and how many there are."""
  size = spec.block_length
  if spec.cache == "prefix":
    return start - shift, length - start + shift
  if spec.cache == "dual":
    return start - shift, size + shift
  width = spec.look_behind + size + spec.look_ahead + shift
  if width >= length:
    return 0, length
  return min(max(start - shift - spec.look_behind, 0), length - width), width


def how_many(spec: SamplerSpec, sorted_confidence: list[float], static: int) -> int:
  if spec.schedule == "static":
    return static
  if spec.schedule == "threshold":
    n = sum(c >= spec.threshold for c in sorted_confidence)
  else:
    n = 0
    while n < len(sorted_confidence) and sorted_confidence[n] >= 1 - spec.factor / (n + 2):
      n += 1
  return max(1, min(n, spec.max_reveal, len(sorted_confidence)))


def generate(
  prompt: np.ndarray,
  valid: np.ndarray,
  sample_id: int,
  spec: SamplerSpec,
  key: jax.Array,
  params: Any,
  shift: int = 0,
) -> Path:
  """LLaDA's generate.py for one prompt, with the run's uniforms: a draw inverts the distribution function."""
  before, length, size = len(prompt), spec.completion_length, spec.block_length
  x = np.concatenate([prompt, np.full(length, toy.MASK)])
  attend = np.concatenate([valid, np.ones(length, bool)])
  is_prompt = np.arange(before + length) < before
  step_of, logp_of, exact_of = np.full(length, -1), np.full(length, np.nan), np.full(length, np.nan)
  passes = []

  def guided(networks: tuple[Network, Network], first: int, width: int) -> np.ndarray:
    logits = networks[0].logits(x, first, width)
    if spec.cfg_scale == 0:
      return logits
    blind = networks[1].logits(np.where(is_prompt, toy.MASK, x), first, width)
    with np.errstate(invalid="ignore"):
      return toy.allowed(blind + (spec.cfg_scale + 1) * (logits - blind))

  pair = Network(params, attend), Network(params, attend)
  for block in range(length // size):
    start = before + block * size
    steps = spec.diffusion_steps // (length // size)
    transfer = [size // steps + (1 if i < size % steps else 0) for i in range(steps)]
    transfer = [n for n in transfer if n]  # LLaDA pays a forward pass that changes nothing
    stride = len(transfer) if spec.schedule == "static" else size
    for step in range(stride):
      holes = [i for i in range(start, start + size) if x[i] == toy.MASK]
      if not holes:
        break
      counter = block * stride + step
      step_key = jax.random.fold_in(jax.random.fold_in(key, sample_id), counter)
      draw_u = np.asarray(jax.random.uniform(jax.random.fold_in(step_key, 0), (length,)))
      order_u = np.asarray(jax.random.uniform(jax.random.fold_in(step_key, 1), (length,)))
      fresh = spec.cache == "none" or step % (spec.refresh_every or stride) == 0
      first, width = (0, len(x)) if fresh else rows_of(spec, start, len(x), shift)
      passes.append(width)
      logits = guided(pair, first, width)
      exact = guided((Network(params, attend), Network(params, attend)), 0, len(x))
      found = {}
      for i in holes:
        tempered = toy.log_softmax(logits[i - shift] / (spec.temperature or 1))
        if spec.temperature == 0:
          token, logp = int(np.argmax(logits[i - shift])), 0.0
        else:
          token = int(np.searchsorted(np.cumsum(np.exp(tempered)), draw_u[i - before], side="right"))
          logp = tempered[token]
        probability = np.exp(toy.log_softmax(logits[i - shift]))[token]
        confidence = probability if spec.remasking == "low_confidence" else order_u[i - before]
        found[i] = confidence, token, logp, toy.log_softmax(exact[i - shift] / (spec.temperature or 1))[token]
      ranked = sorted(holes, key=lambda i: -found[i][0])
      count = how_many(spec, [found[i][0] for i in ranked], transfer[step] if spec.schedule == "static" else 0)
      for i in ranked[:count]:
        _, x[i], logp_of[i - before], exact_of[i - before] = found[i]
        step_of[i - before] = counter
  return Path(x, step_of, logp_of, exact_of, passes)
