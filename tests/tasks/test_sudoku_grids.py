import collections
import itertools

import numpy as np
import pytest

from d1jax.tasks import held_out, sudoku_grids

# shared/data/README.md: clue sets with one solution, by number of clues.
UNIQUE = {
  4: 25_728,
  5: 284_160,
  6: 1_041_408,
  7: 2_141_184,
  8: 2_961_024,
  9: 2_958_336,
  10: 2_204_928,
}
# The others, as plain enumeration has them (`test_unique_masks_are_those_of_plain_enumeration`).
UNIQUE |= {11: 1_239_552, 12: 522_624, 13: 161_280, 14: 34_560, 15: 4_608, 16: 288}


def test_grids_are_all_and_in_order():
  grids = sudoku_grids.GRIDS
  assert len(grids) == 288
  assert list(grids) == sorted(set(grids))
  for grid in grids:
    cells = np.array(list(grid)).reshape(4, 4)
    boxes = cells.reshape(2, 2, 2, 2).swapaxes(1, 2).reshape(4, 4)
    for unit in (*cells, *cells.T, *boxes):
      assert sorted(unit) == list("1234")


def test_groups_are_a_partition():
  groups = [sudoku_grids.TEST_GRIDS, sudoku_grids.VALIDATION_GRIDS, sudoku_grids.TRAINING_GRIDS]
  assert [len(group) for group in groups] == [88, 40, 160]
  assert sorted(itertools.chain(*groups)) == list(range(288))
  # Pinned: a validation grid that becomes a training grid spoils every comparison.
  assert sudoku_grids.VALIDATION_GRIDS[:6] == (4, 6, 10, 26, 29, 36)


def test_held_out_grids_are_those_of_the_file(data_root):
  with open(f"{data_root}/sudoku/held_out_grids.txt") as file:
    held_out = file.read().split()
  assert [sudoku_grids.GRIDS[number] for number in sudoku_grids.TEST_GRIDS] == sorted(held_out)


def test_unique_masks_have_the_published_counts():
  table = sudoku_grids.unique_masks()
  assert table.sum() == 13_579_680
  counts = np.bincount(sudoku_grids.clue_counts(), table.sum(axis=0))
  assert not counts[:4].any()
  assert {clues: counts[clues] for clues in range(4, 17)} == UNIQUE
  assert sum(UNIQUE.values()) == 13_579_680  # 13,579,392 with an empty cell


@pytest.mark.slow(reason="enumerates")
def test_unique_masks_are_those_of_plain_enumeration():
  # A mask tells a grid from all others exactly when no other grid has the same digits there.
  digits = np.array([list(map(int, grid)) for grid in sudoku_grids.GRIDS])
  powers = 4 ** np.arange(16)
  for mask in range(sudoku_grids.MASKS):
    shown = (digits - 1) @ (powers * (mask >> np.arange(16) & 1))
    _, place, counts = np.unique(shown, return_inverse=True, return_counts=True)
    assert (sudoku_grids.unique_masks()[:, mask] == (counts[place] == 1)).all()


def test_published_puzzles_are_known_by_all_their_solutions():
  codes = sudoku_grids.published_codes()
  pairs = [sudoku_grids.decode(int(code)) for code in codes]
  assert {puzzle for puzzle, _ in pairs} == held_out.listed("sudoku")
  assert sorted(set(codes.tolist())) == codes.tolist()
  solutions = collections.Counter(puzzle for puzzle, _ in pairs)
  unique = sudoku_grids.unique_masks()[codes >> 16, codes & 0xFFFF]
  assert [solutions[puzzle] == 1 for puzzle, _ in pairs] == unique.tolist()
  # shared/research: 63 of d1's 256 puzzles have 2 to 4 solutions.
  assert sum(count > 1 for count in solutions.values()) == 63
  assert max(solutions.values()) == 4


def test_clue_counts():
  masks = [0, 1, 0x8000, 0xFFFF, 0b1011]
  assert sudoku_grids.clue_counts()[masks].tolist() == [0, 1, 1, 16, 3]


def test_codes_round_trip():
  puzzle, solution = "0321003004002100", "4321123434122143"
  code = sudoku_grids.encode(puzzle, solution)
  assert sudoku_grids.decode(code) == (puzzle, solution)
  assert sudoku_grids.unique_masks()[code >> 16, code & 0xFFFF]


def test_every_puzzle_belongs_to_one_split():
  codes = np.concatenate([(grid << 16) | np.arange(1 << 16) for grid in range(0, 288, 7)])
  member = np.stack([sudoku_grids.in_split(split, codes) for split in sudoku_grids.SPLIT_GRIDS])
  assert (member.sum(axis=0) == 1).all()


def test_a_quarter_of_the_training_puzzles_are_demonstrations():
  for grid in sudoku_grids.TRAINING_GRIDS[::20]:
    shown = sudoku_grids.grid_puzzles("demonstrations", grid)
    trained = sudoku_grids.grid_puzzles("train", grid)
    assert not np.intersect1d(shown, trained).size
    counts = sudoku_grids.clue_counts()
    for clues in (6, 7, 8, 9, 10):
      quarter = (counts[shown & 0xFFFF] == clues).sum()
      rest = (counts[trained & 0xFFFF] == clues).sum()
      assert abs(quarter / (quarter + rest) - 0.25) < 0.04
