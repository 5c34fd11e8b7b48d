"""d1's recipe: masked SFT, then diffu-GRPO, then evaluation.

`--config=configs/grpo.py:WORDS`, words separated by commas: what is trained (`tiny`, the default; `smoke`; `small`,
ten times as many weights; `lora`, adapters on a downloaded model; `full`, all weights of one), a task (`sudoku`, the
default; `countdown`, `gsm8k`, `math`, `word_problems`), or several, which are mixed, `block` for a block-causal
network, and a method (`d1`, the default; `wd1`, `coupled`, `espo`, `gdpo`, `spg`, `stepmerge`, `tracerl`, `ebpo`,
`agrpo`, `justgrpo`; docs/methods.md). Any field can be set on the command line: `--config.grpo.learning_rate=1e-4`.
docs/configuration.md lists more fields, which few people set.

`lora` and `full` are d1's diffu-GRPO on the model that `--config.model.pretrained` names; docs/d1.md sets each of their
values beside d1's. They take one more word: `v5e`, `v5p`, `v6e` or `h100` sets the mesh for 8 or more of these chips
(v5e and v6e with `full`: 16). `llada_8b` is the old word for `lora`, and `llada_8b,full` for `full`.
"""

import runpy
from pathlib import Path
from typing import Any

from ml_collections import config_dict

METHODS = runpy.run_path(str(Path(__file__).with_name("methods.py")))["METHODS"]

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

ATTENTION = ("block",)
SIZES = ("tiny", "smoke", "small", "lora", "full")
TASKS = ("sudoku", "countdown", "gsm8k", "math", "word_problems")

# Sizes of the mesh axes (fsdp, tensor), with adapters and with every weight trained. In an update, fsdp x tensor chips
# share the weights; in a rollout, only `tensor` chips do: with (2, 4), 8 and 4 chips. A small `tensor` keeps
# communication in rollouts low, and must be large enough that the weights fit.
CHIPS = {
  "v5e": ((2, 4), (4, 4)),  # 16 GiB a chip; a model in bfloat16 has 15
  "v6e": ((8, 1), (16, 1)),  # 32 GiB
  "v5p": ((1, 1), (8, 1)),  # 95 GiB
  "h100": ((1, 1), (8, 1)),  # 80 GB
}

WORDS = {
  "size": SIZES,
  "task": TASKS,
  "attention": ATTENTION,
  "method": tuple(METHODS),
  "of lora and full": tuple(CHIPS),
}
"""All preset words; the first size and the first task are the defaults."""

ADAM = dict(b2=0.99, weight_decay=0.1)


def get_config(words: str = "", alone: bool = True) -> config_dict.ConfigDict:
  """The configuration for the preset words; `alone` is False where it becomes a part of a mix."""
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
    shared = (*named, *chips, *(word for word in ATTENTION if word in chosen))
    return _mix({task: get_config(",".join((sizes[0], task, *shared)), False) for task in sorted(tasks)})

  c = config_dict.ConfigDict()
  c.mode = "grpo"
  c.seed = 0
  c.workdir = "runs/grpo"
  # Trackers of metrics besides metrics.jsonl, separated by commas: tensorboard, wandb, trackio, or your own FILE.py.
  c.trackers = "tensorboard"

  # Devices along each mesh axis; -1 stands for all remaining devices.
  c.mesh = dict(data=1, fsdp=-1, tensor=1, sequence=1)
  # Without an accelerator, the CPU is split into this many devices.
  c.cpu_devices = 2
  # Changes to `d1jax.parallel.mesh.RULES`: each logical axis maps to a mesh axis, a tuple of them, or None.
  c.rules = config_dict.ConfigDict()
  # Changes to these rules in rollouts. If there are any, weights are moved once per iteration.
  c.rollout_rules = config_dict.ConfigDict()
  # Devices of their own for rollouts, along each axis, such as data=4; they are not of `mesh`. See docs/performance.md.
  c.rollout_mesh = config_dict.ConfigDict()

  c.model = dict(
    # A model's folder or its name on the hub, such as GSAI-ML/LLaDA-8B-Instruct, which is downloaded. It sets the
    # sizes, the tokenizer and whether logits are shifted by one position.
    pretrained=config_dict.placeholder(str),
    size="llada_8b",  # the preset used without such a folder
    dtype="auto",  # of matrix products: bfloat16 on accelerators, float32 on CPUs
    remat=True,
    quantize="nf4",  # how the frozen base under adapters is stored: int8, nf4, or none for `dtype`
  )
  # Adapters; rank 0 trains every weight instead.
  c.lora = dict(
    rank=128,
    alpha=64.0,
    dropout=0.05,
    targets=("q_proj", "k_proj", "v_proj", "up_proj"),
  )

  # root: a folder with data files (docs/data.md); hub downloads published ones; for None, problems are generated.
  c.data = dict(root=config_dict.placeholder(str), prompt_buckets=(200,))
  c.task = dict(
    name="sudoku",
    module=config_dict.placeholder(str),  # the Python file of your own task, in place of `name`
    mix=config_dict.ConfigDict(),  # to mix tasks: {name: relative frequency of its prompts}
    style="d1",
    protocol="d1",  # how rewards are graded; evaluations are strict
    sizes=dict(demonstrations=64, train=20000, validation=400, test=880),  # of each task
    options=config_dict.ConfigDict(),  # options of the task; in a mix, {task name: options}
  )

  # d1's rollouts.
  c.rollout = dict(
    completion_length=256,
    diffusion_steps=128,
    block_length=32,
    temperature=0.9,
    cfg_scale=0.0,
    remasking="low_confidence",
    early_exit=False,  # True: finished rows cost nothing; not with the protocol d1, which reads further
    cache="none",  # or approximate: prefix, dual, window; see docs/performance.md
    schedule="static",  # or sequential; or threshold, factor, which unmask every confident token in a step
  )

  # Supervised fine-tuning before diffu-GRPO; with 0 steps there is none. d1's values are in configs/sft.py.
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
    logits_tile=4096,  # vocabulary ids per tile of logits; None: no tiles
    validate_every=100,
  )

  # d1's diffu-GRPO; one step is one rollout followed by num_iterations optimiser steps.
  c.grpo = dict(
    steps=475,
    prompts_per_iteration=16,
    num_generations=6,
    num_iterations=8,  # mu
    accumulation=2,  # micro-batches per optimiser step
    rollout_chunks=2,  # parts of a rollout; one is graded while the next one is computed
    grading_workers=8,  # processes that grade; 0: the run's own process grades
    # The method (docs/methods.md): the estimator of log p, the loss, the advantage. Each has a name (or your own Python
    # file) and options. The command line chooses another one with, for example, --config.grpo.loss=NAME.
    estimator=dict(name="one_step"),
    p_mask_prompt=0.15,  # probability that a prompt token is masked, for estimators that draw new masks
    loss=dict(
      name="clipped_token",
      epsilon=0.5,  # the ratio is clipped to 1 +- epsilon
      beta=0.04,  # weight of the KL
    ),
    aggregation="token",  # or sequence, fixed
    advantage=dict(name="mean"),
    # reward_weights: {component: weight}. overlong: length is penalised within this many last tokens. answered: the
    # reward for any answer that can be parsed. oversample: groups drawn for each one trained on; groups whose samples
    # all got the same reward are dropped first.
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
  # prompt_buckets: the padded prompt lengths of evaluations; for training they are in data.prompt_buckets.
  c.evaluation = dict(batch_size=96, prompt_buckets=(256, 512, 1024, 2048))

  presets = {
    "lora": (),
    "full": (_full,),
    "tiny": (_tiny,),
    "smoke": (_tiny, _smoke),
    "small": (_tiny, _small),
    "sudoku": (_sudoku,),
    "countdown": (_countdown,),
    "gsm8k": (_gsm8k,),
    "math": (_math,),
    "word_problems": (_word_problems,),
  }
  for apply in (*presets[sizes[0]], *presets[tasks[0]]):
    apply(c)
  if alone and (sizes[0], tasks[0]) == ("tiny", "countdown"):
    _tiny_countdown(c)
  if alone and (sizes[0], tasks[0]) == ("small", "word_problems"):
    _small_word_problems(c)
  in_blocks = "block" in chosen or "block" in c.model
  if in_blocks and "block" not in c.model:
    _block(c)
  if chips:
    _lay_out(c, chips[0])
  for name in named:
    _choose(c, METHODS[name], tasks[0], in_blocks)
  return c


def set_fields(section: config_dict.ConfigDict, fields: dict[str, Any]) -> None:
  """Sets fields. A part with a new name gets the given options, and keeps the KL options of the part it replaces."""
  for field, value in fields.items():
    if isinstance(value, dict) and value.get("name", section[field].name) != section[field].name:
      kept = {option: x for option, x in section[field].items() if option in ("beta", "kl", "kl_against")}
      section[field] = config_dict.ConfigDict(kept | value)
    elif isinstance(value, dict):
      section[field].update(value)
    else:
      section[field] = value


def _choose(c: config_dict.ConfigDict, method: Any, task: str, block_causal: bool) -> None:
  """Sets the fields of a method and, on the large model, the paper's hyperparameters; `tiny` keeps its own rates."""
  for section, fields in method.fields(c.rollout.to_dict(), block_causal=block_causal).items():
    set_fields(c[section], fields)
  if c.model.size in ("tiny", "small"):
    return
  given, optimiser_steps = (
    method.paper(c.rollout.to_dict(), task, block_causal=block_causal),
    c.grpo.steps * c.grpo.num_iterations,
  )
  for section, fields in given.items():
    set_fields(c[section], fields)
  # The warm-up counts optimiser steps, and their number depends on mu: the warm-up keeps its share of them.
  if "warmup_steps" not in given["grpo"]:
    c.grpo.warmup_steps = c.grpo.warmup_steps * c.grpo.steps * c.grpo.num_iterations // optimiser_steps


def _lay_out(c: config_dict.ConfigDict, chip: str) -> None:
  """In updates all weights are sharded along embed and gathered layer by layer; in rollouts they are not gathered.

  The base is stored in bfloat16: over 8 chips it takes 2 GiB of each, and NF4 is unpacked in every forward pass.
  """
  fsdp, tensor = CHIPS[chip][c.lora.rank == 0]
  c.mesh.update(data=-1, fsdp=fsdp, tensor=tensor)
  everywhere, shared = ("data", "fsdp", "tensor"), ("fsdp", "tensor")
  c.rules = dict(batch=everywhere, vocab=None, embed=shared, heads=None, kv_heads=None, mlp=None)
  cut = dict.fromkeys(("vocab", "heads", "kv_heads", "mlp", "adapter"), "tensor")
  c.rollout_rules = dict(batch=("data", "fsdp"), embed=None, **cut)
  c.model.quantize = "none"
  c.model.remat = chip != "v5p" or c.lora.rank == 0  # without it, an update of 12 rows per chip takes 53 GiB
  c.grpo.accumulation = 1


def _mix(parts: dict[str, config_dict.ConfigDict]) -> config_dict.ConfigDict:
  """Several tasks with equal frequencies; a field that depends on the task gets the largest value."""
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
  """A model of 0.2M parameters learns 4x4 Sudoku in minutes on two cores; values were chosen on validation grids."""
  c.mesh.update(data=-1, fsdp=1)
  c.model.update(size="tiny", remat=False, unroll=3, quantize="none")
  c.lora.update(rank=0, dropout=0.0, targets=PROJECTIONS)
  c.data.prompt_buckets = (33,)
  c.task.update(style="terse", protocol="strict")
  c.task.sizes.demonstrations = 24
  # Unmasking confident proposals first makes samples less diverse; a high temperature keeps the policy exploring.
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


def _small(c: config_dict.ConfigDict) -> None:
  """A model of 2M parameters, for tasks in words."""
  c.workdir = "runs/small"
  c.model.update(size="small", unroll=4)


def _block(c: config_dict.ConfigDict) -> None:
  """A block-causal network, such as SDAR's: its blocks are completed one after the other, on an exact cache.

  A downloaded model says how long its blocks are, or needs `model.block`; `tiny` has three blocks.
  """
  if c.model.size in ("tiny", "small"):
    size = c.rollout.completion_length // 3
    c.model.block = size
    # A block chooses among few proposals: at the temperature 4 of full attention few completions are well-formed.
    c.rollout.update(block_length=size, diffusion_steps=6, temperature=1.5)
  else:
    c.rollout.update(block_length=4, diffusion_steps=c.rollout.completion_length, temperature=1.0)
  # Rows end at the block of their stop id. The path of a rollout is scored exactly, with one pass a step of a block.
  c.rollout.early_exit = True
  c.task.protocol = "strict"
  c.grpo.estimator = dict(name="step_merged")


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
  """Three numbers up to 20: the tiny model learns to use them, and to reach the target more and more often.

  A mix takes as many problems of each task as of the largest one, and there are too few of these.
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


def _word_problems(c: config_dict.ConfigDict) -> None:
  c.task.name = "word_problems"
  c.task.sizes.update(demonstrations=600, train=8000, validation=160, test=700)
  if c.task.style == "terse":
    # A word is a token; so are a number, and a tag with its newline.
    tags = ("<reasoning>\n", "\n</reasoning>\n<answer>\n", "\n</answer>")
    c.tokenizer = dict(model_type="bpe", vocab_size=800, symbols=(*tags, *map(str, range(100))))
    c.data.prompt_buckets = c.sft.prompt_buckets = c.evaluation.prompt_buckets = (64,)
    c.sft.completion_buckets = (72,)
    c.rollout.update(completion_length=72, block_length=72, diffusion_steps=72, temperature=1.0)
  else:
    c.grpo.update(steps=642, num_iterations=12, warmup_steps=6)  # as for GSM8K


def _small_word_problems(c: config_dict.ConfigDict) -> None:
  """A block-causal network, which scores exactly the path that its rollout took.

  Three of five demonstrations say the answer alone, so that after SFT the network guesses; that steps pay is left for
  diffu-GRPO to find out. In blocks of 2 a number and the one that it is calculated from are never masked together.
  """
  c.model.block = 2
  c.task.options = dict(largest=12, steps=(2, 2), worked=0.4)
  c.task.sizes.update(demonstrations=2400, train=3000, validation=128, test=512)
  c.data.prompt_buckets = c.sft.prompt_buckets = c.evaluation.prompt_buckets = (52,)
  c.rollout.update(completion_length=40, block_length=2, diffusion_steps=40, early_exit=True)
  # A masked number cannot be used. In a trial with AdamW, 2,000 steps were too few to learn to read the numbers.
  c.sft.update(
    optimizer="muon",
    steps=2000,
    batch_size=8,
    completion_buckets=(40,),
    learning_rate=2e-3,
    warmup_steps=100,
    weight_decay=0.1,
    p_mask_prompt=0.0,
    weighting="flat",
    mask_ratio=(0.2, 1.0),
    validate_every=500,
  )
  c.grpo.update(
    estimator=dict(name="step_merged"),
    steps=90,
    prompts_per_iteration=8,
    oversample=2,
    num_generations=8,
    accumulation=2,
    rollout_chunks=1,
    learning_rate=2e-4,
    decay="constant",
    weight_decay=0.0,
    warmup_steps=10,
    validate_every=30,
  )
