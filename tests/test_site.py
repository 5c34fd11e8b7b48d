"""The documentation as a site, and the page that names files and functions."""

import ast
import re
import socket
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "d1jax"
TOUR = (ROOT / "docs/follow_one_prompt.md").read_text(encoding="utf-8")


def public_modules() -> list[str]:
  files = [path.relative_to(ROOT).with_suffix("").as_posix() for path in sorted(PACKAGE.rglob("*.py"))]
  names = [file.removesuffix("/__init__").replace("/", ".") for file in files]
  return [name for name in names if "._" not in name]


class Loaded(HTMLParser):
  """The addresses that a browser loads by itself to show a page: of scripts, styles, fonts, pictures and frames."""

  def __init__(self) -> None:
    super().__init__()
    self.addresses: list[str] = []

  def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
    names = {"a": (), "link": ("href",)}.get(tag, ("src", "srcset", "data", "poster"))
    self.addresses += [value for name, value in attrs if name in names and value]


def test_every_package_has_a_page_of_the_reference_in_the_navigation():
  packages = {
    name.split(".")[1] for name in public_modules() if (ROOT / name.replace(".", "/")).is_dir() and "." in name
  }
  pages = re.findall(r"- reference/(\w+)\.md$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M)
  assert sorted(pages) == sorted({"d1jax", *packages})


def definitions(path: Path) -> set[str]:
  """`f`, `C` and `C.f` for the functions, classes and methods of a file."""
  names = set()
  for node in ast.parse(path.read_text(encoding="utf-8")).body:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
      names.add(node.name)
      inner = [n for n in ast.walk(node) if isinstance(n, ast.FunctionDef)] if isinstance(node, ast.ClassDef) else []
      names |= {f"{node.name}.{n.name}" for n in inner}
  return names


def test_the_functions_that_the_page_names_exist():
  named = re.findall(r"`([\w/]+\.py)::([\w.]+)`", TOUR)
  assert len(named) > 20
  absent = [f"{file}::{name}" for file, name in named if name not in definitions(ROOT / file)]
  assert not absent


@pytest.mark.slow(reason="builds the whole site")
def test_the_site_is_built_without_a_network_and_loads_nothing_from_another_host(tmp_path, monkeypatch):
  def refuse(*_):
    raise AssertionError("the build reached for the network")

  monkeypatch.setattr(socket.socket, "connect", refuse)
  monkeypatch.setattr(socket, "getaddrinfo", refuse)
  config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path))
  assert config.strict, "broken links and pages outside the navigation are errors"
  build(config)
  pages = {path.relative_to(tmp_path).as_posix(): path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.html")}
  for name, text in pages.items():
    loaded = Loaded()
    loaded.feed(text)
    assert loaded.addresses
    assert not [address for address in loaded.addresses if urlsplit(address).netloc], name
  for style in tmp_path.rglob("*.css"):
    assert not re.search(r"(url\(|@import )[\"']?(https?:)?//", style.read_text(encoding="utf-8")), style
  reference = "".join(text for name, text in pages.items() if name.startswith("reference/"))
  assert not [module for module in public_modules() if f'id="{module}"' not in reference]
