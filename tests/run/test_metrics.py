"""Records survive kills and resumes; progress is plain where nobody watches."""

import json
import os
from pathlib import Path

import pytest

from d1jax.errors import RunError
from d1jax.run import metrics
from d1jax.run.metrics import MetricsWriter, Progress, read_records, warn_of_lost


def write(folder, stage, start, iterations):
  writer = MetricsWriter(folder, stage, start)
  for iteration in iterations:
    writer.log(iteration, {"loss": float(iteration)})
  writer.close()


def seen(folder):
  return [(r["stage"], r["iteration"]) for r in read_records(folder / "metrics.jsonl")]


def test_a_resume_drops_what_it_will_make_again(tmp_path):
  write(tmp_path, "sft", 0, [1, 2, 3])
  write(tmp_path, "grpo", 0, [1, 2, 3, 4])
  write(tmp_path, "grpo", 2, [3])
  assert seen(tmp_path) == [("sft", 1), ("sft", 2), ("sft", 3), ("grpo", 1), ("grpo", 2), ("grpo", 3)]


def test_a_line_cut_off_by_a_kill_is_left_out(tmp_path):
  write(tmp_path, "sft", 0, [1, 2])
  path = tmp_path / "metrics.jsonl"
  path.write_text(path.read_text() + '{"stage": "sft", "itera')
  assert seen(tmp_path) == [("sft", 1), ("sft", 2)]
  write(tmp_path, "sft", 2, [3])
  assert seen(tmp_path) == [("sft", 1), ("sft", 2), ("sft", 3)]
  assert all(json.loads(line) for line in path.read_text().splitlines())


RECORD = b'{"stage": "sft", "iteration": 2, "loss": 2.0}'
NOT_RECORDS = {
  "cut": RECORD[:20],
  "not UTF-8": b'{"stage": "sft", "iteration": 2, "x\xff": 1}',
  "a number": b"3",
  "a list": b"[1, 2]",
  "null": b"null",
  "no stage": b'{"iteration": 2}',
  "an unknown stage": b'{"stage": "rl", "iteration": 2}',
  "a stage of another type": b'{"stage": ["sft"], "iteration": 2}',
  "an iteration of text": b'{"stage": "sft", "iteration": "2"}',
  "no iteration": b'{"stage": "sft", "iteration": null}',
  "a loss of text": b'{"stage": "sft", "iteration": 2, "loss": "low"}',
  "deep": b"[" * 100_000,
  "a long number": b'{"stage": "sft", "iteration": 2, "loss": 1' + b"0" * 400 + b"}",
}


@pytest.mark.parametrize("name", NOT_RECORDS)
def test_a_damaged_line_is_lost_alone_said_and_kept_aside(tmp_path, name, caplog):
  write(tmp_path, "sft", 0, [1, 2, 3])
  path = tmp_path / "metrics.jsonl"
  first, _, third = path.read_bytes().splitlines(keepends=True)
  path.write_bytes(first + NOT_RECORDS[name] + b"\n" + third)
  before = path.read_bytes()
  assert seen(tmp_path) == [("sft", 1), ("sft", 3)]
  assert path.read_bytes() == before, "a reader writes nothing"
  for _ in range(2):
    write(tmp_path, "grpo", 0, [1])
  assert seen(tmp_path) == [("sft", 1), ("sft", 3), ("grpo", 1)]
  assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == NOT_RECORDS[name] + b"\n"
  assert [r.message for r in caplog.records] == [
    f"{path}: 1 lines are no records and were moved to {path.name}.damaged"
  ]


def test_a_mark_at_the_start_carriage_returns_and_blank_lines_lose_nothing(tmp_path):
  write(tmp_path, "sft", 0, [1, 2, 3])
  path = tmp_path / "metrics.jsonl"
  path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n\n"))
  assert seen(tmp_path) == [("sft", 1), ("sft", 2), ("sft", 3)]
  write(tmp_path, "sft", 3, [4])
  assert not (tmp_path / "metrics.jsonl.damaged").exists()


@pytest.mark.parametrize(("make", "kind"), [(Path.mkdir, "is a folder"), (os.mkfifo, "is no regular file")])
def test_what_is_in_the_place_of_the_file_is_moved_away(tmp_path, make, kind):
  path = tmp_path / "metrics.jsonl"
  make(path)
  touches = (lambda: read_records(path), lambda: MetricsWriter(tmp_path, "sft", 0), lambda: warn_of_lost(path, {}))
  for touch in touches:
    with pytest.raises(RunError, match=kind) as caught:
      touch()
    said = f"{path} {kind}, expected a file: move it away, then run the same command again"
    assert str(caught.value) == said
  path.rename(tmp_path / "away")
  write(tmp_path, "sft", 0, [1])
  assert seen(tmp_path) == [("sft", 1)]


@pytest.mark.parametrize("how", ["emptied", "deleted"])
def test_lost_records_are_said_in_one_line_and_the_run_goes_on(tmp_path, how, caplog):
  path = tmp_path / "metrics.jsonl"
  write(tmp_path, "sft", 0, [1, 2, 3])
  write(tmp_path, "grpo", 0, [1, 2, 3, 4])
  warn_of_lost(path, {"sft": 3, "grpo": 2})
  assert not caplog.records, "nothing is lost"
  whole = path.read_bytes()
  path.write_bytes(b"") if how == "emptied" else path.unlink()
  warn_of_lost(path, {"sft": 3, "grpo": 2})
  write(tmp_path, "grpo", 2, [3])
  warn_of_lost(path, {"grpo": 3})
  first, second = (record.message for record in caplog.records)
  assert first.startswith(f"{path} lacks records that were written: 3 of the 3 of sft and 2 of the 2 of grpo. Training")
  assert "written: 2 of the 3 of grpo. " in second
  assert "\n" not in first
  path.write_bytes(whole)
  warn_of_lost(path, {"sft": 3, "grpo": 3})
  assert len(caplog.records) == 2, "the remedy works"


def test_no_file_no_records(tmp_path):
  assert read_records(tmp_path / "metrics.jsonl") == []


@pytest.fixture
def clock(monkeypatch):
  """A clock that a test moves."""
  now = [0.0]
  monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
  return now


@pytest.mark.parametrize(("left", "etas"), [(None, (40, 20, 0)), (641, (23, 3, 0))])
def test_plain_lines_without_a_terminal(capsys, clock, left, etas):
  progress = Progress("grpo", 40, 10, lines=4, left=left)
  for iteration in range(11, 41):
    clock[0] += 600 if iteration == 11 else 2  # what the first one compiles says nothing about the others
    progress.update(iteration, {"reward": 0.12345, "alarm": "entropy"})
  progress.close()
  assert capsys.readouterr().out.splitlines() == [
    f"grpo {iteration}/40  reward 0.123  alarm entropy  eta {eta} s"
    for iteration, eta in zip((20, 30, 40), etas, strict=True)
  ]


def test_a_validation_has_its_own_line_and_the_eta_of_the_run_comes_with_it(capsys, clock):
  progress = Progress("sft", 4, 0, lines=2)
  for iteration, shown in enumerate(({}, {"validation": 0.25}, {}, {"validation": 0.5}), 1):
    clock[0] += 1
    progress.update(iteration, {"loss": 0.5} | shown)
    if shown:
      progress.expect(600)
  assert capsys.readouterr().out.splitlines() == [
    "sft 2/4  validation 0.25",
    "sft 2/4  loss 0.5  eta 2 s",
    "sft 4/4  validation 0.5",
    "sft 4/4  loss 0.5  eta 0 s, of the run 10 min",
  ]


@pytest.mark.parametrize(("seconds", "said"), [(0, "0 s"), (119, "119 s"), (600, "10 min"), (8000, "2.2 h")])
def test_a_time_is_said_as_a_person_says_it(seconds, said):
  assert metrics.duration(seconds) == said


def test_a_bar_on_a_terminal(capsys, monkeypatch):
  monkeypatch.setattr("sys.stderr.isatty", lambda: True)
  progress = Progress("sft", 2, 0)
  progress.update(1, {"loss": 0.5, "validation": 0.75})
  progress.update(2, {"loss": 0.25})
  progress.close()
  captured = capsys.readouterr()
  assert captured.out == "sft 1/2  validation 0.75\n"
  assert "sft: 100%" in captured.err
  assert "loss 0.25" in captured.err


def test_records_in_a_bucket_are_there_when_they_are_kept(bucket, monkeypatch):
  write(bucket, "sft", 0, [1, 2])
  writer = MetricsWriter(bucket, "grpo", 0)
  writer.log(1, {"reward": 0.5})
  assert seen(bucket) == [("sft", 1), ("sft", 2)], "an object is not written anew for every record"
  writer.keep()
  assert seen(bucket) == [("sft", 1), ("sft", 2), ("grpo", 1)]
  writer.log(2, {"reward": 0.5})
  monkeypatch.setattr(metrics, "UPLOAD_SECONDS", 0)
  writer.log(3, {"reward": 0.5})
  assert [number for _, number in seen(bucket)] == [1, 2, 1, 2, 3]
  write(bucket, "grpo", 1, [])
  assert seen(bucket) == [("sft", 1), ("sft", 2), ("grpo", 1)]
