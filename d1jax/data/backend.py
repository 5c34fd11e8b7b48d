"""The machine behind a Hugging Face tokenizer: one of the library `tokenizers`, built from a folder's files."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from d1jax.data import folder

SPLIT = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen2's division of text into words; every digit is one. Source: transformers, tokenization_qwen2.py."""

QWEN2_CLASSES = (None, "Qwen2Tokenizer", "Qwen2TokenizerFast", "DreamTokenizer")
"""The tokenizer classes whose vocab.json and merges.txt are read as Qwen2 reads them."""

LARGEST_ID = 2**31 - 1
"""The library counts to 2**32, arrays of ids to this."""

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@contextlib.contextmanager
def library(name: str) -> Iterator[None]:
  """Turns whatever the library raises into a ValueError that names a file: what it raises has no type of its own.

  A panic of it is a BaseException.
  """
  try:
    yield
  except (KeyboardInterrupt, SystemExit, GeneratorExit):
    raise
  except MemoryError:
    raise ValueError(f"{name}: the tokenizer needs more memory than is allowed; use another one") from None
  except BaseException as error:
    reason = " ".join(str(error).split())[:200]
    raise ValueError(
      f"{name}: the library tokenizers fails ({type(error).__name__}: {reason}); fetch the file again"
    ) from None


def build(files: Mapping[str, bytes]) -> Tokenizer:
  """Builds the tokenizer of a folder: from tokenizer.json, or from vocab.json and merges.txt.

  The tokens that tokenizer_config.json (`added_tokens_decoder`) and added_tokens.json list are added under the ids
  that they have there, and tokens with a role are special. Nothing is truncated or padded, even if tokenizer.json asks
  for it.

  Raises:
    ValueError: a file is broken or absent, or two files give a token different ids.
  """
  tokenizer = _from_json(files) if "tokenizer.json" in files else _from_vocabulary(files)
  name = "tokenizer.json" if "tokenizer.json" in files else "vocab.json"
  with library(name):
    tokenizer.no_truncation()
    tokenizer.no_padding()
  special = {token for token in folder.named_tokens(files).values() if token is not None}
  special.update(folder.extra_tokens(files))
  declared = _declared(files, special)
  for content, (file, i, _) in declared.items():
    known = tokenizer.token_to_id(content)
    if known is not None and known != i:
      raise ValueError(f"{file} gives {content!r} the id {i}, but the vocabulary has it at {known}; {_ONE_MODEL}")
  with library(name):
    tokenizer.add_tokens([token for _, _, token in sorted(declared.values(), key=lambda item: item[1])])
  for content, (file, i, _) in declared.items():
    got = tokenizer.token_to_id(content)
    if got != i:
      raise ValueError(
        f"{file} gives {content!r} the id {i}, but the next free id is {got}: tokens before it are absent; {_ONE_MODEL}"
      )
  _make_special(tokenizer, special)
  return tokenizer


_ONE_MODEL = "fetch the files of one and the same model"


def _from_json(files: Mapping[str, bytes]) -> Tokenizer:
  name = "tokenizer.json"
  model = folder.parse(files, name).get("model")
  if isinstance(model, dict) and model.get("dropout"):
    raise ValueError(f"{name}: model.dropout={model['dropout']} makes ids random; set it to null")
  with library(name):
    return Tokenizer.from_str(folder.text(files, name))


def _from_vocabulary(files: Mapping[str, bytes]) -> Tokenizer:
  """A byte-level BPE as Qwen2 has it: NFC, Qwen2's words, bytes."""
  config = folder.parse(files, "tokenizer_config.json")
  kind = config.get("tokenizer_class")
  if kind not in QWEN2_CLASSES:
    raise ValueError(
      f"tokenizer_config.json: vocab.json and merges.txt of a {kind} are not supported, only those of Qwen2's kin;"
      " save the tokenizer with transformers, which writes tokenizer.json"
    )
  for name, other in (("vocab.json", "merges.txt"), ("merges.txt", "vocab.json")):
    if name not in files:
      raise ValueError(f"{other} is there, but {name} is not; fetch {name}, or tokenizer.json")
  vocab = folder.parse(files, "vocab.json")
  for token, i in vocab.items():
    _check_id("vocab.json", token, i)
  if len(set(vocab.values())) != len(vocab):
    raise ValueError("vocab.json: two tokens have the same id; fetch the file again")
  merges = _merges(folder.text(files, "merges.txt"), vocab)
  with library("vocab.json and merges.txt"):
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
  tokenizer.normalizer = normalizers.NFC()
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(Regex(SPLIT), behavior="isolated", invert=False),
      pre_tokenizers.ByteLevel(add_prefix_space=bool(config.get("add_prefix_space")), use_regex=False),
    ]
  )
  tokenizer.decoder = decoders.ByteLevel()
  return tokenizer


def _check_id(name: str, token: str, i: object) -> None:
  if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i <= LARGEST_ID:
    raise ValueError(
      f"{name}: the id of {token[:80]!r} is {i!r}; expected an integer from 0 to {LARGEST_ID}. Fetch the file again"
    )


def _merges(content: str, vocab: Mapping[str, int]) -> list[tuple[str, str]]:
  """The pairs of merges.txt, in order; each, and what it makes, must be in the vocabulary."""
  pairs = []
  for number, line in enumerate(content.replace("\r\n", "\n").removesuffix("\n").split("\n"), start=1):
    if number == 1 and line.startswith("#version"):
      continue
    left, space, right = line.partition(" ")
    if not (left and space and right) or " " in right:
      raise ValueError(f"merges.txt line {number}: {line!r} is not two tokens; fetch the file again")
    for token in (left, right, left + right):
      if token not in vocab:
        raise ValueError(f"merges.txt line {number}: {token!r} is not in vocab.json; {_ONE_MODEL}")
    pairs.append((left, right))
  return pairs


def _declared(files: Mapping[str, bytes], special: set[str]) -> dict[str, tuple[str, int, AddedToken]]:
  """The tokens that the folder lists beside its vocabulary: text -> (file, id, token)."""
  declared: dict[str, tuple[str, int, AddedToken]] = {}
  owners: dict[int, tuple[str, str]] = {}

  def declare(name: str, i: Any, token: AddedToken) -> None:
    content = token.content
    _check_id(name, content, i)
    other, known, _ = declared.setdefault(content, (name, i, token))
    if known != i:
      raise ValueError(f"{other} gives {content!r} the id {known}, {name} gives it {i}; {_ONE_MODEL}")
    first, owner = owners.setdefault(i, (name, content))
    if owner != content:
      raise ValueError(f"{first} gives the id {i} to {owner!r}, {name} gives it to {content!r}; {_ONE_MODEL}")

  name = "tokenizer_config.json"
  listed = folder.parse(files, name).get("added_tokens_decoder") or {}
  if not isinstance(listed, dict):
    raise ValueError(f"{name}: added_tokens_decoder is not an object; fetch the file again")
  for key, value in listed.items():
    flags = {flag: value[flag] for flag in _FLAGS if flag in value} if isinstance(value, dict) else {}
    is_id = key.isascii() and key.isdecimal() and len(key) < 11
    described = isinstance(value, dict) and isinstance(value.get("content"), str)
    if not is_id or not described or not all(isinstance(flag, bool) for flag in flags.values()):
      shortened = f"{value!r:.120}"
      raise ValueError(
        f"{name}: added_tokens_decoder has {key[:80]!r}: {shortened}, expected an id and a token's description"
      )
    with library(name):
      token = AddedToken(value["content"], **flags)
    declare(name, int(key), token)
  name = "added_tokens.json"
  for content, i in folder.parse(files, name).items():
    with library(name):
      token = AddedToken(content, special=content in special, normalized=content not in special)
    declare(name, i, token)
  return declared


def _make_special(tokenizer: Tokenizer, special: set[str]) -> None:
  """Makes the named tokens special; one that the tokenizer does not have is an error."""
  for content in sorted(special):
    if tokenizer.token_to_id(content) is None:
      raise ValueError(
        f"tokenizer_config.json or special_tokens_map.json names {content!r}, but no file gives it an id;"
        " fetch added_tokens.json or tokenizer.json"
      )
  known = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
  missing = [t for t in sorted(special) if t not in known or not known[t].special]
  tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in missing])
