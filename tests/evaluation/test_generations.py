"""Completions in files; the four accuracies that d1 published are the first test."""

import gzip
import json
import os
from pathlib import Path

import pytest

from d1jax import tasks
from d1jax.errors import RunError
from d1jax.evaluation import command, generations, items, output
from tests.jobs import load

PUBLISHED = {
  "gsm8k": ("gsm8k", 69.29, 1130),
  "math": ("math500", 26.0, 500),
  "countdown": ("countdown", 20.7, 256),
  "sudoku": ("sudoku", 11.72, 256),
}


def d1_row(nums: list[int], target: int, text: str) -> dict:
  return {"question": f"Numbers: {nums}\nTarget: {target}", "generations": text, "ground_truth": [nums, target]}


ROWS = [
  d1_row([3, 25, 7], 68, "\\boxed{25*3-7}<|eot_id|>"),
  d1_row([1, 2, 4], 11, "no<|endoftext|>"),
  d1_row([2, 3, 4], 5, "<answer>2*4-3</answer>"),
]


def published(data_root: str, task: str) -> Path:
  path = Path(data_root) / "generations" / f"{PUBLISHED[task][0]}_128.jsonl.gz"
  if not path.is_file():
    pytest.skip(f"no published generations at {path}")
  return path


def grade(path: Path, task: str, output: Path, **changes):
  config = load("eval", f"tiny,{task}")
  config.update(generations=str(path), output=str(output), **changes)
  return command.run(config)


def last_line(capsys) -> dict:
  return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.few(2, reason="each case grades thousands of generations")
@pytest.mark.parametrize("task", PUBLISHED)
def test_d1s_published_accuracies_to_the_digit(data_root, task, tmp_path, capsys):
  results = grade(published(data_root, task), task, tmp_path, protocol="d1")
  _, accuracy, count = PUBLISHED[task]
  assert last_line(capsys) == {"task": task, "protocol": "d1", "accuracy": accuracy, "n": count}
  # Both protocols stand side by side: what is right is right under either.
  strict = grade(published(data_root, task), task, tmp_path / "strict")
  shared = results["arms"][0]["summary"]["metrics"]
  assert strict["arms"][0]["summary"]["metrics"]["solved"] == shared["solved"]
  assert (tmp_path / "report.html").stat().st_size > 10_000


def d1_file(path: Path, rows, **fields) -> None:
  whole = {"generations": rows, "metrics": {"wall_time": 1.0}, "model_path": "m", "gen_length": 128, "block_length": 32}
  path.write_text(json.dumps(whole | fields))


def test_every_layout_gives_the_same_numbers(tmp_path, capsys):
  (tmp_path / "ranks").mkdir()
  d1_file(tmp_path / "ranks" / "cd_128_64_0_generations.json", ROWS[:1])
  d1_file(tmp_path / "ranks" / "cd_128_64_1_generations.json", ROWS[1:], metrics={"wall_time": 2.0})
  (tmp_path / "ranks" / "notes.txt").write_text("not read")
  d1_file(tmp_path / "whole.json", ROWS)
  lines = "".join(json.dumps(row) + "\n" for row in ROWS)
  (tmp_path / "rows.jsonl").write_text(lines)
  (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
  plain = [
    {"record": {"nums": row["ground_truth"][0], "target": row["ground_truth"][1]}, "text": row["generations"]}
    for row in ROWS
  ]
  (tmp_path / "plain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in plain))
  for protocol, accuracy in (("d1", 33.33), ("strict", 66.67)):
    for name in ("ranks", "whole.json", "rows.jsonl", "rows.jsonl.gz", "plain.jsonl"):
      output = tmp_path / "out" / protocol / name
      grade(tmp_path / name, "countdown", output, protocol=protocol)
      found = last_line(capsys)
      assert found == {"task": "countdown", "protocol": protocol, "accuracy": accuracy, "n": 3}, name
  # What an evaluation wrote can be graded again.
  written = next((tmp_path / "out" / "d1" / "whole.json" / "items").iterdir())
  grade(written, "countdown", tmp_path / "again", protocol="d1")
  assert last_line(capsys)["accuracy"] == 33.33


def test_strict_never_sees_what_is_behind_a_stop(tmp_path):
  row = ROWS[0] | {"generations": "I give up.<|eot_id|>\n<answer>25*3-7</answer>\\boxed{25*3-7}"}
  d1_file(tmp_path / "a.json", [row])
  by = {p: grade(tmp_path / "a.json", "countdown", tmp_path / p, protocol=p)["arms"][0] for p in ("d1", "strict")}
  assert by["d1"]["summary"]["accuracy"] == 1.0
  assert by["d1"]["summary"]["metrics"]["solved"]["value"] == by["strict"]["summary"]["accuracy"] == 0.0


@pytest.mark.parametrize(
  ("text", "shown"),
  [
    ("a<|eot_id|>b", "a"),
    ("a<|endoftext|>b<|eot_id|>", "a"),
    ("<|start_header_id|>a<|mdm_mask|>b", "ab"),
    ("a <|im_end|>", "a "),
    ("a < | b |> c", "a < | b |> c"),
    ("", ""),
  ],
)
def test_special_tokens_are_cut(text, shown):
  assert generations.cut(text) == shown


def test_lengths_of_one_folder_are_rows_of_the_table(tmp_path, capsys):
  d1_file(tmp_path / "a.json", ROWS)
  d1_file(tmp_path / "b.json", ROWS[:1], gen_length=256)
  results = grade(tmp_path, "countdown", tmp_path / "out", protocol="d1")
  assert [(arm["length"], arm["summary"]["n"]) for arm in results["arms"]] == [(128, 3), (256, 1)]
  lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()[-2:]]
  assert [(line["length"], line["accuracy"]) for line in lines] == [(128, 33.33), (256, 100.0)]
  grade(tmp_path, "countdown", tmp_path / "one", protocol="d1", lengths=(256,))
  assert last_line(capsys) == {"task": "countdown", "protocol": "d1", "accuracy": 100.0, "n": 1}


def test_several_samples_of_a_question_vote(tmp_path):
  record = {"nums": [3, 25, 7], "target": 68}
  texts = ["<answer>25*3-7</answer>", "<answer>25*3-7</answer>", "<answer>25+3+7</answer>", "no"]
  rows = [{"record": record, "text": text, "sample": i} for i, text in enumerate(texts)]
  (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  summary = grade(tmp_path / "a.jsonl", "countdown", tmp_path / "out")["arms"][0]["summary"]
  assert (summary["n"], summary["samples"]) == (1, 4)
  assert summary["majority"]["value"] == 1.0
  assert summary["pass_at"]["1"]["value"] == 0.5
  assert summary["pass_at"]["4"]["value"] == 1.0


class Odd(tasks.Sudoku):
  """Reads half of a character from every text, and breaks its contract over `bad`."""

  name = "odd"

  def baseline(self, record, style):
    return ""

  def cluster(self, record):
    return record["id"]

  def grade(self, text, record, protocol="strict"):
    return tasks.Grade({"a": float("nan") if "bad" in text else 1.0}, {"solved": (1, 1)}, "7\ud800")


def test_half_of_a_character_in_an_answer_breaks_nothing(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(tasks, "build", lambda *_, **__: Odd())
  (tmp_path / "a.jsonl").write_text(json.dumps({"record": {"id": "1"}, "text": "good \ud800"}))
  results = grade(tmp_path / "a.jsonl", "countdown", tmp_path / "out")
  assert results["arms"][0]["summary"]["accuracy"] == 1.0
  assert last_line(capsys)["accuracy"] == 100.0
  (item,) = output.read_items(tmp_path / "out", results["arms"][0]["name"])
  assert (item.answer, item.text) == ("7\ud800", "good \ud800")
  assert (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_an_error_of_the_task_is_reported_as_the_tasks(tmp_path, monkeypatch):
  monkeypatch.setattr(tasks, "build", lambda *_, **__: Odd())
  (tmp_path / "a.jsonl").write_text(json.dumps({"record": {"id": "1"}, "text": "bad"}))
  message = r"a\.jsonl line 1: the task odd: grade\(text='bad', .*\) gave the reward component 'a' the value nan"
  with pytest.raises(RunError, match=message) as caught:
    grade(tmp_path / "a.jsonl", "countdown", tmp_path / "out")
  assert "is no record" not in str(caught.value)


def test_a_question_that_a_file_repeats_counts_each_time(tmp_path, capsys):
  d1_file(tmp_path / "a.json", [ROWS[0], ROWS[0], ROWS[1]])
  grade(tmp_path / "a.json", "countdown", tmp_path / "out", protocol="d1")
  assert last_line(capsys) == {"task": "countdown", "protocol": "d1", "accuracy": 66.67, "n": 3}


def test_a_gold_that_is_not_known_is_left_out_by_strict_and_wrong_by_d1(tmp_path, capsys):
  rows = [
    {"question": "a", "generations": "\\boxed{5}", "ground_truth": 5.0},
    {"question": "b", "generations": "\\boxed{-5}", "ground_truth": None},
  ]
  d1_file(tmp_path / "a.json", rows)
  grade(tmp_path / "a.json", "gsm8k", tmp_path / "d1", protocol="d1")
  assert last_line(capsys) == {"task": "gsm8k", "protocol": "d1", "accuracy": 50.0, "n": 2}
  grade(tmp_path / "a.json", "gsm8k", tmp_path / "strict")
  assert last_line(capsys) == {"task": "gsm8k", "protocol": "strict", "accuracy": 100.0, "n": 1}


def test_grading_again_gives_the_same_bytes(tmp_path):
  d1_file(tmp_path / "a.json", ROWS)
  grade(tmp_path / "a.json", "countdown", tmp_path / "out")
  before = {p.name: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
  grade(tmp_path / "a.json", "countdown", tmp_path / "out")
  assert {p.name: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == before
  found = [item.text for item in items.read(next((tmp_path / "out" / "items").iterdir()))]
  assert found == [row["generations"] for row in ROWS]


def test_a_subset_is_the_first_questions(tmp_path, capsys):
  d1_file(tmp_path / "a.json", ROWS)
  grade(tmp_path / "a.json", "countdown", tmp_path / "out", questions=1)
  assert last_line(capsys)["n"] == 1
  d1_file(tmp_path / "b.json", ROWS, gen_length=256)
  results = grade(tmp_path, "countdown", tmp_path / "two", questions=2)
  assert [arm["summary"]["n"] for arm in results["arms"]] == [2, 2], "of each length"


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("missing.json", None, "missing.json: not found; name a file"),
    ("a.json", b"", "a.json: holds no completions"),
    ("a.json", b"{]", r"a.json is not JSON \(Expecting property name"),
    ("a.jsonl", b"{]", r"a.jsonl line 1 is not JSON \(Expecting property name"),
    ("a.jsonl", b'{"record": {}, "text": ""}\n{]', r"a.jsonl line 2 is not JSON"),
    ("a.jsonl", b"[" * 100_000, r"a.jsonl line 1 is nested too deep"),
    ("a.json", b'{"generations": []}\n{}', r"a.json line 2: there is something behind"),
    ("a.json", b'{"generations": [],\n "gen_length": true}', "gen_length is True, expected"),
    ("a.json", b"[1]", r"a.json line 1: expected the fields question, .*got \[1\]"),
    *(
      ("a.jsonl", b'{"text": "x", "record": {}, "%s": %s}\n' % (name, value), message)
      for name, value, message in [
        (b"temperature", b"NaN", r"a.jsonl line 1 holds the number NaN, which is not finite"),
        (b"temperature", b"1e999", r"a.jsonl line 1 holds the number 1e999, which is not finite"),
        (b"temperature", b"1" + b"0" * 400, r"a.jsonl line 1 holds a number of 401 digits"),
        (b"temperature", b"true", r"a.jsonl line 1: temperature is True, expected a number"),
        (b"length", b"1" + b"0" * 400, r"a.jsonl line 1 holds a number of 401 digits"),
        (
          b"length",
          b"1" + b"0" * 30,
          r"a.jsonl line 1: length is 1000.*, expected a number from 0 to 9007199254740992",
        ),
        (b"seed", b"-1", r"a.jsonl line 1: seed is -1, expected"),
        (b"sample", b"1.0", r"a.jsonl line 1: sample is 1.0, expected"),
      ]
    ),
    ("a.json", b'{"generations": []}', "holds no completions"),
    ("a.jsonl", b'{"text": "x"}\n', r"a.jsonl line 1: expected the fields"),
    ("a.jsonl", b'{"text": 3, "record": {}}\n', r"a.jsonl line 1: expected the fields"),
    ("a.jsonl", b'\n{"text": "x", "record": {"nums": [1]}}\n', r"a\.jsonl line 2: .* is no record of countdown"),
    ("a.jsonl", b'{"text": "x", "record": {}, "task": "gsm8k"}\n', "line 1: is a completion of the task 'gsm8k'"),
    ("a.jsonl", b'{"question": "q", "generations": "x"}\n', r"a.jsonl line 1: .*ground_truth"),
    ("a.jsonl", b'{"question": "q", "generations": "x", "ground_truth": "1"}\n', r"a.jsonl line 1: .*ground_truth"),
    ("a.jsonl", b'{"text": "x", "record": {}, "sample": null}\n', "line 1: sample is None, expected a number"),
    ("a.jsonl", b'{"text": "x", "record": {}, "length": "128"}\n', "line 1: length is '128', expected a number"),
    ("a.json", b'{"generations": [], "gen_length": null}', "gen_length is None, expected the number of tokens"),
    ("a.jsonl.gz", b"not gzip", r"a.jsonl.gz: cannot be read"),
    ("a.jsonl.gz", gzip.compress(b"x" * 99, mtime=0)[:-4], r"a.jsonl.gz: cannot be read"),
    ("a.json", b"\xff\xfe", r"a.json line 1 is not UTF-8"),
  ],
)
def test_what_is_no_file_of_completions_is_named(tmp_path, name, content, message):
  if content is not None:
    (tmp_path / name).write_bytes(content)
  with pytest.raises(RunError, match=message):
    grade(tmp_path / name, "countdown", tmp_path / "out")
  assert not (tmp_path / "out" / "results.json").exists()


def test_marks_line_ends_and_blank_lines_are_no_content(tmp_path):
  lines = [json.dumps({"record": {"nums": [1]}, "text": text, "sample": i}) for i, text in enumerate("ab")]
  path = tmp_path / "a.jsonl"
  path.write_bytes("\r\n".join(["\ufeff" + lines[0], "", lines[1], ""]).encode())
  assert [one.raw for one in generations.read(path, "countdown")] == ["a", "b"]
  path = tmp_path / "b.json"
  d1_file(path, ROWS)
  path.write_text("\ufeff" + json.dumps(json.loads(path.read_text()), indent=2))
  assert [one.raw for one in generations.read(path, "countdown")] == [row["generations"] for row in ROWS]


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_is_no_regular_file_is_not_waited_for(tmp_path, kind):
  path = tmp_path / "a.jsonl"
  os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
  for asked in (path, tmp_path):
    with pytest.raises(ValueError, match=r"a\.jsonl: is no regular file; name a file of completions"):
      generations.read(asked, "countdown")


@pytest.mark.parametrize("block", [b"x" * 1000, b"\n" * 1000, b'{"record": {}, "text": ""}\n' * 40])
def test_a_file_that_unpacks_without_end_is_given_up(tmp_path, monkeypatch, block):
  """Little is unpacked at a time, and no more than the limits."""
  monkeypatch.setattr(generations, "LARGEST", 100_000)
  monkeypatch.setattr(generations, "LONGEST_LINE", 20_000)
  monkeypatch.setattr(generations, "MOST_LINES", 30_000)
  monkeypatch.setattr(generations, "_BLOCK", 1000)
  (tmp_path / "bomb.jsonl.gz").write_bytes(gzip.compress(block * 5000))
  with pytest.raises(ValueError, match=r"bomb\.jsonl\.gz: holds more than .* split it"):
    generations.read(tmp_path / "bomb.jsonl.gz", "countdown")


def test_models_are_not_mixed(tmp_path):
  d1_file(tmp_path / "a.json", ROWS)
  d1_file(tmp_path / "b.json", ROWS, model_path="another")
  with pytest.raises(RunError, match="completions of several models are mixed"):
    grade(tmp_path, "countdown", tmp_path / "out")


def test_one_task_is_named(tmp_path):
  with pytest.raises(RunError, match="2 tasks are named, but completions in files are graded by one"):
    grade(tmp_path, "gsm8k,math", tmp_path / "out")
  with pytest.raises(RunError, match="0 tasks are named"):
    grade(tmp_path, "", tmp_path / "out")
  with pytest.raises(RunError, match="unknown protocol 'lenient'; choose one of: strict, d1"):
    grade(tmp_path, "countdown", tmp_path / "out", protocol="lenient")


def test_an_output_of_another_evaluation_is_refused(tmp_path):
  d1_file(tmp_path / "a.json", ROWS)
  grade(tmp_path / "a.json", "countdown", tmp_path / "out")
  with pytest.raises(RunError, match="holds another evaluation; name a new folder"):
    grade(tmp_path / "a.json", "countdown", tmp_path / "out", protocol="d1")
