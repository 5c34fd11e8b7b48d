"""Asks a model's folder three times: `python -m examples.ask FOLDER "Name a river."`."""

import sys

import d1jax


def main(folder: str, question: str, max_tokens: int = 64) -> list[str]:
  """Prints the answers, and returns them."""
  model = d1jax.from_pretrained(folder)
  answers = d1jax.generate(model, [question], temperature=0.7, max_tokens=max_tokens, samples=3)
  for answer in answers:
    print(answer.text)
  return [answer.text for answer in answers]


if __name__ == "__main__":
  main(*sys.argv[1:])
