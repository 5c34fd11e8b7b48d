"""d1's recipe: masked SFT, then diffu-GRPO, then evaluation.

`--config=configs/grpo.py:WORDS`, words separated by commas: what is trained (`tiny`, the default; `smoke`; `lora`,
adapters on a downloaded model; `full`, all weights of one), a task (`sudoku`, the default; `countdown`, `gsm8k`,
`math`), or several, which are mixed, and a method (`d1`, which is what there is without one; `wd1`, `coupled`, `espo`,
`gdpo`, `spg`, `stepmerge`, `tracerl`, `agrpo`, `justgrpo`; docs/methods.md). Any field can be set on the command line:
`--config.grpo.learning_rate=1e-4`; those that few people set are in docs/configuration.md.

`lora` and `full` are d1's diffu-GRPO on the model that `--config.model.pretrained` names; docs/d1.md sets each of their
values beside d1's. They take a word more: `v5e`, `v5p`, `v6e` or `h100` lays them out for 8 of these chips or more (v5e
and v6e with `full`: 16). `llada_8b` is the old word for `lora`, and `llada_8b,full` for `full`.
"""

import runpy
from pathlib import Path
from typing import Any

from ml_collections import config_dict

METHODS = runpy.run_path(str(Path(__file__).with_name("methods.py")))["METHODS"]

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

SIZES, TASKS = ("tiny", "smoke", "lora", "full"), ("sudoku", "countdown", "gsm8k", "math")

# Sizes of the mesh's axes fsdp and tensor, with adapters and with every weight trained. In an update fsdp x tensor
# chips share the weights, in a rollout tensor of them: few enough that rollouts send little, enough that all fits.
CHIPS = {
  "v5e": ((2, 4), (4, 4)),  # 16 GiB a chip; a model in bfloat16 has 15
  "v6e": ((8, 1), (16, 1)),  # 32 GiB
  "v5p": ((1, 1), (8, 1)),  # 95 GiB
  "h100": ((1, 1), (8, 1)),  # 80 GB
}

WORDS = {"size": SIZES, "task": TASKS, "method": tuple(METHODS), "of lora and full": tuple(CHIPS)}
"""All preset words; the first size and the first task are the defaults."""

ADAM = dict(b2=0.99, weight_decay=0.1)


def get_config(words: str = "", alone: bool = True) -> config_dict.ConfigDict:
  """The configuration of the preset words; `alone`: not as a part of a mix."""
  chosen = dict.fromkeys(word for word in words.split(",") if word)
  if "llada_8b" in chosen:
    del chosen["llada_8b"]
    chosen |= {} if "full" in chosen else {"lora": None}
  known = [word for group in WORDS.values() for word in group]
  unknown = [word for word in chosen if word not in known]
  if unknown:
    raise ValueError(f"unknown preset word {unknown[0]!r}; known: {', '.join(known)}")
  sizes = [word for word in chosen if word in SIZES] or ["tiny"]
  tasks = [word for word in chosen if word in TASKS] or ["sudoku"]
  chips, named = ([word for word in chosen if word in group] for group in (CHIPS, METHODS))
  for group, names in ((sizes, SIZES), (chips, CHIPS), (named, METHODS)):
    if len(group) > 1:
      raise ValueError(f"preset words {', '.join(group)} exclude each other: name one of {', '.join(names)}")
  if chips and sizes[0] not in ("lora", "full"):
    raise ValueError(f"preset word {chips[0]} is for lora and full: name one of them too, or leave it out")
  if len(tasks) > 1:
    return _mix({task: get_config(",".join((sizes[0], task, *named, *chips)), False) for task in sorted(tasks)})

  c = config_dict.ConfigDict()
  c.mode = "grpo"
  c.seed = 0
  c.workdir = "runs/grpo"
  # Where figures go beside metrics.jsonl, separated by commas: tensorboard, wandb, trackio, or FILE.py of your own.
  c.trackers = "tensorboard"

  # Devices along each axis; -1 takes those that are left.
  c.mesh = dict(data=1, fsdp=-1, tensor=1, sequence=1)
  # Without an accelerator: into how many devices the CPU is split.
  c.cpu_devices = 2
  # Where logical axes live, if not where `d1jax.parallel.mesh.RULES` has them: AXIS to a mesh axis, a tuple, or None.
  c.rules = config_dict.ConfigDict()
  # The same in rollouts, where it differs; weights are moved once an iteration.
  c.rollout_rules = config_dict.ConfigDict()

  c.model = dict(
    # The folder of a downloaded model; it decides the sizes, the tokenizer and where logits stand.
    pretrained=config_dict.placeholder(str),
    size="llada_8b",  # without a folder
    dtype="auto",  # of matrix products: bfloat16 on accelerators, float32 on CPUs
    remat=True,
    quantize="nf4",  # how the base under adapters is kept: int8, nf4, or none for `dtype`
  )
  # Adapters; rank 0 trains every weight instead.
  c.lora = dict(
    rank=128,
    alpha=64.0,
    dropout=0.05,
    targets=("q_proj", "k_proj", "v_proj", "up_proj"),
  )

  # root: a folder with data files (docs/data.md); None generates problems by rule.
  c.data = dict(root=config_dict.placeholder(str), prompt_buckets=(200,))
  c.task = dict(
    name="sudoku",
    module=config_dict.placeholder(str),  # the Python file of a task of your own, in place of `name`
    mix=config_dict.ConfigDict(),  # several tasks: how often prompts are drawn from each, by name
    style="d1",
    protocol="d1",  # of the rewards; evaluations are strict
    sizes=dict(demonstrations=64, train=20000, validation=400, test=880),  # of each task
    options=config_dict.ConfigDict(),  # of the task; in a mix by the task's name
  )

  # d1's rollouts.
  c.rollout = dict(
    completion_length=256,
    diffusion_steps=128,
    block_length=32,
    temperature=0.9,
    cfg_scale=0.0,
    remasking="low_confidence",
    early_exit=False,  # finished rows cost nothing; not under the protocol d1, which reads on
    cache="none",  # or approximate: prefix, dual, window; see docs/performance.md
    schedule="static",  # or threshold, factor: as many tokens a step as are confident
  )

  # Supervised fine-tuning before diffu-GRPO; 0 steps: none. d1's values are in configs/sft.py.
  c.sft = dict(
    data=config_dict.placeholder(str),  # a JSON-lines file under data.root; None: the task's demonstrations
    steps=0,
    batch_size=8,
    accumulation=1,
    prompt_buckets=(512,),
    completion_buckets=(256,),  # ascending
    learning_rate=1e-5,
    warmup_steps=0,
    decay="linear",
    b2=0.999,
    weight_decay=0.1,
    max_grad_norm=1.0,
    p_mask_prompt=0.0,  # d1 masks prompts in diffu-GRPO only
    logits_tile=4096,  # vocabulary ids whose logits exist at a time; None: all
    validate_every=100,
  )

  # d1's diffu-GRPO; one step is one rollout and num_iterations optimiser steps.
  c.grpo = dict(
    steps=475,
    prompts_per_iteration=16,
    num_generations=6,
    num_iterations=8,  # mu
    accumulation=2,  # micro-batches an optimiser step
    rollout_chunks=2,  # parts of a rollout; one is graded while the next is computed
    grading_workers=8,  # processes that grade; 0: the run's own
    # The method: what estimates log p, what is minimised, how rewards are compared (docs/methods.md). Each is a name,
    # or a Python file of your own, and its options; the command line chooses another with --config.grpo.loss=NAME.
    estimator=dict(name="one_step"),
    p_mask_prompt=0.15,  # probability that a prompt token is masked, of estimators that mask anew
    loss=dict(
      name="clipped_token",
      epsilon=0.5,  # half width of the clip
      beta=0.04,  # weight of the KL
    ),
    aggregation="token",  # or sequence, fixed
    advantage=dict(name="mean"),
    # Rewards: weights of components by name; tokens at the end over which length is punished; what an answer pays that
    # can be read at all; groups that are drawn for each that is trained on, those with equal rewards last.
    reward_weights=config_dict.ConfigDict(),
    overlong=0,
    answered=0.0,
    oversample=1,
    learning_rate=3e-6,
    warmup_steps=500,
    decay="constant",
    max_grad_norm=0.2,
    logits_tile=4096,
    validate_every=50,
    **ADAM,
  )
  # Prompts of evaluations; those of training are in data.prompt_buckets.
  c.evaluation = dict(batch_size=96, prompt_buckets=(256, 512, 1024, 2048))

  presets = {
    "lora": (),
    "full": (_full,),
    "tiny": (_tiny,),
    "smoke": (_tiny, _smoke),
    "sudoku": (_sudoku,),
    "countdown": (_countdown,),
    "gsm8k": (_gsm8k,),
    "math": (_math,),
  }
  for apply in (*presets[sizes[0]], *presets[tasks[0]]):
    apply(c)
  if alone and (sizes[0], tasks[0]) == ("tiny", "countdown"):
    _tiny_countdown(c)
  if chips:
    _lay_out(c, chips[0])
  for name in named:
    _choose(c, METHODS[name], tasks[0])
  return c


def set_fields(section: config_dict.ConfigDict, fields: dict[str, Any]) -> None:
  """Sets fields; a part of another name has the options that are given, and the KL that there was."""
  for field, value in fields.items():
    if isinstance(value, dict) and value.get("name", section[field].name) != section[field].name:
      kept = {option: x for option, x in section[field].items() if option in ("beta", "kl", "kl_against")}
      section[field] = config_dict.ConfigDict(kept | value)
    elif isinstance(value, dict):
      section[field].update(value)
    else:
      section[field] = value


def _choose(c: config_dict.ConfigDict, method: Any, task: str) -> None:
  """Sets what a method is, and on the large model what its paper trained with; the small one keeps its own rates."""
  for section, fields in method.fields(c.rollout.to_dict()).items():
    set_fields(c[section], fields)
  if c.model.size == "tiny":
    return
  given, optimiser_steps = method.paper(c.rollout.to_dict(), task), c.grpo.steps * c.grpo.num_iterations
  for section, fields in given.items():
    set_fields(c[section], fields)
  # The warm-up counts optimiser steps, of which another mu makes more or fewer: it keeps its share of them.
  if "warmup_steps" not in given["grpo"]:
    c.grpo.warmup_steps = c.grpo.warmup_steps * c.grpo.steps * c.grpo.num_iterations // optimiser_steps


def _lay_out(c: config_dict.ConfigDict, chip: str) -> None:
  """An update cuts all weights along embed and gathers a layer at a time; in a rollout they stay where they are used.

  The base is kept in bfloat16: over 8 chips it takes 2 GiB of each, and NF4 costs its unpacking in every forward pass.
  """
  fsdp, tensor = CHIPS[chip][c.lora.rank == 0]
  c.mesh.update(data=-1, fsdp=fsdp, tensor=tensor)
  everywhere, shared = ("data", "fsdp", "tensor"), ("fsdp", "tensor")
  c.rules = dict(batch=everywhere, vocab=None, embed=shared, heads=None, kv_heads=None, mlp=None)
  cut = dict.fromkeys(("vocab", "heads", "kv_heads", "mlp", "adapter"), "tensor")
  c.rollout_rules = dict(batch=("data", "fsdp"), embed=None, **cut)
  c.model.quantize = "none"
  c.model.remat = chip != "v5p" or c.lora.rank == 0  # without, an update of 12 rows a chip takes 53 GiB
  c.grpo.accumulation = 1


def _mix(parts: dict[str, config_dict.ConfigDict]) -> config_dict.ConfigDict:
  """Several tasks, drawn from equally often: of a field that depends on the task, the largest value."""
  c = next(iter(parts.values()))
  c.task.name = "+".join(parts)
  c.task.mix = dict.fromkeys(parts, 1.0)
  c.task.options = {name: part.task.options for name, part in parts.items() if part.task.options}
  for split in c.task.sizes:
    c.task.sizes[split] = max(part.task.sizes[split] for part in parts.values())
  for section in ("data", "rollout", "sft", "grpo", "evaluation"):
    _enlarge(c[section], [part[section] for part in parts.values()])
  return c


def _enlarge(section: config_dict.ConfigDict, parts: list[config_dict.ConfigDict]) -> None:
  """Sets each field that differs to the largest value."""
  for field, value in section.items():
    values = [part[field] for part in parts]
    if isinstance(value, config_dict.ConfigDict):
      _enlarge(value, values)
    elif any(other != value for other in values):
      section[field] = max(values)


def _tiny(c: config_dict.ConfigDict) -> None:
  """A model of 0.2M parameters that learns 4x4 Sudoku in minutes on two cores; chosen on the validation grids."""
  c.mesh.update(data=-1, fsdp=1)
  c.model.update(size="tiny", remat=False, unroll=3, quantize="none")
  c.lora.update(rank=0, dropout=0.0, targets=PROJECTIONS)
  c.data.prompt_buckets = (33,)
  c.task.update(style="terse", protocol="strict")
  c.task.sizes.demonstrations = 24
  # Committing confident proposals first sharpens the draws; a high temperature keeps the policy exploring all the same.
  c.rollout.update(completion_length=18, diffusion_steps=4, block_length=18, temperature=4.0)
  c.sft.update(
    steps=1000,
    batch_size=32,
    prompt_buckets=(33,),
    completion_buckets=(18,),
    learning_rate=3e-3,
    warmup_steps=20,
    b2=0.99,
    weight_decay=1.0,
    p_mask_prompt=0.2,
    logits_tile=config_dict.placeholder(int),
    validate_every=100,
  )
  c.grpo.update(
    steps=700,
    prompts_per_iteration=64,
    num_generations=4,
    num_iterations=1,
    accumulation=4,
    rollout_chunks=4,
    grading_workers=0,
    loss=dict(beta=0.0),
    p_mask_prompt=0.0,
    learning_rate=6e-4,
    warmup_steps=20,
    decay="linear",
    max_grad_norm=1.0,
    weight_decay=0.1,
    logits_tile=config_dict.placeholder(int),
    validate_every=50,
  )
  c.evaluation.update(batch_size=128, prompt_buckets=(33,))


def _full(c: config_dict.ConfigDict) -> None:
  """Every weight is trained instead of adapters."""
  c.lora.rank, c.model.quantize = 0, "none"


def _smoke(c: config_dict.ConfigDict) -> None:
  """Every stage in about half a minute."""
  c.workdir = "runs/smoke"
  c.task.sizes.update(train=500, validation=40, test=88)
  c.sft.update(steps=20, validate_every=10, warmup_steps=5)
  c.grpo.update(steps=8, prompts_per_iteration=8, num_generations=4, validate_every=4, warmup_steps=2, drift_every=4)
  c.evaluation.batch_size = 88


def _sudoku(c: config_dict.ConfigDict) -> None:
  if c.task.style != "terse":
    c.data.prompt_buckets = (256,)  # all of d1's Sudoku prompts are longer than its 200 tokens


def _countdown(c: config_dict.ConfigDict) -> None:
  c.task.name = "countdown"
  c.task.sizes.update(validation=200, test=400)
  if c.task.style == "terse":
    c.data.prompt_buckets = c.sft.prompt_buckets = c.evaluation.prompt_buckets = (24,)
    c.sft.completion_buckets = (24,)
    c.rollout.update(completion_length=24, block_length=24)
  else:
    c.task.options.numbers = (3, 3)
    c.grpo.update(steps=625, num_iterations=8, warmup_steps=120)


def _tiny_countdown(c: config_dict.ConfigDict) -> None:
  """Three numbers up to 20, which the tiny model learns to use, and more and more often to reach the target.

  There are too few such problems for a mix, whose tasks all have as many as the largest.
  """
  c.task.options = dict(numbers=(3, 3), largest=20)
  c.task.sizes.update(demonstrations=1500, train=5000)
  c.data.prompt_buckets = c.sft.prompt_buckets = c.evaluation.prompt_buckets = (16,)
  c.sft.completion_buckets = (18,)
  c.rollout.update(completion_length=18, block_length=18, diffusion_steps=6, temperature=1.0)
  # A masked number cannot be used.
  c.sft.update(steps=4000, batch_size=64, learning_rate=2e-3, weight_decay=0.1, p_mask_prompt=0.0, validate_every=500)


def _gsm8k(c: config_dict.ConfigDict) -> None:
  c.task.name = "gsm8k"
  c.task.sizes.update(demonstrations=8000, train=8000, validation=200, test=1319)
  if c.task.style != "terse":
    c.grpo.update(steps=642, num_iterations=12, warmup_steps=6)


def _math(c: config_dict.ConfigDict) -> None:
  _gsm8k(c)
  c.task.name = "math"
  c.task.sizes.update(demonstrations=12000, train=12000, test=500)
  if c.task.style != "terse":
    c.grpo.update(steps=550, warmup_steps=9)
