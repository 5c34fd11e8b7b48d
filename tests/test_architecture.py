"""The house rules of docs and design, read off the syntax tree."""

import ast
import dataclasses
import importlib.util
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

from d1jax.data.tokenizer import train_sentencepiece
from d1jax.diffusion.rollout import SamplerSpec
from d1jax.models.transformer import TransformerSize
from d1jax.run import fields as optional

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "d1jax").rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}

# A room, and the rooms it may import beside itself, all of which stand above it in this table: no arrow of the import
# graph runs back up. Files at the top of the package are rooms of their own.
# `columns` writes tables, `files` reads what comes from outside, `errors` says how a run ends, `helper` runs programs,
# `hub` downloads, and `version` is a number; everybody may use them.
BASE = {"columns", "errors", "files", "helper", "hub", "version"}
ALLOWED = {
  "columns": set(),
  "errors": set(),
  "files": set(),
  "helper": set(),
  "version": set(),
  "hub": {"errors"},
  "intervals": set(),
  "keys": set(),
  "look": set(),
  "microbatch": set(),
  "models": set(),
  "tasks": set(),
  "data": set(),
  "state": {"models"},
  "parallel": {"state", "models"},
  "fingerprint": {"parallel"},
  "diffusion": {"keys", "microbatch"},
  "rl": {"keys", "state", "microbatch", "diffusion", "data", "tasks"},
}
ALLOWED["source"] = {"models", "data", "parallel"}
ALLOWED["weights"] = {"models", "parallel", "state", "keys", "fingerprint", "source"}
ALLOWED["publish"] = {"models", "parallel", "state", "weights"}
ALLOWED["generation_config"] = {"diffusion"}
ALLOWED["card"] = {"diffusion"}
ALLOWED["model"] = {"models", "data", "diffusion", "parallel", "state", "source", "weights", "publish"}
ALLOWED["completer"] = {"keys", "state", "diffusion", "parallel", "model"}
ALLOWED["optimizer"] = {"state"}
ALLOWED["run"] = set(ALLOWED)
ALLOWED["telemetry"] = set(ALLOWED)
ALLOWED["evaluation"] = set(ALLOWED) - {"telemetry"}
ALLOWED["training"] = set(ALLOWED) - {"evaluation"}
ALLOWED["aot"] = ALLOWED["training"] | {"training"}
ALLOWED["generation"] = ALLOWED["export"] = ALLOWED["evaluation"] | {"evaluation"}
ALLOWED["serving"] = ALLOWED["generation"] | {"generation"}
ALLOWED["report"] = ALLOWED["export"] | {"telemetry"}
ALLOWED["results"] = ALLOWED["report"] | {"report"}
ALLOWED["page"] = ALLOWED["results"] | {"results", "generation"}
ALLOWED["preferences"] = ALLOWED["evaluation"] | {"evaluation", "training"}
ALLOWED["stages"] = ALLOWED["page"] | {"page", "training"}
ALLOWED["recipe"] = ALLOWED["stages"] | {"stages", "preferences"}
ALLOWED["distill"] = ALLOWED["recipe"] | {"recipe", "export"}
ALLOWED["presets"] = set(ALLOWED)
ALLOWED["harness"] = set(ALLOWED)
ALLOWED["lm_eval"] = set(ALLOWED)
ALLOWED["commands"] = set(ALLOWED)
ALLOWED["main"] = set(ALLOWED)
ALLOWED[""] = set(ALLOWED)  # the package's own file
ALLOWED["__main__"] = set(ALLOWED)

NNX = {
  "Module",
  "Param",
  "Rngs",
  "split",
  "merge",
  "state",
  "eval_shape",
  "to_pure_dict",
  "vmap",
  "split_rngs",
  "initializers",
  "State",
  "Variable",
  "PARTITION_NAME",
}


def name_of(path: Path) -> str:
  return path.relative_to(ROOT).as_posix()


def module_of(path: Path) -> str:
  parts = path.relative_to(ROOT).with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
  parts = module.split(".")
  return parts[1] if len(parts) > 1 else ""


MODULES = {module_of(path) for path in SOURCES}


def imports_of(path: Path) -> Iterator[str]:
  """The modules of the package that a file imports, wherever the statement stands."""
  for node in ast.walk(TREES[path]):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "d1jax")
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{name_of(path)}:{node.lineno}: relative import"
      if node.module and node.module.split(".")[0] == "d1jax":
        for alias in node.names:
          inner = f"{node.module}.{alias.name}"
          yield inner if inner in MODULES else node.module


def calls(tree: ast.AST, suffix: str) -> list[ast.Call]:
  """The calls of `suffix` or of `something.suffix`."""
  return [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ("." + ast.unparse(n.func)).endswith("." + suffix)]


def words(tree: ast.AST) -> set[str]:
  """Every name that a file uses."""
  found: set[str] = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Name):
      found.add(node.id)
    elif isinstance(node, ast.Attribute):
      found.add(node.attr)
    elif isinstance(node, ast.alias):
      found.add(node.name.split(".")[-1])
  return found


def each_file(check):
  """A test of every file: one test, that lists every file that offends, since all are read in one pass."""

  def test():
    offenders = []
    for path in SOURCES:
      try:
        check(path)
      except AssertionError as error:
        offenders.append(f"{name_of(path)}: {error}")
    assert not offenders, "\n".join(offenders)

  test.__name__, test.__doc__ = check.__name__, check.__doc__
  return test


def test_every_room_stands_on_rooms_that_are_named_before_it():
  known: set[str] = set()
  for room, below in ALLOWED.items():
    assert below <= known, f"{room} may import {below - known}, which stand below it"
    known.add(room)


@each_file
def test_imports_point_one_way(path):
  room = room_of(module_of(path))
  allowed = ALLOWED[room] | {room} | (BASE if room not in BASE else set())
  for module in imports_of(path):
    assert room_of(module) in allowed, f"{name_of(path)} imports {module}"


def test_no_module_imports_itself_through_others():
  graph = {module_of(path): set(imports_of(path)) for path in SOURCES}
  done: set[str] = set()

  def visit(module: str, trail: tuple[str, ...]) -> None:
    assert module not in trail, " -> ".join((*trail, module))
    if module not in done:
      for inner in sorted(graph.get(module, ())):
        visit(inner, (*trail, module))
      done.add(module)

  for module in graph:
    visit(module, ())


@each_file
def test_meshes_and_placements_are_built_in_one_file(path):
  if name_of(path) == "d1jax/parallel/mesh.py":
    assert "PartitionSpec" in words(TREES[path])
    return
  assert not {"PartitionSpec", "P", "make_mesh_auto", "create_device_mesh", "shard_map"} & words(TREES[path])
  assert "jax.make_mesh" not in ast.unparse(TREES[path])
  assert not calls(TREES[path], "Mesh")
  assert not calls(TREES[path], "NamedSharding")


@each_file
def test_few_files_know_of_configurations(path):
  knows = {"ConfigDict", "config_dict", "ml_collections", "config_flags"} & words(TREES[path])
  known = ("d1jax/main.py", "d1jax/export.py", "d1jax/evaluation/", "d1jax/training/configured.py")
  known += (
    "d1jax/generation/command.py",
    "d1jax/serving/command.py",
    "d1jax/aot/command.py",
    "d1jax/page/command.py",
    "d1jax/distill.py",
    "d1jax/recipe.py",
    "d1jax/results.py",
    "d1jax/serving/chat.py",
    "d1jax/run/",
    "d1jax/presets.py",
    "d1jax/preferences.py",
    "d1jax/stages.py",
  )
  allowed = name_of(path).startswith(known)
  assert allowed or not knows


@each_file
def test_rl_and_diffusion_know_no_command_line(path):
  if room_of(module_of(path)) in ("rl", "diffusion"):
    assert "grpo." not in path.read_text(encoding="utf-8")
    assert "--config" not in path.read_text(encoding="utf-8")


@each_file
def test_a_small_part_of_nnx_is_used_and_by_models_alone(path):
  used = {
    node.attr
    for node in ast.walk(TREES[path])
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "nnx"
  }
  assert used <= NNX
  flax = [n for n in ast.walk(TREES[path]) if isinstance(n, ast.ImportFrom) and (n.module or "").startswith("flax")]
  assert all([alias.name for alias in n.names] == ["nnx"] for n in flax)
  assert not flax or room_of(module_of(path)) == "models"


@each_file
def test_files_and_functions_are_short(path):
  assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
  for node in ast.walk(TREES[path]):
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
      assert node.end_lineno is not None
      assert node.end_lineno - node.lineno < 100, node.name


def public_definitions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.ClassDef]:
  """Public functions and classes of a module, and the public methods of its public classes."""
  for node in tree.body:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
      yield node
      if isinstance(node, ast.ClassDef):
        for inner in node.body:
          is_call = isinstance(inner, ast.FunctionDef) and inner.name == "__call__"
          if isinstance(inner, ast.FunctionDef) and (is_call or not inner.name.startswith("_")):
            yield inner


@each_file
def test_what_is_public_is_documented(path):
  assert ast.get_docstring(TREES[path]), "the module"
  for node in public_definitions(TREES[path]):
    assert ast.get_docstring(node), node.name


@each_file
def test_compiled_programs_state_where_things_live(path):
  room = room_of(module_of(path))
  jits = calls(TREES[path], "jit")
  compiling = ("training", "evaluation", "generation", "weights", "publish", "completer", "recipe", "stages", "serving")
  if room in compiling or name_of(path) == "d1jax/models/load.py":
    for call in jits:
      stated = {keyword.arg for keyword in call.keywords}
      assert {"in_shardings", "out_shardings"} <= stated, f"line {call.lineno}"
    partials = [c for c in calls(TREES[path], "partial") if "jit" in ast.unparse(c.args[0])]
    assert not partials
  else:
    assert not jits, f"only {compiling} and the reader of weights compile"
  decorated = [d for n in ast.walk(TREES[path]) if isinstance(n, ast.FunctionDef) for d in n.decorator_list]
  assert not [d for d in decorated if ast.unparse(d) in ("jit", "jax.jit")]


@each_file
def test_nothing_is_suppressed(path):
  text = path.read_text(encoding="utf-8")
  for comment in ("# noqa", "# type: ignore", "# pylint", "# ruff:", "# pragma", "# mypy:"):
    assert comment not in text


def load_config(name: str, *words: str):
  spec = importlib.util.spec_from_file_location(f"config_{name}", ROOT / "configs" / f"{name}.py")
  assert spec is not None
  assert spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config(*words)
  optional.complete(config)
  return config


def leaves(config, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
  for name, value in config.to_dict().items() if hasattr(config, "to_dict") else config.items():
    if isinstance(value, dict):
      yield from leaves(value, (*prefix, name))
    else:
      yield (*prefix, name)


STAGE = "STAGE"
"""Stands for `sft` or `grpo` where a line serves both."""


class Reads(ast.NodeVisitor):
  """The config fields that a file reads: attribute chains that start at a configuration, through local names.

  A configuration is a parameter that is annotated as ConfigDict, an attribute `.config`, or a local name that was
  assigned from one.
  A section counts as read whole only where it is unpacked (`**`, `.to_dict()`, `.items()`) or handed to a function.
  """

  def __init__(self) -> None:
    self.scopes: list[dict[str, tuple[str, ...]]] = [{}]
    self.fields: set[tuple[str, ...]] = set()
    self.whole: set[tuple[str, ...]] = set()

  def path(self, node: ast.expr) -> tuple[str, ...] | None:
    if isinstance(node, ast.Name):
      return next((scope[node.id] for scope in reversed(self.scopes) if node.id in scope), None)
    if isinstance(node, ast.Attribute):
      if node.attr == "config":
        return ()
      base = self.path(node.value)
      return None if base is None else (*base, node.attr)
    if isinstance(node, ast.Subscript) and self.path(node.value) == ():
      return (STAGE,)
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "ConfigDict":
      return ()
    return None

  def visit_FunctionDef(self, node: ast.FunctionDef) -> None:  # the name is ast's
    scope: dict[str, tuple[str, ...]] = {}
    for argument in (*node.args.args, *node.args.kwonlyargs):
      if argument.annotation is not None and ast.unparse(argument.annotation) == "ConfigDict":
        scope[argument.arg] = () if argument.arg == "config" else (STAGE,)
    self.scopes.append(scope)
    self.generic_visit(node)
    self.scopes.pop()

  def visit_Assign(self, node: ast.Assign) -> None:
    self.visit(node.value)
    targets, values = node.targets, [node.value]
    if isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple):
      targets, values = node.targets[0].elts, node.value.elts
    for target, value in zip(targets, values, strict=False):
      found = self.path(value)
      if isinstance(target, ast.Name) and found is not None:
        self.scopes[-1][target.id] = found

  def visit_Attribute(self, node: ast.Attribute) -> None:
    found = self.path(node)
    if found:
      self.fields.add(found)
    self.generic_visit(node)

  def visit_Call(self, node: ast.Call) -> None:
    whole = [argument for argument in node.args if isinstance(argument, ast.Attribute)]
    whole += [k.value for k in node.keywords]
    if isinstance(node.func, ast.Attribute) and node.func.attr in ("to_dict", "items"):
      whole.append(node.func.value)
    for argument in whole:
      found = self.path(argument)
      if found and (len(found) > 1 or found[0] not in ("sft", "dpo", "grpo", STAGE)):  # a stage is read field by field
        self.whole.add(found)
    self.generic_visit(node)


@pytest.fixture(scope="module")
def reads() -> Reads:
  found = Reads()
  for tree in TREES.values():
    found.visit(tree)
  return found


CONFIGS = [
  ("grpo", ""),
  ("grpo", "llada_8b"),
  ("grpo", "smoke,countdown"),
  ("grpo", "llada_8b,math"),
  ("sft", "llada_8b"),
  ("sft", "adapt,block"),
  ("dpo", ""),
  ("dpo", "lora,gsm8k"),
  ("distill", ""),
  ("grpo", "tiny,sudoku,countdown"),
  ("grpo", "small,word_problems"),
  ("eval", ""),
  ("eval", "llada_8b,gsm8k,math"),
  ("export",),
  ("report",),
  ("generate",),
  ("serve",),
  ("aot", "llada_8b,v5e,full"),
]


@pytest.mark.parametrize("arguments", CONFIGS, ids=str)
def test_every_field_of_a_config_is_read_by_some_line(arguments, reads):
  unread = []
  for leaf in leaves(load_config(*arguments)):
    same = [leaf, (STAGE, *leaf[1:])] if leaf[0] in ("sft", "dpo", "grpo") else [leaf]
    unpacked = any(form[:n] in reads.whole for form in same for n in range(1, len(leaf) + 1))
    if not unpacked and not reads.fields.intersection(same):
      unread.append(".".join(leaf))
  assert not unread


def test_the_reader_of_fields_can_tell():
  found = Reads()
  found.visit(
    ast.parse("def f(config: ConfigDict, other):\n  s = config.sft\n  g(s.steps, **config.rollout)\n  other.beta")
  )
  assert ("sft", "steps") in found.fields
  assert ("rollout",) in found.whole
  assert not {path for path in found.fields if path[-1] in ("beta", "batch_size")}
  assert ("sft",) not in found.whole


def test_sections_that_are_unpacked_have_the_fields_of_what_they_fill():
  config = load_config("grpo", "")
  assert set(config.rollout) == {field.name for field in dataclasses.fields(SamplerSpec)}
  assert set(config.tokenizer) == set(inspect.signature(train_sentencepiece).parameters) - {"texts"}
  assert set(config.model.overrides) <= {field.name for field in dataclasses.fields(TransformerSize)}
