import pickle

import pytest

from d1jax.tasks import PROTOCOLS, SPLITS, STYLES, Mixture, Task, build, build_mix

SIZES = {"demonstrations": 3, "train": 20, "validation": 4, "test": 5}


def mix(**options):
  return build_mix({"sudoku": 1, "countdown": 2.5}, sizes=SIZES, **options)


def test_a_mix_is_a_task_whose_name_does_not_depend_on_the_order():
  assert isinstance(mix(), Task)
  assert mix().name == "countdown+sudoku" == build_mix({"countdown": 1, "sudoku": 1}).name
  assert mix().weights == {"countdown": 2.5, "sudoku": 1.0}
  assert list(mix().tasks) == ["countdown", "sudoku"]
  assert mix().splits == SPLITS


@pytest.mark.parametrize("split", SPLITS)
def test_a_split_is_the_splits_of_the_tasks_with_their_names(split):
  own = {name: build(name, seed=4, sizes=SIZES).records(split) for name in ("countdown", "sudoku")}
  records = mix(seed=4).records(split)
  assert len(records) == 2 * SIZES[split]
  assert [r["task"] for r in records] == ["countdown"] * SIZES[split] + ["sudoku"] * SIZES[split]
  bare = [{name: value for name, value in r.items() if name != "task"} for r in records]
  assert bare == [*own["countdown"], *own["sudoku"]]


@pytest.mark.parametrize("style", STYLES)
def test_each_record_is_answered_by_its_own_task(style):
  whole = mix()
  alone = {name: build(name, sizes=SIZES) for name in ("countdown", "sudoku")}
  for record in whole.records("test"):
    task = alone[record["task"]]
    assert whole.prompt(record, style) == task.prompt(record, style)
    assert whole.baseline(record, style) == task.baseline(record, style)
    answer = whole.demonstration(record, style)
    assert answer == task.demonstration(record, style)
    assert whole.cluster(record) == f"{record['task']}/{task.cluster(record)}"
    for protocol in PROTOCOLS:
      for text in (answer, whole.baseline(record, style), "nothing"):
        mixed, own = whole.grade(text, record, protocol), task.grade(text, record, protocol)
        assert (mixed.components, mixed.answer, mixed.reward) == (own.components, own.answer, own.reward)
        prefixed = {f"{task.name}/{name}": pair for name, pair in own.metrics.items()}
        assert mixed.metrics == {**own.metrics, **prefixed}
    assert whole.grade(answer, record).metrics["solved"] == (1, 1)


def test_the_parts_are_the_places_of_each_task_with_its_weight():
  records = mix().records("validation")
  shuffled = [*records[::2], *records[1::2]]
  assert mix().parts(shuffled) == [([0, 1, 4, 5], 2.5), ([2, 3, 6, 7], 1.0)]


def test_a_task_of_which_no_record_is_left_is_an_error():
  with pytest.raises(ValueError, match="no record of sudoku is left; raise the prompt buckets"):
    mix().parts([r for r in mix().records("train") if r["task"] == "countdown"])


def test_a_mix_can_be_sent_to_another_process():
  record = mix().records("test")[-1]
  copy = pickle.loads(pickle.dumps(mix()))
  answer = copy.demonstration(record, "terse")
  assert copy.grade(answer, record) == mix().grade(answer, record)
  assert copy.records("train") == mix().records("train")


def test_options_reach_the_task_that_they_name():
  whole = mix(options={"sudoku": {"clues": (9, 9)}})
  assert {r["puzzle"].count("0") for r in whole.records("train") if r["task"] == "sudoku"} == {7}


@pytest.mark.parametrize(
  ("weights", "options", "message"),
  [
    ({"sudoku": 1, "chess": 1}, {}, "unknown task 'chess'; choose one of: sudoku, countdown, gsm8k, math"),
    ({"sudoku": 0, "countdown": 1}, {}, "the weight of sudoku in the mix is 0; give a positive number"),
    ({"sudoku": -1.5}, {}, "the weight of sudoku in the mix is -1.5"),
    ({"sudoku": float("inf"), "countdown": 1}, {}, "the weight of sudoku in the mix is inf"),
    ({"sudoku": float("nan"), "countdown": 1}, {}, "the weight of sudoku in the mix is nan"),
    ({"sudoku": "1", "countdown": 1}, {}, "the weight of sudoku in the mix is '1'"),
    (
      {"sudoku": 1},
      {"countdown": {"numbers": (3, 3)}},
      "unknown task in the options of a mix 'countdown'; .*: sudoku$",
    ),
    ({"sudoku": 1, "countdown": 1}, {"sudoku": {"numbers": (3, 3)}}, "unknown option of sudoku 'numbers'"),
  ],
)
def test_a_wrong_mix_is_refused(weights, options, message):
  with pytest.raises(ValueError, match=message):
    build_mix(weights, options=options)


def test_every_task_of_a_mixture_has_a_weight_and_no_other():
  tasks = {"sudoku": build("sudoku")}
  with pytest.raises(ValueError, match="the weight of sudoku in the mix is None"):
    Mixture(tasks, {})
  with pytest.raises(ValueError, match="unknown task in the mix's weights 'countdown'; choose one of: sudoku"):
    Mixture(tasks, {"sudoku": 1, "countdown": 1})
