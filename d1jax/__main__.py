"""`python -m d1jax` is the command `d1jax`; it also works in a clone that is not installed."""

from d1jax.commands import main

if __name__ == "__main__":
  main()
