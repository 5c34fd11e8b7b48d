"""How many held-out Sudokus a model's folder solves, with a 95% interval: `python -m examples.solve FOLDER`."""

import sys

import d1jax


def main(folder: str, questions: int = 88, style: str = "d1") -> float:
  """Prints the share of solved puzzles, and returns it."""
  model = d1jax.from_pretrained(folder)
  task = d1jax.tasks.build("sudoku", sizes={"test": questions})
  prompts = d1jax.Prompts.of(task, model.tokenizer, "test", style=style)
  length = 32 if style == "terse" else 256
  sampler = d1jax.Sampler(completion_length=length, diffusion_steps=length // 2, block_length=32, temperature=0.0)
  solved = d1jax.evaluate(model, prompts, sampler, batch_size=44).share("solved")
  print(f"{solved.value:.1%} solved, 95% interval {solved.low:.1%} to {solved.high:.1%}")
  return float(solved.value)


if __name__ == "__main__":
  main(*sys.argv[1:])
