"""What `pip install` brings: the wheel's files, its requirements, and what runs without its extras."""

import ast
import functools
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import packages_distributions

import pytest

import d1jax
from tests import QUICK_TO_COMPILE, jobs
from tests.test_architecture import MODULES, TREES, module_of

PROJECT = tomllib.loads((jobs.ROOT / "pyproject.toml").read_text())["project"]
PINS = (jobs.ROOT / "requirements.txt").read_text()
BY_MODULE = {module_of(path): tree for path, tree in TREES.items()}


def names(requirements: list[str]) -> set[str]:
  """The packages that requirements name."""
  return {re.split(r"[\[<>=~! ]", line)[0].lower().replace("_", "-") for line in requirements}


EXTRAS = {extra: names(lines) for extra, lines in PROJECT["optional-dependencies"].items()}
BASE = names(PROJECT["dependencies"])
COMPANIONS = {"ml-dtypes", "markupsafe", "sympy", "latex2sympy2-extended", "h11"}
"""What jax, jinja2, math-verify and uvicorn cannot be without."""


distributions = functools.cache(packages_distributions)


def imported(body: list[ast.stmt]) -> Iterator[str]:
  """What statements import when they are run at the top of a module."""
  for node in body:
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
      for alias in node.names:
        inner = f"{node.module}.{alias.name}"
        yield inner if inner in MODULES else node.module
    elif isinstance(node, ast.With | ast.Try):
      yield from imported(node.body)


def needed(*modules: str) -> set[str]:
  """The distributions that modules need before a function is called, those of the modules they import included."""
  found, todo = set(), [*modules]
  seen = set()
  while todo:
    module = todo.pop()
    if module in seen:
      continue
    seen.add(module)
    for name in imported(BY_MODULE[module].body):
      if name in MODULES:
        todo += [name, *(parent for parent in MODULES if name.startswith(f"{parent}."))]
      else:
        found.add(name.split(".")[0])
  owners = distributions()
  return names([owners.get(name, [name])[0] for name in found - sys.stdlib_module_names])


@pytest.mark.parametrize(
  ("modules", "extras"),
  [
    (
      [
        "d1jax.__main__",
        "d1jax.commands",
        "d1jax.main",
        "d1jax.generation.command",
        "d1jax.export",
        "d1jax.aot.command",
      ],
      [],
    ),
    (["d1jax.evaluation.command", "d1jax.generation.film"], ["eval"]),
    (["d1jax.serving.command"], ["serve"]),
    (["d1jax.recipe", "d1jax.run.trackers.tensorboard"], ["train"]),
    (["d1jax.tasks.verifier_process"], ["math"]),
    (["d1jax.run.trackers.wandb"], ["wandb"]),
    (["d1jax.run.trackers.trackio"], ["trackio"]),
    (["d1jax.harness"], ["lm_eval"]),
  ],
  ids=lambda value: "+".join(value) if value else "none",
)
def test_modules_need_what_is_declared(modules, extras):
  declared = BASE.union(*(EXTRAS[extra] for extra in extras))
  assert needed(*modules) - declared <= COMPANIONS


def test_the_names_of_the_top_need_no_extra():
  places = {place.partition(":")[0] for place in d1jax._PLACES.values()}
  named = {f"{place}.{name}" for name, place in d1jax._PLACES.items()}
  assert needed("d1jax", *places, *(named & MODULES)) - BASE <= COMPANIONS


def test_the_pins_are_of_all_that_is_declared():
  pinned = {line.split("==")[0].lower() for line in PINS.splitlines() if not line.startswith("#")}
  assert BASE | EXTRAS["train"] | EXTRAS["eval"] | EXTRAS["math"] | EXTRAS["serve"] <= pinned
  assert not re.search(r"^[^#]*[\[>~]\S*$", PINS, re.MULTILINE), "pip takes exact versions alone as constraints"


ALONE = """
import sys

class Missing:
  def find_spec(self, name, path=None, target=None):
    if name.partition(".")[0] in {names}:
      raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
from d1jax.__main__ import main
import d1jax

assert d1jax.__file__.startswith({site!r}), d1jax.__file__
sys.argv = ["d1jax", "train", "smoke"]
try:
  main()
except SystemExit as end:
  print(end.code)
(answer,) = d1jax.generate(d1jax.from_pretrained({start!r}), ["0300413012003420abcdefghijklmnop"])
print(len(answer.tokens))
"""


@pytest.mark.slow(reason="builds a wheel, and runs it in a process of its own")
def test_a_wheel_has_the_presets_and_samples_without_extras(tmp_path):
  build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
  subprocess.run(build, cwd=jobs.ROOT, check=True, capture_output=True, text=True)
  (wheel,) = tmp_path.glob("*.whl")
  assert wheel.name == f"d1jax-{d1jax.__version__}-py3-none-any.whl"
  site = tmp_path / "site"
  with zipfile.ZipFile(wheel) as archive:
    archive.extractall(site)
  info = site / f"d1jax-{d1jax.__version__}.dist-info"
  packed = {
    path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file() and info not in path.parents
  }
  there = {path for folder in ("d1jax", "configs") for path in (jobs.ROOT / folder).rglob("*") if path.is_file()}
  kept = {path.relative_to(jobs.ROOT).as_posix() for path in there if path.suffix != ".pyc"}
  assert packed == {re.sub(r"^configs/", "d1jax/configs/", name) for name in kept}
  assert {"d1jax/py.typed", "d1jax/tasks/held_out.txt", "d1jax/evaluation/report.css"} <= packed
  assert (info / "entry_points.txt").read_text() == "[console_scripts]\nd1jax = d1jax.__main__:main\n"

  missing = {"grain", "math_verify", "matplotlib", "PIL", "tensorboardX", "tqdm", "wandb", "trackio", "lm_eval"}
  missing |= {"starlette", "uvicorn"}
  script = ALONE.format(names=missing, site=str(site), start=str(jobs.START))
  (tmp_path / "empty").mkdir()
  environment = os.environ | {"PYTHONPATH": str(site), "XLA_FLAGS": QUICK_TO_COMPILE}
  done = subprocess.run(
    [sys.executable, "-c", script], cwd=tmp_path / "empty", env=environment, capture_output=True, text=True
  )
  assert done.stdout == "2\n128\n", done.stderr
  assert 'd1jax: tqdm is not installed: pip install "d1jax[train]"' in done.stderr


def test_make_setup_brings_jax_for_an_accelerator(tmp_path):
  plan = lambda *flags: subprocess.run(
    ["make", "-n", "setup", f"VENV={tmp_path}", *flags], cwd=jobs.ROOT, capture_output=True, text=True
  )
  assert "jax[" not in plan().stdout
  assert '-c requirements.txt "jax[tpu]"' in plan("JAX=tpu").stdout
  wrong = plan("JAX=rocm")
  assert wrong.returncode == 2
  assert "JAX=rocm is unknown; known: cuda12, cuda13, tpu" in wrong.stderr
