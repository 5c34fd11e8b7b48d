"""Tables as text: for a terminal in at most 80 columns, as Markdown, and lists of words with what they mean."""

import itertools
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

WIDTH = 80
"""The columns of a terminal that all have."""


def table(head: Sequence[str], rows: Sequence[Sequence[str]], keys: int = 1) -> str:
  """A plain table, in at most `WIDTH` columns if its single columns are narrow.

  What is wider becomes several tables below each other, each with the first columns again:

  ```
  arm     n  solved
  ---  ----  ------
  SFT  1319    61.2

  arm  tokens
  ---  ------
  SFT     187
  ```

  Args:
    head: the names of the columns.
    rows: a text for each column.
    keys: the number of columns that say whose row it is, and are repeated; the first one is aligned left.
  """
  cells = [head, *rows]
  widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
  parts: list[list[int]] = [[]]
  room = WIDTH - sum(widths[:keys]) - 2 * (keys - 1)
  left = room
  for column in range(keys, len(head)):
    if parts[-1] and widths[column] + 2 > left:
      parts, left = [*parts, []], room
    parts[-1].append(column)
    left -= widths[column] + 2
  lines = [head, ["-" * width for width in widths], *rows]

  def shown(part: Sequence[int]) -> str:
    chosen = [*range(keys), *part]
    texts = (
      [row[column].rjust(widths[column]) if column else row[0].ljust(widths[0]) for column in chosen] for row in lines
    )
    return "\n".join("  ".join(text).rstrip() for text in texts)

  return "\n\n".join(map(shown, parts))


def markdown(head: Sequence[str], rows: Iterable[Sequence[Any]], align: str = "--:") -> str:
  """A Markdown table; the first column is aligned left, the others as `align` says, `--:` (numbers) or `---`."""
  lines = [head, ["---", *itertools.repeat(align, len(head) - 1)], *rows]
  return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def explained(pairs: Iterable[tuple[str, str]], widest: int = 32) -> list[str]:
  """Lines of words, each with what it means beside it, in at most `WIDTH` columns.

  Args:
    pairs: words and their meanings.
    widest: the most columns of the words; the meaning of a longer one begins on the next line.
  """
  found = list(pairs)
  width = max((len(word) for word, _ in found if len(word) <= widest), default=0)
  lines = []
  for word, meaning in found:
    first, *more = textwrap.wrap(meaning, WIDTH - width - 4, break_on_hyphens=False) or [""]
    if len(word) > width:
      lines += [f"  {word}", f"  {'':{width}}  {first}"]
    else:
      lines.append(f"  {word:{width}}  {first}")
    lines += [f"  {'':{width}}  {line}" for line in more]
  return [line.rstrip() for line in lines]
