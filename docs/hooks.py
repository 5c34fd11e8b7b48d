"""What the site holds beside the pages of this folder: README.md and its neighbours, and the API reference.

MkDocs calls the functions whose names begin with `on_`. Nothing here imports d1jax: the reference is read from its
sources.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = {
  "README.md": "index.md",
  "SECURITY.md": "SECURITY.md",
  "CONTRIBUTING.md": "CONTRIBUTING.md",
  "CHANGELOG.md": "CHANGELOG.md",
}
LINK = re.compile(r'(\]\(|src="|href=")([^)"#\s]+)')


def modules() -> dict[str, list[str]]:
  """The pages of the reference by name, and the modules on each: one page a package, and one for the top."""
  pages: dict[str, list[str]] = {"d1jax": ["d1jax"]}
  for path in sorted((ROOT / "d1jax").rglob("*.py")):
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[-1] == "__init__":
      parts = parts[:-1]
    if len(parts) > 1 and not any(part.startswith("_") for part in parts):
      page = parts[1] if (ROOT / "d1jax" / parts[1]).is_dir() else "d1jax"
      pages.setdefault(page, []).append(".".join(parts))
  return pages


def reference(page: str, names: list[str]) -> str:
  """The text of a page of the reference, which mkdocstrings fills in; the package itself is its title."""
  title = "d1jax" if page == "d1jax" else f"d1jax.{page}"
  head = f"---\ntitle: {title}\n---\n\n::: {names[0]}\n    options:\n      heading_level: 1\n"
  return "\n".join([head, *(f"::: {name}\n" for name in names[1:])])


def moved(text: str, folder: Path, needed: set[Path]) -> str:
  """A page whose links to files of the repository lead to where the site has them.

  A link to another page is a link to that page; any other file is copied to `files/` and added to `needed`; of a link
  to a folder, which a site cannot show, the text is left.

  Args:
    text: the page's Markdown.
    folder: where the page lies in the repository.
    needed: the files that pages link to; this function adds to it.
  """

  def target(match: re.Match[str]) -> str:
    start, link = match.groups()
    path = (folder / link).resolve()
    if ":" in link or not path.is_file() or not path.is_relative_to(ROOT):
      return match[0]
    name = path.relative_to(ROOT).as_posix()
    if path.parent == ROOT / "docs":
      return start + path.name
    if name in PAGES:
      return start + PAGES[name]
    needed.add(path)
    return f"{start}files/{name}"

  text = re.sub(
    r"\[([^\]]+)\]\(([^)#:\s]+)\)", lambda match: match[1] if (folder / match[2]).is_dir() else match[0], text
  )
  return LINK.sub(target, text)


def on_files(files: Files, config: MkDocsConfig) -> Files:
  """Adds the pages that do not lie in docs/, and the files that pages link to."""
  needed: set[Path] = set()
  for name, page in PAGES.items():
    text = moved((ROOT / name).read_text(encoding="utf-8"), ROOT, needed)
    files.append(File.generated(config, page, content=text))
  for file in files.documentation_pages():
    if file.abs_src_path is not None:
      moved(Path(file.abs_src_path).read_text(encoding="utf-8"), ROOT / "docs", needed)
  for page, names in modules().items():
    files.append(File.generated(config, f"reference/{page}.md", content=reference(page, names)))
  for path in sorted(needed):
    name = f"files/{path.relative_to(ROOT).as_posix()}"
    files.append(File.generated(config, name, abs_src_path=str(path)))
  return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
  """Rewrites the links of a page of docs/ that leave it."""
  lies_in_docs = page.file.generated_by is None
  return moved(markdown, ROOT / "docs", set()) if lies_in_docs else markdown
