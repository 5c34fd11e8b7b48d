"""How busy partial rollouts keep their slots, by the number of slots and by `grpo.partial_age`.

It counts: rows have a number of blocks with a long tail, drawn as if a network gave the stop id with the same
probability at each token (the mean is about a quarter of the longest), and take turns in the order of
`d1jax.diffusion.continuous`, whose tests check this order. No network is computed, and no time is measured.
`python -m benchmarks.partial` prints a line for each number of slots and each age.
"""

import argparse

import numpy as np

from d1jax.columns import markdown


def lengths(rows: int, longest: int, seed: int) -> np.ndarray:
  """The blocks of so many rows."""
  return np.minimum(np.random.default_rng(seed).geometric(4 / longest, rows), longest)


def turns(last: np.ndarray, rows: int, slots: int, age: int) -> tuple[np.ndarray, np.ndarray]:
  """The turns of each iteration, and the iterations from the one in which each row began to its own.

  Args:
    last: the blocks of each row, those of one iteration after the other.
    rows: of an iteration.
    slots: how many rows are computed at a time.
    age: for how many iterations a row may go on.
  """
  turn, began = np.zeros(len(last), int), np.full(len(last), -1)
  found = []
  for iteration in range(len(last) // rows - age):
    window = np.arange(iteration * rows, (iteration + 1 + age) * rows)
    found.append(0)
    while (turn < last)[window[:rows]].any():
      running = window[turn[window] < last[window]][:slots]
      began[running] = np.where(began[running] < 0, iteration, began[running])
      turn[running] += 1
      found[-1] += 1
  trained = np.arange(len(found) * rows)
  return np.asarray(found), trained // rows - began[trained]


def main() -> None:
  """Prints the table."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--rows", type=int, default=128, help="completions of an iteration")
  parser.add_argument("--slots", type=int, nargs="+", default=[16, 64, 128], help="rows computed at a time")
  parser.add_argument("--age", type=int, nargs="+", default=[0, 1, 2, 4], help="grpo.partial_age")
  parser.add_argument("--blocks", type=int, default=32, help="of the longest completion")
  parser.add_argument("--iterations", type=int, default=200)
  options = parser.parse_args()
  table = []
  for slots in options.slots:
    first = None
    for age in options.age:
      last = lengths(options.rows * (options.iterations + age), options.blocks, seed=0)
      counted, ages = turns(last, options.rows, slots, age)
      kept = counted[age:]  # the first iterations begin without rows that go on
      own = last[: len(counted) * options.rows].reshape(len(counted), -1)[age:].sum()
      first = first or kept.mean()
      busy = own / (kept.sum() * slots)
      old = ages.reshape(len(counted), -1)[age:].mean()
      table.append((slots, age, f"{kept.mean():.1f}", f"{first / kept.mean():.2f}", f"{busy:.0%}", f"{old:.2f}"))
  print(markdown(("slots", "partial_age", "turns an iteration", "times fewer", "slots busy", "mean age"), table))


if __name__ == "__main__":
  main()
