"""The program `d1jax`, and `python -m d1jax`, which also works in a clone that is not installed."""

import sys

from d1jax import errors

with errors.environment():
  from d1jax import commands


def main() -> None:
  """Runs the command `d1jax`; a failure is one line on standard error and an exit code, as in `d1jax.main`."""
  try:
    written = commands.flags(sys.argv[1:])
  except errors.RunError as error:
    print(f"d1jax: {errors.harmless(str(error))}", file=sys.stderr)
    sys.exit(error.exit_code)
  if written is not None:
    sys.argv[1:] = written
    from d1jax import main as program

    program.main()


if __name__ == "__main__":
  main()
