"""All fields of a configuration as flags, with what the comments in its file say about them: `--print_config`."""

import ast
import io
import shlex
import textwrap
import tokenize
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from d1jax.run import fields


def comments(source: str) -> dict[str, str]:
  """What the comments in the file of a preset say about its fields, by dotted name.

  A comment stands behind a field, or in the lines above it. Fields are those that `get_config` sets as `c.NAME = ...`,
  and the keywords of a `dict(...)` there.
  """
  behind: dict[int, str] = {}
  above: dict[int, str] = {}
  for token in tokenize.generate_tokens(io.StringIO(source).readline):
    if token.type == tokenize.COMMENT:
      alone = not token.line[: token.start[1]].strip()
      (above if alone else behind)[token.start[0]] = token.string.lstrip("# ")
  found: dict[str, str] = {}

  def note(name: str, first: int, last: int, value: ast.expr) -> None:
    lines: list[str] = []
    while above.get(first - 1 - len(lines)):
      lines.insert(0, above[first - 1 - len(lines)])
    inner = value.keywords if isinstance(value, ast.Call) and ast.unparse(value.func) == "dict" else []
    said = (behind.get(last, "") if not inner or first == last else "") or " ".join(lines)
    if said:
      found.setdefault(name, said)
    for keyword in inner:
      if keyword.arg and keyword.lineno > first:
        note(f"{name}.{keyword.arg}", keyword.lineno, keyword.value.end_lineno or keyword.lineno, keyword.value)

  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.FunctionDef) and node.name == "get_config":
      for each in ast.walk(node):
        if isinstance(each, ast.Assign) and len(each.targets) == 1 and isinstance(each.targets[0], ast.Attribute):
          root, _, name = ast.unparse(each.targets[0]).partition(".")
          if root == "c":
            note(name, each.lineno, each.end_lineno or each.lineno, each.value)
  return found


def listing(config: ConfigDict, about: Mapping[str, str], columns: int = 120) -> str:
  """All fields as flags of the command line, one a line, with what they mean.

  Args:
    config: the configuration.
    about: the meaning of fields and sections, by dotted name; those of `fields.OPTIONAL` need not be in it.
    columns: where lines are broken.
  """
  about = {name: field.about for name, field in fields.OPTIONAL.items()} | dict(about)
  found = [(name, value) for name, value in fields.leaves(config) if name != "mode"]
  found = [(name, value) for name, value in found if fields.is_open(name) or not _is_empty(value)]
  lines: list[str] = []
  entered: set[str] = set()
  for name, value in sorted(found, key=lambda field: "." in field[0]):
    parts = name.split(".")[:-1]
    for section in (".".join(parts[: end + 1]) for end in range(len(parts))):
      if section not in entered:
        entered.add(section)
        lines += [""] if "." not in section else []
        lines += _folded("", about.get(section, ""), columns)
    text = "" if _is_empty(value) else str(value)
    quoted = f'"{text}"' if "'" in text and '"' not in text else shlex.quote(text)
    lines += _folded(f"--config.{name}={quoted if text else ''}", about.get(name, ""), columns)
  return "\n".join(lines).strip("\n")


def _is_empty(value: Any) -> bool:
  return isinstance(value, ConfigDict) and not len(value)


def _folded(flag: str, about: str, columns: int) -> list[str]:
  """A flag and its meaning on one line, or the meaning in lines above it where that is too long."""
  if not about:
    return [flag] if flag else []
  if flag and len(flag) + len(about) + 4 <= columns:
    return [f"{flag}  # {about}"]
  lines = [f"# {line}" for line in textwrap.wrap(about, columns - 2)]
  return [*lines, flag] if flag else lines
