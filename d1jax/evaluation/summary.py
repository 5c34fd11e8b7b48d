"""Computes numbers from graded completions: the summary of one arm, the comparison of two, a table of many."""

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from d1jax import columns as layout
from d1jax.evaluation.items import Item
from d1jax.intervals import Share, clustered, mcnemar, over_seeds, paired_difference, pass_at


class Column(NamedTuple):
  """One column of the table of arms.

  Attributes:
    head: its short name, for a terminal.
    title: its full name.
    cells: one text per row; empty if the row has no such value.
  """

  head: str
  title: str
  cells: list[str]


def verdict(item: Item, accuracy: str) -> bool | None:
  """Whether an item has the full value of the metric `accuracy`; None if the right answer is unknown."""
  numerator, denominator = item.metrics[accuracy]
  return numerator == denominator if denominator > 0 else None


def summarise(items: Sequence[Item], accuracy: str) -> dict[str, Any]:
  """The numbers of one arm, which is a task with one length and temperature.

  Intervals are 95% intervals over clusters of questions; only that of `over_seeds` is over seeds. Items with an unknown
  answer (denominator 0) are left out of a metric, and a metric without other items is left out.

  Args:
    items: one for each question, seed and sample, in any order.
    accuracy: the name of the metric that is the accuracy.

  Returns:
    `n` questions, `samples` per seed and question, `seeds`, `metrics` {name: {value, interval}}, `accuracy` and
    `accuracy_interval` (None without a known answer), mean `reward`; None if unknown: mean `tokens`, mean
    `forward_passes`, `tokens_per_second`. With several seeds: `over_seeds` {values, mean, interval}. With several
    completions per question and an accuracy of 0 or 1 per item: `pass_at` {k: {value, interval}} and `majority` {value,
    interval} of all of them.

  Raises:
    ValueError: the items belong to several arms, some are missing or repeated, or they lack the metric `accuracy`.
  """
  questions = _by_question(items, accuracy)
  seeds = sorted({item.seed for item in items})
  names = dict.fromkeys(name for item in items for name in item.metrics)
  metrics = {name: share for name in names if (share := _pooled(items, name))}
  found: dict[str, Any] = {
    "n": len(questions),
    "samples": len(questions[0]) // len(seeds),
    "seeds": seeds,
    "metrics": metrics,
    "accuracy": metrics[accuracy]["value"] if accuracy in metrics else None,
    "accuracy_interval": metrics[accuracy]["interval"] if accuracy in metrics else None,
    "reward": _mean(item.reward for item in items),
    "tokens": _mean(item.tokens for item in items),
    "forward_passes": _mean(item.forward_passes for item in items),
    "tokens_per_second": _rate(items),
  }
  if len(seeds) > 1 and accuracy in metrics:
    shares = (_pooled([item for item in items if item.seed == seed], accuracy) for seed in seeds)
    values = [share["value"] for share in shares if share]
    mean = over_seeds(values)
    found["over_seeds"] = {"values": values, "mean": mean.value, "interval": mean.interval}
  count = len(questions[0])
  if count > 1 and accuracy in metrics and _is_binary(items, accuracy):
    known = [question for question in questions if verdict(question[0], accuracy) is not None]
    right = [sum(bool(verdict(item, accuracy)) for item in question) for question in known]
    clusters = [question[0].cluster for question in known]
    pooled = lambda values: _shown(clustered(values, [1] * len(values), clusters))
    ks = [2**i for i in range(count.bit_length()) if 2**i < count] + [count]
    found["pass_at"] = {str(k): pooled([pass_at(count, c, k) for c in right]) for k in ks}
    found["majority"] = pooled([float(_majority(question, accuracy)) for question in known])
  return found


def compare(first: Sequence[Item], second: Sequence[Item], accuracy: str) -> dict[str, Any]:
  """Two evaluations of the same questions, paired by question, seed and sample.

  Args:
    first: the items of one arm.
    second: the items of another arm, in any order.
    accuracy: the name of a metric that is 0 or 1 per item; pairs with an unknown answer are left out.

  Returns:
    `n` pairs and the number of `clusters`; how many pairs `both`, `only_first`, `only_second` and `neither` answer
    correctly; `p` of McNemar's exact test; `difference` of the accuracies, second minus first, with its `interval` over
    clusters; a `note` if pairs share clusters, which McNemar's test ignores.

  Raises:
    ValueError: the questions differ, or the accuracy is not 0 or 1.
  """
  one, other = _by_draw(first, accuracy), _by_draw(second, accuracy)
  if one.keys() != other.keys():
    raise ValueError(
      f"{len(one.keys() - other.keys())} of {len(one)} items of the first and {len(other.keys() - one.keys())} of"
      f" {len(other)} of the second have no partner of the same question, seed and sample: evaluate both on the same"
      " split with the same seeds and samples"
    )
  if not (_is_binary(first, accuracy) and _is_binary(second, accuracy)):
    raise ValueError(f"accuracy {accuracy!r} is not 0 or 1 an item: compare by another metric, such as 'solved'")
  pairs = [(item, other[key]) for key, item in one.items()]
  known = [(a, b) for a, b in pairs if None not in (verdict(a, accuracy), verdict(b, accuracy))]
  if not known:
    raise ValueError(f"none of {len(pairs)} pairs has a known answer: compare on questions with answers")
  before, after = ([float(bool(verdict(item, accuracy))) for item in side] for side in zip(*known, strict=True))
  counts = Counter(zip(before, after, strict=True))
  clusters = [item.cluster for item, _ in known]
  change = paired_difference(before, after, clusters)
  found: dict[str, Any] = {
    "n": len(known),
    "clusters": len(set(clusters)),
    "both": counts[1, 1],
    "only_first": counts[1, 0],
    "only_second": counts[0, 1],
    "neither": counts[0, 0],
    "p": mcnemar(counts[1, 0], counts[0, 1]),
    "difference": change.difference,
    "interval": [change.low, change.high],
  }
  if found["clusters"] < len(known):
    found["note"] = (
      f"The {len(known)} pairs come in {found['clusters']} clusters. McNemar's p takes the pairs as independent and is"
      " too small where a cluster's pairs agree; the interval knows of the clusters."
    )
  return found


def columns(rows: Sequence[Mapping[str, Any]]) -> list[Column]:
  """The columns of a table of arms, with shares in percent; a column without any value is left out.

  Args:
    rows: {"task", "length", "temperature", "summary", "baseline", "sampler"}: a summary of `summarise`, the accuracy of
      the task's constant answer as {"value", "interval"}, or None, and the fields of the sampler, or None if it is
      not known. Its cache and schedule are shown where they are not d1's, `none` and `static`.
  """
  every: list[tuple[str, str, Callable[[Mapping[str, Any]], str]]] = [
    ("task", "task", lambda row: row["task"]),
    ("length", "length", lambda row: str(row["length"] or "")),
    ("temp", "temperature", lambda row: f"{row['temperature']:g}"),
    ("mode", "sampler", lambda row: _sampler(row["sampler"])),
    ("n", "questions", lambda row: str(row["summary"]["n"])),
    ("accuracy [95%]", "accuracy [95%]", lambda row: _accuracy(row["summary"])),
    ("over seeds", "95% over seeds", lambda row: _interval(row["summary"].get("over_seeds", {}).get("interval"))),
    ("cells", "cell accuracy", lambda row: _percent(row["summary"]["metrics"].get("cell_accuracy"))),
    ("const", "constant answer", lambda row: _percent(row["baseline"])),
  ]
  for k in sorted({k for row in rows if (k := _samples(row))}):
    every += [
      (f"pass@{k}", f"pass@{k}", functools.partial(_pass_at, k=k)),
      (f"maj@{k}", f"majority of {k}", functools.partial(_majority_of, k=k)),
    ]
  every += [
    ("tokens", "tokens", lambda row: _number(row["summary"]["tokens"])),
    ("passes", "forward passes", lambda row: _number(row["summary"]["forward_passes"])),
    ("tok/s", "tokens a second", lambda row: _number(row["summary"]["tokens_per_second"])),
  ]
  found = [Column(head, title, [cell(row) for row in rows]) for head, title, cell in every]
  return [column for column in found if any(column.cells)]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  """A plain table of arms for the terminal, see `columns`."""
  shown = columns(rows)
  keys = sum(column.head in ("task", "length", "temp", "mode") for column in shown)
  return layout.table([column.head for column in shown], list(zip(*(each.cells for each in shown), strict=True)), keys)


def _check_arm(items: Sequence[Item], accuracy: str) -> None:
  arms = sorted({(item.task, item.length, item.temperature) for item in items})
  if len(arms) != 1:
    raise ValueError(f"{len(items)} items of the arms (task, length, temperature) {arms}: give those of one arm")
  for item in items:
    if accuracy not in item.metrics:
      raise ValueError(f"accuracy {accuracy!r} is none of the metrics of {arms[0][0]}: {', '.join(item.metrics)}")


def _by_question(items: Sequence[Item], accuracy: str) -> list[list[Item]]:
  """The items of each question in the order in which they were drawn; every question has the same number."""
  _check_arm(items, accuracy)
  drawn = {(item.index, item.seed, item.sample): item for item in items}
  indices, seeds, samples = (sorted(set(part)) for part in zip(*drawn, strict=True))
  if not len(drawn) == len(items) == len(indices) * len(seeds) * len(samples):
    raise ValueError(
      f"{len(items)} items ({len(drawn)} different) of {len(indices)} questions under {len(seeds)} seeds with"
      f" {len(samples)} samples: one is needed for each; finish the evaluation"
    )
  return [[drawn[index, seed, sample] for seed in seeds for sample in samples] for index in indices]


def _by_draw(items: Sequence[Item], accuracy: str) -> dict[tuple[str, int, int, int], Item]:
  """Items by question, seed, sample and, for questions that a split repeats, the number of the repeat."""
  _check_arm(items, accuracy)
  found: dict[tuple[str, int, int, int], Item] = {}
  repeats: Counter[tuple[str, int, int]] = Counter()
  for item in sorted(items, key=lambda item: item.index):
    key = (item.question, item.seed, item.sample)
    found[*key, repeats[key]] = item
    repeats[key] += 1
  return found


def _is_binary(items: Iterable[Item], accuracy: str) -> bool:
  return all(tuple(item.metrics[accuracy]) in ((0, 0), (0, 1), (1, 1)) for item in items)


def _majority(question: Sequence[Item], accuracy: str) -> bool:
  """Whether the most frequent answer is right; of equally frequent answers, the one drawn first counts."""
  votes = Counter(item.answer for item in question if item.answer is not None)
  if not votes:
    return False
  winner = max(votes, key=votes.__getitem__)  # a Counter keeps the order of first appearance
  return bool(verdict(next(item for item in question if item.answer == winner), accuracy))


def _pooled(items: Sequence[Item], name: str) -> dict[str, Any] | None:
  known = [(*item.metrics[name], item.cluster) for item in items if item.metrics.get(name, (0, 0))[1] > 0]
  return _shown(clustered(*zip(*known, strict=True))) if known else None


def _shown(share: Share) -> dict[str, Any]:
  return {"value": share.value, "interval": [share.low, share.high]}


def _mean(values: Iterable[float | None]) -> float | None:
  known = [value for value in values if value is not None]
  return sum(known) / len(known) if known else None


def _rate(items: Sequence[Item]) -> float | None:
  timed = [(item.tokens, item.seconds) for item in items if item.tokens is not None and item.seconds is not None]
  seconds = sum(pair[1] for pair in timed)
  return sum(pair[0] for pair in timed) / seconds if seconds > 0 else None


def _sampler(sampler: Mapping[str, Any] | None) -> str:
  shown = (sampler["cache"], sampler["schedule"]) if sampler else ()
  return " ".join(word for word in shown if word not in ("none", "static"))


def _samples(row: Mapping[str, Any]) -> int:
  """The number of completions per question if they vote, otherwise 0."""
  return max(map(int, row["summary"].get("pass_at", {})), default=0)


def _pass_at(row: Mapping[str, Any], k: int) -> str:
  return _percent(row["summary"].get("pass_at", {}).get(str(k)))


def _majority_of(row: Mapping[str, Any], k: int) -> str:
  return _percent(row["summary"]["majority"]) if _samples(row) == k else ""


def _percent(share: Mapping[str, Any] | None) -> str:
  return f"{100 * share['value']:.1f}" if share else ""


def _interval(ends: Sequence[float] | None) -> str:
  return f"[{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]" if ends else ""


def _accuracy(summary: Mapping[str, Any]) -> str:
  value = summary["accuracy"]
  return "" if value is None else f"{100 * value:.1f} {_interval(summary['accuracy_interval'])}"


def _number(value: float | None) -> str:
  return "" if value is None else f"{value:.0f}"
