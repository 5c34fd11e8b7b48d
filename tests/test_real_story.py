"""`benchmarks.real`: its data, its commands, its report, and the whole of it on a small random folder."""

import contextlib
import json
import signal
import sys

import pytest
from absl import flags
from ml_collections import config_flags

from benchmarks import real
from d1jax import main, tasks
from d1jax.run import limits
from tests import hub, jobs
from tests.data.folders import write_json

SOLVED = "Ann has {0} pens and buys 2. How many has she?"


def sources(root, count=200, test=False):
  """GSM8K and MATH in a few rows."""
  (root / "gsm8k").mkdir(parents=True)
  (root / "math").mkdir()
  rows = [{"question": SOLVED.format(i), "answer": f"{i} + 2 = {i + 2}.\n#### {i + 2}"} for i in range(2, 2 + count)]
  lines = [json.dumps(row) + "\n" for row in rows]
  (root / "gsm8k" / "train.jsonl").write_text("".join(lines))
  if test:
    (root / "gsm8k" / "test.jsonl").write_text("".join(lines[:5]))
  write_json(root / "math" / "train.jsonl", {"problem": "2 + 2?", "solution": r"It is $\boxed{4}$.", "answer": "4"})
  return root


def texts(folder):
  return [json.loads(line)["text"] for path in sorted((folder / "texts").iterdir()) for line in path.open()]


@pytest.mark.parametrize("test", [True, False])
def test_texts_have_no_question_that_is_asked_later(tmp_path, monkeypatch, test):
  monkeypatch.setattr(real, "HELD_OUT", 7)
  folder = tmp_path / "data"
  assert real.write_data(sources(tmp_path / "source", test=test), folder, 1000) == ["gsm8k", "word_problems"]
  written = texts(folder)
  task = tasks.build("gsm8k", root=str(folder))
  asked = [record["question"] for split in ("validation", "test") for record in task.records(split)]
  assert len(task.records("test")) == (5 if test else 7)
  assert not [text for text in written for question in asked if text.startswith(question + "\n")]
  learned = {text.split("\n")[0] for text in written}
  assert {record["question"] for record in task.records("train")} <= learned
  assert "2 + 2?\nIt is $\\boxed{4}$." in written
  assert not learned & {record["question"] for record in tasks.build("word_problems").records("train")}
  assert real.write_data(None, folder, 5) == ["word_problems"], "what is there stays"
  assert texts(folder) == written


def configuration(command):
  """What a command line of `d1jax.main` configures."""
  argv, values = ["main", *command[3:]], flags.FlagValues()
  config_flags.DEFINE_config_file("config", None, "", flag_values=values)
  assert main.read(argv, values) == ["main"]
  limits.check(values["config"].value)
  return values["config"].value


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
  monkeypatch.chdir(real.ROOT)


@pytest.mark.parametrize("smoke", [True, False])
@pytest.mark.parametrize("names", [["word_problems"], ["gsm8k", "word_problems"]])
def test_the_stages_take_their_share_of_the_time(tmp_path, smoke, names):
  adapt, _, train = (
    configuration(step.command) for step in real.steps(tmp_path, tmp_path / "model", names, 10.0, smoke)
  )
  limits = [adapt.sft.seconds, train.sft.seconds, train.grpo.seconds]
  assert limits == ([None] * 3 if smoke else [600 * share for share in real.SHARES.values()])
  assert sum(real.SHARES.values()) < 0.7
  assert [adapt.task.name, train.task.name] == ["none", "+".join(names)]
  assert train.model.pretrained == str(tmp_path / "adapted")
  assert train.grpo.estimator.name == "step_merged"
  for config in (adapt, train):
    assert config.model.block == config.rollout.block_length == 4
    assert config.lora.rank == 0, "every weight is trained"


def test_a_command_whose_time_is_up_is_asked_to_stop():
  assert real.run([sys.executable, "-c", "pass"], 60) == 0
  assert real.run(["sleep", "60"], 0.1) == -signal.SIGTERM


def test_a_report_of_what_there_is(tmp_path):
  assert "# A real model" in real.described(tmp_path)
  (tmp_path / "train").mkdir()
  record = {"stage": "sft", "iteration": 1, "seconds": 2.0, "elapsed": 3.0, "loss": 1.0, "cost/tokens/update": 64.0}
  records = [record, record | {"iteration": 2, "validation": 0.25, "elapsed": 6.0}]
  (tmp_path / "train" / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
  (tmp_path / "steps.jsonl").write_text('{"step": "train", "seconds": 9.0, "code": 75}\n')
  text = real.described(tmp_path)
  assert "| SFT | 2 | 4 | 6 | 128 | validation: solved | 0.25 | 0.25 |" in text
  assert "| train | 9.0 | 75 |" in text
  assert "not finished; cost so far" in text


@pytest.mark.long
@pytest.mark.slow(reason="runs three stages, an export and two evaluations on a small folder")
def test_the_whole_of_it_on_a_small_folder(tmp_path, monkeypatch, capsys):
  model = hub.write(tmp_path / "model", "llama", layers=1)

  def run(command, seconds):
    # A byte is a token here: prompts are longer.
    flags = [flag.replace("(160,)", "(512,)").replace("buckets=(96,)", "buckets=(512,)") for flag in command[3:]]
    code, _, error = jobs.finish(jobs.start(*flags), timeout=900)
    assert code == 0, error
    return code

  monkeypatch.setattr(real, "run", run)
  monkeypatch.setenv("D1JAX_DATA", "")
  monkeypatch.setattr(sys, "argv", ["real", str(model), "--smoke", f"--folder={tmp_path / 'run'}"])
  real.main()
  out = capsys.readouterr().out
  for said in ("| adapt | 3 |", "| SFT | 2 |", "| diffu-GRPO | 2 |", "Held-out split of word_problems", "MFU"):
    assert said in out, said
  monkeypatch.setattr(real, "run", lambda *_: pytest.fail("all of it is done"))
  with contextlib.redirect_stdout(None):
    real.main()
