"""The result of an analysis as tables."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from d1jax import columns

GIB = 2**30
ARGUMENTS = ("trained", "moments", "base", "reference", "weights", "rest")

SHOWN = 3
"""The number of loops whose largest collective is shown."""


def tables(result: Mapping[str, Any]) -> str:
  """The tables of one analysis: its overview; memory, collectives and time of each program."""
  programs = {name: found for name, found in result["programs"].items() if "memory" in found}
  parts = [columns.table(*overview([result])), *_refusals(result["programs"])]
  if programs:
    parts += ["GiB a chip:", _memory(programs), "Collectives of one run, by what a chip receives:"]
    parts += [_collectives(programs), *_notes(programs), "Seconds of one run, at least:", _times(programs)]
  if found := result.get("evaluation"):
    said = f"A validation of {found['rows']} prompts of {found['width']} tokens needs {_needed(found)} GiB a chip"
    parts.append(said + (", which fits." if found["fits"] else ", which does not fit."))
  return "\n\n".join(parts)


Rows = tuple[tuple[str, ...], list[tuple[str, ...]]]
"""The head of a table, and its rows."""


def overview(results: Sequence[Mapping[str, Any]]) -> Rows:
  """One row per result: the memory of each program on a chip, and the time of an iteration."""
  rows = []
  for result in results:
    needs = [_needed(found) for found in result["programs"].values()]
    time, share, bound = "", "", ""
    if each := result["iteration"]:
      time = f"{each['seconds']:.1f} - {each['seconds_apart']:.1f}"
      share = f"{each['compute_share_apart']:.0%} - {each['compute_share']:.0%}"
      bound = ", ".join(dict.fromkeys(result["programs"][name]["bound"] for name in ("rollout", "update")))
    mesh = " x ".join(str(size) for size in list(result["mesh"].values())[:3])
    name = result["topology"] + (f" x {result['slices']}" if result["slices"] > 1 else "")
    fits = "yes" if result["fits"] else "no"
    gib = f"{result['available'] / GIB:.2f}"
    rows.append((name, mesh, result["training"], str(result["rows"]), *needs, gib, fits, time, bound, share))
  head = ("topology", "data x fsdp x tensor", "training", "rows", "publish", "rollout", "update", "GiB a chip", "fits")
  return (*head, "s an iteration", "bound", "compute share"), rows


def _needed(found: Mapping[str, Any]) -> str:
  return f"{(found['memory']['total'] if 'memory' in found else found['needed']) / GIB:.2f}"


def _memory(programs: Mapping[str, Any]) -> str:
  rows = []
  for name, found in programs.items():
    memory = found["memory"]
    sizes = [memory["arguments"].get(kind, 0) for kind in ARGUMENTS]
    sizes += [memory[kind] for kind in ("outputs", "temporaries", "code", "elsewhere", "total")]
    rows.append((name, *(f"{size / GIB:.2f}" if size else "" for size in sizes), f"{found['compile_seconds']:.0f}"))
  head = ("program", *ARGUMENTS, "outputs", "temporaries", "code", "elsewhere", "total", "compile s")
  return columns.table(head, rows)


def _collectives(programs: Mapping[str, Any]) -> str:
  rows = []
  for name, found in programs.items():
    for each in found["collectives"]:
      where = "loops" if each["in_loop"] else "outside"
      rows.append(
        (name, where, each["kind"], str(each["count"]), f"{each['bytes'] / GIB:.3f}", f"{each['seconds']:.3f}")
      )
  return columns.table(("program", "where", "kind", "count", "GiB", "seconds"), rows)


def _times(programs: Mapping[str, Any]) -> str:
  rows = []
  for name, found in programs.items():
    counts = [f"{found[kind] / 1e15:.3f}" for kind in ("flops", "repeated")]
    seconds = [f"{found['seconds'][kind]:.3f}" for kind in ("compute", "memory", "network")]
    rows.append((name, str(found["runs"]), *counts, f"{found['traffic'] / GIB:.1f}", *seconds, found["bound"]))
  head = ("program", "runs", "PFLOP", "repeated", "HBM GiB", "compute", "memory", "network", "bound")
  return columns.table(head, rows)


def _refusals(programs: Mapping[str, Any]) -> Iterator[str]:
  for name, found in programs.items():
    if not found["fits"]:
      yield (
        f"{name} does not fit: {found['needed'] / GIB:.2f} GiB of {found['available'] / GIB:.2f}. The largest buffers:"
      )
      yield "\n".join(f"- {each['bytes'] / GIB:.2f} GiB: {each['shape']} {each['source']}" for each in found["largest"])


def _notes(programs: Mapping[str, Any]) -> Iterator[str]:
  for name, found in programs.items():
    if found["largest_in_loops"]:
      arrays = [f"{each['kind']} of {each['dtype']}{each['dims']}" for each in found["largest_in_loops"][:SHOWN]]
      moved = found["weights_in_loop"] or "none"
      yield f"{name}: the largest collectives in loops, the longest loop first: {'; '.join(arrays)}."
      yield f"{name}: collectives that move the same weights again in each pass of a loop: {moved}."
    if found["open_loops"]:
      yield f"{name}: {found['open_loops']} loops have no known length and count as one pass; FLOPs are of all passes."
