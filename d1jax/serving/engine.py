"""The engine: a thread that owns the device, and completes the prompts of many requests at once."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from d1jax.diffusion.rollout import SamplerSpec
from d1jax.model import Model
from d1jax.state import Params


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


class BusyError(Exception):
  """The queue is full, or the engine is closed.

  Attributes:
    retry_after: seconds, after which there may be room.
  """

  def __init__(self, message: str, retry_after: float):
    super().__init__(message)
    self.retry_after = retry_after


class Ticket:
  """A submitted request."""

  def cancel(self) -> None:
    """Ends the request at the next denoising step; its listener gets a last update, unless it had one. Any thread may
    call it.
    """
    raise NotImplementedError


class Engine:
  """Completes requests on the device of a model.

  Attributes:
    ready: whether `prepare` is done.
  """

  ready: bool = False

  def __init__(
    self,
    model: Model,
    params: Params | None = None,
    *,
    slots: int = 16,
    lengths: Sequence[int] = (256, 512, 1024),
    block_length: int = 32,
    queue: int = 64,
  ):
    """Stores the arguments; nothing is compiled yet.

    Args:
      model: network and mesh.
      params: the weights, from `Model.publish`; None: `Model.params`.
      slots: the most rows that run at once on canvases of one length; rounded up to what the mesh divides.
      lengths: the canvases: a request takes the smallest that holds its prompt and its completion.
      block_length: the longest block of a request.
      queue: the most requests that wait.
    """

  def prepare(self, report: Callable[[str], Any] = lambda line: None) -> None:
    """Compiles every program, calls `report` with a line before each, and starts the thread; nothing is compiled
    afterwards.
    """
    raise NotImplementedError

  def check(self, request: Request) -> None:
    """Raises a ValueError that names the parameter and the bound if the request cannot be served."""
    raise NotImplementedError

  def submit(self, request: Request, listen: Callable[[Update], None]) -> Ticket:
    """Queues a request. Any thread may call it.

    Args:
      request: what to complete.
      listen: is called with each update from the engine's thread; it must not block. If it raises, the request ends.

    Raises:
      BusyError: the queue is full, or the engine is closed.
      ValueError: the request cannot be served, see `check`.
    """
    raise NotImplementedError

  def close(self, drain: float | None = None) -> None:
    """Refuses new requests, and ends when those that were submitted have ended.

    Args:
      drain: seconds after which requests that still run or wait are cancelled; None: they are completed.
    """
    raise NotImplementedError

  def gauges(self) -> dict[str, float]:
    """Numbers to watch: `slots`, `running` and `waiting` requests; since the start, `requests` that ended, completion
    `tokens`, `passes` of the network and `token_forwards`, the positions that they computed.
    """
    raise NotImplementedError
