"""Where numbers go: JSON lines, TensorBoard event files, and the line that a person watches."""

import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tensorboardX
import tqdm

log = logging.getLogger(__name__)


def read_records(path: Path) -> list[dict[str, Any]]:
  """The records of a JSON lines file; a last line that was cut off by a kill is left out, an absent file is empty."""
  if not path.exists():
    return []
  records = []
  for line in path.read_text(encoding="utf-8").splitlines():
    try:
      records.append(json.loads(line))
    except json.JSONDecodeError:
      break
  return records


class MetricsWriter:
  """Appends one record an iteration to `metrics.jsonl` and to TensorBoard."""

  def __init__(self, workdir: Path, stage: str, start: int):
    """Opens the files; records of this stage beyond iteration `start` are dropped, the run will make them again."""
    self._stage = stage
    path = workdir / "metrics.jsonl"
    kept = [r for r in read_records(path) if r["stage"] != stage or r["iteration"] <= start]
    draft = path.with_suffix(".tmp")
    draft.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
    draft.replace(path)
    self._file = path.open("a", encoding="utf-8")
    self._board = tensorboardX.SummaryWriter(str(workdir / "tensorboard" / stage), purge_step=start + 1)

  def write(self, iteration: int, values: Mapping[str, float | str | list[str]]) -> None:
    """Writes one record; numbers go to TensorBoard too."""
    self._file.write(json.dumps({"stage": self._stage, "iteration": iteration, **values}) + "\n")
    self._file.flush()
    for name, value in values.items():
      if isinstance(value, int | float):
        self._board.add_scalar(name, value, iteration)

  def close(self) -> None:
    """Flushes both."""
    self._file.close()
    self._board.close()


class Progress:
  """A live bar on a terminal, plain lines elsewhere."""

  def __init__(self, stage: str, total: int, start: int, *, lines: int = 20):
    """`lines`: how many plain lines a stage prints when the output is no terminal."""
    self._stage, self._total, self._done = stage, total, start
    self._every = max(total // lines, 1)
    self._bar: Any = None
    if sys.stderr.isatty():
      self._bar = tqdm.tqdm(total=total, initial=start, desc=stage, unit="it", dynamic_ncols=True)
    else:
      self._clock = tqdm.tqdm(total=total, initial=start, disable=False, file=_Nowhere())

  def update(self, iteration: int, shown: Mapping[str, float | str]) -> None:
    """Moves to `iteration` and shows a few values."""
    text = "  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items())
    bar = self._clock if self._bar is None else self._bar
    bar.update(iteration - self._done)
    self._done = iteration
    if self._bar is not None:
      bar.set_postfix_str(text, refresh=False)
    elif iteration % self._every == 0 or iteration == self._total or "validation" in shown:
      rate = bar.format_dict["rate"]
      eta = f"{(self._total - iteration) / rate:.0f} s" if rate else "?"
      print(f"{self._stage} {iteration}/{self._total}  {text}  eta {eta}", flush=True)

  def close(self) -> None:
    """Ends the bar."""
    (self._clock if self._bar is None else self._bar).close()


class _Nowhere:
  """A file that swallows what it is given; tqdm then only keeps the time."""

  def write(self, text: str) -> None:
    """Drops the text."""

  def flush(self) -> None:
    """Does nothing."""
