"""Tables as text."""

import pytest

from d1jax import columns


def test_a_wide_table_is_cut_between_columns_and_repeats_whose_rows_they_are():
  head = ["arm", "length", *(f"figure number {i}" for i in range(6))]
  rows = [["SFT", "128", *"123456"], ["SFT + diffu-GRPO", "8", *"abcdef"]]
  parts = [part.splitlines() for part in columns.table(head, rows, keys=2).split("\n\n")]
  assert [len(part) for part in parts] == [4, 4]
  assert max(len(line) for part in parts for line in part) <= columns.WIDTH
  assert [part[3].split()[:4] for part in parts] == [["SFT", "+", "diffu-GRPO", "8"]] * 2
  assert "".join("".join(part[2].split()[2:]) for part in parts) == "123456"
  assert "\n\n" not in columns.table(head[:4], [row[:4] for row in rows], keys=2)


def test_a_markdown_table_has_a_line_that_aligns_it():
  assert columns.markdown(["a", "b"], [["c", 1]]) == "| a | b |\n| --- | --: |\n| c | 1 |"


@pytest.mark.parametrize("long", [10, 50])
def test_words_stand_beside_what_they_mean(long):
  lines = columns.explained([("-" * long, "and " * 30), ("b", "short")])
  assert max(map(len, lines)) <= columns.WIDTH
  assert lines[-1].split() == ["b", "short"]
  assert lines[-1].index("short") == lines[1].index("and"), "meanings begin in one column"
