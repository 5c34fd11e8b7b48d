"""Rejection sampling: which answers are kept, rounds that are killed and go on, and inputs that are refused."""

import dataclasses
import functools
import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from d1jax import distill, recipe
from d1jax.errors import PreemptedError, RunError
from d1jax.evaluation import rejection, rollout_answers, subject
from d1jax.evaluation.rollout_answers import Answer
from d1jax.evaluation.subject import Found
from d1jax.run.checkpoint import Checkpoints
from d1jax.tasks import split_hash
from tests import jobs

OWN = {
  "sft__steps": 4,
  "sft__validate_every": 4,
  "sft__completion_buckets": (24,),  # a text may have more tokens than its answer was sampled with
  "grpo__steps": 2,
  "rounds": 2,
  "distill__questions": 48,
  "distill__samples": 2,
}


def job(workdir, **changes):
  return jobs.started(workdir, "distill", **(OWN | {"checkpoint": "runs/none"} | changes))


@functools.cache
def built():
  return distill.experiments.build(distill._stage(job(jobs.ROOT / "none"), "grpo", jobs.ROOT / "none"), None)


def prompts():
  """The first three questions."""
  found = built().prompts("train")
  return dataclasses.replace(found, **{name: getattr(found, name)[:3] for name in ("records", "ids", "prefills")})


ANSWERS = [
  [Answer(True, "long", 0, 1.0, 9), Answer(False, "no", 1, 0.0, 2), Answer(True, "one", 2, 1.0, 4)],
  [Answer(False, "no", 0, 0.5, 3)],
  [Answer(True, "two", 1, 1.0, 4), Answer(True, "six", 3, 1.0, 4), Answer(True, "ten", 4, 1.0, 3)],
]


@pytest.mark.parametrize(
  ("keep", "most", "expected"),
  [
    ("shortest", 4, [(0, "one", 2), (2, "ten", 4)]),
    ("distinct", 2, [(0, "long", 0), (0, "one", 2), (2, "two", 1), (2, "six", 3)]),
  ],
)
def test_right_answers_are_kept_with_their_origin(keep, most, expected):
  asked = prompts()
  rows = rejection.rows(asked, ANSWERS, keep=keep, most=most, made={"seed": 7})
  assert [(row["made"]["question"], row["messages"][-1]["content"], row["made"]["sample"]) for row in rows] == expected
  for row in rows:
    record = row["made"]["record"]
    assert row["messages"][:-1] == asked.task.prompt(record, "terse")[0]
    assert record == dict(asked.records[row["made"]["question"]])
    assert {"seed": 7, "reward": 1.0}.items() <= row["made"].items()


@pytest.fixture
def stages(monkeypatch):
  """Rounds whose stages are over at once; the list of those that ran, and the stage before which the next one dies."""
  ran, dies = [], []

  def stage(name, home, *facts):
    if dies and home.name == dies[0]:
      dies.pop()
      raise PreemptedError(f"SIGTERM: saved at the start of {home.name}; run the same command again to go on")
    ran.append((name, home.name, *facts))

  def sample(asker, params, **options):
    stage("sampled", SimpleNamespace(name=params))
    return ANSWERS

  def run(config):
    home = distill.Path(config.workdir)
    start = config.sft.data if config.mode == "sft" else config.model.pretrained
    stage(config.mode, home, distill.Path(start).name)
    solved = [[1, 1], [home.name == "grpo-2", 1]]
    (home / "completions").mkdir(parents=True, exist_ok=True)
    rows = [
      {"record": dict(r), "metrics": {"solved": s}} for r, s in zip(built().task.records("test"), solved, strict=False)
    ]
    (home / "completions" / "after.jsonl").write_text("\n".join(map(json.dumps, rows)))
    share = sum(s for s, _ in solved) / 2
    return {"after": {"solved": share, "solved_interval": [0.25, 1.0], "n": 2}, "seconds": {config.mode: 5.0}}

  def export(config):
    stage("model", distill.Path(config.output), distill.Path(config.checkpoint).name)
    (folder := distill.Path(config.output)).mkdir(parents=True)
    return folder

  read = lambda config, policy, own: SimpleNamespace(
    experiment=None, name=policy.name, fingerprint="f", params=lambda: distill.Path(policy.name).name
  )
  monkeypatch.setattr(distill, "_checked", lambda config: built())
  monkeypatch.setattr(distill, "_asker", lambda *given: SimpleNamespace(prompts=prompts()))
  monkeypatch.setattr(distill, "_read", read)
  monkeypatch.setattr(rollout_answers, "sample", sample)
  monkeypatch.setattr(recipe, "run", run)
  monkeypatch.setattr(distill.export, "run", export)
  monkeypatch.setattr(distill.compiled, "kept", lambda workdir: nullcontext())
  return ran, dies


WHOLE = [
  ("sampled", "first"),
  ("sft", "sft-1", "answers-1.jsonl"),
  ("model", "model-1", "sft-1"),
  ("grpo", "grpo-1", "model-1"),
  ("sampled", "grpo-1"),
  ("sft", "sft-2", "answers-2.jsonl"),
  ("model", "model-2", "sft-2"),
  ("grpo", "grpo-2", "model-2"),
]


def test_rounds_that_are_killed_before_any_stage_go_on_where_they_were(tmp_path, stages, capsys):
  ran, dies = stages
  config = job(tmp_path, checkpoint="first", sft__completion_buckets=(24,))
  for name in ("sft-1", "model-1", "grpo-1", "sft-2", "model-2", "grpo-2"):
    dies.append(name)
    with pytest.raises(PreemptedError):
      distill.run(config)
    assert not dies
  rounds = distill.run(config)
  assert list(dict.fromkeys(ran)) == WHOLE
  made_once = [one for one in ran if one[0] in ("sampled", "model")]
  assert len(made_once) == len(set(made_once)) == 4
  assert rounds == json.loads((tmp_path / "rounds.json").read_text())["rounds"]
  assert [(one["questions"], one["none_right"], one["kept"], one["length"]) for one in rounds] == [(3, 1, 2, 3.5)] * 2
  assert "gain" not in rounds[0]
  assert rounds[1]["gain"]["value"] == 0.5
  last = capsys.readouterr().out.strip().splitlines()[-1].split(" | ")
  assert last[:5] == ["| 2", "3", "1", "2", "3.5"]
  assert last[6:10] == ["50.0% [25.0, 100.0]", "5", "100.0% [25.0, 100.0]", "5"]
  with pytest.raises(RunError, match=r"answers-1.jsonl was sampled by first .* use --config.workdir=..."):
    distill.run(job(tmp_path, checkpoint="first", distill__temperature=0.5))
  assert [one["round"] for one in distill.run(job(tmp_path, checkpoint="first", rounds=1))] == [1]
  (tmp_path / "answers-2.jsonl").write_text('{"messages": []}\n')
  with pytest.raises(RunError, match=r"answers-2.jsonl is damaged \('made'\); delete it to sample it again"):
    distill.run(config)
  assert len(json.loads((tmp_path / "rounds.json").read_text())["rounds"]) == 2  # the second one is still there


def test_no_right_answer_writes_no_file(tmp_path, stages, monkeypatch):
  monkeypatch.setattr(rollout_answers, "sample", lambda *given, **options: [[], ANSWERS[1], []])
  with pytest.raises(RunError, match=r"none of 3 questions got a right answer: raise distill.samples=2"):
    distill.run(job(tmp_path))
  assert not list(tmp_path.glob("answers*"))


REFUSED = {
  "nobody samples": ({"checkpoint": None}, "nothing samples the first round: set config.checkpoint"),
  "rounds": ({"rounds": 0}, "rounds=0 must be a whole number of at least 1"),
  "samples": ({"distill__samples": 0}, "distill.samples=0 must be a whole number of at least 1"),
  "keep": ({"distill__keep": "best"}, "unknown distill.keep 'best'; choose one of: shortest, distinct"),
  "steps": ({"sft__steps": 0}, "sft.steps=0 fine-tunes on no answer: let it be at least 1"),
  "output": ({"output": "OUTPUT"}, "config.output=.* exists; name a new file"),
  "a run's folder": ({"workdir": "RUN"}, "holds a run, expected rounds: use --config.workdir=... for a new folder"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_distilled_is_one_line(tmp_path, name):
  changes, message = REFUSED[name]
  (tmp_path / "OUTPUT").write_text("mine")
  (tmp_path / "RUN" / "checkpoints").mkdir(parents=True)
  named = {field: str(tmp_path / value) for field, value in changes.items() if value in ("OUTPUT", "RUN")}
  fields = {"workdir": tmp_path / "new"} | changes | named
  with pytest.raises(RunError, match=message) as caught:
    distill.run(job(fields.pop("workdir"), **fields))
  assert "\n" not in str(caught.value)
  assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
  ("task", "test", "message"),
  [
    ("sudoku", None, None),
    ("countdown", None, "was trained on the task countdown, but the questions are of sudoku: name a run of sudoku"),
    ("sudoku", "1234", "the test questions of .* are not those of this configuration"),
  ],
)
def test_a_run_that_may_know_the_held_out_questions_is_refused(tmp_path, monkeypatch, task, test, message):
  records = {name: built().task.records(name) for name in ("test", "validation")}
  records |= {"test": [{"puzzle": test}]} if test else {}
  splits = {name: {"n": len(found), "sha256": split_hash(found)} for name, found in records.items()}
  (tmp_path / "splits.json").write_text(json.dumps(splits))
  monkeypatch.setattr(Found, "metadata", {"config": {"task": {"name": task}}})
  stage = tmp_path / "checkpoints" / "grpo"
  with pytest.raises(ValueError, match=message) if message else nullcontext():
    distill._check_questions(Found(stage / "1", Checkpoints(stage), True), built())


@pytest.mark.slow(reason="samples, and runs both stages of a round")
def test_a_round_samples_a_folder_and_trains_on_answers_to_training_questions_alone(tmp_path, monkeypatch):
  """The start solves nothing: a right answer is one that is well-formed."""
  monkeypatch.setattr(rollout_answers, "METRIC", "well_formed")
  config = job(tmp_path / "rounds", checkpoint=None, pretrained=str(jobs.START), rounds=1)
  (found,) = distill.run(config)
  rows = [json.loads(line) for line in (tmp_path / "rounds" / "answers-1.jsonl").read_text().splitlines()]
  assert found["kept"] == len(rows) == 48 - found["none_right"] > 0
  task = built().task
  asked = lambda split: [task.prompt(record, "terse")[0][-1]["content"] for record in task.records(split)]
  for row in rows:
    *turns, answer = row["messages"]
    reached, possible = task.grade(answer["content"], row["made"]["record"]).metrics["well_formed"]
    assert reached == possible
    assert turns[-1]["content"] in asked("train")[:48]
    assert turns[-1]["content"] not in asked("test") + asked("validation")
  assert set(found) == {"round", "by", "questions", "none_right", "kept", "length", "seconds", "sft", "grpo"}
  sampled = subject.find_checkpoint(tmp_path / "rounds" / "grpo-1")
  assert sampled.metadata["config"]["model"]["pretrained"] == str(tmp_path / "rounds" / "model-1")

  monkeypatch.setattr(distill, "_sample", None)  # sampling again would fail
  before = (tmp_path / "rounds" / "model-1" / "config.json").stat().st_mtime_ns
  assert distill.run(config) == [found]
  assert (tmp_path / "rounds" / "model-1" / "config.json").stat().st_mtime_ns == before
