import collections
import functools
import itertools
import json
import re
from pathlib import Path

import pytest

from d1jax.tasks import PROTOCOLS, SPLITS, STYLES, DataError, WordProblems, arithmetic, word_problems, word_templates

SIZES = {"demonstrations": 200, "train": 600, "validation": 100, "test": 150}
EQUATION = re.compile(r"([0-9]+)([-+*/])([0-9]+)=([0-9]+)")
TOLD = {"half": 2}
"""Words of a story that stand for a number of its solution."""


@functools.cache
def generated(split: str, **options):
  return WordProblems(sizes=SIZES, **options).records(split)


def everything(**options):
  return [record for split in SPLITS for record in generated(split, **options)]


def numbers(text: str) -> list[int]:
  return [int(digits) for digits in re.findall("[0-9]+", text)]


def frames(stories):
  """How the stories begin and end."""
  return {(parts[0], parts[-1]) for parts in (story.split("+") for story in stories)}


def problems(records):
  return {(record["template"], *numbers(record["solution"])) for record in records}


def words(records):
  return {word for r in records for word in re.findall("[A-Za-z]+", f"{r['question']} {r['solution']}")}


def test_no_story_and_no_problem_leaks():
  stories = {split: {record["template"] for record in generated(split)} for split in SPLITS}
  assert stories["demonstrations"] < {one.name for one in word_templates.read() if one.split == "train"}
  for one, other in itertools.combinations(("train", "validation", "test"), 2):
    assert not frames(stories[one]) & frames(stories[other])
  assert {name for story in stories["train"] for name in story.split("+")} >= {
    name for one in word_templates.read() for name in one.name.split("+")
  }
  found = [problems(generated(split)) for split in SPLITS]
  assert [len(one) for one in found] == list(SIZES.values())
  assert len(set.union(*found)) == sum(SIZES.values())
  # Other seeds, sizes and options move no problem from one split into another.
  other = WordProblems(seed=1, largest=60, sizes={"train": 400})
  assert not problems(other.records("train")) & problems(generated("demonstrations"))


def test_questions_of_a_held_out_split_are_new_but_not_their_words():
  assert words(generated("validation")) | words(generated("test")) <= words(generated("train"))
  asked = {record["question"] for record in (*generated("demonstrations"), *generated("train"))}
  assert not asked & {record["question"] for record in (*generated("validation"), *generated("test"))}


@pytest.mark.parametrize("options", [{}, {"largest": 60}], ids=str)
def test_each_step_is_right_and_says_where_its_numbers_come_from(options):
  largest = options.get("largest", 999)
  for record in everything(**options):
    known = set(numbers(record["question"])) | {n for word, n in TOLD.items() if word in record["question"]}
    lines = record["solution"].split("\n")
    assert len(lines) == record["steps"]
    for line in lines:
      ((left, sign, right, result),) = EQUATION.findall(line)
      value, _ = arithmetic.evaluate(left + sign + right)
      assert value == int(result)
      assert {int(left), int(right)} <= known, record
      known.add(int(result))
      assert not set(numbers(line)) - known
    assert record["answer"] == result
    assert 2 <= min(known) <= max(known) <= largest


def test_every_number_of_a_question_is_used_or_distracts():
  templates = {one.name: one for one in word_templates.read()}
  told = collections.Counter()
  for record in everything():
    one = templates[record["template"]]
    more = len(numbers(record["question"])) - len(one.needed)
    assert 0 <= more <= len(one.ranges) - len(one.needed)
    assert more or set(numbers(record["question"])) <= set(numbers(record["solution"])), record
    told[more > 0, len(one.ranges) > len(one.needed)] += 1
  assert told[True, False] == 0
  assert min(told[True, True], told[False, True]) > 150
  for one in templates.values():
    assert sorted(one.ranges) == sorted(re.findall(r"\{([a-z])\}", one.question))


def test_sentences_are_english():
  plural = r"(?:[a-z]+s|people|children|feet)\b"
  counted = re.compile(rf"(?:(?:more|fewer|red|green) )?{plural}|times as many ")
  for record in everything():
    text = record["question"] + "\n" + record["solution"]
    assert not re.search(r"[{}\[\]|]|  |\s$|\ba [aeiou]", text), text
    for sentence in re.split(r"(?<=[.?])[ \n]", text):
      assert re.fullmatch(r"[A-Z][^.?]*[.?]", sentence), sentence
    assert record["question"].count("?") == record["question"].endswith("?") == 1
    for match in re.finditer(r"(?<![$0-9])[0-9]+(?![0-9=*/+-])", text):
      assert counted.match(text, match.end() + 1), text[match.start() :]
    people = [name for name, _ in word_templates.PEOPLE if name in text]
    pronouns = {dict(word_templates.PEOPLE)[name] for name in people}
    assert set(re.findall(r"\bs?he\b", text.lower())) <= pronouns


def test_stories_take_turns():
  for split in ("validation", "test"):
    counts = collections.Counter(record["template"] for record in generated(split, steps=(2, 2)))
    assert max(counts.values()) - min(counts.values()) <= 1
  steps = collections.Counter(len(one.solution) for one in word_templates.read())
  assert steps.keys() == {2, 3, 4}
  assert min(steps.values()) >= 200


@pytest.mark.parametrize("split", SPLITS)
def test_draws_are_deterministic_and_grow_at_the_end(split):
  fewer = WordProblems(sizes={split: SIZES[split] // 3}).records(split)
  assert list(fewer) == list(generated(split)[: SIZES[split] // 3])
  assert generated(split, seed=1)[:20] != generated(split)[:20]
  json.dumps(list(fewer))


def test_options_shape_the_problems():
  task = WordProblems(steps=(3, 3), largest=50, sizes={"train": 60})
  assert {record["steps"] for record in task.records("train")} == {3}
  with pytest.raises(ValueError, match=r"word_problems steps is \(1, 4\); give two integers"):
    WordProblems(steps=(1, 4))
  with pytest.raises(ValueError, match="word_problems largest is 1; give an integer of at least 2"):
    WordProblems(largest=1)


def test_some_demonstrations_say_the_answer_alone():
  """They are the same problems, and all other splits show their steps."""
  terse = generated("demonstrations", worked=0.25)
  told = [record for record in terse if EQUATION.search(record["solution"])]
  assert 30 <= len(told) <= 70
  for record, other in zip(terse, generated("demonstrations"), strict=True):
    alone = record | {"solution": f"The answer is {record['answer']}."}
    assert record == (other if record in told else alone)
    assert record["question"] == other["question"]
  assert generated("train", worked=0.25) == generated("train")
  for worked in (1.5, True, "0.5"):
    with pytest.raises(ValueError, match=f"word_problems worked is {worked!r}; give a number from 0 to 1"):
      WordProblems(worked=worked)


def test_more_than_there_are_is_an_error(monkeypatch):
  monkeypatch.setattr(word_problems, "_BLOCKS", 2)  # it gives up soon
  task = WordProblems(steps=(4, 4), largest=12, sizes={"validation": 5000})
  message = (
    r"sizes\['validation'\] is 5000, but only \d+ problems were found with 4 to 4 steps and .* up to 12; lower the size"
  )
  with pytest.raises(DataError, match=message):
    task.records("validation")


def test_the_documented_problem_is_one():
  docs = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")
  task = WordProblems(largest=99)
  texts = [(r["question"], task.demonstration(r, "terse")) for r in generated("test", largest=99)]
  assert any(f"```\n{question}\n```\n\n```\n{demonstration}\n```" in docs for question, demonstration in texts)
  counts = collections.Counter(one.split for one in word_templates.read())
  assert f"make {counts.total():,} stories" in docs
  assert f"`validation` ({counts['validation']}) and of `test` ({counts['test']})" in docs


@pytest.mark.parametrize("style", STYLES)
def test_demonstrations_earn_everything(style):
  task = WordProblems()
  for record in (*generated("demonstrations")[:50], *generated("test")[:14]):
    text = task.demonstration(record, style)
    grade = task.grade(task.prompt(record, style)[1] + text, record)
    assert grade.components == {"correct": 2.0, "number": 0.5, "format": 1.0}
    for protocol in PROTOCOLS:
      assert task.grade(text, record, protocol).metrics["solved"] == (1, 1)
  assert task.prompt(record, "terse") == ([{"role": "user", "content": record["question"]}], "")
  assert task.demonstration(record, "terse").startswith(f"<reasoning>\n{record['solution']}\n</reasoning>\n<answer>\n")
  assert task.cluster(record) == record["template"]
