"""The closing report."""

from d1jax.evaluation.evaluator import tables
from d1jax.report import summary

ROW = {
  "solved": 0.5,
  "solved_interval": [0.25, 0.75],
  "cell_accuracy": 0.875,
  "cell_accuracy_interval": [0.8, 0.95],
  "n": 88,
}


def test_a_row_shows_shares_in_percent_with_their_intervals():
  head, rule, row = tables({"an arm": ROW}).splitlines()
  assert head.split() == ["n", "=", "88", "solved", "cell", "accuracy"]
  assert row.split() == ["an", "arm", "50.0%", "[25.0,", "75.0]", "87.5%", "[80.0,", "95.0]"]
  assert len(head) == len(rule) == len(row)


def test_the_widest_table_fits_a_terminal_of_80_columns():
  whole = {"n": 123456} | dict.fromkeys(("solved", "cell_accuracy", "well_formed"), 1.0)
  whole |= {f"{name}_interval": [0.999, 1.0] for name in ("solved", "cell_accuracy", "well_formed")}
  text = tables({"SFT + diffu-GRPO": whole})
  assert max(map(len, text.splitlines())) <= 80
  assert text.count("100.0% [99.9, 100.0]") == 3


def test_mixed_tasks_have_a_table_each():
  mixed = ROW | {"n": 88}
  for task, n in (("sudoku", 60), ("countdown", 28)):
    mixed |= {f"{task}/solved": 0.25, f"{task}/solved_interval": [0.0, 0.5], f"{task}/solved_n": n}
  first, second = tables({"an arm": mixed}).split("\n\n")
  assert first.splitlines()[0] == "sudoku:"
  assert first.splitlines()[-1].split() == ["an", "arm", "25.0%", "[0.0,", "50.0]"]
  assert [part.splitlines()[1].split()[2] for part in (first, second)] == ["60", "28"]
  assert second.splitlines()[0] == "countdown:"


def test_the_summary_names_arms_samples_and_files(tmp_path):
  results = {
    "baseline": ROW | {"solved": 0.0},
    "before": ROW,
    "after": ROW | {"solved": 0.75},
    "seconds": {"sft": 10.4, "grpo": 99.6, "this_invocation": 120.0},
    "samples": [{"record": {"puzzle": "1", "solution": "2"}, "completion": "3", "reward": 0.0, "solved": False}],
    "task": "sudoku",
    "checkpoint": "some/folder",
  }
  text = summary(results, tmp_path)
  for part in (
    "Held-out split of sudoku",
    "constant answer",
    "SFT + diffu-GRPO",
    "75.0%",
    "'3'  wrong",
    "sft 10 s, grpo 100 s",
    "some/folder",
  ):
    assert part in text
  assert "solution" not in text
  del results["seconds"]["sft"]
  assert [line.split("  ")[0] for line in summary(results, tmp_path).splitlines()[5:7]] == ["start", "diffu-GRPO"]
  del results["before"]
  results["seconds"] = {"sft": 10.4}
  assert "diffu-GRPO" not in summary(results, tmp_path)
