"""The canvas as lines of text, with colours and without."""

import re

import numpy as np

from d1jax.generation import terminal
from d1jax.generation.canvas import GIVEN, HIDDEN, NEVER, SCALE, Canvas

CANVAS = Canvas("?", ("so ", "the ", "cat\n", "日", "∎", "·", "·"), np.asarray([GIVEN, 2, 0, 1, 0, 2, NEVER]))
ESCAPE = re.compile(r"\x1b\[([\d;]*)m")


def test_each_step_shows_what_is_revealed_by_then():
  shown = terminal.show(CANVAS, columns=40, colored=False)
  assert shown.split("\n\n")[:3] == [
    "step 1 of 3, 2 of 6 tokens\nso ░░░░cat↵\n░░∎░░",
    "step 2 of 3, 3 of 6 tokens\nso ░░░░cat↵\n日∎░░",
    "step 3 of 3, 5 of 6 tokens\nso the cat↵\n日∎·░",
  ]
  assert shown.split("\n\n")[3] == terminal.LEGEND
  assert "\x1b" not in shown


def test_colours_change_no_character_but_the_legend():
  plain, colored = (terminal.show(CANVAS, columns=40, colored=c) for c in (False, True))
  *frames, legend = ESCAPE.sub("", colored).split("\n\n")
  assert frames == plain.split("\n\n")[:3]
  assert legend == f"revealed early {'■' * len(SCALE)} late   {terminal.LEGEND}"
  codes = ESCAPE.findall(colored.split("\n\n")[3])
  assert codes[::2] == [f"38;5;{number}" for number in SCALE]
  assert set(codes[1::2]) == {"0"}


def test_a_token_keeps_its_colour_and_is_bold_when_it_is_new():
  first, second, third, _ = terminal.show(CANVAS, columns=40, colored=True).split("\n\n")
  early, middle, late = SCALE[0], SCALE[round((len(SCALE) - 1) / 2)], SCALE[-1]
  assert first.split("\n")[1] == f"so \x1b[2m{HIDDEN * 4}\x1b[0m\x1b[38;5;{early};1mcat↵\x1b[0m"
  assert second.split("\n")[1] == f"so \x1b[2m{HIDDEN * 4}\x1b[0m\x1b[38;5;{early}mcat↵\x1b[0m"
  assert third.split("\n")[2] == (
    f"\x1b[38;5;{middle}m日\x1b[0m\x1b[38;5;{early}m∎\x1b[0m\x1b[38;5;{late};1m·\x1b[0m\x1b[2m{HIDDEN}\x1b[0m"
  )


def test_long_films_show_some_steps_and_the_last():
  canvas = Canvas("?", ("a",) * 100, np.arange(100))
  parts = terminal.show(canvas, columns=40, colored=False).split("\n\n")
  assert len(parts) == terminal.MOST + 1
  assert parts[-2] == "step 100 of 100, 100 of 100 tokens\n" + "\n".join(["a" * 40, "a" * 40, "a" * 20])
  counts = [int(re.match(r"step (\d+) ", part)[1]) for part in parts[:-1]]
  assert counts == sorted(set(counts))


def test_tokens_revealed_between_two_shown_steps_are_new_in_the_second():
  canvas = Canvas("?", ("a",) * 2 * terminal.MOST, np.arange(2 * terminal.MOST))
  second = terminal.show(canvas, columns=40, colored=True).split("\n\n")[1]
  assert "".join(re.findall(r";1m(a+)", second)) == "aa"
