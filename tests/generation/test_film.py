"""Animated pictures, read back."""

import itertools
import os

import numpy as np
import pytest
from PIL import Image

from d1jax.generation import film
from d1jax.generation.canvas import GIVEN, NEVER, SCALE, Canvas, rgb

CANVAS = Canvas(
  "How many?", ("so ", "the ", "answer\n", "is ", "42", "∎", "·"), np.asarray([GIVEN, 3, 0, 1, 2, 0, NEVER])
)


def frames_of(path) -> tuple[list[np.ndarray], list[int]]:
  """Pictures in RGB, and their times in milliseconds."""
  with Image.open(path) as image:
    found = []
    for index in range(image.n_frames):
      image.seek(index)
      found.append((np.asarray(image.convert("RGB")).astype(int), image.info["duration"]))
  return [picture for picture, _ in found], [milliseconds for _, milliseconds in found]


def near(picture: np.ndarray, color: tuple[int, int, int]) -> int:
  """How many pixels have a colour, or one a palette of 256 takes for it."""
  return int((np.abs(picture - np.asarray(color)).max(axis=-1) <= 6).sum())


def test_a_film_starts_hidden_shows_each_step_and_holds_the_last(tmp_path):
  film.save(tmp_path / "a.gif", [CANVAS])
  pictures, times = frames_of(tmp_path / "a.gif")
  assert times == [700, 500, 500, 500, 500, 3000]
  hidden = [near(picture, film.PILL) for picture in pictures]
  assert all(a > b for a, b in itertools.pairwise(hidden[:5]))
  assert hidden[4] == hidden[5] > 0, "what no step revealed stays hidden"
  assert len({picture.shape for picture in pictures}) == 1
  with Image.open(tmp_path / "a.gif") as image:
    assert image.info["loop"] == 0


def test_the_bar_fills_in_the_colours_of_the_scale(tmp_path):
  film.save(tmp_path / "a.gif", [CANVAS])
  pictures, _ = frames_of(tmp_path / "a.gif")
  first, last = ([near(picture, rgb(shade)) for picture in pictures] for shade in (0, len(SCALE) - 1))
  assert first[0] == 0 < first[1]
  assert last[3] == 0 < last[4]


def test_what_is_given_and_what_is_revealed_can_be_read_from_the_pixels(tmp_path):
  film.save(tmp_path / "a.gif", [CANVAS])
  pictures, _ = frames_of(tmp_path / "a.gif")
  brightest = [int(picture[:, : picture.shape[1] // 2].min(axis=-1).max()) for picture in pictures]
  assert brightest[0] > 200, "the given start is there from the first picture on"
  changed = [np.abs(a - b).max(axis=-1) > 6 for a, b in itertools.pairwise(pictures)]
  assert all(change.any() for change in changed)


def test_several_completions_follow_each_other_in_one_size(tmp_path):
  long = Canvas("Why?", ("because ",) * 120, np.arange(120))
  scenes = [CANVAS, long, CANVAS, CANVAS, CANVAS]
  film.save(tmp_path / "b.gif", scenes)
  with Image.open(tmp_path / "b.gif") as image:
    found = []
    for index in range(image.n_frames):
      image.seek(index)
      found.append((image.size, image.info["duration"]))
  assert len({size for size, _ in found}) == 1
  assert [index for index, (_, milliseconds) in enumerate(found) if milliseconds == 3000] == [5, 53, 59, 65, 71]
  assert film.MOST_FRAMES // len(scenes) == 48


def test_long_prompts_are_cut_and_long_answers_get_wider_lines(tmp_path):
  sizes = {}
  for name, prompt, tokens in (("a", "why " * 400, 10), ("b", "why", 10), ("c", "why", 1500)):
    film.save(tmp_path / f"{name}.gif", [Canvas(prompt, ("word ",) * tokens, np.zeros(tokens, int))])
    with Image.open(tmp_path / f"{name}.gif") as image:
      sizes[name] = image.size
  assert sizes["a"][0] == sizes["b"][0] < sizes["c"][0]
  assert sizes["b"][1] < sizes["a"][1] < 2.5 * sizes["b"][1]


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("a.mp4", "'.*a.mp4' does not end in .gif"),
    ("a", "does not end in .gif"),
    ("folder.gif", "is a folder; name a file"),
    ("nowhere/a.gif", r"cannot be written \(No such file or directory\)"),
    ("file/a.gif", r"cannot be written \(Not a directory\)"),
  ],
)
def test_a_path_that_takes_no_film_is_refused(tmp_path, name, message):
  (tmp_path / "folder.gif").mkdir()
  (tmp_path / "file").write_text("")
  with pytest.raises(ValueError, match=message):
    film.check(tmp_path / name)


def test_checking_a_path_leaves_nothing_and_keeps_what_is_there(tmp_path):
  (tmp_path / "old.gif").write_text("old")
  film.check(tmp_path / "old.gif")
  film.check(tmp_path / "new.GIF")
  assert os.listdir(tmp_path) == ["old.gif"]
  assert (tmp_path / "old.gif").read_text() == "old"
