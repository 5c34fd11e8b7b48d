"""`--config=configs/report.py`: draws the page of any run, old or at work, into a file of its own."""

from pathlib import Path

from ml_collections import ConfigDict

from d1jax.errors import RunError
from d1jax.page import run_files, writer
from d1jax.run.workdir import folder, local, unwritable, write_atomically


def run(config: ConfigDict) -> Path:
  """Writes the page of `config.workdir` to `config.output`, and returns its path.

  Raises:
    RunError: a field is not set, a folder holds no run, or the page would lie in one.
  """
  if config.workdir is None:
    raise RunError("config.workdir is not set; name the folder of a run")
  if config.output is None:
    raise RunError("config.output is not set; name the page, a new file like report.html")
  workdir, output = folder(config.workdir), local("output", config.output)
  mode = run_files.read_config(workdir)["mode"]
  if config.compare is not None:
    writer.check_other(workdir, mode, config.compare, "config.compare")
  if output.suffix.lower() != ".html" or output.is_dir():
    raise RunError(f"config.output={config.output} is no name of a page; name a file that ends in .html")
  for name in filter(None, (config.workdir, config.compare)):
    if "://" not in name and output.resolve().is_relative_to(Path(name).resolve()):
      raise RunError(f"config.output={config.output} lies in {name}, where a reader writes nothing: name another place")
  page = writer.drawn(workdir, config.compare)
  try:
    write_atomically(output, page.encode())
  except OSError as error:
    raise unwritable(output.parent, error) or error from None
  print(output)
  return output
