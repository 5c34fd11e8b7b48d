"""What is missing is said at once, before anything is downloaded, compiled or rented."""

import json

import pytest

from d1jax.errors import RunError
from d1jax.run import check, inputs
from d1jax.run import experiment as experiments
from tests import hub_server, jobs

MODEL = {"config.json": b"{}", "model.safetensors": b""}


def llada(**changes):
  """The configuration of a LLaDA on GSM8K; `changes` are dotted fields with `__` for the dot."""
  config = jobs.load("grpo", "lora,gsm8k")
  config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
  return config


@pytest.fixture
def data(tmp_path):
  """A data folder with GSM8K."""
  (tmp_path / "data/gsm8k").mkdir(parents=True)
  for name in ("train", "test"):
    rows = [{"question": f"{name} {n}?", "answer": f"It is\n#### {n}"} for n in range(30)]
    (tmp_path / f"data/gsm8k/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(tmp_path / "data")


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
  with hub_server.running(monkeypatch, tmp_path / "cache") as found:
    found.files["model/lab/llada"] = dict(MODEL)
    yield found


@pytest.mark.parametrize(
  ("changes", "weights", "questions"),
  [
    ({}, r"model.size=llada_8b has no weights: name a folder with --config.model.pretrained", "gsm8k root is None"),
    ({"model__pretrained": "/nowhere"}, "/nowhere/config.json is missing", "gsm8k root is None"),
    ({"model__pretrained": "lab/none"}, "lab/none is no folder here", "gsm8k root is None"),
    ({"data__root": "/nowhere"}, "model.size=llada_8b has no weights", "gsm8k/test.jsonl: not found in '/nowhere'"),
    ({"data__root": "hf:lab/none"}, "model.size=llada_8b has no weights", "lab/none is no folder here, .* no dataset"),
    (
      {"sft__steps": 1, "sft__data": "s1k.jsonl", "data__root": "/no"},
      "no weights",
      r"sft.data: /no/s1k.jsonl is miss",
    ),
  ],
)
def test_weights_and_questions_that_are_missing_are_one_message(changes, weights, questions, stand_in):
  with pytest.raises(RunError, match=f"{weights}.*; and .*{questions}") as caught:
    check.run(llada(**changes))
  assert "\n" not in str(caught.value)
  with pytest.raises(ValueError, match=f"{weights}.*; and .*{questions}"):
    experiments.build(llada(**changes), None, trains=True)


def test_a_model_is_not_downloaded_for_a_run_without_questions(stand_in, data, capsys):
  with pytest.raises(ValueError, match=r"^gsm8k root is None"):
    experiments.build(llada(model__pretrained="lab/llada"), None, trains=True)
  with pytest.raises(RunError, match=r"^gsm8k root is None"):
    check.run(llada(model__pretrained="lab/llada"))
  check.run(llada(model__pretrained="lab/llada", data__root=data))
  assert not stand_in.fetched()
  commit = stand_in.commit("model/lab/llada")
  assert capsys.readouterr().out.splitlines() == [
    f"model: lab/llada, commit {commit} of the hub",
    "data: 30 test questions of gsm8k",
    "checked: flags, model and data are there",
  ]


def test_a_data_folder_may_lie_on_the_hub(stand_in, data, tmp_path):
  rows = (tmp_path / "data/gsm8k/test.jsonl").read_bytes()
  stand_in.files["dataset/lab/data"] = {"gsm8k/train.jsonl": rows, "gsm8k/test.jsonl": rows, "load.py": b"raise"}
  config = llada(model__pretrained="lab/llada", data__root="hf:lab/data")
  assert len(inputs.build_task(config).records("test")) == 30
  assert stand_in.fetched() == ["gsm8k/test.jsonl", "gsm8k/train.jsonl"]
  assert config.data.root == "hf:lab/data"


def test_what_is_made_here_needs_no_weights(data, capsys):
  check.run(llada(model__size="tiny", data__root=data))
  assert "model: new weights of the size tiny" in capsys.readouterr().out
  with pytest.raises(RunError, match=r"--check is for training, but config\.mode is 'eval': leave it out"):
    check.run(jobs.load("eval"))
