"""A model of d1jax as lm-evaluation-harness sees it: generations, log-likelihoods, rolling log-likelihoods."""

import hashlib
import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from d1jax import model as models
from d1jax import presets
from d1jax.data import chat
from d1jax.data.tokenizer import Tokenizer, body, prefix
from d1jax.errors import explained, input_checked, smaller_batches
from d1jax.evaluation import subject
from d1jax.evaluation.likelihood import scored
from d1jax.evaluation.perplexity import windows
from d1jax.generation.generate import MOST_PROMPTS, stream
from d1jax.generation.requests import Settings, asked, encode_pair, sampler, until_stop
from d1jax.model import Model
from d1jax.parallel import multihost
from d1jax.parallel.mesh import MESH_AXES, make_mesh
from d1jax.state import Params

ROWS = 16
"""Rows a device of `batch_size=auto`."""

_log = logging.getLogger("lm_eval.d1jax")  # the harness shows what is logged below its own name


def _identity(text: str) -> int:
  """A number that stands for a request in its draws, so that a resumed evaluation draws what it would have drawn."""
  return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _loaded(settings: Settings) -> tuple[Model, Params | None]:
  """The model, and its weights if they are not those with which it starts."""
  mesh = {axis: getattr(settings, axis) for axis in MESH_AXES}
  if settings.checkpoint is None:
    dtype = models.compute_dtype(settings.dtype, jax.devices()[0].platform)
    folder = str(settings.pretrained)
    return models.from_pretrained(
      folder, dtype, quantize=settings.quantize, block=settings.block, mesh=make_mesh(mesh)
    ), None
  fields = {f"mesh.{axis}": size for axis, size in mesh.items()} | {"checkpoint": settings.checkpoint}
  if settings.pretrained is not None:
    fields["pretrained"] = settings.pretrained
  # The questions are the harness's: the run's own test split is not met.
  found = subject.load(presets.load("eval", fields | {"chosen_beforehand": True}))
  return found.experiment.model, found.params()


class D1jaxLM(LM):
  """The model `d1jax` of the harness: one process, with all devices that JAX finds (`rank` 0 of `world_size` 1)."""

  def __init__(self, **arguments: Any):
    """Reads the model; the arguments are `Settings`, and the harness's own `batch_size`, `max_batch_size`, `device`.

    Raises:
      RunError: an argument is unknown or wrong, or the model cannot be read; the message is one line.
    """
    super().__init__()
    multihost.check_alone("lm_eval")
    with input_checked():
      self.settings = Settings.of(arguments)
      self.model, self._params = _loaded(self.settings)
      if self.model.tokenizer is None:
        raise ValueError(f"{self.settings.pretrained} has no tokenizer; put tokenizer.json beside config.json")
    self.tokenizer: Tokenizer = self.model.tokenizer

  @property
  def rows(self) -> int:
    """The rows of a batch."""
    size = self.settings.batch_size
    if isinstance(size, int):
      return size
    return min(ROWS * self.model.rollout_ways, self.settings.max_batch_size or ROWS * self.model.rollout_ways)

  @property
  def tokenizer_name(self) -> str:
    """The content of the tokenizer's files, as a name: the harness keeps requests by it."""
    digest = hashlib.sha256()
    for name, content in sorted(self.tokenizer.files.items()):
      digest.update(name.encode() + b"\0" + content)
    return f"d1jax_{digest.hexdigest()[:16]}"

  def chat_template(self, chat_template: bool | str = False) -> str | None:
    """The source of the chat template; None if none is wanted.

    Raises:
      RunError: the tokenizer has none, or another one is asked for by name.
    """
    if not chat_template:
      return None
    found = chat.find_template(self.tokenizer.files)
    with input_checked():
      if isinstance(chat_template, str) and chat_template != "default":
        raise ValueError(f"apply_chat_template={chat_template}: d1jax reads the template named default; leave it out")
      if found is None:
        raise ValueError("the tokenizer has no chat template: leave --apply_chat_template out")
    return found[0] if found else None

  def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
    """A conversation as the model was trained to read it; few-shot examples may be turns of it.

    Without `add_generation_prompt` the last turn is the given start of the answer, behind which nothing is written.
    """
    self.chat_template(True)
    with input_checked():
      text = self.tokenizer.written(chat_history, add_generation_prompt)
    if add_generation_prompt:
      return text
    start = chat_history[-1]["content"]
    kept = start if start in text else start.rstrip()
    return text[: text.rindex(kept) + len(kept)]

  def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
    """Log p of each continuation, and whether greedy decoding writes it (False if that is not asked).

    The continuations of one context share their masks, which makes their differences less noisy.
    """
    pairs = [encode_pair(self.tokenizer, *request.args) for request in requests]
    found: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)  # of continuations without a token
    places = [place for place, (_, answer) in enumerate(pairs) if answer]
    identities = [_identity(requests[place].args[0]) for place in places]
    results = self._scored([pairs[place] for place in places], identities, self.settings.is_check_greedy)
    for index, logp, greedy in results:
      found[places[index]] = logp, greedy
      self.cache_hook.add_partial("loglikelihood", requests[places[index]].args, found[places[index]])
    return found

  def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[float]:
    """Log p of each text, in windows of `max_length - 1` tokens (`d1jax.evaluation.perplexity.windows`)."""
    before, width = prefix(self.tokenizer), max(1, self.settings.max_length - 1)
    cut = [list(windows(body(self.tokenizer, request.args[0]), before, width)) for request in requests]
    owner = [place for place, own in enumerate(cut) for _ in own]
    identities = [
      _identity(f"{number} {request.args[0]}")
      for request, own in zip(requests, cut, strict=True)
      for number in range(len(own))
    ]
    found, left = [0.0] * len(cut), [len(own) for own in cut]
    for index, logp, _ in self._scored(list(itertools.chain(*cut)), identities, False):
      place = owner[index]
      found[place] += logp
      left[place] -= 1
      if not left[place]:
        self.cache_hook.add_partial("loglikelihood_rolling", requests[place].args, found[place])
    return found

  def _scored(
    self, pairs: Sequence[tuple[list[int], list[int]]], identities: Sequence[int], greedy: bool
  ) -> Iterator[tuple[int, float, bool]]:
    """The index of each pair, its log-probability, and whether it is greedy."""
    most, cut = self.settings.max_length, 0
    contexts = []
    for context, answer in pairs:
      kept = context[-max(1, most - len(answer)) :]
      cut += len(kept) < len(context)
      contexts.append(kept)
    if cut:
      _log.warning("%d of %d contexts lost their beginning: max_length is %d", cut, len(pairs), most)
    buckets = self._buckets(8)
    with input_checked():
      results = scored(
        self.model,
        contexts,
        [answer for _, answer in pairs],
        params=self._params,
        samples=self.settings.mc_num,
        cfg_scale=float(self.settings.cfg_scale),
        check_greedy=greedy,
        seed=self.settings.seed,
        identities=[identity % 2**31 for identity in identities],
        batch_size=self.rows,
        prompt_buckets=[width for width in buckets if width >= min(64, most)],
        answer_buckets=buckets,
      )
    with explained("lm_eval", smaller_batches("batch_size", self.rows).replace("--config.", "--")):
      for done, (index, one) in enumerate(results, start=1):
        if done == len(pairs) or done % (8 * self.rows) == 0:
          _log.info("%d of %d likelihoods", done, len(pairs))
        yield index, one.logp, bool(one.greedy)

  def _buckets(self, least: int) -> list[int]:
    """Lengths that are compiled: powers of two, and the longest that is allowed."""
    most = self.settings.max_length
    return [2**n for n in range(64) if least <= 2**n < most] + [most]

  def generate_until(self, requests: Sequence[Instance]) -> list[str]:
    """Completes each context, and cuts the text at its first stop string.

    An answer is what `d1jax.generate` gives for the context's ids, the sampler of `sampler`, and the identity of the
    context; if the same context comes several times, they are its samples. Requests of one length, temperature and
    seed share batches.
    """
    with input_checked():
      wanted = [asked(request.args[1], self.settings) for request in requests]
    groups: dict[tuple[Any, ...], dict[str, list[int]]] = {}
    for place, (request, one) in enumerate(zip(requests, wanted, strict=True)):
      groups.setdefault(one[1:], {}).setdefault(request.args[0], []).append(place)
    found, done = [""] * len(requests), 0
    for (tokens, temperature, seed), contexts in groups.items():
      times = {len(places) for places in contexts.values()} if temperature else {1}
      for samples in sorted(times):
        chosen = {text: own for text, own in contexts.items() if not temperature or len(own) == samples}
        for text, number, ids in self._completed(list(chosen), tokens, temperature, seed, samples):
          for place in [chosen[text][number]] if temperature else chosen[text]:
            found[place], done = until_stop(self.tokenizer, ids, wanted[place].until), done + 1
            if not temperature:  # the harness draws anew what it draws
              self.cache_hook.add_partial("generate_until", requests[place].args, found[place])
            if done == len(requests) or done % self.rows == 0:
              _log.info("%d of %d answers", done, len(requests))
    return found

  def _completed(
    self, contexts: Sequence[str], tokens: int, temperature: float, seed: int, samples: int
  ) -> Iterator[tuple[str, int, list[int]]]:
    """Each context, the number of the sample, and the ids of the answer."""
    encoded: list[tuple[np.ndarray, str]] = []
    with input_checked():
      spec = sampler(self.settings, self.model.denoiser.block, tokens, temperature)
      room = self.settings.max_length - spec.completion_length
      if room < 1:
        raise ValueError(
          f"answers of {spec.completion_length} tokens leave no room for a context: max_length is"
          f" {self.settings.max_length}"
        )
      for text in contexts:
        ids = self.tokenizer.encode(text) or prefix(self.tokenizer)
        if len(ids) > room:
          _log.warning("a context of %d tokens lost its beginning: there is room for %d", len(ids), room)
        encoded.append((np.asarray(ids[-room:], np.int32), text))
      encoded.sort(key=lambda pair: len(pair[0]))
      answers = stream(
        self.model,
        [ids for ids, _ in encoded],
        params=self._params,
        spec=spec,
        samples=samples,
        seed=seed,
        identities=[_identity(text) % MOST_PROMPTS for _, text in encoded],
        batch_size=self.rows,
        prompt_buckets=self._buckets(64),
      )
    with explained("lm_eval", smaller_batches("batch_size", self.rows).replace("--config.", "--")):
      for one in answers:
        yield encoded[one.index][1], one.sample, one.tokens[: min(one.length, tokens)].tolist()
