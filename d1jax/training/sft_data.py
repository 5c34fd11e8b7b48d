"""The demonstrations of supervised fine-tuning, from a task or from the user's files, as token ids."""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from d1jax.data import demonstrations as demonstration_files
from d1jax.data import examples as example_files
from d1jax.data.examples import Example, Row
from d1jax.data.packing import Packer, row_shape
from d1jax.data.sft_batches import padding
from d1jax.data.tokenizer import Tokenizer, body, prefix
from d1jax.diffusion.corruption import LLADA, NoiseSpec
from d1jax.errors import reworded
from d1jax.rl.prompts import Prompts
from d1jax.tasks import held_out as held_out_questions
from d1jax.tasks import tables

ENDINGS = (".jsonl", ".ndjson", ".json", ".parquet")
"""The files of a folder that are read."""


class Demonstrations(NamedTuple):
  """Tokenised prompts and answers, including stop ids."""

  prompts: list[list[int]]
  completions: list[list[int]]


@dataclasses.dataclass(frozen=True)
class Options:
  """The options of fine-tuning.

  Attributes:
    batch_size: demonstrations per step.
    prompt_buckets: the prompt lengths that are compiled.
    completion_buckets: the answer lengths that are compiled, each one with each prompt length.
    accumulation: micro-batches per step.
    truncate: whether answers longer than the largest bucket are cut; if not, they are left out.
    p_mask_prompt: the probability that a prompt token is masked.
    logits_tile: vocabulary ids per tile of logits; None: no tiles.
    noise: how completions are masked.
    grow: the block lengths of the first parts of the stage; its last part has the network's own.
    mask_noise_steps: the number of first steps with noise on the mask's embedding.
    packed: whether demonstrations share rows, all as long as the largest two buckets together.
    ends: behind an answer in a packed row of full attention stand so many end-of-sequence tokens at most, which are
      learned, so that the model knows what follows an answer in a longer canvas.

  Raises:
    ValueError: block lengths that do not grow.
  """

  batch_size: int
  prompt_buckets: tuple[int, ...]
  completion_buckets: tuple[int, ...]
  accumulation: int = 1
  truncate: bool = False
  p_mask_prompt: float = 0.0
  logits_tile: int | None = None
  noise: NoiseSpec = LLADA
  grow: tuple[int, ...] = ()
  mask_noise_steps: int = 0
  packed: bool = False
  ends: int = 0

  def check(self, block: int | None) -> None:
    """Raises a ValueError if the options do not fit a network with blocks of this length (None: full attention)."""
    if self.packed and self.truncate:
      raise ValueError(
        "sft.packed=True puts whole demonstrations into rows, but sft.truncate=True cuts answers: use"
        " sft.truncate=False, which leaves long ones out, or sft.packed=False"
      )
    if self.ends and (not self.packed or block is not None):
      raise ValueError(
        f"sft.ends={self.ends} is for packed rows of full attention, which have no padding behind an answer; here it"
        " is learned as it is: use sft.ends=0"
      )
    if self.grow and block is None:
      raise ValueError(
        f"sft.grow={self.grow} makes blocks longer up to those of the model, but this one has full attention: set"
        f" model.block, for example to {8 * self.grow[-1]}, or sft.grow=()"
      )
    lengths = (*self.grow, *([] if block is None else [block]))
    for short, long in itertools.pairwise(lengths):
      if short >= long or long % short:
        raise ValueError(
          f"sft.grow={self.grow} with model.block={block}: each length must be a proper divisor of the next one, and"
          f" {short} is none of {long}; 1, 2, 4, 8 are, for example"
        )
    if block is not None and min(self.completion_buckets) < block:
      raise ValueError(
        f"sft.completion_buckets={self.completion_buckets} has a bucket that is shorter than one block of the model,"
        f" {block} tokens (model.block): let all be at least {block}"
      )


def of_task(prompts: Prompts, style: str, options: Options, block: int | None = None) -> Demonstrations:
  """The task's own demonstrations; the number of those that are too long is printed. `block` is the model's."""
  answers = [prompts.task.demonstration(record, style) for record in prompts.records]
  found = Demonstrations(
    [list(ids) for ids in prompts.ids], [_ended(prompts.tokenizer, answer, options) for answer in answers]
  )
  _report(options, "demonstrations", found, block)
  return found


def of_file(
  root: str | None, name: str, tokenizer: Tokenizer, held_out: float, options: Options, block: int | None = None
) -> tuple[Demonstrations, Demonstrations | None]:
  """The demonstrations of the user's data for training, and those held out for validation.

  Demonstrations for questions of the tasks' test splits are left out; the number of those that are too long is printed.

  Args:
    root: a folder, `tables.HUB` for the Hugging Face hub, or None.
    name: the path, from `root`, of a file of JSON lines, of a Parquet file or of a folder of such files. On the hub:
      `OWNER/NAME`, or `OWNER/NAME:CONFIGURATION`, of which the split `train` is read; an absolute path is a file there
      too.
    tokenizer: of the model.
    held_out: see `d1jax.data.demonstrations.split`.
    options: of the fine-tuning.
    block: that of the model, for packed rows.

  Raises:
    ValueError: the data cannot be read, is wrong, or does not fit the buckets; the message names the file.
  """
  root = None if Path(name).is_absolute() else root
  path = name if root == tables.HUB else str(Path(root or "") / name)
  rows = [row for file, found in _sources(root, name, path) for row in _examples(file, found)]
  kept = [row for row in rows if not held_out_questions.is_listed(row.question)]
  if len(kept) < len(rows):
    print(f"{path}: left out {len(rows) - len(kept)} of {len(rows)} demonstrations, which answer test questions")
  sides = demonstration_files.split(kept, held_out)
  found, validation = (_tokenised(tokenizer, side, options, block) for side in sides)
  places, (used, computed) = "buckets", _report(options, path, found[0], block, found[1])
  if options.packed:
    places, (used, computed) = "packed rows", packer_of(found[0], options, block, tokenizer.pad_id).padding()
  print(f"{path}: {used:,} tokens in {places} of {computed:,} ({used / computed:.0%} used)")
  return found[0], validation[0] if sides[1] else None


def _sources(root: str | None, name: str, path: str) -> Iterator[tuple[str, Iterable[Row]]]:
  """The files of the data, and their rows with their places."""
  if root == tables.HUB:
    repository, _, configuration = name.partition(":")
    yield name, tables.load(f"{name} train", repository, configuration or None, split="train")
    return
  files = [Path(path)]
  if Path(path).is_dir():
    files = sorted(file for file in Path(path).rglob("*") if file.suffix in ENDINGS and file.is_file())
    if not files:
      raise ValueError(f"{path} is a folder without a file of data; put files into it that end in {', '.join(ENDINGS)}")
  for file in files:
    if file.suffix == ".parquet" and file.is_file():
      yield str(file), tables.load(str(file), "parquet", data_files=str(file), split="train")
    else:
      yield str(file), example_files.json_lines(file)


def _examples(name: str, rows: Iterable[Row]) -> list[Example]:
  """The examples of a file: the user's own, or those of a published schema under d1's instruction."""
  walking = iter(rows)
  first = next(walking, None)
  if first is None:
    raise ValueError(f"{name} has no row; give a file with data")
  every = itertools.chain([first], walking)
  if example_files.form_of(first[1]) and not (
    example_files.form_of(first[1]) == "text" and demonstration_files.has_schema(first[1])
  ):
    return example_files.parse(every)
  found = demonstration_files.parse(every, name)
  return [Example(name, one.question, *demonstration_files.conversation(one)) for one in found]


def _tokenised(
  tokenizer: Tokenizer, side: Sequence[Example], options: Options, block: int | None
) -> tuple[Demonstrations, list[str]]:
  """The token ids of some examples, and the place of each.

  A text is cut into pieces that fit a row, or the largest completion bucket. The first one has the start token as its
  prompt, each other one the last token of the piece before, which is seen and not learned. With pieces of 4 tokens, the
  text `a b c d e f` is `start | a b c d` and `d | e f end`.
  """
  found, places = Demonstrations([], []), []
  longest = max(options.completion_buckets)
  if options.packed:
    longest = row_shape(options.prompt_buckets, options.completion_buckets, block)[0] - 1
  for example in side:
    with reworded(f"{example.place}: "):
      if example.messages:
        pieces = [(tokenizer.prompt(list(example.messages), ""), _ended(tokenizer, example.answer, options))]
      else:
        ids = [*prefix(tokenizer)[-1:], *body(tokenizer, example.answer), tokenizer.stop_ids[0]]
        pieces = [(ids[i : i + 1], ids[i + 1 : i + 1 + longest]) for i in range(0, len(ids) - 1, longest)]
    for prompt, completion in pieces:
      found.prompts.append(prompt)
      found.completions.append(completion)
      places.append(example.place)
  return found, places


def _ended(tokenizer: Tokenizer, answer: str, options: Options) -> list[int]:
  """The ids of an answer with the end-of-sequence tokens behind it; a hash of the text says how many."""
  number = int.from_bytes(hashlib.sha256(answer.encode()).digest()[:8], "big") % (options.ends + 1)
  return [*tokenizer.completion(answer), *[tokenizer.pad_id] * number]


def _report(
  options: Options, name: str, found: Demonstrations, block: int | None, places: Sequence[str] = ()
) -> tuple[int, int]:
  """Prints how many are left out or cut; returns the number of tokens, and of places for them in the buckets."""
  count, longest = len(found.prompts), max(options.completion_buckets)
  lengths = [len(prompt) + len(answer) for prompt, answer in zip(*found, strict=True)]
  named = lambda row, said: f" ({said}{places[row]})" if places and places[row] != name else ""
  if options.packed:
    width = row_shape(options.prompt_buckets, options.completion_buckets, block)[0]
    long = [i for i, length in enumerate(lengths) if length > width]
    if len(long) == count:
      least = min(range(count), key=lambda i: lengths[i])
      raise ValueError(
        f"none of {count} demonstrations fits a row of {width} tokens, the largest of"
        f" sft.prompt_buckets={options.prompt_buckets} and of sft.completion_buckets={options.completion_buckets}"
        f" together: raise one of them; the shortest{named(least, '')} has {lengths[least]}"
      )
    if long:
      print(
        f"{name}: left out {len(long)} of {count} demonstrations longer than a row of {width} tokens"
        f"{named(long[0], 'the first: ')}"
      )
    return sum(lengths) - sum(lengths[i] for i in long), width * count
  shut_out = [i for i, prompt in enumerate(found.prompts) if len(prompt) > max(options.prompt_buckets)]
  too_long = [i for i, answer in enumerate(found.completions) if len(answer) > longest]
  if shut_out:
    print(
      f"{name}: left out {len(shut_out)} of {count} prompts longer than {max(options.prompt_buckets)} tokens"
      f"{named(shut_out[0], 'the first: ')}"
    )
  if too_long:
    print(
      f"{name}: {'cut' if options.truncate else 'left out'} {len(too_long)} of {count} answers longer than {longest}"
      f" tokens{named(too_long[0], 'the first: ')}"
    )
  used, computed = padding(*found, options.prompt_buckets, options.completion_buckets, truncate=options.truncate)
  if not used:
    raise ValueError(
      f"none of {count} demonstrations fits sft.prompt_buckets={options.prompt_buckets} and"
      f" sft.completion_buckets={options.completion_buckets}: raise them"
    )
  return used, computed


def packer_of(found: Demonstrations, options: Options, block: int | None, pad_id: int) -> Packer:
  """What puts the demonstrations into packed rows, for a network with blocks of this length."""
  return Packer(
    *found, buckets=options.prompt_buckets, completion_buckets=options.completion_buckets, block=block, pad_id=pad_id
  )
