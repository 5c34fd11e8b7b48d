"""Perplexity: windows, figures, files, and the command."""

import json
import math

import numpy as np
import pytest

from d1jax.errors import RunError
from d1jax.evaluation import command
from d1jax.evaluation.perplexity import Window, documents, of_logps, windows
from tests import hub
from tests.jobs import load


def test_every_token_is_scored_once_with_as_much_context_as_fits():
  found = list(windows(range(10), [99], 4))
  assert found == [Window([99], [0, 1, 2, 3]), Window([3], [4, 5, 6, 7]), Window([5, 6, 7], [8, 9])]
  assert list(windows([7, 8], [99], 4)) == [Window([99], [7, 8])]
  assert list(windows([], [99], 4)) == []


def test_figures_and_their_errors():
  bits = of_logps([-10.0, -30.0], [3.0, 4.0], [10, 20], bits=True)
  assert bits.value == pytest.approx(40 / 30 / math.log(2))
  assert bits.masks == pytest.approx(5 / 30 / math.log(2))
  rest = np.asarray([-10 + 40 / 3, -30 + 80 / 3])
  assert bits.documents == pytest.approx(math.sqrt(2 * (rest**2).sum()) / 30 / math.log(2))
  assert of_logps([-1e4], [1.0], [1]).value == math.inf, "a text without blanks is one long word"
  words = of_logps([-10.0], [math.nan], [10])
  assert words.value == pytest.approx(math.e)
  assert math.isnan(words.masks)
  assert math.isnan(words.documents)


def test_errors_cover_the_truth():
  """Documents of different lengths, drawn anew: the interval of 2 errors covers the true value 95 times of 100."""
  rng, covered = np.random.default_rng(0), 0
  for _ in range(300):
    counts = rng.integers(5, 50, 60)
    logps = [float(-rng.exponential(2.0, n).sum()) for n in counts]
    unit = of_logps(logps, [0.0] * 60, counts.tolist(), bits=True)
    covered += abs(unit.value - 2 / math.log(2)) < 2 * unit.documents
  assert 0.91 < covered / 300 < 0.985


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("a.txt", None, "a.txt is missing, expected a file"),
    ("a.txt", b" \n", "a.txt has no document with a text"),
    ("a.txt", b"\xff", "a.txt is not UTF-8"),
    ("a.jsonl", b'{"text": "b"}\n{"texts": "c"}\n', 'a.jsonl line 2 has no text; a line is like {"text": "..."}'),
    ("a.jsonl", b'{"text": "b"', "a.jsonl line 1 is not JSON"),
  ],
)
def test_a_bad_file_is_one_line(tmp_path, name, content, message):
  if content is not None:
    (tmp_path / name).write_bytes(content)
  with pytest.raises(RunError) as caught:
    command.run(configured(tmp_path / name, "FOLDER"))
  assert message in str(caught.value)
  assert "\n" not in str(caught.value)


def configured(path, folder):
  config = load("eval")
  config.update(perplexity=str(path), pretrained=str(folder), window=16, mc_num=2, batch_size=8)
  return config


def test_documents(tmp_path):
  (tmp_path / "a.jsonl").write_text('{"text": "b c"}\n\n{"text": "é\\n"}\n{"text": " "}')
  assert documents(tmp_path / "a.jsonl") == ["b c", "é\n"]
  (tmp_path / "a.md").write_text("b\n\nc")
  assert documents(tmp_path / "a.md") == ["b\n\nc"]


@pytest.mark.slow(reason="compiles programs of its own")
def test_the_command(tmp_path, capsys):
  folder = hub.write(tmp_path / "llada", dtype="float32")
  path = tmp_path / "a.jsonl"
  path.write_text('{"text": "It rains in Spain."}\n{"text": "Mainly."}\n')
  found = command.run(configured(path, folder))
  assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found
  assert (found["documents"], found["words"], found["bytes"]) == (2, 5, 25)
  assert found["perplexity_per_token_error"] is None, "one set of masks"
  # Weights that nobody trained: about as good as a guess among 258 tokens.
  assert 200 < found["perplexity_per_token"] < 400
  bits = math.log2(found["perplexity_per_token"]) * found["tokens"] / found["bytes"]
  assert found["bits_per_byte"] == pytest.approx(bits)
