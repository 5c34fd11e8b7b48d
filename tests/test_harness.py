"""The model `d1jax` of lm-evaluation-harness, and the harness itself: its command line runs its official task files.

A few questions of our own stand in the place of the hub's, so that no network is needed.
"""

import dataclasses
import functools
import json
import math
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lm_eval import tasks
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

import d1jax
from d1jax import lm_eval
from d1jax.errors import RunError
from d1jax.generation.requests import Asked, Settings, asked, encode_pair, sampler, until_stop
from d1jax.harness import D1jaxLM
from d1jax.parallel import mesh
from tests import jobs

ARGUMENTS = {"mc_num": 4, "length": 16, "block_length": 8, "max_length": 256}

SUMS = [
  {"question": f"Ann has {n} pears and buys {n + 1}. How many?", "answer": f"{n}+{n + 1}\n#### {2 * n + 1}"}
  for n in (1, 3, 4)
]
LETTERS = [
  {"question": f"After {letter}?", "choices": {"text": ["B", "D", "F"], "label": ["1", "2", "3"]}, "answerKey": key}
  for letter, key in (("E", "3"), ("A", "1"), ("C", "2"))
]
OFFICIAL = {
  "gsm8k": ("gsm8k/gsm8k.yaml", SUMS),
  "arc_easy": ("arc/arc_easy.yaml", LETTERS),
  "wikitext": ("wikitext/wikitext.yaml", [{"page": page} for page in ("", "It", "He")]),
}
"""The harness's own task files, and rows in the layout of their data: an example, and two questions or documents."""


def instance(*args) -> Instance:
  return Instance("generate_until", {}, args, 0)


@pytest.fixture(scope="module")
def lm(folder):
  """On one device."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr("d1jax.harness.make_mesh", lambda sizes: mesh.make_mesh({"data": 1}, mesh.first_device()))
    return D1jaxLM(pretrained=str(folder), batch_size=4, **ARGUMENTS)


def test_the_command_makes_the_model_known():
  for _ in range(2):
    lm_eval.register()
  assert get_model("d1jax") is D1jaxLM


def test_without_the_harness_it_is_one_line(monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, "lm_eval.models", None)
  with pytest.raises(SystemExit) as end:
    lm_eval.main()
  assert end.value.code == 2
  assert 'is not installed: pip install "d1jax[lm_eval]"' in capsys.readouterr().err


@pytest.fixture
def harness(lm, tmp_path, monkeypatch):
  """Runs the harness's command line on official task files; returns its numbers, and of each task its requests."""
  monkeypatch.setattr("lm_eval.utils._LOGGING_CONFIGURED", True)  # its handler would outlive the test
  # The names of all 14,000 task files are not looked up, because the paths of files are given.
  monkeypatch.setattr(tasks, "TaskManager", functools.partial(tasks.TaskManager, include_defaults=False))
  monkeypatch.setattr("d1jax.harness._loaded", lambda settings: (lm.model, None))  # which keeps compiled programs
  for name, (file, rows) in OFFICIAL.items():
    files = {}
    for split, own in (("train", rows[:1]), ("validation", rows[:1]), ("test", rows[1:])):
      files[split] = str(tmp_path / f"{name}_{split}.jsonl")
      (tmp_path / f"{name}_{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    changes = {
      "include": str(next(iter(tasks.__path__))) + "/" + file,
      "task": f"{name}_local",
      "dataset_path": "json",
      "dataset_name": None,
      "dataset_kwargs": {"data_files": files, "cache_dir": str(tmp_path / "datasets")},
    }
    (tmp_path / f"{name}.yaml").write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in changes.items()))

  def run(*names, options=()):
    output = tmp_path / f"output_{len(list(tmp_path.iterdir()))}"
    model_args = ",".join(f"{name}={value}" for name, value in (ARGUMENTS | {"pretrained": "FOLDER"}).items())
    command = ["lm_eval", "--model", "d1jax", "--model_args", model_args, "--batch_size", "4", "--log_samples"]
    command += ["--tasks", ",".join(str(tmp_path / f"{name}.yaml") for name in names), "--output_path", str(output)]
    monkeypatch.setattr(sys, "argv", [*command, "--num_fewshot", "1", *options])
    lm_eval.main()
    (results,) = output.rglob("results_*.json")
    requests = {}
    for name in names:
      (path,) = output.rglob(f"samples_{name}_local_*.jsonl")
      lines = [json.loads(line) for line in path.read_text().splitlines()]
      requests[name] = [
        (tuple(given.values()), answer)
        for line in sorted(lines, key=lambda line: line["doc_id"])
        if line["filter"] == lines[0]["filter"]  # there is a line for each filter of the task
        for given, (answer,) in zip(line["arguments"].values(), line["resps"], strict=True)
      ]
    return json.loads(results.read_text())["results"], requests

  return run


def estimates(lm: D1jaxLM, context: list[int], answer: list[int]) -> np.ndarray:
  """LLaDA's estimate of two tokens from four masks, by hand: two masks of both, and two of one token, of which none,
  one or two mask the first token."""
  mask = lm.model.denoiser.mask_id
  rows = jnp.asarray([[*context, *masked] for masked in ((mask, mask), (mask, answer[1]), (answer[0], mask))])
  hidden = lm.model.denoiser.encode(lm.model.params, rows, jnp.ones(rows.shape, bool))
  logps = jax.nn.log_softmax(lm.model.denoiser.logits(lm.model.params, hidden[:, -2:]))
  both = float(logps[0, 0, answer[0]] + logps[0, 1, answer[1]])
  first, second = float(logps[1, 0, answer[0]]), float(logps[2, 1, answer[1]])
  return np.asarray([(2 * both + 2 / 1 * (k * first + (2 - k) * second)) / 4 for k in range(3)])


@pytest.mark.slow(reason="runs the harness, and compiles programs of its own")
def test_the_harness_runs_official_task_files(lm, harness, tmp_path, monkeypatch):
  cached = ("--use_cache", str(tmp_path / "cache"))
  numbers, found = harness(*OFFICIAL, options=cached)
  encode = lm.tokenizer.encode

  shot = f"Question: {SUMS[0]['question']}\nAnswer: {SUMS[0]['answer']}\n\n"
  contexts = [f"{shot}Question: {row['question']}\nAnswer:" for row in SUMS[1:]]
  assert [args[0] for args, _ in found["gsm8k"]] == contexts
  answers = check_generations(lm, found["gsm8k"])
  last = [(re.findall(r"-?\d+", text) or [""])[-1] for text in answers]
  right = [number == row["answer"].split()[-1] for number, row in zip(last, SUMS[1:], strict=True)]
  assert numbers["gsm8k_local"]["exact_match,flexible-extract"] == np.mean(right)
  # A part of the requests, in another order.
  assert lm.generate_until([instance(*args) for args, _ in found["gsm8k"][:0:-1]]) == answers[:0:-1]

  shot = "Question: After E?\nAnswer: F\n\n"
  expected = [(f"{shot}Question: {row['question']}\nAnswer:", f" {text}") for row in LETTERS[1:] for text in "BDF"]
  assert [args for args, _ in found["arc_easy"]] == expected
  by_hand = np.asarray([estimates(lm, encode(context), encode(answer)) for context, answer in expected])
  logps = np.asarray([float(logp) for _, (logp, _) in found["arc_easy"]]).reshape(2, 3)
  for question, own in zip(by_hand.reshape(2, 3, 3), logps, strict=True):  # the choices of a question share masks
    assert any(np.allclose(own, question[:, k], rtol=1e-4) for k in range(3))
  gold = [int(row["answerKey"]) - 1 for row in LETTERS[1:]]
  assert numbers["arc_easy_local"]["acc,none"] == np.mean(logps.argmax(1) == gold)

  assert [args for args, _ in found["wikitext"]] == [("It",), ("He",)]
  rolling = [float(logp) for _, logp in found["wikitext"]]
  for text, logp in zip(("It", "He"), rolling, strict=True):
    assert np.isclose(estimates(lm, list(lm.tokenizer.stop_ids[:1]), encode(text)), logp, rtol=1e-4).any()
  assert numbers["wikitext_local"]["word_perplexity,none"] == pytest.approx(math.exp(-sum(rolling) / 2))

  with monkeypatch.context() as patch:  # whatever computes would fail
    patch.setattr("d1jax.harness.scored", None)
    patch.setattr("d1jax.harness.stream", None)
    assert harness(*OFFICIAL, options=cached)[1] == found

  found = harness("gsm8k", options=("--apply_chat_template", "--fewshot_as_multiturn"))[1]["gsm8k"]
  turns = [("user", f"Question: {SUMS[0]['question']}\nAnswer:"), ("assistant", SUMS[0]["answer"])]
  for (args, _), row in zip(found, SUMS[1:], strict=True):
    own = [*turns, ("user", f"Question: {row['question']}\nAnswer:")]
    written = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in own)
    assert args[0] == written + "<|im_start|>assistant\n"
  check_generations(lm, found)


def check_generations(lm: D1jaxLM, requests) -> list[str]:
  """They are the texts of `d1jax.generate` up to the first stop string."""
  texts = []
  for (context, options), answer in requests:
    ids = np.asarray(lm.tokenizer.encode(context), np.int32)
    (one,) = d1jax.generate(lm.model, [ids], spec=sampler(lm.settings, None, 16, 0.0), prompt_buckets=(256,))
    until = [stop for stop in options["until"] if stop in one.text]
    assert answer == one.text[: min((one.text.index(stop) for stop in until), default=None)]
    texts.append(answer)
  return texts


@pytest.mark.slow(reason="compiles programs of its own")
def test_repeated_draws_are_samples_of_the_request(lm):
  options = {"until": [], "temperature": 1.0, "do_sample": True, "seed": 3}
  requests = [instance(text, options) for text in ("ab", "cd", "ab", "ab")]
  found = lm.generate_until(requests)
  assert len({*found}) == 4
  assert lm.generate_until(requests[1:2]) == found[1:2]
  assert lm.generate_until([requests[0], requests[2], requests[3]]) == [found[0], found[2], found[3]]


def test_chats_are_written_by_the_template(lm):
  turns = [
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "2 + 2?"},
  ]
  text = lm.apply_chat_template(turns)
  assert lm.tokenizer.encode(text) == lm.tokenizer.prompt(turns, "")
  begun = lm.apply_chat_template([*turns, {"role": "assistant", "content": "It is "}], add_generation_prompt=False)
  assert begun == text + "It is "
  assert lm.chat_template(True) == lm.chat_template("default") != ""
  assert lm.chat_template(False) is None
  with pytest.raises(RunError, match="apply_chat_template=rag: d1jax reads the template named default"):
    lm.chat_template("rag")
  assert lm.tokenizer_name.startswith("d1jax_")


def test_spaces_move_to_the_continuation(lm):
  tokenizer = lm.tokenizer
  context, answer = encode_pair(tokenizer, "The  ", "end")
  assert (context, context + answer) == (tokenizer.encode("The"), tokenizer.encode("The  end"))
  assert encode_pair(tokenizer, "", "end") == ([258], tokenizer.encode("end"))


def test_stop_strings_may_be_special_tokens(lm):
  ids = [*lm.tokenizer.encode("one two"), 260, *lm.tokenizer.encode("three. four")]
  assert until_stop(lm.tokenizer, ids, ()) == "one twothree. four"
  assert until_stop(lm.tokenizer, ids, (".", "<|im_end|>")) == "one two"
  assert until_stop(lm.tokenizer, ids, ("four", ".")) == "one twothree"


@pytest.mark.parametrize(
  ("given", "expected"),
  [
    ({"until": "\n"}, Asked(("\n",), 256, 0.0, 7)),
    ({"until": ["a", ""], "max_gen_toks": 9, "max_tokens": 8, "seed": 1}, Asked(("a",), 9, 0.0, 1)),
    ({"temperature": 0.5, "do_sample": False}, Asked((), 256, 0.0, 7)),
    ({"temperature": 0.5, "top_p": 1.0}, Asked((), 256, 0.5, 7)),
    ({"temperature": 0, "top_p": 0.95, "num_beams": 1}, Asked((), 256, 0.0, 7)),
  ],
)
def test_options_of_a_task(given, expected):
  assert asked(given, Settings(pretrained="FOLDER", seed=7)) == expected


@pytest.mark.parametrize("given", [{"temperature": 0.5, "top_p": 0.9}, {"num_beams": 10}, {"wings": 2}])
def test_options_that_would_change_answers_are_refused(given):
  with pytest.raises(ValueError, match=r"generation_kwargs: .* is not supported by d1jax; known: until, max_gen_toks"):
    asked(given, Settings(pretrained="FOLDER"))


def test_the_canvas_is_whole_blocks():
  settings = Settings(pretrained="FOLDER")
  assert dataclasses.astuple(sampler(settings, None, 40, 0.0))[:3] == (64, 64, 32)
  assert dataclasses.astuple(sampler(settings, None, 10, 0.0))[:3] == (10, 10, 10)
  assert dataclasses.astuple(sampler(settings, 4, 10, 0.0))[:3] == (12, 12, 4)
  assert dataclasses.astuple(sampler(dataclasses.replace(settings, tokens_per_step=2), 8, 10, 0.0))[:3] == (16, 8, 8)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"pretraned": "FOLDER"}, "unknown model_args 'pretraned'; known: pretrained, checkpoint, dtype"),
    ({}, "model_args name no model: set pretrained=FOLDER or checkpoint=RUN"),
    ({"pretrained": "nowhere", "mc_num": "many"}, "model_args: mc_num='many' must be of the type int"),
    ({"pretrained": "nowhere", "mc_num": 0}, "model_args: mc_num=0 must be at least 1"),
    ({"pretrained": "nowhere", "is_check_greedy": 1}, "is_check_greedy=1 must be of the type bool"),
    ({"pretrained": "nowhere", "batch_size": "large"}, "batch_size='large' must be a number of at least 1, or auto"),
    ({"checkpoint": "nowhere", "block": 4}, "dtype, quantize and block are for pretrained=FOLDER"),
    ({"pretrained": "nowhere"}, "nowhere"),
    ({"checkpoint": "nowhere"}, "no checkpoint in nowhere"),
  ],
)
def test_wrong_arguments_are_one_line(arguments, message):
  with pytest.raises(RunError) as caught:
    D1jaxLM(**arguments)
  assert message in str(caught.value)
  assert "\n" not in str(caught.value)


def test_auto_is_a_batch_for_all_devices(lm, monkeypatch):
  for size, most, rows in (("auto", None, 16), ("auto:4", 6, 6), (3, 2, 3)):
    monkeypatch.setattr(lm, "settings", dataclasses.replace(lm.settings, batch_size=size, max_batch_size=most))
    assert lm.rows == rows
  assert Settings.of({"pretrained": 7, "batch_size": "5"}) == Settings(pretrained="7", batch_size=5)
  assert jnp.float32 == lm.model.params["embedding"].dtype


@pytest.mark.slow(reason="reads a trained run, and compiles programs of its own")
def test_a_run_is_read_with_its_own_tokenizer():
  from d1jax.evaluation import subject
  from tests import runs

  workdir, _, _ = runs.finished()
  lm = D1jaxLM(checkpoint=str(workdir), length=8, block_length=8, mc_num=1, max_length=64)
  config = jobs.load("eval")
  config.checkpoint = str(workdir)
  found = subject.load(config)
  text = "0300413012003420"
  ids = np.asarray(lm.tokenizer.encode(text), np.int32)
  spec = sampler(lm.settings, None, 8, 0.0)
  (one,) = d1jax.generate(found.experiment.model, [ids], params=found.params(), spec=spec, prompt_buckets=(56,))
  assert lm.generate_until([instance(text, {"until": []})]) == [one.text]
  with pytest.raises(RunError, match="the tokenizer has no chat template: leave --apply_chat_template out"):
    lm.apply_chat_template([{"role": "user", "content": text}])
