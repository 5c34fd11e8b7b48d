"""Writes `tests/harness_golden.json`: `python -m tests.make_harness_golden`, which needs the extra `lm_eval`.

Official task files of lm-evaluation-harness, with a few questions of our own in place of the hub's, are run by the
harness's own command line. Beside the requests and their answers it is checked that a second run finds everything in
the harness's cache, and that a chat template with few-shot examples as turns works.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from d1jax import lm_eval as command
from tests import hub
from tests.test_harness import ARGUMENTS, GOLDEN

GSM8K = [
  {
    "question": f"Anna has {n} apples and buys {n + 1} more. How many has she?",
    "answer": f"{n}+{n + 1}\n#### {2 * n + 1}",
  }
  for n in range(3, 9)
]
ARC = [
  {
    "question": question,
    "choices": {"text": texts, "label": ["A", "B", "C"]},
    "answerKey": "B",
  }
  for question, texts in (
    ("What do plants need?", ["noise", "light", "a map"]),
    ("What melts?", ["stone at noon", "ice in the sun", "wood"]),
  )
]
WIKITEXT = [{"page": " = Rain = \n \n It rains a lot . It has rained for days , and it will rain on .\n"}]
TASKS = {
  "gsm8k": ("gsm8k/gsm8k.yaml", GSM8K),
  "arc_easy": ("arc/arc_easy.yaml", ARC),
  "wikitext": ("wikitext/wikitext.yaml", WIKITEXT),
}


def write_tasks(folder: Path) -> list[str]:
  """The official files, with local data; the names of the files."""
  from lm_eval import tasks

  home, names = Path(tasks.__file__).parent, []
  for name, (official, rows) in TASKS.items():
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {split: str(data) for split in ("train", "validation", "test")}
    changes = {"task": f"{name}_local", "dataset_path": "json", "dataset_name": None}
    path = folder / f"{name}_local.yaml"
    path.write_text(
      f"include: {home / official}\n"
      + "".join(f"{key}: {json.dumps(value)}\n" for key, value in changes.items())
      + f"dataset_kwargs: {json.dumps({'data_files': files})}\n"
    )
    names.append(str(path))
  return names


def run(folder: Path, tasks: list[str], *options: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
  """What the harness's command line writes: numbers, and requests with their answers."""
  output = folder / f"output_{len(list(folder.iterdir()))}"
  arguments = ",".join(f"{name}={value}" for name, value in ARGUMENTS.items() if name != "batch_size")
  sys.argv = [
    *("lm_eval", "--model", "d1jax", "--model_args", f"pretrained={folder / 'model'},{arguments}"),
    *("--batch_size", str(ARGUMENTS["batch_size"]), "--tasks", ",".join(tasks), "--limit", "2"),
    *("--output_path", str(output), "--log_samples", *options),
  ]
  command.main()
  (numbers,) = output.rglob("results_*.json")
  found = []
  for path in sorted(output.rglob("samples_*.jsonl")):
    for line in path.read_text().splitlines():
      sample = json.loads(line)
      for given, (answer,) in zip(sample["arguments"].values(), sample["resps"], strict=True):
        args = list(given.values())
        if isinstance(args[-1], dict):
          one = {"type": "generate_until", "args": args, "answer": answer}
        elif len(args) == 1:  # the harness writes numbers as texts
          one = {"type": "loglikelihood_rolling", "args": args, "answer": float(answer)}
        else:
          one = {"type": "loglikelihood", "args": args, "answer": [float(answer[0]), answer[1] == "True"]}
        if one not in found:  # a sample is written once a filter
          found.append(one)
  return json.loads(numbers.read_text())["results"], found


def main() -> None:
  """Writes the golden."""
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    hub.write(folder / "model", dtype="float32")
    tasks = write_tasks(folder)
    cache = ["--use_cache", str(folder / "cache")]
    numbers, requests = run(folder, tasks, "--num_fewshot", "1", *cache)
    print(json.dumps(numbers, indent=1))
    again, resumed = run(folder, tasks, "--num_fewshot", "1", *cache)
    assert (again, resumed) == (numbers, requests), "the cache"
    turns = run(folder, tasks[:1], "--num_fewshot", "1", "--apply_chat_template", "--fewshot_as_multiturn")[1]
    assert "<|im_start|>assistant\n" in turns[0]["args"][0]
    requests += turns
  GOLDEN.write_text(json.dumps(requests, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
  print(f"{len(requests)} requests")


if __name__ == "__main__":
  main()
