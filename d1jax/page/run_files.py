"""What a run has left in its work directory so far, for its page; nothing is written."""

from typing import Any, NamedTuple

from d1jax.errors import RunError, input_checked
from d1jax.files import FileError, read_json
from d1jax.page import samples
from d1jax.page.samples import Validated
from d1jax.run.metrics import STAGES, read_records
from d1jax.run.workdir import Folder

_TOTALS = ("steps", "patience", "seconds")


class RunFiles(NamedTuple):
  """The files of a run.

  Attributes:
    name: the run's folder, as it was named.
    config: the content of `config.json`.
    records: the records of `metrics.jsonl` of each stage that has any, in the order of the iterations.
    validated: the records of `samples.jsonl` whose validation is among them.
    questions: the number of validation questions; 0 if `splits.json` does not say it.
    results: the content of `results.json`; None as long as the run is not finished.
  """

  name: str
  config: dict[str, Any]
  records: dict[str, list[dict[str, Any]]]
  validated: list[Validated]
  questions: int
  results: dict[str, Any] | None

  @property
  def mode(self) -> str:
    """The last stage that the configuration asks for."""
    return str(self.config["mode"])


@input_checked()
def read(workdir: Folder) -> RunFiles:
  """Reads a run, at work or finished; damaged records and samples are left out.

  Raises:
    RunError: the folder holds no run, or its configuration is damaged.
  """
  config = read_config(workdir)
  records: dict[str, dict[int, dict[str, Any]]] = {}
  for record in read_records(workdir / "metrics.jsonl"):
    records.setdefault(record["stage"], {})[record["iteration"]] = record
  ordered = {stage: [own[i] for i in sorted(own)] for stage in STAGES if (own := records.get(stage))}
  validated = [
    one for one in samples.read(workdir) if "validation" in records.get(one.stage, {}).get(one.iteration, {})
  ]
  validated.sort(key=lambda one: (STAGES.index(one.stage), one.iteration))
  return RunFiles(str(workdir), config, ordered, validated, _questions(workdir), _results(workdir, config))


def read_config(workdir: Folder) -> dict[str, Any]:
  """The configuration of a run.

  Raises:
    RunError: the folder holds no run, or its configuration is damaged.
  """
  path = workdir / "config.json"
  if not path.exists():
    raise RunError(f"{workdir} holds no run (there is no {path.name}): name the work directory of a run")
  with input_checked():
    config = read_json(path, dict)
  if config.get("mode") not in STAGES:
    raise RunError(f"{path} is not the configuration of a run: name the work directory of a run")
  return config


def _questions(workdir: Folder) -> int:
  """The number of validation questions; 0 if it is not known."""
  path = workdir / "splits.json"
  try:
    count = read_json(path, dict)["validation"]["n"] if path.exists() else 0
  except (FileError, LookupError, TypeError):
    return 0
  return count if type(count) is int and 0 < count < 1 << 40 else 0


def _results(workdir: Folder, config: dict[str, Any]) -> dict[str, Any] | None:
  """The results; None if there are none, or if they are those of a shorter run that has since been continued."""
  path = workdir / "results.json"
  try:
    results = read_json(path, dict) if path.exists() else None
    return results if results and _totals(results["config"]) == _totals(config) else None
  except (FileError, LookupError, TypeError, AttributeError):
    return None


def _totals(config: dict[str, Any]) -> list[Any]:
  return [config.get(stage, {}).get(name) for stage in STAGES for name in _TOTALS]
