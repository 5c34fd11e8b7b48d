"""The model card of an export: README.md with the facts of the run, its results and how to load it."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from d1jax import columns
from d1jax.diffusion.rollout import SamplerSpec
from d1jax.errors import harmless
from d1jax.hub import Snapshot

LONGEST = 120
"""The longest text of a cell in characters."""


class Facts(NamedTuple):
  """What a card tells of a checkpoint.

  Attributes:
    name: of the model: the repository that it is pushed to, or the folder's name.
    form: `model` or `adapter`.
    base: the model that training began with: a snapshot of the hub, or a folder's name; None: it was drawn.
    stage: `sft` or `grpo`.
    step: the iteration of the checkpoint.
    config: the run's configuration.
    results: the run's results, if they are of this checkpoint.
    sampler: how the run samples.
  """

  name: str
  form: str
  base: Snapshot | str | None
  stage: str
  step: int
  config: Mapping[str, Any]
  results: Mapping[str, Any] | None
  sampler: SamplerSpec


def write(facts: Facts) -> str:
  """The text of README.md.

  No path of this machine stands in it: of a local base there is the folder's name alone.

  Raises:
    LookupError, TypeError: the configuration or the results are not those of a run.
  """
  stage = {"sft": "masked supervised fine-tuning", "grpo": "diffu-GRPO"}[facts.stage]
  what = "Adapters (PEFT's LoRA) of a masked diffusion" if facts.form == "adapter" else "A masked diffusion"
  parts = [
    _front(facts),
    f"# {_cell(facts.name)}",
    f"{what} language model, trained by {stage} with d1jax.",
    "## Training",
    columns.markdown(("", ""), _training(facts), "---"),
    "## Results",
    _results(facts),
    "## Use",
    _use(facts),
  ]
  return "\n\n".join(parts) + "\n"


def _cell(value: Any) -> str:
  """A value as text that stays in its cell: names in a run may have been chosen by others."""
  text = " ".join(harmless(str(value)).split())[:LONGEST]
  return "".join(f"\\{char}" if char in "\\|`*_[]<>#" else char for char in text)


def _front(facts: Facts) -> str:
  lines = ["---", "library_name: d1jax", "pipeline_tag: text-generation"]
  if isinstance(facts.base, Snapshot):
    lines.append(f"base_model: {facts.base.repository}")
    lines.append(f"base_model_relation: {'adapter' if facts.form == 'adapter' else 'finetune'}")
  return "\n".join([*lines, "tags:", "- diffusion-language-model", f"- {facts.stage}", "---"])


def _training(facts: Facts) -> list[tuple[str, str]]:
  config, section = facts.config, facts.config[facts.stage]
  if isinstance(facts.base, Snapshot):
    base = f"{_cell(facts.base.repository)}, commit {facts.base.commit}"
  else:
    base = "none: the weights were drawn" if facts.base is None else _cell(facts.base)
  lora = config["lora"]
  trained = f"LoRA of rank {lora['rank']}, alpha {lora['alpha']}, on {', '.join(lora['targets'])}"
  rows = [
    ("base", base),
    ("task", _cell(config["task"]["name"])),
    ("checkpoint", f"iteration {facts.step} of {section['steps']}"),
    ("trained", _cell(trained) if lora["rank"] else "all weights"),
    ("learning rate", _cell(section["learning_rate"])),
    ("seed", _cell(config["seed"])),
  ]
  if facts.stage == "grpo":
    names = {"estimator": section["estimator"], "loss": section["loss"], "advantage": section["advantage"]}
    rows.insert(2, ("method", _cell(", ".join(f"{kind} {part['name']}" for kind, part in names.items()))))
  if facts.results is not None:
    revision = facts.results["revision"]
    rows.append(("device", _cell(facts.results["device"])))
    rows.append(("code", _cell(revision["commit"] or f"files with the SHA-256 {revision['source']}")))
  return rows


def _results(facts: Facts) -> str:
  results = facts.results
  if results is None:
    return "The run has no results of this checkpoint."
  arms = {"constant answer": results["baseline"]}
  arms |= {"start": results["before"]} if "before" in results else {}
  arms["this model"] = results["after"]
  names = [name for name in results["after"] if f"{name}_interval" in results["after"]]
  rows = []
  for arm, found in arms.items():
    cells = []
    for name in names:
      low, high = found[f"{name}_interval"]
      cells.append(f"{100 * found[name]:.1f} [{100 * low:.1f}, {100 * high:.1f}]")
    rows.append([arm, *cells, str(int(found["n"]))])
  head = ["", *(_cell(name.replace("_", " ")) for name in names), "questions"]
  table = columns.markdown(head, rows, "---")
  return f"The held-out split of {_cell(results['task'])}, greedy, in percent with 95% intervals:\n\n{table}"


def _use(facts: Facts) -> str:
  spec, base = facts.sampler, facts.base.repository if isinstance(facts.base, Snapshot) else "BASE"
  name = facts.name if re.fullmatch("[A-Za-z0-9._/-]+", facts.name) else "FOLDER"
  sampled = (
    f"`generation_config.json` holds how the run samples: {spec.completion_length} tokens in blocks of"
    f" {spec.block_length}, {spec.diffusion_steps} steps."
  )
  if facts.form == "adapter":
    merge = f"d1jax export --pretrained={base} --adapter={name} --output=merged"
    code = f'from peft import PeftModel\n\nmodel = PeftModel.from_pretrained(base, "{name}")  # base: {base}'
    return f"```\n{merge}\n```\n\n```python\n{code}\n```\n\n{sampled}"
  ask = 'print(d1jax.generate(model, ["A question"])[0].text)'
  code = f'import d1jax\n\nmodel = d1jax.from_pretrained("{name}")\n{ask}'
  names = "Tensors have the names of the base, so that its own code loads the folder too."
  return f"```python\n{code}\n```\n\n{sampled}{' ' + names if facts.base is not None else ''}"
