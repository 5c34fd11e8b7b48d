"""Tokenizers of Hugging Face folders: text as the library `tokenizers` reads it, conversations as the template says."""

import datetime
import functools
import re
from collections.abc import Iterable, Mapping, Sequence

from d1jax.data import backend, characters, chat, folder


def own_files(files: Mapping[str, bytes]) -> dict[str, bytes]:
  """The files of a folder that make its tokenizer.

  If the chat template writes the date and there is no file of the date yet, a file with today's date is added: so
  prompts do not change while the files do not.
  """
  left_out = folder.CORE[1:] if "tokenizer.json" in files else ("tokenizer.model",)
  core = {name: content for name, content in files.items() if name not in left_out}
  template = chat.find_template(core)
  if template and "strftime_now" in template[0] and folder.DATE not in core:
    core[folder.DATE] = datetime.date.today().isoformat().encode()
  return core


class HuggingFaceTokenizer:
  """The tokenizer of a folder with a tokenizer.json, or with vocab.json and merges.txt.

  Special tokens come from the chat template alone. Text that spells one (`<|mdm_mask|>` in a question) is encoded as
  ordinary characters, unlike in transformers: a mask in a prompt would be a hole that the sampler fills. Any other
  text gets the ids that transformers gives it. Added tokens that are not special (Dream's `<tool_call>`) are read as
  in transformers.

  Ids above the tokenizer's own, up to the model's vocabulary, have no text: LLaDA's 8B has 126,349 tokens and
  126,464 logits.

  Attributes:
    files: the content of the files that make this tokenizer, by name.
    vocab: ids from 0 to `vocab - 1` have a meaning, the mask included.
    mask_id: the id of the mask; if the folder names none, the first id after the tokenizer's own.
    stop_ids: each ends a completion.
    pad_id: the id of padding.
    unk_id: the id of a character without a token; None if the folder names none.
  """

  def __init__(self, files: Mapping[str, bytes]):
    """Builds a tokenizer; the chat template is read when it is first needed.

    Args:
      files: the folder's files by name, see `d1jax.data.folder.read`.

    Raises:
      ValueError: a file is broken, absent or contradicts another.
    """
    self.files: Mapping[str, bytes] = own_files(files)
    self._tokenizer = backend.build(self.files)
    self._name = "tokenizer.json" if "tokenizer.json" in self.files else "vocab.json"
    self._size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    self._tokens = folder.named_tokens(self.files)
    known_ids = {
      f"{role}_id": self._tokenizer.token_to_id(text) if text else None for role, text in self._tokens.items()
    }
    if known_ids.get("mask_token_id") is None:
      found = map(self._tokenizer.token_to_id, folder.MASKS)
      known_ids["mask_token_id"] = next((i for i in found if i is not None), None)
    ids = folder.special_ids(self.files, known_ids, size=self._size)
    self.vocab, self.mask_id, self.stop_ids, self.pad_id = ids.vocab, ids.mask_id, ids.stop_ids, ids.pad_id
    self.unk_id = known_ids.get("unk_token_id")
    self._bos = () if ids.bos_id is None else (ids.bos_id,)
    adds_bos = folder.parse(self.files, "tokenizer_config.json").get("add_bos_token")
    self._start = () if adds_bos is False else self._bos
    added = self._tokenizer.get_added_tokens_decoder()
    special = {i: token.content for i, token in added.items() if token.special}
    roles = {self.mask_id, self.pad_id, *self.stop_ids, *self._bos}
    promoted = [added[i] for i in sorted(roles - set(special)) if i in added]
    if promoted:
      self._tokenizer.add_special_tokens([token.content for token in promoted])
      special |= {i: added[i].content for i in roles if i in added}
    self._silent = roles | set(special)
    self._spelled = _any_of(special.values())

  def try_template(self) -> None:
    """Raises a ValueError if the chat template does not parse, or writes no answer."""
    _ = self._written_end

  def try_tokenizer(self) -> None:
    """Raises a ValueError if a question and an answer cannot be encoded and decoded."""
    question = self.prompt([{"role": "user", "content": "A question"}], "")
    self.decode_all([question, self.completion("An answer")])

  def prompt(self, messages: Sequence[dict[str, str]], prefill: str) -> list[int]:
    """The ids of a conversation that the model is to continue, the given start of its answer included.

    The chat template is asked for the start of an assistant's turn, and the prefill follows. No start token is added
    to those that the template writes. Without a template: the start token, where the folder names one and does
    not say `"add_bos_token": false`, the contents of the messages one after the other, and the prefill.

    Raises:
      ValueError: the template fails, or the text becomes a mask.
    """
    if self._template is None:
      return [*self._start, *self._encode("".join(m["content"] for m in messages) + prefill)]
    # What is special in the messages is covered before the template sees it and read as characters afterwards.
    spelled: list[str] = []
    key = _unused([self._template.source, prefill, *(text for message in messages for text in message.values())])

    def cover(text: str) -> str:
      def mark(match: re.Match[str]) -> str:
        spelled.append(match[0])
        return f"{key}{len(spelled) - 1}{key}"

      return self._spelled.sub(mark, text)

    covered = [{name: cover(text) for name, text in message.items()} for message in messages]
    written = self._template.render(covered, add_generation_prompt=True) + cover(prefill)
    ids: list[int] = []
    for i, piece in enumerate(re.split(f"{key}(\\d+){key}", written)):
      ids += self._encode(spelled[int(piece)]) if i % 2 else self._ids(piece)
    return ids

  def completion(self, text: str) -> list[int]:
    """The ids of an answer: the text, the text that the template writes after it, and the end of sequence.

    The text that the template writes after an answer ends with its first special token (LLaDA `<|eot_id|>`, Dream
    `<|im_end|>`). Where that is a stop id itself, no other follows.

    Raises:
      ValueError: the text becomes a mask.
    """
    end = self._end if self._end and self._end[-1] in self.stop_ids else [*self._end, self.stop_ids[0]]
    return [*self._encode(text), *end]

  def written(self, messages: Sequence[dict[str, str]], begin_answer: bool) -> str:
    """A conversation as the chat template writes it; without a template, the contents one after the other.

    Raises:
      ValueError: the template fails.
    """
    if self._template is None:
      return "".join(message["content"] for message in messages)
    return self._template.render(messages, add_generation_prompt=begin_answer)

  def encode(self, text: str) -> list[int]:
    """The ids that transformers gives a text: special tokens that it spells are special.

    The start token stands in front, where the folder names one and does not say `"add_bos_token": false`, and the text
    does not spell it.

    Raises:
      ValueError: the text becomes a mask.
    """
    ids = self._ids(text)
    return ids if ids[:1] == list(self._start) else [*self._start, *ids]

  def unknown(self, text: str) -> list[str]:
    """The characters of a text that have no token, each once."""
    distinct = list(dict.fromkeys(text))
    decoded = self.decode_all([self._encode(char) for char in distinct])
    return [char for char, read in zip(distinct, decoded, strict=True) if not characters.is_read(char, read)]

  def decode_all(self, rows: Sequence[Sequence[int]]) -> list[str]:
    """The texts of rows of ids; special tokens vanish, as do ids beyond the tokenizer.

    Bytes that are not UTF-8 become U+FFFD.
    """
    visible = [[i for i in row if 0 <= i < self._size and i not in self._silent] for row in rows]
    return self._decode(visible, skip_special=True)

  def decode_raw(self, rows: Sequence[Sequence[int]]) -> list[str]:
    """The texts of rows of ids with special tokens spelled out; ids beyond the tokenizer vanish."""
    return self._decode([[i for i in row if 0 <= i < self._size] for row in rows], skip_special=False)

  def _decode(self, rows: list[list[int]], *, skip_special: bool) -> list[str]:
    with backend.library(self._name):
      return self._tokenizer.decode_batch(rows, skip_special_tokens=skip_special)

  def _encode(self, text: str) -> list[int]:
    """The ids of a text in which special tokens are read as ordinary characters."""
    if not self._spelled.search(text):
      return self._ids(text)
    self._tokenizer.encode_special_tokens = True
    try:
      return self._ids(text)
    finally:
      self._tokenizer.encode_special_tokens = False

  def _ids(self, text: str) -> list[int]:
    characters.check_unicode(text)
    with backend.library(self._name):
      ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
    characters.check_no_mask(text, ids, self.mask_id)
    return ids

  @functools.cached_property
  def _template(self) -> chat.ChatTemplate | None:
    source = chat.find_template(self.files)
    if source is None:
      return None
    return chat.ChatTemplate(source[0], self._tokens, name=source[1], date=folder.date(self.files))

  @functools.cached_property
  def _written_end(self) -> str:
    """The text that the template writes after an answer, up to its first special token; empty without one."""
    if self._template is None:
      return ""
    answer = "TheAnswerOfTheAssistant"
    turns = [{"role": "user", "content": "A question"}, {"role": "assistant", "content": answer}]
    written, answered, behind = self._template.render(turns, add_generation_prompt=False).rpartition(answer)
    if not answered:
      raise ValueError(
        f"the chat template leaves the assistant's turn out (it writes {(written + behind)[:200]!r}); correct the"
        " template"
      )
    first = self._spelled.search(behind)
    return behind[: first.end()] if first else ""

  @functools.cached_property
  def _end(self) -> list[int]:
    """The ids of `_written_end`."""
    return self._ids(self._written_end) if self._written_end else []


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
  """Finds any of some texts, the longest first; without texts it finds nothing."""
  known = sorted(filter(None, texts), key=len, reverse=True)
  return re.compile("|".join(map(re.escape, known)) or r"(?!)")


def _unused(texts: Sequence[str]) -> str:
  """A word that none of some texts contains."""
  word = "CoveredToken"
  while any(word in text for text in texts):
    word += "X"
  return word
