"""Numbers of arms, against counting by hand and by other code."""

import itertools
import json
import random
from collections import Counter

import numpy as np
import pytest
from scipy import stats

from d1jax.evaluation.summary import columns, compare, summarise, table, verdict
from d1jax.intervals import clustered, paired_difference, wilson
from tests.evaluation.arms import arm, item


def test_a_verdict_is_the_whole_metric_or_unknown():
  assert verdict(item(right=True), "solved") is True
  assert verdict(item(right=False), "solved") is False
  assert verdict(item(right=None), "solved") is None
  cells = item(metrics={"cells": (11, 12)})
  assert verdict(cells, "cells") is False
  assert verdict(item(metrics={"cells": (12, 12)}), "cells") is True


def test_greedy_items_are_counted_once_each():
  items = [item(0), item(1, False), item(2), item(3, None)]
  found = summarise(items, "solved")
  assert json.loads(json.dumps(found)) == found
  low, high = wilson(2 / 3, 3)
  assert found == {
    "n": 4,
    "samples": 1,
    "seeds": [0],
    "metrics": {
      "solved": {"value": 2 / 3, "interval": pytest.approx([low, high])},
      "well_formed": {"value": 1.0, "interval": pytest.approx(list(wilson(1.0, 4)))},
    },
    "accuracy": 2 / 3,
    "accuracy_interval": pytest.approx([low, high]),
    "reward": 0.5,
    "tokens": None,
    "forward_passes": None,
    "tokens_per_second": None,
  }


def test_costs_are_means_and_speed_is_a_ratio_of_sums_over_what_is_known():
  items = [
    item(0, tokens=100, forward_passes=64, seconds=2.0),
    item(1, tokens=20, forward_passes=32, seconds=1.0),
    item(2, tokens=30),
    item(3, seconds=50.0),
  ]
  found = summarise(items, "solved")
  assert (found["tokens"], found["forward_passes"], found["tokens_per_second"]) == (50, 48, 40)
  assert summarise([item(0, tokens=5, seconds=0.0)], "solved")["tokens_per_second"] is None


def test_questions_nobody_knows_the_answer_of_leave_no_accuracy():
  items = [
    item(index, None, seed=seed, sample=sample) for index in range(3) for seed in range(2) for sample in range(2)
  ]
  found = summarise(items, "solved")
  assert (found["accuracy"], found["accuracy_interval"]) == (None, None)
  assert list(found["metrics"]) == ["well_formed"]
  assert not {"pass_at", "majority", "over_seeds"} & found.keys()


def test_samples_of_a_question_are_one_cluster():
  items = arm(40, 0.6, seeds=2, samples=3)
  found = summarise(items, "solved")
  assert (found["n"], found["samples"], found["seeds"]) == (40, 3, [0, 1])
  outcomes = [i.metrics["solved"][0] for i in items]
  share = clustered(outcomes, [1] * 240, [i.cluster for i in items])
  assert found["accuracy"] == share.value == sum(outcomes) / 240
  assert found["accuracy_interval"] == [share.low, share.high]
  assert found["metrics"]["solved"] == {"value": share.value, "interval": [share.low, share.high]}


def test_over_seeds_averages_one_accuracy_a_seed():
  items = arm(40, 0.6, seeds=3)
  values = [np.mean([i.metrics["solved"][0] for i in items if i.seed == seed]) for seed in range(3)]
  found = summarise(items, "solved")["over_seeds"]
  assert found["values"] == pytest.approx(values)
  assert found["mean"] == pytest.approx(np.mean(values))
  assert found["interval"] == pytest.approx(stats.t.interval(0.95, 2, np.mean(values), stats.sem(values)))
  assert "over_seeds" not in summarise(arm(40, 0.6, samples=3), "solved")


@pytest.mark.parametrize(("seeds", "samples", "ks"), [(1, 5, "1245"), (2, 2, "124"), (3, 1, "123"), (1, 2, "12")])
def test_pass_at_averages_the_subsets_of_each_question(seeds, samples, ks):
  items = arm(30, 0.4, seeds=seeds, samples=samples)
  found = summarise(items, "solved")["pass_at"]
  assert list(found) == list(ks)
  for k in map(int, ks):
    means = []
    for index in range(30):
      outcomes = [i.metrics["solved"][0] for i in items if i.index == index]
      means.append(np.mean([max(subset) for subset in itertools.combinations(outcomes, k)]))
    assert found[str(k)]["value"] == pytest.approx(np.mean(means))
    low, high = found[str(k)]["interval"]
    assert 0 <= low < np.mean(means) < high <= 1
  assert found["1"]["value"] == pytest.approx(summarise(items, "solved")["accuracy"])


def votes(*answers: str | None, right: str) -> list:
  """One question whose samples gave these answers."""
  return [
    item(0, answer == right, sample=number, seed=0, answer=answer, cluster="c") for number, answer in enumerate(answers)
  ]


@pytest.mark.parametrize(
  ("answers", "is_right"),
  [
    (("7", "8", "7"), True),
    (("8", "7", "8"), False),
    (("8", "7"), False),  # a tie: the first drawn counts
    (("7", "8"), True),
    (("8", "7", "7", "8"), False),
    ((None, None, "7"), True),  # no answer has no vote
    ((None, None), False),
  ],
)
def test_the_most_frequent_answer_wins_and_ties_go_to_the_first(answers, is_right):
  items = votes(*answers, right="7")
  found = summarise(items, "solved")["majority"]
  assert found["value"] == is_right
  assert found["interval"] == list(wilson(float(is_right), 1))
  shuffled = random.Random(0).sample(items, len(items))
  assert summarise(shuffled, "solved")["majority"] == found


def test_samples_of_the_first_seed_are_drawn_first():
  answers = {(0, 0): None, (0, 1): "7", (1, 0): "8", (1, 1): None}
  items = [
    item(0, answer == "7", seed=seed, sample=sample, answer=answer) for (seed, sample), answer in answers.items()
  ]
  assert summarise(items, "solved")["majority"]["value"] == 1


def test_majority_over_questions_leaves_out_unknown_answers():
  items = arm(25, 0.5, samples=5) + [item(25, None, sample=s, answer="3") for s in range(5)]
  expected = []
  for index in range(25):
    own = sorted((i for i in items if i.index == index), key=lambda i: i.sample)
    counts = Counter(i.answer for i in own if i.answer)
    best = [a for a, n in counts.items() if n == max(counts.values())]
    expected.append(bool(best) and best[0] == str(index + 1))
  found = summarise(items, "solved")
  assert found["majority"]["value"] == np.mean(expected)
  assert found["n"] == 26


def test_a_share_of_cells_has_no_votes():
  items = [item(i, sample=s, metrics={"cells": (i + s, 8), "solved": (0, 1)}) for i in range(4) for s in range(2)]
  found = summarise(items, "cells")
  assert found["accuracy"] == 16 / 64
  assert "pass_at" not in found
  assert "majority" not in found
  assert "pass_at" in summarise(items, "solved")


def test_items_that_are_not_one_arm_or_not_complete_are_refused():
  items = arm(4, 0.5, samples=2)
  with pytest.raises(ValueError, match=r"arms .*\[\('gsm8k', 64, 0.0\), \('gsm8k', 128, 0.0\)\]"):
    summarise([*items, item(length=64)], "solved")
  with pytest.raises(ValueError, match=r"0 items of the arms .*\[\]"):
    summarise([], "solved")
  with pytest.raises(ValueError, match="'d1_accuracy' is none of the metrics of gsm8k: solved, well_formed"):
    summarise(items, "d1_accuracy")
  with pytest.raises(ValueError, match=r"7 items \(7 different\) of 4 questions under 1 seeds with 2 samples"):
    summarise(items[:-1], "solved")
  with pytest.raises(ValueError, match=r"8 items \(7 different\)"):
    summarise([*items[:-1], items[0]], "solved")


def test_compare_counts_pairs():
  first, second = arm(50, 0.5), arm(50, 0.7, chosen=1)
  before, after = ([i.metrics["solved"][0] for i in side] for side in (first, second))
  found = compare(first, random.Random(0).sample(second, 50), "solved")
  assert json.loads(json.dumps(found)) == found
  pairs = Counter(zip(before, after, strict=True))
  cells = {"both": (1, 1), "only_first": (1, 0), "only_second": (0, 1), "neither": (0, 0)}
  assert {name: found[name] for name in cells} == {name: pairs[cell] for name, cell in cells.items()}
  assert found["n"] == 50
  assert found["p"] == stats.binomtest(pairs[1, 0], pairs[1, 0] + pairs[0, 1]).pvalue
  expected = paired_difference(before, after, range(50))
  np.testing.assert_allclose((found["difference"], *found["interval"]), expected)
  assert found["difference"] == pytest.approx(
    summarise(second, "solved")["accuracy"] - summarise(first, "solved")["accuracy"]
  )
  assert "note" not in found
  assert found["clusters"] == found["n"]


def test_compare_says_when_pairs_are_not_independent():
  found = compare(arm(20, 0.5, seeds=2, samples=2), arm(20, 0.7, seeds=2, samples=2), "solved")
  assert found["n"] == 80
  assert "80 pairs come in 20 clusters" in found["note"]
  assert found["clusters"] == 20


def test_compare_pairs_by_question_not_by_place():
  first = [item(0, True), item(1, False), item(2, True)]
  second = [item(2 - i.index, i.metrics["solved"][0] == 1, question=i.question) for i in first]
  found = compare(first, second, "solved")
  assert (found["both"], found["neither"], found["p"]) == (2, 1, 1.0)


def test_compare_keeps_the_repeats_of_a_question():
  first = [item(0, True), item(1, False, question="q0")]
  second = [item(3, True, question="q0"), item(7, True, question="q0")]
  assert compare(first, second, "solved")["only_second"] == 1
  found = compare(first, [item(7, False, question="q0"), item(3, True, question="q0")], "solved")
  assert (found["both"], found["neither"]) == (1, 1)
  with pytest.raises(ValueError, match="1 of 2 items of the first and 0 of 1 of the second have no partner"):
    compare(first, second[:1], "solved")


def test_compare_leaves_out_unknown_answers_and_refuses_what_it_cannot_pair():
  first, second = arm(6, 0.5), arm(6, 0.5, chosen=1)
  unknown = [*first, item(6, None)], [*second, item(6, None)]
  assert compare(*unknown, "solved") == compare(first, second, "solved")
  with pytest.raises(ValueError, match="none of 1 pairs has a known answer"):
    compare([item(0, None)], [item(0, None)], "solved")
  with pytest.raises(ValueError, match="2 of 6 items of the first and 3 of 7 of the second have no partner"):
    compare(first, [*second[2:], *(item(i) for i in (10, 11, 12))], "solved")
  with pytest.raises(ValueError, match="6 of 6 items of the first"):
    compare(first, arm(6, 0.5, seed=1), "solved")
  cells = [item(i, metrics={"cells": (3, 8)}) for i in range(3)]
  with pytest.raises(ValueError, match="'cells' is not 0 or 1 an item"):
    compare(cells, cells, "cells")


def rows() -> list[dict]:
  sudoku = [
    item(i, i < 3, task="sudoku", length=256, metrics={"solved": (i < 3, 1), "cell_accuracy": (i, 12)})
    for i in range(12)
  ]
  sampled = arm(400, 0.764, seeds=4, samples=4, length=512, temperature=0.9)
  return [
    {
      "task": "sudoku",
      "length": 256,
      "temperature": 0.0,
      "sampler": None,
      "summary": summarise(sudoku, "solved"),
      "baseline": None,
    },
    {
      "task": "gsm8k",
      "length": 512,
      "temperature": 0.9,
      "sampler": {"cache": "window", "schedule": "static"},
      "summary": summarise(sampled, "solved"),
      "baseline": {"value": 0.0213, "interval": [0.01, 0.03]},
    },
  ]


def test_the_table_shows_the_numbers_of_the_summaries():
  arms = rows()
  parts = [part.splitlines() for part in table(arms).split("\n\n")]
  assert len(parts) == 2
  assert max(len(line) for part in parts for line in part) <= 80
  shown = {column.head: column.cells for column in columns(arms)}
  summary = arms[1]["summary"]
  percent = lambda share: f"{100 * share['value']:.1f}"
  assert shown == {
    "task": ["sudoku", "gsm8k"],
    "length": ["256", "512"],
    "temp": ["0", "0.9"],
    "mode": ["", "window"],
    "n": ["12", "400"],
    "accuracy [95%]": [
      "25.0 [{:.1f}, {:.1f}]".format(*(100 * end for end in wilson(0.25, 12))),
      "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * v for v in (summary["accuracy"], *summary["accuracy_interval"]))),
    ],
    "over seeds": ["", "[{:.1f}, {:.1f}]".format(*(100 * end for end in summary["over_seeds"]["interval"]))],
    "cells": [f"{100 * 66 / 144:.1f}", ""],
    "const": ["", "2.1"],
    "pass@16": ["", percent(summary["pass_at"]["16"])],
    "maj@16": ["", percent(summary["majority"])],
    "tokens": ["", f"{summary['tokens']:.0f}"],
    "passes": ["", "64"],
    "tok/s": ["", f"{summary['tokens_per_second']:.0f}"],
  }
  for number, cells in enumerate(zip(*shown.values(), strict=True)):
    keys, *rest = (part[2 + number].split() for part in parts)
    whose = " ".join(cells[:4]).split()  # task, length, temperature and mode stand in both
    assert rest[0][: len(whose)] == whose
    assert [*keys, *rest[0][len(whose) :]] == " ".join(cells).split()


def test_columns_without_a_value_are_left_out():
  usual = {"cache": "none", "schedule": "static"}
  only = rows()[0] | {"task": "gsm8k", "length": 0, "sampler": usual, "summary": summarise([item(0)], "solved")}
  assert [column.head for column in columns([only])] == ["task", "temp", "n", "accuracy [95%]"]
  unknown = only | {"summary": summarise([item(0, None)], "solved")}
  assert [column.head for column in columns([unknown])] == ["task", "temp", "n"]
  assert len(table([only]).splitlines()) == 3
  for cache, schedule, said in (("dual", "threshold", "dual threshold"), ("none", "factor", "factor")):
    arms = [only | {"sampler": {"cache": cache, "schedule": schedule}}, only]
    assert {column.head: column.cells for column in columns(arms)}["mode"] == [said, ""]


def test_arms_of_different_sample_counts_have_columns_of_their_own():
  arms = [rows()[1] | {"summary": summarise(arm(5, 0.5, samples=samples), "solved")} for samples in (4, 8)]
  shown = {column.head: column.cells for column in columns(arms)}
  assert [head for head in shown if "@" in head] == ["pass@4", "maj@4", "pass@8", "maj@8"]
  assert shown["maj@4"][1] == ""
  assert shown["maj@8"][0] == ""
  assert shown["pass@4"][1] != ""  # eight samples estimate this as well
