"""The 288 filled 4x4 Sudoku grids: which clue sets have one solution, which split may use them.

A puzzle with one solution is a number, its code: `grid << 16 | mask`, where `grid` counts the
filled grids in lexicographic order and bit i of `mask` says that cell i (reading order) is a clue.
"""

import functools
import hashlib
import itertools

import numpy as np

from d1jax.tasks import held_out

CELLS = 16
MASKS = 1 << CELLS

_ROWS = ["".join(row) for row in itertools.permutations("1234")]
_BANDS = [a + b for a in _ROWS for b in _ROWS if not set(a[:2]) & set(b[:2])]


def _columns_differ(upper: str, lower: str) -> bool:
  return all(len({*upper[i::4], *lower[i::4]}) == 4 for i in range(4))


GRIDS: tuple[str, ...] = tuple(upper + lower for upper in _BANDS for lower in _BANDS if _columns_differ(upper, lower))
"""All filled grids as 16 digits, in lexicographic order."""

GRID_NUMBER: dict[str, int] = {grid: number for number, grid in enumerate(GRIDS)}

# SPG's split by solution: no puzzle that trains or validates may have one of these as its solution.
_HELD_OUT = """
  5 9 12 13 25 27 30 31 32 33 35 43 47 48 55 56 57 67 71 74 75 80 82 86 89 91 94 99 101 102 104 105
  107 110 111 114 116 118 121 131 132 133 134 135 137 138 146 149 151 152 153 156 157 163 164 166
  167 174 183 186 188 190 192 195 197 200 203 205 214 216 217 219 220 221 222 224 229 234 236 238
  243 245 253 256 265 273 274 276
"""
TEST_GRIDS: tuple[int, ...] = tuple(map(int, _HELD_OUT.split()))


def _digest(number: int) -> bytes:
  return hashlib.sha256(GRIDS[number].encode()).digest()


_OTHERS = sorted(set(range(len(GRIDS))) - set(TEST_GRIDS), key=_digest)
VALIDATION_GRIDS: tuple[int, ...] = tuple(sorted(_OTHERS[:40]))
TRAINING_GRIDS: tuple[int, ...] = tuple(sorted(_OTHERS[40:]))

SPLIT_GRIDS: dict[str, tuple[int, ...]] = {
  "demonstrations": TRAINING_GRIDS,
  "train": TRAINING_GRIDS,
  "validation": VALIDATION_GRIDS,
  "test": TEST_GRIDS,
}
"""The grids that a split's puzzles may have as their solution."""


@functools.cache
def unique_masks() -> np.ndarray:
  """Tabulate [grid, mask]: True if these cells of the grid, as clues, leave one solution.

  They do not exactly when another grid agrees with this one on all of them: the ambiguous masks
  of a grid are the subsets of its agreements, found by clearing one bit after the other.
  """
  digits = np.array([list(map(int, grid)) for grid in GRIDS], dtype=np.uint8)
  agreements = (digits[:, None] == digits[None]) @ (1 << np.arange(CELLS))
  ambiguous = np.zeros((len(GRIDS), MASKS), dtype=bool)
  for grid, masks in enumerate(agreements):
    ambiguous[grid, np.delete(masks, grid)] = True
  for bit in range(CELLS):
    # Axis 2 is the bit: a subset without it is ambiguous if the set with it is.
    pairs = ambiguous.reshape(len(GRIDS), -1, 2, 1 << bit)
    pairs[:, :, 0] |= pairs[:, :, 1]
  return ~ambiguous


@functools.cache
def clue_counts() -> np.ndarray:
  """Count the clues of each of the 65,536 masks."""
  return np.unpackbits(np.arange(MASKS, dtype=">u2").view(np.uint8)).reshape(MASKS, -1).sum(1)


def in_split(split: str, codes: np.ndarray) -> np.ndarray:
  """Tell which puzzles belong to the split; each belongs to one, whatever seeds and sizes are.

  The solution grid decides. Of the puzzles on training grids a fixed quarter, by a hash of the
  code, are for demonstrations and the rest for training.
  """
  of_grid = np.zeros(len(GRIDS), dtype=bool)
  of_grid[list(SPLIT_GRIDS[split])] = True
  member = of_grid[codes >> CELLS]
  if SPLIT_GRIDS[split] is TRAINING_GRIDS:
    mixed = codes.astype(np.uint64) * np.uint64(0xFF51AFD7ED558CCD)
    is_demonstration = (mixed >> np.uint64(40)) % np.uint64(4) == 0
    member &= is_demonstration if split == "demonstrations" else ~is_demonstration
  return member


@functools.cache
def published_codes() -> np.ndarray:
  """List the codes of d1's published test puzzles, ascending: one for each of a puzzle's solutions."""
  puzzles = np.array([list(map(int, puzzle)) for puzzle in held_out.listed("sudoku")], dtype=np.uint8)
  grids = np.array([list(map(int, grid)) for grid in GRIDS], dtype=np.uint8)
  masks = (puzzles > 0) @ (1 << np.arange(CELLS))
  puzzle, grid = np.nonzero(((puzzles[:, None] == grids) | (puzzles[:, None] == 0)).all(axis=2))
  return np.sort(grid << CELLS | masks[puzzle]).astype(np.int64)


def grid_puzzles(split: str, grid: int) -> np.ndarray:
  """List the codes of the split's puzzles that one grid solves, ascending."""
  codes = (grid << CELLS) | np.flatnonzero(unique_masks()[grid])
  return codes[in_split(split, codes)]


def encode(puzzle: str, solution: str) -> int:
  """Return the code of a puzzle (0 = empty) of which `solution` is the completed grid."""
  mask = sum(1 << cell for cell, digit in enumerate(puzzle) if digit != "0")
  return GRID_NUMBER[solution] << CELLS | mask


def decode(code: int) -> tuple[str, str]:
  """Return the puzzle and the solution that a code stands for."""
  solution = GRIDS[code >> CELLS]
  puzzle = "".join(d if code >> cell & 1 else "0" for cell, d in enumerate(solution))
  return puzzle, solution
