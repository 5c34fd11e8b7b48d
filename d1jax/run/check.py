"""`--check`: are flags, model and data there? It is asked before hosts are rented; nothing is trained or written."""

from ml_collections import ConfigDict

from d1jax import hub
from d1jax.errors import RunError, harmless, input_checked
from d1jax.run import experiment as experiments
from d1jax.run import inputs, limits, parts
from d1jax.run.workdir import folder


def run(config: ConfigDict) -> None:
  """Looks for what a run of `grpo` or `sft` needs, and prints a line for each.

  A model of the hub is looked up, not downloaded. Data sets of the hub are downloaded, since they are small.

  Raises:
    RunError: something is missing or wrong; the message has a part for each.
  """
  if config.mode not in ("grpo", "sft"):
    raise RunError(f"--check is for training, but config.mode is {config.mode!r}: leave it out")
  folder(config.workdir)
  parts.complete(config)
  with input_checked():
    limits.check(config)
    experiments.check_start(config)
    task, found = inputs.find_inputs(config, trains=True, reads=True)
  if isinstance(found, hub.Snapshot):
    print(f"model: {found.repository}, commit {found.commit} of the hub")
  else:
    print(harmless(f"model: {config.model.pretrained or f'new weights of the size {config.model.size}'}"))
  if task is not None:
    print(harmless(f"data: {len(task.records('test'))} test questions of {task.name}"))
  print("checked: flags, model and data are there")
