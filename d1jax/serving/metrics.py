"""What a server counts, in the text format of Prometheus."""

from collections import Counter
from collections.abc import Mapping

BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0)
"""Upper bounds of the histograms, in seconds."""

_GAUGES = ("slots", "running", "waiting")
"""What the engine says that may fall again; all else is counted since the start."""

_HISTOGRAMS = {
  "queued": "From a request to the start of its completion.",
  "first_block": "From a request to its first final text.",
  "completion": "From a request to the end of its completion.",
}


class Metrics:
  """Counters and histograms of one server; only its event loop writes them."""

  def __init__(self) -> None:
    """Begins at zero."""
    self._answers: Counter[tuple[str, int]] = Counter()
    self._buckets = {name: [0] * (len(BOUNDS) + 1) for name in _HISTOGRAMS}
    self._sums = dict.fromkeys(_HISTOGRAMS, 0.0)

  def answered(self, path: str, status: int) -> None:
    """Counts an answer."""
    self._answers[path, status] += 1

  def took(self, name: str, seconds: float) -> None:
    """Counts a duration: `queued`, `first_block` or `completion`."""
    self._buckets[name][next((i for i, bound in enumerate(BOUNDS) if seconds <= bound), len(BOUNDS))] += 1
    self._sums[name] += seconds

  def text(self, engine: Mapping[str, float]) -> str:
    """All of it, and the numbers of the engine."""
    lines = ["# HELP d1jax_http_requests_total Answers by path and status.", "# TYPE d1jax_http_requests_total counter"]
    for (path, status), count in sorted(self._answers.items()):
      lines.append(f'd1jax_http_requests_total{{path="{path}",status="{status}"}} {count}')
    for name, value in engine.items():
      own = f"d1jax_{name}" if name in _GAUGES else f"d1jax_{name}_total"
      lines += [f"# TYPE {own} {'gauge' if name in _GAUGES else 'counter'}", f"{own} {value:.12g}"]
    for name, about in _HISTOGRAMS.items():
      own, total = f"d1jax_{name}_seconds", 0
      lines += [f"# HELP {own} {about}", f"# TYPE {own} histogram"]
      for bound, count in zip((*map(str, BOUNDS), "+Inf"), self._buckets[name], strict=True):
        total += count
        lines.append(f'{own}_bucket{{le="{bound}"}} {total}')
      lines += [f"{own}_sum {self._sums[name]:.12g}", f"{own}_count {total}"]
    return "\n".join(lines) + "\n"
