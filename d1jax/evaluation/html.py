"""The report of an evaluation: tables, plots and completions in one HTML file that makes no network requests.

Completions may be hostile text. The page contains them as JSON without a `<`, shows them only as text nodes, and its
content security policy allows no script but its own.
"""

import base64
import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from d1jax import look
from d1jax.evaluation.items import Item
from d1jax.evaluation.plots import plots
from d1jax.evaluation.summary import columns, verdict
from d1jax.tasks.common import ACCURACY

LIMIT = 500
"""The largest number of completions of one arm on a page."""

_HERE = Path(__file__).parent
_UNPRINTABLE = re.compile("[\0\ud800-\udfff]")
_APART = ("arms", "compare", "config", "questions")
"""Fields of the results that have their own place on the page."""


def render(results: Mapping[str, Any], items: Sequence[Item]) -> str:
  """The text of the page; equal inputs give equal bytes.

  Args:
    results: the content of `results.json`: `protocol`, `arms` (rows as in `summary.columns`), and optionally `compare`
      ({"with": name, "arms": {name: pairs of `summary.compare`}}), `questions` (hashes by arm), `config`, and other
      fields, which are shown unchanged.
    items: the graded completions of the arms.

  Returns:
    HTML that can be encoded in UTF-8, whatever the items contain.
  """
  accuracy, arms = ACCURACY[results["protocol"]], results["arms"]
  samples = _samples(arms, items, accuracy)
  return written(
    _HERE / "report",
    tasks=list(dict.fromkeys(arm["task"] for arm in arms)),
    about=_about(results, accuracy),
    details=json.dumps({name: value for name, value in results.items() if name != "arms"}, indent=2),
    columns=columns(arms),
    drawn=[_drawn(arm) for arm in arms],
    compare=results.get("compare"),
    plots=[(plot.title, Markup(plot.svg)) for plot in plots(arms, items, accuracy)],
    shown=len(samples["items"]),
    all=len(items),
    limit=LIMIT,
    samples=Markup(embedded(samples)),
  )


def written(stem: Path, style: str = "", **values: Any) -> str:
  """The text of the page of a template, `STEM.html.jinja`, with its script, `STEM.js`.

  `style` stands behind the style sheet of all pages: colours for light and dark, type, tables.
  """
  script = stem.with_suffix(".js").read_text(encoding="utf-8")
  page = _template(stem).render(
    **values,
    style=Markup(look.css() + (_HERE / "report.css").read_text(encoding="utf-8") + style),
    script=Markup(script),
    script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
  )
  return _UNPRINTABLE.sub("\ufffd", page)


@functools.cache
def _template(stem: Path) -> jinja2.Template:
  """A compiled template."""
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(stem.parent), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
  )
  return environment.get_template(f"{stem.name}.html.jinja")


def embedded(value: Any) -> str:
  """JSON for a `<script>` element: ASCII, without `<`, `>` and `&`; it reads back exactly."""
  text = json.dumps(value, allow_nan=False, separators=(",", ":"))
  return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def chosen(items: Sequence[Item], accuracy: str, limit: int = LIMIT) -> list[Item]:
  """At most `limit` items in their order: half of them solved if there are enough, each half evenly spread."""
  right = [number for number, item in enumerate(items) if verdict(item, accuracy)]
  other = [number for number, item in enumerate(items) if not verdict(item, accuracy)]
  room = max(limit // 2, limit - len(other))
  numbers = _spread(right, room)
  return [items[number] for number in sorted(numbers + _spread(other, limit - len(numbers)))]


def _spread(numbers: Sequence[int], count: int) -> list[int]:
  places = np.linspace(0, len(numbers) - 1, min(count, len(numbers)))
  return [numbers[place] for place in places.astype(int)]


def _samples(arms: Sequence[Mapping[str, Any]], items: Sequence[Item], accuracy: str) -> dict[str, Any]:
  """The completions for the page's script."""
  by_arm: dict[tuple[str, int, float], list[Item]] = {}
  for item in items:
    by_arm.setdefault((item.task, item.length, item.temperature), []).append(item)
  records: dict[str, dict[str, str]] = {}
  shown: list[dict[str, Any]] = []
  for number, arm in enumerate(arms):
    for item in chosen(by_arm.get((arm["task"], arm["length"], arm["temperature"]), []), accuracy):
      records[item.question] = {name: _plain(value) for name, value in item.record.items()}
      shown.append(
        {
          "arm": number,
          "place": [item.index, item.seed, item.sample],
          "verdict": _outcome(item, accuracy),
          "question": item.question,
          "text": item.text,
          "answer": item.answer,
          "reward": f"{item.reward:g}",
          "metrics": ", ".join(
            f"{name.replace('_', ' ')} {top:g}/{full:g}" for name, (top, full) in item.metrics.items()
          ),
          "tokens": item.tokens,
        }
      )
  named = [
    {"task": arm["task"], "length": str(arm["length"] or ""), "temperature": f"{arm['temperature']:g}"} for arm in arms
  ]
  return {"arms": named, "records": records, "items": shown}


def _outcome(item: Item, accuracy: str) -> str:
  known = verdict(item, accuracy)
  if known is None:
    return "unknown"
  return "solved" if known else "wrong" if item.answer is not None else "no answer"


def _about(results: Mapping[str, Any], accuracy: str) -> dict[str, str]:
  """A description of the evaluation, for a table of two columns."""
  seeds = sorted({seed for arm in results["arms"] for seed in arm["summary"]["seeds"]})
  hashes = dict.fromkeys(asked.get("prompts_sha256", "")[:16] for asked in results.get("questions", {}).values())
  rows = {name: value for name, value in results.items() if name not in _APART}
  rows |= {"accuracy": accuracy, "seeds": seeds, "prompts, sha256": [name for name in hashes if name]}
  return {name.replace("_", " "): _plain(value) for name, value in rows.items() if value not in (None, [], {})}


def _plain(value: Any) -> str:
  """A JSON value as readable text; whole numbers keep all digits."""
  if isinstance(value, str):
    return value
  if isinstance(value, Mapping) and value and all(isinstance(inner, str) for inner in value.values()):
    return ", ".join(f"{name} {inner}" for name, inner in value.items())
  if isinstance(value, list) and all(isinstance(inner, str) for inner in value):
    return ", ".join(value)
  return json.dumps(value)


def _drawn(arm: Mapping[str, Any]) -> dict[str, float | None]:
  """An arm's accuracy, interval and constant answer in percent, for a drawing; None without an accuracy."""
  summary = arm["summary"]
  low, high = summary["accuracy_interval"] or (None, None)
  baseline = arm["baseline"]["value"] if arm["baseline"] else None
  ends = {"value": summary["accuracy"], "low": low, "high": high, "constant": baseline}
  return {name: None if end is None else 100 * end for name, end in ends.items()}
