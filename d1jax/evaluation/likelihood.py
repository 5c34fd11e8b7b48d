"""How probable an answer is: `d1jax.log_likelihood(model, ["2 + 2 ="], [" 4"])`."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from d1jax import keys
from d1jax.data.pipeline import bucket_for, pad_left
from d1jax.data.tokenizer import Tokenizer
from d1jax.diffusion.answers import Answers, answer_logps, check_guidance, check_samples, is_exact, is_greedy
from d1jax.model import Model
from d1jax.parallel import mesh as meshes
from d1jax.state import Params
from d1jax.tasks.base import Message
from d1jax.tasks.common import check_integer

Ids = Sequence[int] | Int[np.ndarray, "_"]
"""Token ids, which are taken as they are."""

PROMPT_BUCKETS = (64, 128, 256, 512, 1024, 2048, 4096)
"""The prompt lengths that are compiled."""

ANSWER_BUCKETS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
"""The answer lengths that are compiled."""

STRATA = 32
"""The most masks of a set, by default: LLaDA's batch."""


@dataclasses.dataclass(frozen=True)
class Likelihood:
  """The log-probability of one answer.

  Attributes:
    logp: log p(answer | prompt), in nats; an estimate of its lower bound, or exact (`error` is 0).
    error: its standard error over the masks; NaN if there is only one set of masks.
    tokens: the answer's tokens.
    greedy: whether greedy decoding writes this answer; None if it was not asked.
  """

  logp: float
  error: float
  tokens: int
  greedy: bool | None


def log_likelihood(
  model: Model,
  prompts: Sequence[str | Sequence[Message] | Ids],
  answers: Sequence[str | Ids],
  **options: Any,
) -> list[Likelihood]:
  """The log-probabilities of answers to prompts.

  A model with full attention is scored by LLaDA's estimator (arXiv 2502.09992): the mean over masks of the summed
  log-probabilities of the x masked tokens, times n / x. It is unbiased for a lower bound of log p. A block-causal model
  is scored block by block: exactly over blocks, and by the same estimator within a block; with blocks of one token, or
  answers of one token, the result is exact.

  Args:
    model: network, tokenizer and mesh.
    prompts: texts or conversations, which the tokenizer's chat template writes; or token ids, which may be none.
    answers: one a prompt. A text is scored with the end of the answer behind it, as fine-tuning learns it; token ids
      are scored as they are.
    **options: those of `scored`.

  Returns:
    One `Likelihood` a prompt, in order.

  Raises:
    ValueError: a prompt, an answer or an option cannot be used; it is raised before anything is computed.
  """
  found = dict(scored(model, prompts, answers, **options))
  return [found[index] for index in range(len(found))]


class _Row(NamedTuple):
  """One request, and the shapes that it needs."""

  place: int
  prompt: list[int]
  answer: list[int]
  identity: int
  prompt_width: int
  answer_width: int
  exact: bool


def scored(
  model: Model,
  prompts: Sequence[str | Sequence[Message] | Ids],
  answers: Sequence[str | Ids],
  *,
  params: Params | None = None,
  samples: int = 128,
  strata: int | None = None,
  cfg_scale: float = 0.0,
  check_greedy: bool = False,
  seed: int = 0,
  identities: Sequence[int] | None = None,
  batch_size: int = 16,
  prompt_buckets: Sequence[int] = PROMPT_BUCKETS,
  answer_buckets: Sequence[int] = ANSWER_BUCKETS,
) -> Iterator[tuple[int, Likelihood]]:
  """Scores answers batch by batch, and yields the index and the result of each when its batch is done.

  One program is compiled for each shape of a batch. Requests of one shape share batches. A draw depends only on the
  seed, the request's identity and the token's number in the answer: batches, buckets and meshes change no mask.

  Args:
    model: network, tokenizer and mesh.
    prompts: see `log_likelihood`.
    answers: see `log_likelihood`.
    params: the weights, from `Model.publish`; None: the weights with which the model starts.
    samples: masks of each answer, a forward pass each (LLaDA's mc_num). Answers whose log-probability is exact take
      one.
    strata: masks of a set, among which the counts of masked tokens are spread evenly; None: the largest divisor of
      `samples` up to 32. 1: every mask on its own.
    cfg_scale: w of classifier-free guidance; twice the passes.
    check_greedy: whether greedy decoding would write the answer is found out too, at most one pass a token.
    seed: the seed of the draws.
    identities: a number from 0 to 2**31 - 1 for each request, by which its draws are known; None: its index.
    batch_size: the number of answers per batch.
    prompt_buckets: the prompt lengths that are compiled.
    answer_buckets: the answer lengths that are compiled.

  Raises:
    ValueError: a prompt, an answer or an option cannot be used; it is raised before anything is computed.
  """
  for name, value, least in (("samples", samples, 1), ("seed", seed, 0), ("batch_size", batch_size, 1)):
    check_integer(name, value, least)
  strata = max(n for n in range(1, STRATA + 1) if samples % n == 0) if strata is None else strata
  check_integer("strata", strata, 1)
  check_samples(samples, strata)
  check_guidance(model.rollout_denoiser, cfg_scale)
  if isinstance(prompts, str) or isinstance(answers, str):
    raise ValueError("prompts and answers are lists; put the one text into a list")
  if len(prompts) != len(answers):
    raise ValueError(f"there are {len(prompts)} prompts and {len(answers)} answers; give one answer a prompt")
  identities = range(len(prompts)) if identities is None else identities
  rows = [
    _row(model, index, *request, prompt_buckets, answer_buckets)
    for index, request in enumerate(zip(prompts, answers, identities, strict=True))
  ]
  rows.sort(key=lambda row: (row.exact, row.prompt_width, row.answer_width))
  key = meshes.place(keys.seeded(seed), model.rollout_replicated)
  ways = model.rollout_ways

  def batches() -> Iterator[tuple[int, Likelihood]]:
    weights = model.params if params is None else params
    while rows:
      size = min(-(-batch_size // ways), -(-len(rows) // ways)) * ways
      own = [row for row in rows[:size] if row[-3:] == rows[0][-3:]]
      del rows[: len(own)]
      draws = (1, 1) if own[0].exact else (samples, strata)
      placed = _placed(model, [own[i % len(own)] for i in range(size)])
      logps = np.asarray(_program(model, "logps", *draws, cfg_scale)(weights, placed, key), np.float64)
      greedy = np.asarray(_program(model, "greedy", 1, 1, cfg_scale)(weights, placed, key)) if check_greedy else None
      for number, row in enumerate(own):
        estimates = logps[number]
        error = float(np.std(estimates, ddof=1) / math.sqrt(len(estimates))) if len(estimates) > 1 else math.nan
        yield (
          row.place,
          Likelihood(
            float(np.mean(estimates)),
            0.0 if row.exact else error,
            len(row.answer),
            None if greedy is None else bool(greedy[number]),
          ),
        )

  return batches()


def _row(
  model: Model,
  index: int,
  prompt: str | Sequence[Message] | Ids,
  answer: str | Ids,
  identity: int,
  prompt_buckets: Sequence[int],
  answer_buckets: Sequence[int],
) -> _Row:
  asked, answered = _prompt_ids(model.tokenizer, prompt), _answer_ids(model.tokenizer, answer)
  if not answered:
    raise ValueError(f"answer {index + 1} has no tokens; write something")
  if not asked and (model.denoiser.shift or model.denoiser.block):
    raise ValueError(
      f"prompt {index + 1} has no tokens, but this model needs one in front of an answer: begin with the end of"
      " sequence, or with the tokenizer's start token"
    )
  widths = []
  for name, ids, buckets in (("prompt", asked, prompt_buckets), ("answer", answered, answer_buckets)):
    width = bucket_for(len(ids), buckets)
    if width is None:
      raise ValueError(
        f"{name} {index + 1} has {len(ids)} tokens, {name}_buckets hold {max(buckets, default=0)}: shorten it, or"
        " raise them"
      )
    widths.append(width)
  if not 0 <= identity < 2**31:
    raise ValueError(f"the identity {identity} of request {index + 1} must be from 0 to 2**31 - 1")
  outside = [i for i in (*asked, *answered) if not 0 <= i < model.denoiser.vocab]
  if outside or set(answered) & set(model.denoiser.forbidden_ids):
    named = outside or sorted(set(answered) & set(model.denoiser.forbidden_ids))
    raise ValueError(f"request {index + 1} has the id {named[0]}, which has no probability: leave it out")
  exact = is_exact(model.rollout_denoiser, len(answered))
  return _Row(index, asked, answered, int(identity), widths[0], widths[1], exact)


def _tokenizer(tokenizer: Tokenizer | None) -> Tokenizer:
  if tokenizer is None:
    raise ValueError("there is no tokenizer for this text; give token ids, or put tokenizer.json beside config.json")
  return tokenizer


def _prompt_ids(tokenizer: Tokenizer | None, prompt: str | Sequence[Message] | Ids) -> list[int]:
  if isinstance(prompt, str):
    return _tokenizer(tokenizer).prompt([{"role": "user", "content": prompt}], "")
  turns: list[Message] = [turn for turn in prompt if isinstance(turn, dict)]
  return _tokenizer(tokenizer).prompt(turns, "") if turns else [int(i) for i in np.asarray(prompt, int)]


def _answer_ids(tokenizer: Tokenizer | None, answer: str | Ids) -> list[int]:
  return _tokenizer(tokenizer).completion(answer) if isinstance(answer, str) else [int(i) for i in answer]


def _placed(model: Model, rows: Sequence[_Row]) -> Answers:
  pad = model.denoiser.stop_ids[0] if model.tokenizer is None else model.tokenizer.pad_id
  prompt, valid = pad_left([row.prompt for row in rows], rows[0].prompt_width, pad)
  answer = np.full((len(rows), rows[0].answer_width), pad, np.int32)
  for number, row in enumerate(rows):
    answer[number, : len(row.answer)] = row.answer
  length = np.asarray([len(row.answer) for row in rows], np.int32)
  identity = np.asarray([row.identity for row in rows], np.int32)
  return Answers(*meshes.place((prompt, valid, answer, length, identity), model.rollout_by_row))


def _program(model: Model, kind: str, samples: int, strata: int, cfg_scale: float) -> Any:
  """A program of the model, which keeps it: jit compiles it once a shape."""

  def logps(params: Params, answers: Answers, key: jax.Array) -> jax.Array:
    key, options = keys.purpose_key(key, keys.Purpose.LIKELIHOOD), dict[str, Any](samples=samples, strata=strata)
    return answer_logps(model.rollout_denoiser, params, answers, key, cfg_scale=cfg_scale, **options)

  def greedy(params: Params, answers: Answers, key: jax.Array) -> jax.Array:
    del key
    return is_greedy(model.rollout_denoiser, params, answers, cfg_scale=cfg_scale)

  name = ("likelihood", kind, samples, strata, cfg_scale)
  if name not in model.programs:
    model.programs[name] = jax.jit(
      logps if kind == "logps" else greedy,
      in_shardings=(model.publisher.placement, model.rollout_by_row, model.rollout_replicated),
      out_shardings=model.rollout_replicated,
    )
  return model.programs[name]
