"""Every command and all Python that README and the pages print works, as far as parsers can tell.

Commands are read by the parsers that would read them: configuration files, preset words, fields and values, targets of
make, modules and their options, scripts. Nothing is trained. tests/launch/test_docs.py runs the dry runs.
"""

import ast
import functools
import importlib
import importlib.util
import inspect
import os
import re
import shlex
import string
from collections.abc import Iterator

import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

import d1jax
from d1jax import commands, main, presets
from d1jax.run import fields, limits
from tests import jobs
from tests.test_packaging import EXTRAS

PAGES = [jobs.ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")]
PAGES += sorted((jobs.ROOT / "docs").glob("*.md"))
TEXTS = {page.relative_to(jobs.ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
ASSIGNED = re.compile(r"([A-Z_]+)=(.*)", re.DOTALL)

OTHERS = ("pip", "source", "gcloud", "xpk", "kubectl", "sky", "hf", "xprof", "tensorboard", "curl", "git", "env", "cat")
"""Programs of others; they are not asked."""
OWN = ("python", "d1jax", "make", "bash")
INLINE = re.compile(
  r"(?<!`)`((?:python -[mc]|d1jax (?:train|sft|eval|generate|serve|export|aot)|make|bash) [^`]+"
  r"|launch/[^`]+|--config\.[^`]+)`(?!`)"
)
ANY_MODULE = ("pip", "venv", "http.server", "pytest", "mkdocs")


def blocks(text: str, *languages: str) -> list[str]:
  """The fenced blocks of some languages, without their indentation."""
  return [
    re.sub(rf"(?m)^{indent}", "", body) for indent, language, body in FENCE.findall(text) if language in languages
  ]


def is_command(words: list[str]) -> bool:
  """Whether words begin a command, and not the output of one."""
  return bool(words) and (words[0] in (*OWN, *OTHERS) or words[0].startswith(("launch/", "--config.")))


def split(line: str, values: dict[str, str]) -> Iterator[list[str]]:
  """Yields the commands of a line, without comments, variables, and where their output goes."""
  try:
    words = shlex.split(string.Template(line).safe_substitute(values), comments=True)
  except ValueError:  # a quotation mark of an output
    return
  while words and (given := ASSIGNED.fullmatch(words[0])):
    values[given[1]] = given[2]
    words = words[1:]
  command: list[str] = []
  for word in [*words, ";"]:
    if word in (";", "&&", "|", "<", ">"):
      yield command
      command = []
    else:
      command.append(word)


def printed(text: str) -> list[list[str]]:
  """The commands of a page: those in blocks of which the first line is one, and those in the middle of sentences."""
  found, values = [], {}  # a variable that a block sets has its value in later ones
  for block in blocks(text, "", "bash", "sh", "console"):
    lines = [line.removeprefix("$ ") for line in block.replace("\\\n", " ").splitlines()]
    ours = [command for line in lines for command in split(line, values) if command]
    if ours and is_command(ours[0]):
      found += [command for command in ours if is_command(command)] if "$ " in block[:2] else ours
  for inline in INLINE.findall(FENCE.sub("", text).replace("\n", " ")):
    found += [command for command in split(inline, {}) if command]
  return found


def configuration(arguments: list[str]) -> ConfigDict:
  """The configuration of a command line; an error if a part of it does not exist, or a value is not allowed."""
  argv, values = ["main", *arguments], flags.FlagValues()
  config_flags.DEFINE_config_file("config", None, "", flag_values=values)
  assert main.read(argv, values) == ["main"], "what is no flag"
  config = values["config"].value
  limits.check(config)
  return config


@functools.cache
def options(module: str) -> set[str]:
  """The options that a program of this repository adds to its parser."""
  path = importlib.util.find_spec(module).origin
  with open(path, encoding="utf-8") as file:
    return set(re.findall(r'add_argument\(\s*"(--?[\w-]+)"', file.read()))


def is_a_value(argument: str) -> bool:
  """Whether an argument is complete: `--config.trackers=wandb`, not `--config.trackers`, nor one with NAME or k."""
  name, equals, value = argument.partition("=")
  return bool(equals) and not re.fullmatch(r"[A-Z]+|[a-z]|[0-9.]*\.\.\.", value) and not re.search(r"[A-Z]{2}", name)


def check(command: list[str], own_files: dict[str, str]) -> None:
  """An AssertionError or a RunError if a command cannot work."""
  program, *rest = command
  rest = [f"--config={own_files[arg[9:]]}" if arg[9:] in own_files else arg for arg in rest]
  if program == "python" and rest[:1] == ["-c"]:
    compile(rest[1], "page", "exec")
  elif program == "python":
    assert rest[0] == "-m", "python -m MODULE"
    module, *rest = rest[1:]
    rest = [arg for arg in rest if arg not in ("--print_config", "--check")]
    if module == "d1jax.main":
      assert not rest or configuration(rest)
    elif module == "d1jax":
      check(["d1jax", *rest], own_files)
    elif module not in ANY_MODULE:
      assert importlib.util.find_spec(module), module
      given = {arg.partition("=")[0] for arg in rest if arg.startswith("--")}
      assert module == "d1jax.lm_eval" or {arg for arg in given if not arg.startswith("--config.")} <= options(module)
  elif program == "d1jax":
    written = commands.flags([arg for arg in rest if arg not in ("--print_config", "--check")])
    assert written is None or configuration(written)
  elif program == "make":
    makefile = (jobs.ROOT / "Makefile").read_text()
    for word in rest:
      name, equals, _ = word.partition("=")
      assert re.search(rf"^{name} \?=" if equals else rf"^{name}:", makefile, re.MULTILINE), word
  elif program == "bash" or program.startswith("launch/"):
    script = rest.pop(0) if program == "bash" else program
    assert os.access(jobs.ROOT / script, os.R_OK if script == "launch/env.sh" else os.X_OK), script
    ours = [arg for arg in rest if arg.startswith("--config") and is_a_value(arg)]
    named = ours[:1] if ours and ours[0].startswith("--config=") else ["--config=configs/grpo.py"]
    assert configuration([*named, *(arg for arg in ours if arg.startswith("--config."))])
  elif program == "pip":
    named = re.findall(r"\[([\w,]+)\]", " ".join(arg for arg in rest if "d1jax" in arg or arg.startswith(".")))
    assert {extra for names in named for extra in names.split(",")} <= {*EXTRAS, "all"}
  elif program.startswith("--config."):
    check_fields(command)


def check_fields(arguments: list[str]) -> None:
  """Some configuration takes the fields, or has them, if there is no value."""
  if not all(map(is_a_value, arguments)):
    names = [arg.partition("=")[0].removeprefix("--config.") for arg in arguments]
    assert not [name for name in names if not re.search(r"[A-Z]{2}", name) and name not in known_fields()], names
    return
  failures = []
  for name in ("grpo", "sft", "generate", "eval", "report", "serve", "export", "aot"):
    try:
      configuration([f"--config=configs/{name}.py", *arguments])
      return
    except (main.errors.RunError, ValueError) as error:
      failures.append(str(error))
  raise AssertionError(failures[0])


@functools.cache
def known_fields() -> set[str]:
  """All fields of all configurations, and their sections."""
  names = [
    name
    for preset in ("grpo", "generate", "eval", "report", "serve", "export", "aot")
    for name, _ in fields.leaves(presets.load(preset))
  ]
  return {".".join(name.split(".")[: end + 1]) for name in names for end in range(name.count(".") + 1)}


@pytest.mark.parametrize("name", TEXTS)
def test_every_command_of_a_page_can_be_run(name, monkeypatch, tmp_path, capsys):
  monkeypatch.chdir(jobs.ROOT)
  own_files = {}
  for block in blocks(TEXTS[name], "python"):
    if (title := re.match(r"# (\w+\.py): python", block)) is not None:
      (tmp_path / title[1]).write_text(block)
      own_files[title[1]] = str(tmp_path / title[1])
  wrong = []
  for command in printed(TEXTS[name]):
    try:
      check(command, own_files)
    except (AssertionError, main.errors.RunError, ValueError, SyntaxError) as error:
      wrong.append(f"{shlex.join(command)}: {error}")
  assert not wrong, "\n".join(wrong)


def test_the_pages_have_commands():
  found = [command for text in TEXTS.values() for command in printed(text)]
  assert sum(command[:3] == ["python", "-m", "d1jax.main"] for command in found) > 40
  assert sum(command[0] == "d1jax" for command in found) > 5


def resolved(name: str) -> object:
  """What a dotted name beginning with a package stands for."""
  first, *rest = name.split(".")
  thing = importlib.import_module(first)
  for end, part in enumerate(rest, 1):
    if not hasattr(thing, part):
      importlib.import_module(".".join([first, *rest[:end]]))
    thing = getattr(thing, part)
  return thing


def of_d1jax(tree: ast.AST) -> Iterator[tuple[str, list[str]]]:
  """Yields the dotted names of d1jax that code uses, with the keywords of their calls."""
  names = {"d1jax": "d1jax"}
  for node in ast.walk(tree):
    if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("d1jax"):
      for alias in node.names:
        names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        yield f"{node.module}.{alias.name}", []
    elif isinstance(node, ast.Import):
      yield from ((alias.name, []) for alias in node.names if alias.name.startswith("d1jax"))
  for node in ast.walk(tree):
    found = node.func if isinstance(node, ast.Call) else node
    if isinstance(found, ast.Attribute | ast.Name):
      first, _, rest = ast.unparse(found).partition(".")
      if first in names and re.fullmatch(r"[\w.]*", rest) and (rest or isinstance(node, ast.Call)):
        keywords = [each.arg for each in node.keywords if each.arg] if isinstance(node, ast.Call) else []
        yield f"{names[first]}.{rest}".rstrip("."), keywords


@pytest.mark.parametrize("name", [name for name, text in TEXTS.items() if blocks(text, "python")])
def test_python_of_a_page_uses_what_there_is(name):
  for block in blocks(TEXTS[name], "python"):
    for used, keywords in of_d1jax(ast.parse(block)):
      thing = resolved(used)
      if keywords and callable(thing):
        taken = inspect.signature(thing).parameters
        free = any(each.kind is each.VAR_KEYWORD for each in taken.values())
        assert free or set(keywords) <= set(taken), f"{used}({', '.join(keywords)})"


def test_the_names_of_the_package_resolve():
  assert resolved("d1jax.generate") is d1jax.generate
