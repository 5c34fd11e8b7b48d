"""A request, what its listener hears, and how far it is."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from d1jax.diffusion.rollout import SamplerSpec
from d1jax.serving.lane import Lane


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
  """A prompt to complete.

  Attributes:
    prompt: ids, with the chat template and the prefill applied (`Tokenizer.prompt`).
    spec: the sampler; each request has its own, and no field of it is compiled in.
    seed: of the draws, which are those of `d1jax.generate(model, [prompt], spec=spec, seed=seed, samples=sample + 1)`.
    sample: the number of the completion among those of its prompt.
    every_step: an update a denoising step, instead of one a block.
    deadline: seconds from the submission, after which the request ends as it is; None: never.
  """

  prompt: Int[np.ndarray, "p"]
  spec: SamplerSpec
  seed: int = 0
  sample: int = 0
  every_step: bool = False
  deadline: float | None = None


class Update(NamedTuple):
  """What a request has so far; the arrays belong to the listener.

  Attributes:
    tokens: the completion; the mask's id where nothing is revealed yet.
    reveal_step: the denoising step, from 0, that revealed each token; -1 where none has yet.
    reveal_logp: the log-probability of each revealed token under the distribution that it was drawn from; 0 elsewhere.
    known: how many tokens from the left are final: those of finished blocks; at the end, up to and including the first
      stop id.
    reason: why the request has ended: `stop`, `length`, `cancelled`, `deadline` or `error`; None: it goes on.
    message: of an error.
  """

  tokens: Int[np.ndarray, "C"]
  reveal_step: Int[np.ndarray, "C"]
  reveal_logp: Float[np.ndarray, "C"]
  known: int
  reason: str | None
  message: str = ""


@dataclasses.dataclass(eq=False)
class Job:
  """A request on its way.

  Attributes:
    request: what was submitted.
    listen: hears the updates.
    lane: where it runs.
    submitted: when, in seconds of a clock that never goes back.
    first: the column of its first completion token.
    began: when it got a slot.
    slot: its place in the lane; None: it waits, or has ended.
    known: tokens of finished blocks.
    cancelled: the reason to end it.
  """

  request: Request
  listen: Callable[[Update], None]
  lane: Lane
  submitted: float
  first: int
  began: float | None = None
  slot: int | None = None
  known: int = 0
  cancelled: str | None = None

  def update(self, mask_id: int, reason: str | None, message: str = "") -> Update:
    """What the request has now."""
    length, rows = self.request.spec.completion_length, self.lane.rows
    tokens, steps, logp = (
      np.full(length, mask_id, np.int32),
      np.full(length, -1, np.int32),
      np.zeros(length, np.float32),
    )
    if self.slot is not None:
      own = slice(self.first, self.first + length)
      for mine, row in ((tokens, rows.tokens), (steps, rows.reveal_step), (logp, rows.reveal_logp)):
        mine[:] = row[self.slot, own]
    return Update(tokens, steps, logp, self.known, reason, message)
