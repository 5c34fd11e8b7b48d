"""The folder of an evaluation, whatever became of its files."""

import json

import pytest
from ml_collections import ConfigDict

from d1jax.errors import RunError
from d1jax.evaluation import items, output
from tests.damages import DAMAGES
from tests.evaluation.test_items import ITEM

IDENTITY = {"subject": "runs/x", "config": {"protocol": "strict"}, "questions": {"arm": {"n": 1}}}


@pytest.fixture
def folder(tmp_path):
  folder = output.claim(None, tmp_path / "eval", IDENTITY)
  items.append(output.items_path(folder, "arm"), [ITEM])
  return folder


def test_a_folder_is_found_again_and_another_evaluation_refused(folder, tmp_path):
  assert output.claim(folder, tmp_path, IDENTITY) == folder
  assert output.claim(None, tmp_path / "eval", IDENTITY) == folder
  with pytest.raises(RunError, match="holds another evaluation"):
    output.claim(folder, tmp_path, IDENTITY | {"subject": "runs/y"})
  assert output.read_items(folder, "arm") == [ITEM]


@pytest.mark.parametrize("how", DAMAGES)
def test_results_stand_in_for_a_damaged_identity(folder, tmp_path, how):
  DAMAGES[how](folder / "evaluation.json")
  if how in ("an empty object", "another type inside"):
    with pytest.raises(RunError, match="holds another evaluation"):
      output.claim(folder, tmp_path, IDENTITY)
    return
  with pytest.raises(RunError, match=r"evaluation\.json .* nothing tells whose items are there; name a new folder"):
    output.claim(folder, tmp_path, IDENTITY)
  (folder / "results.json").write_text(json.dumps(IDENTITY | {"arms": []}))
  if how == "a folder":
    with pytest.raises(RunError, match="is a folder"):
      output.claim(folder, tmp_path, IDENTITY)
    return
  with pytest.raises(RunError, match="holds another evaluation"):
    output.claim(folder, tmp_path, IDENTITY | {"subject": "runs/y"})
  output.claim(folder, tmp_path, IDENTITY)
  assert json.loads((folder / "evaluation.json").read_text()) == IDENTITY


@pytest.mark.parametrize("how", [how for how in DAMAGES if how not in ("a folder", "deleted")])
def test_without_items_a_damaged_identity_is_written_anew(tmp_path, how):
  folder = output.claim(None, tmp_path, IDENTITY)
  DAMAGES[how](folder / "evaluation.json")
  if how not in ("an empty object", "another type inside"):
    output.claim(folder, tmp_path, IDENTITY)
    assert json.loads((folder / "evaluation.json").read_text()) == IDENTITY


def test_items_that_are_a_folder_are_one_line(folder):
  output.items_path(folder, "other").mkdir()
  with pytest.raises(RunError, match=r"other\.jsonl is a folder, expected a file"):
    output.read_items(folder, "other")


def test_a_file_in_the_place_of_the_folder_is_one_line(tmp_path):
  (tmp_path / "file").write_text("")
  for folder in (tmp_path / "file", tmp_path / "file" / "deep"):
    with pytest.raises(RunError, match="is a file, expected a folder"):
      output.claim(folder, tmp_path, IDENTITY)


def test_a_folder_in_a_bucket_is_one(bucket):
  folder = output.claim(None, bucket / "eval", IDENTITY)
  assert str(folder).startswith("gs://bucket/eval/")
  for _ in range(2):
    items.append(output.items_path(folder, "arm"), [ITEM])
  assert output.claim(folder, bucket, IDENTITY) == folder
  assert output.read_items(folder, "arm") == [ITEM, ITEM]


GOOD = json.dumps({"protocol": "strict", "subject": "x"})


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_results_to_compare_with_are_one_line(tmp_path, how):
  config = ConfigDict({"compare": str(tmp_path), "protocol": "strict"})
  path = tmp_path / "results.json"
  path.write_text(GOOD)
  assert output.compared_with(config) == json.loads(GOOD)
  DAMAGES[how](path)
  with pytest.raises(RunError, match=r"results\.json") as caught:
    output.compared_with(config)
  assert "\n" not in str(caught.value)
