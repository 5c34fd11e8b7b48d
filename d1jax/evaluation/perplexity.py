"""`--config=configs/eval.py --config.perplexity=FILE`: how well a model predicts the documents of a file."""

import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from d1jax import columns, files
from d1jax.data.tokenizer import body, prefix
from d1jax.errors import explained, input_checked, smaller_batches
from d1jax.evaluation import subject
from d1jax.evaluation.likelihood import scored

JSON_LINES = (".jsonl", ".ndjson")
"""The endings of files with a document a line; any other file is one document."""


_LARGEST = 700.0
"""Nats a unit, beyond which the perplexity is no finite number: a text without blanks is one word."""


class Window(NamedTuple):
  """A part of a document that is scored at a time, and the tokens before it that the model sees."""

  context: list[int]
  tokens: list[int]


class Unit(NamedTuple):
  """A figure of a file.

  Attributes:
    value: the figure.
    masks: its standard error over the masks of the estimator; NaN if one of them is not known, 0 if all is exact.
    documents: its standard error over documents, the masks included; NaN of fewer than two documents.
  """

  value: float
  masks: float
  documents: float


def windows(tokens: Sequence[int], before: Sequence[int], width: int) -> Iterator[Window]:
  """Cuts a document as lm-evaluation-harness does (`get_rolling_token_windows`): every token is scored once.

  A window of `width` tokens has one token of context. The last one, which may be shorter, has more, so that the model
  sees `width + 1` tokens: of 0..9 with width 4 the windows are `before | 0 1 2 3`, `3 | 4 5 6 7` and `5 6 7 | 8 9`.
  `before` is the context of the first window.
  """
  for first in range(0, len(tokens), width):
    end = min(first + width, len(tokens))
    context = tokens[max(0, end - width - 1) : first] if first else before
    yield Window(list(context), list(tokens[first:end]))


def documents(path: Path) -> list[str]:
  """The documents of a file: the field `text` of each line of JSON lines, or the whole of any other file.

  Raises:
    FileError: the file cannot be read, a line is not JSON or has no text, or there is nothing in it.
  """
  text = files.read_text(path)
  found = [text]
  if path.suffix in JSON_LINES:
    found = []
    for number, _, value in files.json_lines(text, path):
      if isinstance(value, files.FileError):
        raise value
      if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        raise files.FileError(f'{path} line {number} has no text; a line is like {{"text": "..."}}')
      found.append(value["text"])
  found = [one for one in found if one.strip()]
  if not found:
    raise files.FileError(f"{path} has no document with a text")
  return found


def of_logps(logps: Sequence[float], errors: Sequence[float], counts: Sequence[int], *, bits: bool = False) -> Unit:
  """Bits a unit, or the perplexity of a unit, of documents with a log-probability in nats, its error and a count of
  units each.

  Errors are those of the mean by the delta method; over documents, those of a ratio of two sums.
  """
  total, units = math.fsum(logps), sum(counts)
  mean = -total / units
  perplexity = math.exp(mean) if mean < _LARGEST else math.inf
  value, slope = (mean / math.log(2), 1 / math.log(2)) if bits else (perplexity, perplexity)
  masks = math.sqrt(math.fsum(error**2 for error in errors)) / units
  rest = [logp + mean * count for logp, count in zip(logps, counts, strict=True)]
  number = len(logps)
  spread = math.sqrt(number / (number - 1) * math.fsum(x**2 for x in rest)) / units if number > 1 else math.nan
  return Unit(value, slope * masks, slope * spread)


def run(config: ConfigDict) -> dict[str, Any]:
  """Scores `config.perplexity`; prints a table and a JSON line.

  Returns:
    The content of the JSON line: each figure with its standard errors (`null` where one is not known or not finite),
    and the counts.
  """
  path = Path(config.perplexity)
  with input_checked():
    if config.generations is not None:
      raise ValueError("perplexity and generations exclude each other: leave one of them out")
    texts = documents(path)
  with explained("perplexity", smaller_batches("batch_size", config.batch_size or 16)):
    found = subject.load(config)
    model, tokenizer = found.experiment.model, found.experiment.tokenizer
    with input_checked():
      before = prefix(tokenizer)
      cut = [list(windows(body(tokenizer, text), before, config.window)) for text in texts]
      owner = np.repeat(np.arange(len(texts)), [len(own) for own in cut])
      all_of_them = [window for own in cut for window in own]
      lengths = tuple(sorted({min(2**n, config.window + 1) for n in range(3, 21)}))
      with subject.saying("publishing the weights"):
        params = found.params()
      print(f"0/{len(all_of_them)} windows; each length is compiled when it is first met", flush=True)
      results = scored(
        model,
        [window.context for window in all_of_them],
        [window.tokens for window in all_of_them],
        params=params,
        samples=config.mc_num,
        batch_size=config.batch_size or 16,
        prompt_buckets=lengths,
        answer_buckets=lengths,
      )
    logps, variances = np.zeros(len(texts)), np.zeros(len(texts))
    for done, (index, one) in enumerate(results, start=1):
      logps[owner[index]] += one.logp
      variances[owner[index]] += one.error**2
      if done == len(all_of_them) or done % 256 == 0:
        print(f"{done}/{len(all_of_them)} windows", flush=True)
  return _report(path, texts, cut, logps.tolist(), np.sqrt(variances).tolist())


def _report(
  path: Path,
  texts: Sequence[str],
  cut: Sequence[Sequence[Window]],
  logps: Sequence[float],
  errors: Sequence[float],
) -> dict[str, Any]:
  counts = {
    "tokens": [sum(len(window.tokens) for window in own) for own in cut],
    "words": [len(re.split(r"\s+", text)) for text in texts],  # as lm-evaluation-harness counts them
    "bytes": [len(text.encode()) for text in texts],
  }
  figures = {
    "bits_per_byte": of_logps(logps, errors, counts["bytes"], bits=True),
    "perplexity_per_token": of_logps(logps, errors, counts["tokens"]),
    "perplexity_per_word": of_logps(logps, errors, counts["words"]),
  }
  totals = {name: sum(values) for name, values in counts.items()}
  print(f"{path}: {len(texts)} documents, " + ", ".join(f"{n:,} {name}" for name, n in totals.items()))
  rows = [
    (name.replace("_", " "), f"{unit.value:.6g}", f"{unit.masks:.3g}", f"{unit.documents:.3g}")
    for name, unit in figures.items()
  ]
  print(columns.table(("", "value", "+- masks", "+- documents"), rows))
  line: dict[str, Any] = {"documents": len(texts)} | totals
  for name, unit in figures.items():
    known = [number if math.isfinite(number) else None for number in unit]
    line |= dict(zip((name, f"{name}_error", f"{name}_error_over_documents"), known, strict=True))
  print(json.dumps(line))
  return line
