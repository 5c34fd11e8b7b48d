"""Seconds, device-seconds, shares and utilisation, with numbers that are worked out by hand."""

import json
import types

import pytest

from d1jax.telemetry import ledger
from d1jax.telemetry.cost import Work

CPU, CHIP = "cpu", "TPU v5 lite"  # of 197e12 FLOP/s
WORK = {
  "rollout": Work(6_000, 60, passes=3),
  "score": Work(1_000, 20, passes=1),
  "update": Work(2_000, 40, repeated=1_000, passes=2),
}


@pytest.fixture
def clock(monkeypatch):
  """A clock that stands still until `clock.now` is set."""
  found = types.SimpleNamespace(now=0.0)
  monkeypatch.setattr(ledger.time, "perf_counter", lambda: found.now)
  return found


def test_the_seconds_of_a_compiled_update_are_shared_by_what_it_computes():
  found = ledger.entry(2, CPU, {"rollout": 3.0, "grading": 0.5, "update": 2.0}, WORK)
  assert found == {
    "cost/seconds/rollout": 3.0,
    "cost/seconds/grading": 0.5,
    "cost/seconds/score": 0.5,
    "cost/seconds/update": 1.5,
    "cost/flops/rollout": 6_000,
    "cost/flops/score": 1_000,
    "cost/flops/update": 2_000,
    "cost/tokens/rollout": 60,
    "cost/tokens/score": 20,
    "cost/tokens/update": 40,
    "cost/passes/rollout": 3,
    "cost/passes/score": 1,
    "cost/passes/update": 2,
    "cost/devices": 2,
  }


def test_peaks_are_of_all_devices_and_known_for_accelerators_alone():
  assert ledger.entry(4, CHIP, {"update": 1.0}, {"update": WORK["update"]})["cost/peak_flops"] == 4 * 197e12


def test_each_moment_belongs_to_one_part(clock):
  clock.now = 5.0
  running = ledger.Clock(began=1.0)
  clock.now = 12.0
  first = running.close(ledger.entry(2, CHIP, {"rollout": 3.0, "grading": 0.5, "update": 2.0}, WORK))
  parts = {"rollout": 3, "grading": 0.5, "score": 0.5, "update": 1.5, "compilation": 4, "idle": 1.5}
  assert {part: first[f"cost/seconds/{part}"] for part in parts} == parts
  assert (first["seconds"], first["compiled_share"]) == (7, 5 / 7)
  assert first["cost/mfu"] == 9_000 / (7 * 2 * 197e12)
  for part, began, ended in (("saving", 12.25, 12.5), ("validation", 13.0, 14.5)):
    clock.now = began
    with running.outside(part):
      clock.now = ended
  second = running.close(ledger.entry(1, CPU, {"update": 0.25, "validation": 0.5}, {"update": WORK["update"]}))
  parts = {"update": 0.25, "validation": 2.0, "saving": 0.25}
  assert {name.removeprefix("cost/seconds/"): value for name, value in second.items() if "/seconds/" in name} == parts
  assert (second["seconds"], second["compiled_share"]) == (0.25, 1.0)
  assert "cost/mfu" not in second


def record(stage, devices, elapsed, peak=None, **seconds):
  found = {"stage": stage, "elapsed": elapsed, "cost/devices": devices}
  found |= {f"cost/seconds/{part}": value for part, value in seconds.items()}
  for part in ("rollout", "update"):
    if part in seconds:
      found |= {f"cost/flops/{part}": 8e12, f"cost/tokens/{part}": 50.0}
  return found | ({"cost/peak_flops": peak} if peak else {})


RECORDS = [
  record("sft", 4, 1.0, 40e12, update=1.0, compilation=3.0),
  record("grpo", 4, 2.0, 40e12, rollout=1.0, grading=0.5, update=0.5),
  record("grpo", 8, 5.0, 80e12, rollout=1.0, update=0.5, saving=1.0, idle=0.5),
]


def test_sums_are_device_seconds_and_shares_of_the_whole():
  spent = ledger.total(RECORDS, {"sft": 1.0, "grpo": 5.25})
  seconds = {stage: {part: each["device_seconds"] for part, each in spent[stage].items()} for stage in ("sft", "grpo")}
  assert seconds == {
    "sft": {"update": 4.0, "compilation": 12.0},
    "grpo": {"rollout": 12.0, "grading": 2.0, "update": 6.0, "saving": 10.0, "idle": 4.0},
  }
  shares = [each["share"] for stage in ("sft", "grpo") for each in spent[stage].values()]
  assert sum(shares) == pytest.approx(1, rel=1e-12)
  assert spent["grpo"]["rollout"] == {
    "device_seconds": 12.0,
    "share": 12 / 50,
    "flops": 16e12,
    "tokens": 100,
    "mfu": 16e12 / (40e12 + 80e12),
  }
  assert spent["grpo"]["grading"]["mfu"] is None
  # 4 x 4 and 4 x 2 and 8 x 3.25 device-seconds of chips with 10 TFLOP/s each.
  assert spent["total"] == {
    "device_seconds": 50.0,
    "share": 1.0,
    "flops": 40e12,
    "tokens": 250,
    "mfu": pytest.approx(40e12 / (50 * 10e12), rel=1e-12),
  }
  assert json.loads(json.dumps(spent)) == spent


def test_without_a_peak_for_all_records_there_is_no_utilisation():
  moved = [record("grpo", 2, 1.0, update=1.0), *RECORDS[1:]]
  spent = ledger.total(moved, {"grpo": 5.0})
  assert spent["grpo"]["update"]["mfu"] is None
  assert spent["total"]["mfu"] is None
  assert "MFU" in ledger.table(spent)
  assert "%" in ledger.table(spent)


def test_the_table_has_a_line_for_each_part_that_took_time():
  head, _, *rows, last = ledger.table(ledger.total(RECORDS, {"sft": 1.0, "grpo": 5.25})).splitlines()
  assert head.split() == ["device-seconds", "share", "tokens", "FLOPs", "MFU"]
  assert [row.split()[:2] for row in rows] == [
    *(["sft", part] for part in ("update", "compilation")),
    *(["grpo", part] for part in ("rollout", "grading", "update", "saving", "idle")),
  ]
  assert rows[2].split() == ["grpo", "rollout", "12.0", "24.0%", "100", "1.60e+13", "13.3%"]
  assert rows[3].split() == ["grpo", "grading", "2.0", "4.0%"]
  assert last.split() == ["total", "50.0", "100.0%", "250", "4.00e+13", "8.0%"]
