"""Tokenizers of Hugging Face folders: text as the library `tokenizers` reads it, conversations as the template says."""

import functools
import re
from collections.abc import Iterable, Mapping, Sequence

from tokenizers import Tokenizer as Backend

from d1jax.data import backend, chat, folder


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
    mask_id: of the mask, behind the tokenizer's own ids where the folder names none.
    stop_ids: each ends a completion.
    pad_id: of padding.
  """

  def __init__(self, files: Mapping[str, bytes]):
    """Builds a tokenizer.

    Args:
      files: the folder's files by name, see `d1jax.data.folder.read`.

    Raises:
      ValueError: a file is broken, absent or contradicts another, or the chat template does not work.
    """
    left_out = folder.CORE[1:] if "tokenizer.json" in files else ("tokenizer.model",)
    self.files: Mapping[str, bytes] = {name: content for name, content in files.items() if name not in left_out}
    self._tokenizer = backend.build(self.files)
    self._size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    tokens = folder.named_tokens(self.files)
    own = {f"{role}_id": self._tokenizer.token_to_id(text) if text else None for role, text in tokens.items()}
    ids = folder.special_ids(self.files, own, size=self._size)
    self.vocab, self.mask_id, self.stop_ids, self.pad_id = ids.vocab, ids.mask_id, ids.stop_ids, ids.pad_id
    self._bos = () if ids.bos_id is None else (ids.bos_id,)
    added = self._tokenizer.get_added_tokens_decoder()
    special = {i: token.content for i, token in added.items() if token.special}
    roles = {self.mask_id, self.pad_id, *self.stop_ids, *self._bos}
    promoted = [added[i] for i in sorted(roles - set(special)) if i in added]
    if promoted:
      self._tokenizer.add_special_tokens([token.content for token in promoted])
      special |= {i: added[i].content for i in roles if i in added}
    self._silent = roles | set(special)
    self._spelled = _any_of(special.values())
    source = chat.find_template(self.files)
    self._template = None if source is None else chat.ChatTemplate(source[0], tokens, name=source[1])
    self._end = self._turn_end()

  def prompt(self, messages: Sequence[dict[str, str]], prefill: str) -> list[int]:
    """The ids of a conversation that the model is to continue, the given start of its answer included.

    The chat template is asked for the start of an assistant's turn, and the prefill follows. No start token is added
    to those that the template writes. Without a template: the start token, where the folder names one, the
    contents of the messages one after the other, and the prefill.

    Raises:
      ValueError: the template fails, or the text becomes a mask.
    """
    if self._template is None:
      return [*self._bos, *self._encode("".join(m["content"] for m in messages) + prefill)]
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
      ids += self._encode(spelled[int(piece)]) if i % 2 else self._ids(self._tokenizer, piece)
    return ids

  def completion(self, text: str) -> list[int]:
    """The ids of an answer: the text, what the template writes behind an answer, and the end of sequence.

    What the template writes behind an answer ends with its first special token (LLaDA `<|eot_id|>`, Dream
    `<|im_end|>`). Where that is a stop id itself, no other follows.

    Raises:
      ValueError: the text becomes a mask.
    """
    end = self._end if self._end and self._end[-1] in self.stop_ids else [*self._end, self.stop_ids[0]]
    return [*self._encode(text), *end]

  def decode_all(self, rows: Sequence[Sequence[int]]) -> list[str]:
    """The texts of rows of ids; special tokens vanish, as do ids beyond the tokenizer.

    Bytes that are not UTF-8 become U+FFFD.
    """
    shown = [[i for i in row if 0 <= i < self._size and i not in self._silent] for row in rows]
    return self._tokenizer.decode_batch(shown, skip_special_tokens=True)

  def decode_raw(self, rows: Sequence[Sequence[int]]) -> list[str]:
    """The texts of rows of ids with special tokens spelled out; ids beyond the tokenizer vanish."""
    known = [[i for i in row if 0 <= i < self._size] for row in rows]
    return self._tokenizer.decode_batch(known, skip_special_tokens=False)

  @functools.cached_property
  def _literal(self) -> Backend:
    """A copy that reads special tokens as the characters they are made of."""
    copy = Backend.from_str(self._tokenizer.to_str())
    copy.encode_special_tokens = True
    return copy

  def _encode(self, text: str) -> list[int]:
    """The ids of text in which nothing is special."""
    return self._ids(self._literal if self._spelled.search(text) else self._tokenizer, text)

  def _ids(self, tokenizer: Backend, text: str) -> list[int]:
    try:
      ids = tokenizer.encode(text, add_special_tokens=False).ids
    except TypeError:
      raise ValueError(f"the text {text[:80]!r} is not Unicode (half a surrogate pair?); correct it") from None
    if self.mask_id in ids:
      raise ValueError(
        f"the text {text[:80]!r} becomes the mask (id {self.mask_id}), which the sampler would fill; change the text,"
        " or the mask_token_id of config.json if it is an ordinary token"
      )
    return ids

  def _turn_end(self) -> list[int]:
    """The ids that the template writes behind an answer, up to its first special token; none without one."""
    if self._template is None:
      return []
    answer = "TheAnswerOfTheAssistant"
    turns = [{"role": "user", "content": "A question"}, {"role": "assistant", "content": answer}]
    written, found, behind = self._template.render(turns, add_generation_prompt=False).rpartition(answer)
    if not found:
      raise ValueError(
        f"the chat template leaves out what the assistant says (it writes {written + behind!r}); correct the template"
      )
    first = self._spelled.search(behind)
    return self._ids(self._tokenizer, behind[: first.end()]) if first else []


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
  """Finds any of some texts, the longest first; nothing where there are none."""
  known = sorted(filter(None, texts), key=len, reverse=True)
  return re.compile("|".join(map(re.escape, known)) or r"(?!)")


def _unused(texts: Sequence[str]) -> str:
  """A word that none of some texts contains."""
  word = "CoveredToken"
  while any(word in text for text in texts):
    word += "X"
  return word
