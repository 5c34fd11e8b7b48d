"""An answer on a terminal while it is denoised."""

import shutil
import signal
import threading
import time
from collections.abc import Callable

import numpy as np

from d1jax.data.tokenizer import Tokenizer
from d1jax.diffusion.rollout import SamplerSpec
from d1jax.generation import board as boards
from d1jax.generation import canvas as canvases
from d1jax.generation import command, terminal
from d1jax.serving.answers import Words
from d1jax.serving.engine import Ticket
from d1jax.serving.request import Update
from d1jax.tasks.base import Record


def follow(
  submit: Callable[[Callable[[Update], None]], Ticket], show: Callable[[Update], None], pace: float = 0.0
) -> Update:
  """Submits a request and waits for its last update; Ctrl-C cancels it.

  Args:
    submit: gives the request to an engine, with the listener of its updates.
    show: is called with the newest update, whenever there is a new one.
    pace: the least seconds from one update to the next, so that a person can follow a quick model; the engine waits.
  """
  latest: list[Update] = []
  arrived = threading.Event()
  due = [time.monotonic()]

  def listen(update: Update) -> None:
    time.sleep(max(0.0, due[0] - time.monotonic()))
    due[0] = time.monotonic() + pace
    latest[:] = [update]
    arrived.set()

  ticket = submit(listen)
  before = signal.signal(signal.SIGINT, lambda *_: ticket.cancel())  # an exception could tear a drawing in two
  try:
    while not (latest and latest[0].reason):
      arrived.wait()
      arrived.clear()
      show(latest[0])
  finally:
    signal.signal(signal.SIGINT, before)
  return latest[0]


class View:
  """An answer on a terminal while it is denoised."""

  def __init__(self, tokenizer: Tokenizer, spec: SamplerSpec, prefill: str, record: Record | None = None):
    """Draws at the cursor; the answer to a Sudoku whose record is given as a grid."""
    self._record = record if record and "puzzle" in record and not prefill else None
    size = shutil.get_terminal_size()
    self._tokenizer, self._spec, self._prefill = tokenizer, spec, prefill
    self._columns, self._colored = min(command.WIDEST, size.columns - 1), command.has_colors()
    self._screen = terminal.Screen(command.write, size.lines - 2)
    self._words = Words(tokenizer)

  def show(self, update: Update) -> None:
    """Draws what is revealed, up to the end of the active block."""
    shown = update.reveal_step >= 0
    if not shown.any():
      return
    end = min(len(update.tokens), update.known + self._spec.block_length)
    masked, ids = ~shown[:end], update.tokens[:end].tolist()
    texts = [canvases.HIDDEN if hidden else self._text(i) for i, hidden in zip(ids, masked, strict=True)]
    ranks = np.searchsorted(np.unique(update.reveal_step[shown]), update.reveal_step[:end])
    steps = np.where(masked, canvases.NEVER, ranks)
    if self._prefill:
      texts, steps = [self._prefill, *texts], np.append(canvases.GIVEN, steps)
    board = boards.begun(texts, masked.tolist(), self._record) if self._record else None
    canvas = canvases.Canvas("", tuple(texts), steps, board)
    lines = terminal.frame(canvas, columns=self._columns, colored=self._colored)
    count = f"step {canvas.total}, {int(shown.sum())} of {len(update.tokens)} tokens; Ctrl-C stops"
    self._screen.show([*lines, count[: self._columns]])

  def clear(self) -> None:
    """Takes the drawing away."""
    self._screen.show([])

  def _text(self, token: int) -> str:
    """What is drawn for a token."""
    if token in self._tokenizer.stop_ids:
      return canvases.END
    (text,) = self._words.texts([token])
    return text or canvases.SILENT
