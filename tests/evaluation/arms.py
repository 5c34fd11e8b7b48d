"""Items that look like those of a model, for the tests of numbers and pages."""

import random

from d1jax.evaluation.items import Item


def item(index: int = 0, right: bool | None = True, **fields) -> Item:
  """One item of a yes-or-no metric `solved`; `right` None: nobody knows."""
  known = {
    "task": "gsm8k",
    "length": 128,
    "temperature": 0.0,
    "seed": 0,
    "sample": 0,
    "question": f"q{index}",
    "cluster": f"c{index}",
    "record": {"question": f"What is {index} + 1?", "answer": str(index + 1)},
    "text": f"<answer>\n{index + 1 if right else 'no idea'}\n</answer>",
    "answer": str(index + 1) if right else None,
    "reward": float(bool(right)),
    "metrics": {"solved": (int(bool(right)), 0 if right is None else 1), "well_formed": (1, 1)},
  }
  return Item(index=index, **(known | fields))


def arm(count: int, chance: float, *, seeds: int = 1, samples: int = 1, chosen: int = 0, **fields) -> list[Item]:
  """An arm whose items are right by `chance`; wrong answers are one of two, or none."""
  draw = random.Random(f"{chosen} {count} {chance}")
  found = []
  for seed in range(seeds):
    for sample in range(samples):
      for index in range(count):
        right = draw.random() < chance
        answer = str(index + 1) if right else draw.choice(["-1", "-2", None])
        own = {"seed": seed, "sample": sample, "answer": answer, "tokens": draw.randint(20, 128)}
        own |= {"text": f"<answer>{answer}</answer>", "forward_passes": 64, "seconds": 0.5}
        found.append(item(index, right, **(own | fields)))
  return found
