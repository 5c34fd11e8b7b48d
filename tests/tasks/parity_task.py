"""A task of a user's own, as docs describe it: is the number of ones even? `--config.task.module=PATH` trains on it."""

import dataclasses
import random
from collections.abc import Mapping

from d1jax.tasks import SPLITS, Grade
from d1jax.tasks.common import check_choice

DIGITS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parity:
  """Records are `{"digits": "01101001"}`; the answer is `even` or `odd`."""

  seed: int = 0
  root: str | None = None
  sizes: Mapping[str, int] = dataclasses.field(default_factory=dict, hash=False)
  share: float = 1.0  # an option: of all records, which share is used

  name = "parity"
  splits = SPLITS

  def records(self, split):
    """A quarter of all digit strings for each split, so that none has a string of another's."""
    everything = [{"digits": f"{number:0{DIGITS}b}"} for number in range(2**DIGITS)]
    random.Random(self.seed).shuffle(everything)
    own = everything[SPLITS.index(split) :: len(SPLITS)]
    return own[: min(self.sizes.get(split, len(own)), int(self.share * len(own)))]

  def prompt(self, record, style):
    """The digits and no prefill, in every style."""
    return [{"role": "user", "content": record["digits"]}], ""

  def demonstration(self, record, style):
    """The right word."""
    return "odd" if record["digits"].count("1") % 2 else "even"

  def baseline(self, record, style):
    """Always the same word."""
    return "even"

  def cluster(self, record):
    """Every record stands for itself."""
    return record["digits"]

  def grade(self, text, record, protocol="strict"):
    """1 for the right word, 0.1 for the wrong one."""
    check_choice("protocol", protocol, ("strict",))
    answer = text.strip() if text.strip() in ("even", "odd") else None
    solved = answer == self.demonstration(record, "terse")
    components = {"word": 0.1 * (answer is not None), "right": 0.9 * solved}
    return Grade(components, {"solved": (int(solved), 1), "well_formed": (int(answer is not None), 1)}, answer)


build = Parity
