"""The learning curves of a run as one picture: for each stage the validation, and the loss or the reward."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from d1jax import look
from d1jax.page import curves, run_files
from d1jax.page.curves import Curve
from d1jax.page.run_files import RunFiles
from d1jax.report import TITLES
from d1jax.run.metrics import STAGES
from d1jax.run.workdir import Folder, write_atomically

NAME = "learning_curves.png"

_SHARES = {
  "sft": (),
  "dpo": (
    curves.Figure("accuracy", "preferred", "%"),
    curves.Figure("held_out/accuracy", "held out", "%"),
  ),
  "grpo": (curves.Figure("solved", "training", "%"),),
}
"""The shares that are drawn beside the validation; a stage without them has none."""

_SIGNAL = {
  "sft": curves.Figure("loss", "loss"),
  "dpo": curves.Figure("loss", "loss"),
  "grpo": curves.Figure("reward", "reward"),
}


def write(workdir: Folder) -> None:
  """Draws the picture from what is in the folder of a run."""
  write_atomically(workdir / NAME, look.png(figure(run_files.read(workdir))))


@look.styled()
def figure(run: RunFiles) -> Figure:
  """The picture: a column for each stage; above the validation, below the loss or the reward of training."""
  stages = [stage for stage in STAGES if stage in run.records]
  columns = max(len(stages), 1)
  found = look.panels(columns, 2, width=5.5, height=2.7, sharex="col", squeeze=False)
  for place, stage in enumerate(stages):
    above, below = found.axes[place], found.axes[columns + place]
    _validation(run, stage, above)
    above.set(title=TITLES[stage])
    signal = curves.curve(run.records[stage], _SIGNAL[stage])
    if signal:
      color = "line1"
      if len(signal.raw_x) > 1:
        below.plot(signal.raw_x, signal.raw_y, color=look.LIGHT[color], linewidth=0.7, alpha=0.3)
      look.line(below, signal.x, signal.y, color, _last(signal, "mean"))
    below.set(xlabel="iteration", ylabel=f"{_SIGNAL[stage].title} of training, mean of {curves.SMOOTHING}")
    if stage != "grpo" and signal and signal.y.min() > 0 and signal.y.max() > curves.DECADES * signal.y.min():
      look.logarithmic(below, "y")
  if all(axes.get_ylabel().endswith("%") for axes in found.axes[:columns]):
    high = max(axes.get_ylim()[1] for axes in found.axes[:columns])
    for axes in found.axes[:columns]:
      axes.set(ylim=(0, high))
  return found


def _validation(run: RunFiles, stage: str, axes: Axes) -> None:
  """Solved questions with their intervals and the level of SFT, or held-out losses."""
  validated = curves.validation(run, stage)
  if validated and validated[0] is curves.HELD_OUT_LOSS:
    look.points(axes, validated[1].x, validated[1].y, "line0", _last(validated[1], "held out"))
    axes.set(ylabel="held-out loss, nats a token")
    return
  shares = [(each, curves.curve(run.records[stage], each)) for each in _SHARES[stage]]
  for number, (each, own) in enumerate(shares):
    if own:
      look.line(axes, own.x, own.y, ("muted", "line2")[number], f"{each.title} {own.last:.0f}%", width=1.2)
  if validated:
    curve = validated[1]
    ends = (curve.low, curve.high) if len(curve.low) else None
    look.points(axes, curve.x, curve.y, "line0", f"validation {curve.last:.0f}%", ends=ends)
  before = curves.best(run, "sft") if stage != "sft" else None
  if before and before[1] >= 0:
    look.level(axes, 100 * before[1], f"SFT {100 * before[1]:.0f}%")
  axes.set(ylabel="solved or preferred, %" if stage == "dpo" else "solved questions, %", ylim=(0, None))


def _last(curve: Curve, name: str) -> str:
  return f"{name} {curve.last:.3g}"
