"""One process of several for tests/parallel/test_multihost.py: what it is asked, told as a line of JSON.

`python -m tests.parallel.peers [iteration] [talk] --config.FIELD=VALUE ...`: an iteration of diffu-GRPO, and what
`multihost` says; it takes the flags that `jobs.start_processes` adds.
"""

import functools
import hashlib
import json
import sys
import zlib
from pathlib import Path

import jax
import numpy as np

from d1jax import keys
from d1jax.diffusion.corruption import mask_prompt
from d1jax.errors import RunError
from d1jax.fingerprint import fingerprint
from d1jax.parallel import multihost
from d1jax.parallel.mesh import place
from d1jax.rl.grading import Grader
from d1jax.run import experiment as experiments
from d1jax.tasks import Grade
from d1jax.training import configured, host
from tests.jobs import small


class Counting(Grader):
  """Pays for texts, by their letters alone, and notes how many it has seen."""

  graded = 0

  def submit(self, texts, records, protocol):
    self.graded += len(texts)
    sums = [zlib.crc32(text.encode()) for text in texts]
    grades = [Grade({"lucky": i % 7 / 7}, {"even": (1 - i % 2, 1), "parts": (i % 5, i % 3)}) for i in sums]
    return lambda: grades


def digest(*arrays) -> str:
  return hashlib.sha256(b"".join(np.ascontiguousarray(x).tobytes() for x in arrays)).hexdigest()[:16]


def iteration() -> dict:
  mesh = {"mesh__data": jax.device_count() // 2, "mesh__tensor": 2}  # every row is on two devices
  config = small(Path("unused"), grpo__num_iterations=2, **mesh)
  experiment = experiments.build(config, None)
  optimizer = experiment.optimizer(config.grpo, 4)
  programs = configured.programs(experiment, optimizer)
  programs.compile()
  grading = host.Grading(experiment.prompts("train"), Counting(experiment.task, 0), "strict")
  section = config.grpo
  batch = next(grading.prompts.batches(prompts=section.prompts_per_iteration, num_generations=section.num_generations))
  state, frozen = experiment.model.weights.fresh_state(optimizer), experiment.model.weights.frozen
  placed, number = programs.place(batch, 0)
  chunks = programs.rollout(programs.publish(state, frozen), placed, state.key, number)
  visit = host.grade_chunks(grading, batch.record, chunks)
  mask_key = keys.purpose_key(state.key, keys.Purpose.SFT_PROMPT_MASK, 0)
  masked = jax.jit(
    lambda key, ids, prompt, valid: mask_prompt(key, ids, prompt, valid, 0.5, experiment.model.denoiser.mask_id),
    in_shardings=(experiment.model.replicated, *[experiment.model.by_row] * 3),
    out_shardings=experiment.model.by_row,
  )(mask_key, *place((batch.sample_id, batch.prompt, batch.prompt_valid), experiment.model.by_row))
  state, metrics, advantages = programs.update(state, frozen, chunks, visit.rewards)
  whole = multihost.fetch(list(chunks))
  return {
    "prompts": digest(batch.prompt, batch.sample_id, *(x for chunk in whole for x in (chunk.prompt, chunk.sample_id))),
    "masks": digest(multihost.fetch(masked)),
    "tokens": digest(*(chunk.completion for chunk in whole)),
    "key": np.asarray(jax.random.key_data(state.key)).tolist(),
    "rewards": visit.rewards.tolist(),
    "sums": dict(visit.sums),
    "texts": multihost.gather_rows(visit.rows, visit.graded.texts),
    "advantages": multihost.fetch(advantages).tolist(),
    "losses": np.asarray(metrics["loss"]).tolist(),
    "state": fingerprint(state),
    "rows": visit.rows.tolist(),
    "graded": grading.grader.graded,
  }


def talk() -> dict:
  """What `multihost` says of things that differ between the processes."""
  own, last = jax.process_index(), jax.process_count() - 1

  def refuse():
    raise RunError(f"process {own} does not like it")

  def message(question):
    try:
      return question()
    except RunError as error:
      return str(error)

  return {
    "is_main": multihost.is_main(),
    "gather": multihost.gather({"process": own, "text": "é" * 700 * own}),
    "largest": multihost.largest(own),
    "from_main": [multihost.from_main(lambda: {"number": own}), message(lambda: multihost.from_main(refuse))],
    "same": [message(functools.partial(multihost.check_same, "the number", value)) for value in (7, min(own, 1))],
    "in_order": multihost.gather_rows(np.arange(own, 6, last + 1)[::-1], [f"{own}!"] * len(range(own, 6, last + 1))),
  }


def main() -> None:
  given = dict(flag.removeprefix("--config.").split("=", 1) for flag in sys.argv[1:] if flag.startswith("--"))
  settings = {name: given.get(f"distributed.{name}") for name in ("processes", "process", "timeout")}
  multihost.initialize(
    "the test", given.get("distributed.coordinator"), **{k: v and int(v) for k, v in settings.items()}
  )
  multihost.split_cpu(int(given["cpu_devices"]))
  asked = [question for question in (talk, iteration) if question.__name__ in sys.argv]
  print(json.dumps({name: found for question in asked for name, found in question().items()}))


if __name__ == "__main__":
  main()
