"""`python -m d1jax`: the command `d1jax`, in a clone too that is not installed."""

from d1jax.commands import main

if __name__ == "__main__":
  main()
