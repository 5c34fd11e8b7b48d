"""The machine behind a Hugging Face tokenizer: one of the library `tokenizers`, built from a folder's files."""

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from d1jax.data import folder

SPLIT = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen2's division of text into words; every digit is one. Source: transformers, tokenization_qwen2.py."""

QWEN2_CLASSES = (None, "Qwen2Tokenizer", "Qwen2TokenizerFast", "DreamTokenizer")
"""The tokenizer classes whose vocab.json and merges.txt are read as Qwen2 reads them."""


def build(files: Mapping[str, bytes]) -> Tokenizer:
  """Builds the tokenizer of a folder: from tokenizer.json, or from vocab.json and merges.txt.

  The tokens that tokenizer_config.json (`added_tokens_decoder`) and added_tokens.json list are added under the ids
  that they have there, and those that have a role are special. Nothing is cut or padded, whatever tokenizer.json says.

  Raises:
    ValueError: a file is broken or absent, or two files give a token different ids.
  """
  tokenizer = _from_json(files) if "tokenizer.json" in files else _from_vocabulary(files)
  tokenizer.no_truncation()
  tokenizer.no_padding()
  special = {token for token in folder.named_tokens(files).values() if token is not None}
  special.update(folder.extra_tokens(files))
  declared = _declared(files, special)
  for content, (name, i, _) in declared.items():
    known = tokenizer.token_to_id(content)
    if known is not None and known != i:
      raise ValueError(f"{name} gives {content!r} the id {i}, but the vocabulary has it at {known}; {_ONE_MODEL}")
  tokenizer.add_tokens([token for _, _, token in sorted(declared.values(), key=lambda item: item[1])])
  for content, (name, i, _) in declared.items():
    got = tokenizer.token_to_id(content)
    if got != i:
      raise ValueError(
        f"{name} gives {content!r} the id {i}, but the next free id is {got}: tokens before it are absent; {_ONE_MODEL}"
      )
  _make_special(tokenizer, special)
  return tokenizer


_ONE_MODEL = "fetch the files of one and the same model"


def _from_json(files: Mapping[str, bytes]) -> Tokenizer:
  name = "tokenizer.json"
  model = folder.parse(files, name).get("model")
  if isinstance(model, dict) and model.get("dropout"):
    raise ValueError(f"{name}: model.dropout={model['dropout']} makes ids random; set it to null")
  try:
    return Tokenizer.from_str(files[name].decode("utf-8"))
  except Exception as error:  # what the library raises has no type of its own
    raise ValueError(f"{name} is not a file of the library tokenizers ({error}); fetch the file again") from None


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
    if not isinstance(i, int) or isinstance(i, bool) or i < 0:
      raise ValueError(f"vocab.json: the id of {token!r} is {i!r}; expected an integer. Fetch the file again")
  if len(set(vocab.values())) != len(vocab):
    raise ValueError("vocab.json: two tokens have the same id; fetch the file again")
  tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=_merges(files["merges.txt"], vocab)))
  tokenizer.normalizer = normalizers.NFC()
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(Regex(SPLIT), behavior="isolated", invert=False),
      pre_tokenizers.ByteLevel(add_prefix_space=bool(config.get("add_prefix_space")), use_regex=False),
    ]
  )
  tokenizer.decoder = decoders.ByteLevel()
  return tokenizer


def _merges(content: bytes, vocab: Mapping[str, int]) -> list[tuple[str, str]]:
  """The pairs of merges.txt, in order; each, and what it makes, must be in the vocabulary."""
  try:
    lines = content.decode("utf-8").replace("\r\n", "\n").removesuffix("\n").split("\n")
  except UnicodeDecodeError as error:
    raise ValueError(f"merges.txt: byte {error.start} is not UTF-8; fetch the file again") from None
  pairs = []
  for number, line in enumerate(lines, start=1):
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
  found: dict[str, tuple[str, int, AddedToken]] = {}
  owners: dict[int, tuple[str, str]] = {}

  def declare(name: str, i: Any, token: AddedToken) -> None:
    content = token.content
    if not isinstance(i, int) or isinstance(i, bool) or i < 0:
      raise ValueError(f"{name}: the id of {content!r} is {i!r}; expected an integer. Fetch the file again")
    other, known, _ = found.setdefault(content, (name, i, token))
    if known != i:
      raise ValueError(f"{other} gives {content!r} the id {known}, {name} gives it {i}; {_ONE_MODEL}")
    first, owner = owners.setdefault(i, (name, content))
    if owner != content:
      raise ValueError(f"{first} gives the id {i} to {owner!r}, {name} gives it to {content!r}; {_ONE_MODEL}")

  name = "tokenizer_config.json"
  for key, value in (folder.parse(files, name).get("added_tokens_decoder") or {}).items():
    if not isinstance(value, dict) or not isinstance(value.get("content"), str) or not key.isdecimal():
      raise ValueError(f"{name}: added_tokens_decoder has {key!r}: {value!r}, expected an id and a token's description")
    flags = {k: value[k] for k in ("single_word", "lstrip", "rstrip", "normalized", "special") if k in value}
    declare(name, int(key), AddedToken(value["content"], **flags))
  name = "added_tokens.json"
  for content, i in folder.parse(files, name).items():
    declare(name, i, AddedToken(content, special=content in special, normalized=content not in special))
  return found


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
