"""The model `d1jax` of lm-evaluation-harness, on requests that the harness itself made of its official task files.

The harness brings scikit-learn and 30 other packages, which the tests do not install: a stand-in has the four names of
it that d1jax uses. `python -m tests.make_harness_golden` runs the real one, with its own command line, and keeps its
requests and what d1jax answered to them.
"""

import contextlib
import dataclasses
import json
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

import d1jax
from d1jax import lm_eval
from d1jax.errors import RunError
from d1jax.generation.requests import Asked, Settings, asked, encode_pair, sampler, until_stop
from tests import hub, jobs

GOLDEN = jobs.ROOT / "tests" / "harness_golden.json"
ARGUMENTS = {"mc_num": 4, "length": 16, "block_length": 8, "max_length": 256, "batch_size": 4, "data": 1}
"""With which the golden was made."""


@dataclasses.dataclass
class Instance:
  args: tuple


class LM:
  """What `lm_eval.api.model.LM` has."""

  def __init__(self) -> None:
    self.cache_hook = types.SimpleNamespace(add_partial=lambda *arguments: None)


class Registry(dict):
  def register(self, name: str, target: str) -> None:
    self[name] = target


@pytest.fixture(scope="module")
def stand_in():
  names = {
    "lm_eval": {},
    "lm_eval.api": {},
    "lm_eval.api.instance": {"Instance": Instance},
    "lm_eval.api.model": {"LM": LM},
    "lm_eval.api.registry": {"model_registry": Registry()},
  }
  with pytest.MonkeyPatch.context() as patch:
    for name, content in names.items():
      module = types.ModuleType(name)
      vars(module).update(content)
      patch.setitem(sys.modules, name, module)
    patch.delitem(sys.modules, "d1jax.harness", raising=False)
    yield names
  sys.modules.pop("d1jax.harness", None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return hub.write(tmp_path_factory.mktemp("hub") / "llada", dtype="float32")


@pytest.fixture(scope="module")
def model_class(stand_in):
  from d1jax.harness import D1jaxLM

  return D1jaxLM


@pytest.fixture(scope="module")
def lm(model_class, folder):
  with contextlib.ExitStack() as stack:
    patch = stack.enter_context(pytest.MonkeyPatch.context())
    patch.setattr("d1jax.harness.make_mesh", lambda sizes: one_device())
    return model_class(pretrained=str(folder), **ARGUMENTS)


def one_device():
  from d1jax.parallel import mesh

  return mesh.make_mesh({"data": 1}, mesh.first_device())


def golden(kind: str) -> tuple[list[Instance], list]:
  requests = json.loads(GOLDEN.read_text(encoding="utf-8"))
  chosen = [request for request in requests if request["type"] == kind]
  return [Instance(tuple(request["args"])) for request in chosen], [request["answer"] for request in chosen]


def test_the_command_makes_the_model_known_once(stand_in):
  for _ in range(2):
    lm_eval.register()
  assert stand_in["lm_eval.api.registry"]["model_registry"] == {"d1jax": "d1jax.harness:D1jaxLM"}


def test_without_the_harness_it_is_one_line(monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, "lm_eval.models", None)
  with pytest.raises(SystemExit) as end:
    lm_eval.main()
  assert end.value.code == 2
  assert 'is not installed: pip install "d1jax[lm_eval]"' in capsys.readouterr().err


@pytest.mark.slow(reason="compiles programs of its own")
def test_likelihoods_are_those_that_the_harness_got(lm):
  requests, answers = golden("loglikelihood")
  found = lm.loglikelihood(requests)
  np.testing.assert_allclose([logp for logp, _ in found], [logp for logp, _ in answers], rtol=1e-4)
  assert [greedy for _, greedy in found] == [greedy for _, greedy in answers]
  rolling, logps = golden("loglikelihood_rolling")
  np.testing.assert_allclose(lm.loglikelihood_rolling(rolling), logps, rtol=1e-4)


@pytest.mark.slow(reason="compiles programs of its own")
def test_answers_are_those_of_generate_and_of_the_harness(lm, monkeypatch):
  requests, answers = golden("generate_until")
  kept = {}
  hook = types.SimpleNamespace(add_partial=lambda kind, args, answer: kept.update({(kind, args[0]): answer}))
  monkeypatch.setattr(lm, "cache_hook", hook)
  found = lm.generate_until(requests)
  assert found == answers
  assert kept == {("generate_until", request.args[0]): text for request, text in zip(requests, found, strict=True)}
  for request, text in zip(requests, found, strict=True):
    ids = np.asarray(lm.tokenizer.encode(request.args[0])[-(256 - 16) :], np.int32)
    spec = sampler(lm.settings, None, 16, 0.0)
    (one,) = d1jax.generate(lm.model, [ids], spec=spec, prompt_buckets=(256,))
    until = [stop for stop in request.args[1]["until"] if stop in one.text]
    assert text == one.text[: min((one.text.index(stop) for stop in until), default=None)]
  # A part of the requests, as after a cache, and in another order.
  assert lm.generate_until(requests[:0:-1]) == found[:0:-1]


@pytest.mark.slow(reason="compiles programs of its own")
def test_repeated_draws_are_samples_of_the_request(lm):
  options = {"until": [], "temperature": 1.0, "do_sample": True, "seed": 3}
  requests = [Instance((text, options)) for text in ("ab", "cd", "ab", "ab")]
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
def test_wrong_arguments_are_one_line(model_class, arguments, message):
  with pytest.raises(RunError) as caught:
    model_class(**arguments)
  assert message in str(caught.value)
  assert "\n" not in str(caught.value)


def test_auto_is_a_batch_for_all_devices(lm, monkeypatch):
  for size, most, rows in (("auto", None, 16), ("auto:4", 6, 6), (3, 2, 3)):
    monkeypatch.setattr(lm, "settings", dataclasses.replace(lm.settings, batch_size=size, max_batch_size=most))
    assert lm.rows == rows
  assert Settings.of({"pretrained": 7, "batch_size": "5"}) == Settings(pretrained="7", batch_size=5)
  assert jnp.float32 == lm.model.params["embedding"].dtype


@pytest.mark.slow(reason="reads a trained run, and compiles programs of its own")
def test_a_run_is_read_with_its_own_tokenizer(model_class):
  from d1jax.evaluation import subject
  from tests import runs

  workdir, _, _ = runs.finished()
  lm = model_class(checkpoint=str(workdir), length=8, block_length=8, mc_num=1, max_length=64)
  config = jobs.load("eval")
  config.checkpoint = str(workdir)
  found = subject.load(config)
  text = "0300413012003420"
  ids = np.asarray(lm.tokenizer.encode(text), np.int32)
  spec = sampler(lm.settings, None, 8, 0.0)
  (one,) = d1jax.generate(found.experiment.model, [ids], params=found.params(), spec=spec, prompt_buckets=(56,))
  assert lm.generate_until([Instance((text, {"until": []}))]) == [one.text]
  with pytest.raises(RunError, match="the tokenizer has no chat template: leave --apply_chat_template out"):
    lm.apply_chat_template([{"role": "user", "content": text}])
