import collections
import logging
import re

import numpy as np
import pytest

from d1jax.tasks import SPLITS, DataError, Sudoku, sudoku_grids, sudoku_puzzles

# Of the 16 cells of the first grid, 12 given: exactly one solution. The first two rows given: two.
UNIQUE = ("1234341221430000", "1234341221434321")
AMBIGUOUS = ("1234341200000000", "1234341221434321")
# d1's published puzzles with one solution, all with 8 clues; 60 others of the 193 are on test grids.
PUBLISHED = {"demonstrations": 20, "train": 88, "validation": 25, "test": 0}


def stock(split: str, clues: int) -> np.ndarray:
  """All puzzles of a split with so many clues, by enumeration."""
  codes = np.concatenate([sudoku_grids.grid_puzzles(split, grid) for grid in sudoku_grids.SPLIT_GRIDS[split]])
  return codes[sudoku_grids.clue_counts()[codes % sudoku_grids.MASKS] == clues]


def without_published(split: str, clues: int) -> np.ndarray:
  codes = stock(split, clues)
  return codes if split == "test" else codes[~np.isin(codes, sudoku_grids.published_codes())]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("clues", [4, 8, 15])
def test_every_puzzle_but_the_published_ones_can_be_drawn(split, clues):
  wanted = without_published(split, clues)
  with pytest.raises(DataError, match=rf"only {len(wanted)} puzzles with {clues} to {clues} clues exist"):
    sudoku_puzzles.draw(split, 0, 10_000_000, (clues, clues))
  assert len(stock(split, clues)) - len(wanted) == (PUBLISHED[split] if clues == 8 else 0)
  if clues != 8:
    drawn = sudoku_puzzles.draw(split, 3, len(wanted), (clues, clues))
    assert sorted(drawn) == sorted(wanted.tolist())


def test_published_puzzles_leave_the_order_of_the_others_as_it_is():
  rng = np.random.default_rng((5, SPLITS.index("train")))
  grids = rng.permutation(sudoku_grids.TRAINING_GRIDS)
  codes = np.concatenate([sudoku_grids.grid_puzzles("train", int(grid)) for grid in grids])
  order = rng.permutation(codes[sudoku_grids.clue_counts()[codes % sudoku_grids.MASKS] == 8])
  first = int(np.flatnonzero(np.isin(order, sudoku_grids.published_codes()))[0])
  drawn = sudoku_puzzles.draw("train", 5, first + 10, (8, 8))
  assert list(drawn) == [*order[:first].tolist(), *order[first + 1 : first + 11].tolist()]


@pytest.mark.few(1, reason="each case draws thousands of puzzles")
@pytest.mark.parametrize("split", ["train", "test"])
def test_puzzles_with_one_number_of_clues_are_drawn_uniformly(split):
  codes = stock(split, 4)
  grids, seeds = codes >> sudoku_grids.CELLS, 15
  # `train` is one lane; in `test` each grid is one, and each gives a puzzle in turn.
  lanes = np.zeros_like(codes) if split == "train" else grids
  _, lane, sizes = np.unique(lanes, return_inverse=True, return_counts=True)
  each = sizes.min() // 2
  counts = collections.Counter(
    code for seed in range(seeds) for code in sudoku_puzzles.draw(split, seed, int(each) * len(sizes), (4, 4))
  )
  assert set(counts) <= set(codes.tolist())
  # A seed draws a puzzle with this probability and at most once, so that a count is binomial. The statistic has mean
  # n and variance 2 n; five standard deviations have a chance below 1e-6.
  share = each / sizes[lane]
  found = np.array([counts[code] for code in codes.tolist()])
  statistic = ((found - seeds * share) ** 2 / (seeds * share * (1 - share))).sum()
  assert abs(statistic - len(codes)) < 5 * (2 * len(codes)) ** 0.5


@pytest.mark.parametrize("split", ["demonstrations", "validation", "test"])
def test_grids_take_turns_elsewhere(split):
  grids = len(sudoku_grids.SPLIT_GRIDS[split])
  turns = [code >> sudoku_grids.CELLS for code in sudoku_puzzles.draw(split, 1, 3 * grids, (5, 5))]
  assert turns[:grids] == turns[grids : 2 * grids] == turns[2 * grids :]
  assert sorted(turns[:grids]) == sorted(sudoku_grids.SPLIT_GRIDS[split])


# Files.


def write(tmp_path, **files) -> str:
  (tmp_path / "sudoku").mkdir(exist_ok=True)
  for name, rows in files.items():
    lines = ["Puzzle,Solution", *(",".join(row) for row in rows)]
    (tmp_path / f"sudoku/{name}.csv").write_text("\n".join(lines) + "\n")
  return str(tmp_path)


def training_rows(count: int) -> list[tuple[str, str]]:
  return [sudoku_grids.decode(code) for code in sudoku_puzzles.draw("train", 9, count, (9, 9))]


def test_a_test_file_is_the_test_split_and_no_other_has_a_puzzle_of_it(tmp_path, caplog):
  rows = training_rows(30)
  root = write(tmp_path, train=rows, test=[rows[4], AMBIGUOUS, UNIQUE, rows[4]])
  task = Sudoku(root=root, sizes={"test": 9})
  # Whatever their solutions, in the order of the file, each once.
  wanted = [{"puzzle": puzzle, "solution": solution} for puzzle, solution in (rows[4], AMBIGUOUS, UNIQUE)]
  assert list(task.records("test")) == wanted
  with caplog.at_level(logging.WARNING):
    train = task.records("train")
  assert [(r["puzzle"], r["solution"]) for r in train] == [*rows[:4], *rows[5:]]
  assert "left out 0 puzzles with several solutions, 0 repeated ones and 1 test puzzles" in caplog.text
  write(tmp_path, test=[])
  with pytest.raises(DataError, match=r"^sudoku/test.csv: the file has no puzzles; add some, or take it away"):
    task.records("test")
  write(tmp_path, test=[(rows[0][0], "1" * 16)])
  for split in ("train", "test"):
    with pytest.raises(DataError, match=r"^sudoku/test.csv line 2: solution '1111111111111111' is not a valid grid"):
      task.records(split)


def test_a_test_puzzle_with_several_solutions_is_solved_by_each_of_them(tmp_path):
  root = write(tmp_path, test=[AMBIGUOUS])
  (record,) = Sudoku(root=root).records("test")
  grids = [grid for grid in sudoku_grids.GRIDS if re.fullmatch(AMBIGUOUS[0].replace("0", "."), grid)]
  assert len(grids) > 1
  grades = {grid: Sudoku().grade(grid, record).metrics for grid in grids}
  assert all(metrics["solved"] == (1, 1) for metrics in grades.values())
  assert [grid for grid, metrics in grades.items() if metrics["cell_accuracy"] == (8, 8)] == [AMBIGUOUS[1]]
  other = "1234341243212143"
  assert Sudoku().grade(other, {**record, "puzzle": "2" + AMBIGUOUS[0][1:]}).metrics["solved"] == (0, 1)


def test_the_hub_has_no_puzzles_so_they_are_drawn():
  assert Sudoku(root="hub").records("validation") == Sudoku().records("validation")
