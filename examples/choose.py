"""Chooses among answers by their probability: `python -m examples.choose FOLDER "2 + 2 =" 3 4 5`."""

import sys

import d1jax


def main(folder: str, question: str, *answers: str) -> str:
  """Prints each answer with its log-probability and standard error, and returns the most probable one."""
  model = d1jax.from_pretrained(folder)
  found = d1jax.log_likelihood(model, [question] * len(answers), list(answers))
  for answer, one in zip(answers, found, strict=True):
    print(f"{answer!r}: log p = {one.logp:.2f} +- {one.error:.2f}")
  return max(zip(answers, found, strict=True), key=lambda pair: pair[1].logp)[0]


if __name__ == "__main__":
  main(*sys.argv[1:])
