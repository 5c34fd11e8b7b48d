"""Writes the analyses that the tests compare with, under the compiler at hand: `python -m tests.aot.make_goldens`.

What is there already is left as it is: delete a file to have it made again. A large case takes minutes; names of
topologies, such as `v5e:2x4`, make only theirs. At the end all of them are printed as a table.
"""

import subprocess
import sys

from d1jax.aot.table import overview
from d1jax.columns import markdown
from tests import jobs
from tests.aot.cases import BLOCK_CASE, LARGE_CASES, SMALL_CASES, TOPOLOGIES, read


def main() -> None:
  wanted = sys.argv[1:] or TOPOLOGIES
  cases = [case for case in [*SMALL_CASES, BLOCK_CASE, *LARGE_CASES] if case.topology in wanted]
  for case in cases:
    if not case.golden().exists():
      print(case.name, flush=True)
      line = [sys.executable, "-m", "d1jax.main", *case.flags, f"--config.output={case.golden()}"]
      # What does not fit fails too, and is kept.
      subprocess.run(line, cwd=jobs.ROOT, stdout=subprocess.DEVNULL, check=False)
      if not case.golden().exists():
        sys.exit(f"{case.name} failed: {' '.join(line)}")
  print(markdown(*overview([read(case.golden()) for case in cases if not case.small])))


if __name__ == "__main__":
  main()
