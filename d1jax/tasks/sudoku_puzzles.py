"""Where Sudoku puzzles come from: drawn at random or read from a file, as codes of one split."""

import functools
import itertools
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from d1jax.tasks import common, sudoku_grids
from d1jax.tasks.base import DataError

FILE = "sudoku/train.csv"
TEST_FILE = "sudoku/test.csv"
HEADER = "Puzzle,Solution"

_log = logging.getLogger(__name__)


@functools.lru_cache(maxsize=16)
def draw(split: str, seed: int, count: int, clues: tuple[int, int]) -> tuple[int, ...]:
  """Draw `count` distinct puzzles of a split; a smaller count gives the start of a larger one.

  With one number of clues, `train` is an exactly uniform draw without replacement: it starts a random permutation of
  all the split's puzzles with that many clues. d1's published test puzzles are taken out of the permutation.

  A lane is a set of grids; lanes take turns, so that each gives as many puzzles as the others.
  `train` is one lane with all its grids, the other splits have a lane a grid. A lane keeps a
  shuffled pile for each number of clues; a puzzle is the next one of a pile drawn at random.
  Raises a DataError when the split has fewer puzzles.
  """
  rng = np.random.default_rng((seed, common.SPLITS.index(split)))
  grids = rng.permutation(sudoku_grids.SPLIT_GRIDS[split])
  of_grid = [sudoku_grids.grid_puzzles(split, int(grid)) for grid in grids]
  codes, ends = np.concatenate(of_grid), np.cumsum([len(some) for some in of_grid])
  found = sudoku_grids.clue_counts()[codes % sudoku_grids.MASKS]
  is_published = np.isin(codes, sudoku_grids.published_codes()) & (split != "test")
  lanes: list[list[list[int]]] = []
  for places in np.split(np.arange(len(codes)), [] if split == "train" else ends[:-1]):
    piles = [rng.permutation(places[found[places] == k]) for k in range(clues[0], clues[1] + 1)]
    piles = [codes[pile[~is_published[pile]]] for pile in piles]
    lanes.append([pile[:count][::-1].tolist() for pile in piles])
  available = sum(len(pile) for lane in lanes for pile in lane)
  if count > available:
    raise DataError(
      f"sudoku: sizes[{split!r}] is {count}, but only {available} puzzles with {clues[0]} to "
      f"{clues[1]} clues exist in this split; lower the size or widen clues"
    )
  drawn: list[int] = []
  for lane in itertools.cycle(lanes):
    if len(drawn) == count:
      break
    stocked = [pile for pile in lane if pile]
    if stocked:
      drawn.append(stocked[rng.integers(len(stocked))].pop())
  return tuple(drawn)


def read(root: str, split: str) -> Sequence[int]:
  """Read the split's puzzles of `root/sudoku/train.csv` in the order of the file, each once.

  A row that breaks the format or the rules is a DataError that names its line. Puzzles with several solutions (one
  might be a held-out grid) and repeated ones are left out and logged, and in all splits but `test` d1's published test
  puzzles and those of `root/sudoku/test.csv`. If there is such a file, it is the whole split `test`, including its
  puzzles with several solutions.
  """
  tested = _read(root, TEST_FILE) if (Path(root) / TEST_FILE).exists() else None
  if split == "test" and tested is not None:
    if not tested.size:
      raise DataError(f"{TEST_FILE}: the file has no puzzles; add some, or take it away to generate them")
    return tuple(dict.fromkeys(tested.tolist()))
  every = _read(root, FILE)
  codes = every[sudoku_grids.unique_masks()[every >> sudoku_grids.CELLS, every % sudoku_grids.MASKS]]
  remaining = distinct = np.array(list(dict.fromkeys(codes.tolist())), dtype=np.int64)
  if split != "test":
    remaining = distinct[
      ~np.isin(distinct, np.append(sudoku_grids.published_codes(), [] if tested is None else tested))
    ]
  if len(remaining) < len(every):
    _log.warning(
      "%s: left out %d puzzles with several solutions, %d repeated ones and %d test puzzles",
      FILE,
      len(every) - len(codes),
      len(codes) - len(distinct),
      len(distinct) - len(remaining),
    )
  return tuple(remaining[sudoku_grids.in_split(split, remaining)].tolist())


def _read(root: str, name: str) -> np.ndarray:
  """Read all rows of a file as codes."""
  lines = common.read_lines(root, name)
  first, header = lines[0]
  if header != HEADER:
    raise DataError(f"{name} line {first}: the header is {header[:80]!r}, expected {HEADER!r}")
  rows = [_parse(f"{name} line {number}", line) for number, line in lines[1:]]
  return np.array(rows, dtype=np.int64)


def _parse(place: str, line: str) -> int:
  """Check every rule of one row and return its code."""
  columns = line.split(",")
  if len(columns) != 2:
    raise DataError(f"{place}: {len(columns)} columns, expected 2 ({HEADER})")
  for name, value, allowed in zip(("puzzle", "solution"), columns, ("01234", "1234"), strict=True):
    if value.strip("0123456789"):
      raise DataError(f"{place}: {name} {value[:40]!r} is not all digits, expected 16 digits")
    if len(value) != 16:
      raise DataError(f"{place}: {name} {value[:40]!r} has {len(value)} digits, expected 16")
    if value.strip(allowed):
      raise DataError(f"{place}: {name} {value!r} has digits other than {', '.join(allowed)}")
  puzzle, solution = columns
  if solution not in sudoku_grids.GRID_NUMBER:
    raise DataError(
      f"{place}: solution {solution!r} is not a valid grid; every row, column and 2x2 box must hold 1, 2, 3 and 4"
    )
  for cell, (clue, digit) in enumerate(zip(puzzle, solution, strict=True), start=1):
    if clue not in ("0", digit):
      raise DataError(f"{place}: clue {clue} in cell {cell} contradicts the solution's {digit}")
  return sudoku_grids.encode(puzzle, solution)
