"""The tokenizer files of a Hugging Face folder, and the special ids that they name."""

import dataclasses
import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from d1jax.errors import reworded
from d1jax.files import decode, parse_json, read_bytes

CORE = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model")
"""The files that hold a vocabulary."""

EXTRAS = ("added_tokens.json", "special_tokens_map.json", "tokenizer_config.json", "chat_template.jinja")
"""The files that belong to a tokenizer and are of no use without a vocabulary."""

MODEL = ("generation_config.json", "config.json")
"""The files of the model that name token ids, in the order in which they win."""

DATE = "prompt_date.txt"
"""The day, as in 2026-11-30, that a chat template takes for today; a run keeps it among the tokenizer's files."""

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""The keys under which tokenizer_config.json and special_tokens_map.json name special tokens."""

MASKS = ("<|MASK|>", "|<MASK>|", "<[MASK]>", "<|mask|>")
"""The masks of SDAR, Fast-dLLM v2, iLLaDA and dllm's models, whose files do not always name them as `mask_token`."""

AGAIN = "; fetch the file again"


@dataclasses.dataclass(frozen=True)
class SpecialIds:
  """What the ids of a tokenizer mean.

  Attributes:
    mask_id: the id of the mask.
    stop_ids: each ends a completion; the first is the end of sequence.
    pad_id: the id of padding.
    bos_id: the id of the start of a text; None if the folder names none.
    vocab: ids from 0 to `vocab - 1` have a meaning, the mask included.
  """

  mask_id: int
  stop_ids: tuple[int, ...]
  pad_id: int
  bos_id: int | None
  vocab: int


def read(folder: Path) -> dict[str, bytes]:
  """Reads the files of a folder that say what its tokenizer is; names that it does not have are left out.

  Raises:
    ValueError: there is no such folder, or a name is no regular file: a link to nothing, a folder, a pipe.
  """
  if not folder.is_dir():
    raise ValueError(f"{folder} is not a folder; name the folder that holds the tokenizer's files")
  paths = {name: folder / name for name in (*CORE, *EXTRAS, *MODEL, DATE)}
  return {name: read_bytes(path) for name, path in paths.items() if path.is_symlink() or path.exists()}


def parse(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
  """Reads a JSON object; an absent file is an empty one, a broken file a ValueError."""
  if name not in files:
    return {}
  with reworded("", AGAIN):
    return parse_json(decode(files[name], name), name, dict)


def text(files: Mapping[str, bytes], name: str) -> str:
  """The text of a file that is there; a ValueError where it is not UTF-8."""
  with reworded("", AGAIN):
    return decode(files[name], name)


def with_mask(files: Mapping[str, bytes], mask_id: int) -> dict[str, bytes]:
  """The files that have to change so that a tokenizer without a mask has the token `MASKS[-1]` with this id.

  Args:
    files: the files of the folder. A folder with a tokenizer.model alone has no file in which tokens are added.
    mask_id: the first id behind the tokenizer's own.
  """
  text, found = MASKS[-1], dict[str, dict[str, Any]]()
  token = {
    "content": text,
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
    "special": True,
  }
  if "tokenizer.json" in files:
    core = parse(files, "tokenizer.json")
    found["tokenizer.json"] = core | {"added_tokens": [*(core.get("added_tokens") or []), {"id": mask_id, **token}]}
  elif "vocab.json" in files:
    found["added_tokens.json"] = parse(files, "added_tokens.json") | {text: mask_id}
  else:
    return {}
  settings = parse(files, "tokenizer_config.json") | {"mask_token": text}
  if isinstance(settings.get("added_tokens_decoder"), dict):
    settings["added_tokens_decoder"] = {**settings["added_tokens_decoder"], str(mask_id): token}
  found["tokenizer_config.json"] = settings
  return {name: json.dumps(value, indent=2, ensure_ascii=False).encode() for name, value in found.items()}


def date(files: Mapping[str, bytes]) -> datetime.date:
  """The day that a chat template takes for today: the one that the files name, or the present one."""
  if DATE not in files:
    return datetime.date.today()
  written = text(files, DATE).strip()
  try:
    return datetime.date.fromisoformat(written)
  except ValueError:
    raise ValueError(f"{DATE}: {written[:40]!r} is not a date; write one like 2026-11-30") from None


def _content(name: str, key: str, value: Any) -> str:
  """The text of a token that is written as a string or as an object with a `content`."""
  text = value.get("content") if isinstance(value, dict) else value
  if not isinstance(text, str) or not text:
    raise ValueError(f"{name}: {key} is {value!r}; expected a token's text")
  return text


def named_tokens(files: Mapping[str, bytes]) -> dict[str, str | None]:
  """The texts of the special tokens by role (`bos_token`, ...), for the chat template and for their ids.

  tokenizer_config.json wins over special_tokens_map.json, which transformers reads for old folders only; a null in it
  means that there is no such token. A role that neither file has is absent.
  """
  found: dict[str, str | None] = {}
  for name in ("tokenizer_config.json", "special_tokens_map.json"):
    values = parse(files, name)
    for role in ROLES:
      if role in values and role not in found:
        found[role] = None if values[role] is None else _content(name, role, values[role])
  return found


def extra_tokens(files: Mapping[str, bytes]) -> list[str]:
  """The texts of the special tokens without a role: `additional_special_tokens` and `extra_special_tokens`."""
  texts: list[str] = []
  for name in ("tokenizer_config.json", "special_tokens_map.json"):
    values = parse(files, name)
    for key in ("additional_special_tokens", "extra_special_tokens"):
      listed = values.get(key) or []
      if not isinstance(listed, list | dict):
        raise ValueError(f"{name}: {key} is {listed!r}; expected a list of tokens")
      items = listed.values() if isinstance(listed, dict) else listed
      texts += [_content(name, key, item) for item in items]
  return list(dict.fromkeys(texts))


def named_ids(files: Mapping[str, bytes], key: str) -> tuple[tuple[int, ...], str]:
  """The ids under a key such as `eos_token_id`, and the file that names them; () and '' if no file does."""
  for name in MODEL:
    value = parse(files, name).get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for i in ids:
      if not isinstance(i, int) or isinstance(i, bool):
        raise ValueError(f"{name}: {key} is {value!r}; expected a token id, a list of them or null")
    if ids:
      return tuple(dict.fromkeys(ids)), name
  return (), ""


def special_ids(files: Mapping[str, bytes], own: Mapping[str, int | None], *, size: int) -> SpecialIds:
  """Finds the special ids of a folder; none is built in.

  generation_config.json wins over config.json, and both over the tokenizer's files: the weights were trained with the
  ids of the model's files. The start of a text is the exception, because it is part of what the chat template
  writes and templates take it from the tokenizer's files: Dream's config.json says 151643 (`<|endoftext|>`), its
  tokenizer_config.json `<|beginoftext|>`, 151665.

  Where nothing names a mask (a causal model that is the start of a diffusion model), it is a new id, the first one
  behind the tokenizer's own. Where nothing names a padding, it is the first stop id.

  Args:
    files: the files of the folder.
    own: what the tokenizer's own files say, by the key that config.json has for it (`eos_token_id`, ...). A
      `bos_token_id` of None means that there is none.
    size: the size of the tokenizer, one more than its highest id.

  Raises:
    ValueError: no file names a stop id, an id is neither the tokenizer's nor the model's, or the mask doubles as
      a stop or a padding.
  """
  model_size = parse(files, "config.json").get("vocab_size")
  limit = max(size, model_size) if isinstance(model_size, int) else size

  def ids(key: str) -> tuple[int, ...]:
    named, name = named_ids(files, key)
    value = own.get(key)
    if not named and value is not None:
      named, name = (value,), "the tokenizer"
    for i in named:
      if not 0 <= i < limit:
        raise ValueError(
          f"{name}: {key}={i} is outside the tokenizer ({size} ids) and config.json's vocab_size={model_size};"
          " correct the id, or fetch the files of one and the same model"
        )
    return named

  stops = ids("eos_token_id")
  if not stops:
    looked = ", ".join((*MODEL, "tokenizer_config.json", "special_tokens_map.json"))
    raise ValueError(f"no file names an end of sequence (looked at {looked}); write eos_token_id into config.json")
  mask, pad = (*ids("mask_token_id"), size)[0], (*ids("pad_token_id"), stops[0])[0]
  for role, taken in (("eos_token_id", stops), ("pad_token_id", (pad,))):
    if mask in taken:
      raise ValueError(f"mask_token_id={mask} is also the {role}; give the mask an id of its own in config.json")
  start = (own["bos_token_id"],) if "bos_token_id" in own else ids("bos_token_id")
  bos = start[0] if start else None
  vocab = max(size, mask + 1, pad + 1, *(i + 1 for i in stops), 0 if bos is None else bos + 1)
  return SpecialIds(mask, stops, pad, bos, vocab)
