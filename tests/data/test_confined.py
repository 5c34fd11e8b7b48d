"""Tokenizers and templates in their own process: the same ids, and nothing that is hostile gets far."""

import contextlib
import gc
import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d1jax.data import backend, confined
from d1jax.data.confined import ConfinedTokenizer, TokenizerError
from d1jax.data.confined_process import Server
from d1jax.data.hugging_face import HuggingFaceTokenizer
from d1jax.errors import RunError
from d1jax.helper import Helper
from tests.data.folders import small_files

ANYTHING = st.recursive(
  st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=9),
  lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
)
USER = [{"role": "user", "content": "hi <|hole|> é"}]
WRITTEN = "{% for m in messages %}{{ m.content }}{% endfor %}"


def as_json(**values) -> dict[str, bytes]:
  """A folder with a tokenizer.json."""
  files = small_files()
  whole = json.loads(backend.build(files).to_str()) | values
  kept = {name: content for name, content in files.items() if name not in ("vocab.json", "merges.txt")}
  return kept | {"tokenizer.json": json.dumps(whole).encode()}


def replaced(pattern: dict[str, str], content: str) -> dict:
  return {"type": "Replace", "pattern": pattern, "content": content}


def test_it_does_what_the_tokenizer_does():
  files = small_files(mask_token_id=261)
  inside, outside = HuggingFaceTokenizer(files), ConfinedTokenizer(files)
  for name in ("files", "vocab", "mask_id", "stop_ids", "pad_id"):
    assert getattr(outside, name) == getattr(inside, name), name
  ids = inside.prompt(USER, "<|end|>")
  assert outside.prompt(USER, "<|end|>") == ids
  assert outside.completion("a\nb") == inside.completion("a\nb")
  assert outside.decode_all([ids, []]) == inside.decode_all([ids, []])
  assert outside.decode_raw([ids]) == inside.decode_raw([ids])
  for begin in (True, False):
    assert outside.written(USER, begin) == inside.written(USER, begin)
  assert outside.encode("a<|end|>") == inside.encode("a<|end|>")
  assert outside.unknown("aé\n 漢") == inside.unknown("aé\n 漢") == []
  with pytest.raises(ValueError, match="is not Unicode"):
    outside.completion("a\ud800")


@pytest.mark.parametrize(
  "template",
  [
    "{{ 'x' * 10**9 }}",
    "{{ messages[0].content * 10**9 }}",
    "{{ messages[0].content.ljust(10**10) }}",
    "{{ messages[0].content | center(10**10) }}",
    "{{ '%10000000000d' % 1 }}",
    "{{ '{:10000000000}'.format(1) }}",
    "{{ ('a\n' * 1000) | indent(10**8) }}",
    "{% set ns = namespace(l=[1]) %}{% for i in range(60) %}{% set ns.l = ns.l + ns.l %}{% endfor %}",
    "{{ range(99999) | list | join('x' * 10**5) }}",
    f"{{{{ {'(' * 5000}1{')' * 5000} }}}}",
    "{% if 1 %}" * 5000 + "{% endif %}" * 5000,
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
  ],
  ids=lambda template: template[:30],
)
def test_a_template_is_stopped(template):
  with pytest.raises(
    TokenizerError,
    match=r"tokenizer_config\.json: .*(more memory than is allowed|nested too deep|used up its CPU time)",
  ) as caught:
    ConfinedTokenizer(small_files(template + WRITTEN))
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  "values",
  [
    {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////w=="}},
    {"normalizer": replaced({"Regex": ""}, "x")},
    {"normalizer": replaced({"String": ""}, "x")},
    {
      "normalizer": {
        "type": "Sequence",
        "normalizers": [replaced({"String": "A" if not i else "b"}, "b" * 5000) for i in range(4)],
      }
    },
    {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+a+)+[yz]"}, "behavior": "Isolated", "invert": False}},
  ],
)
def test_a_tokenizer_is_stopped(values):
  with pytest.raises(TokenizerError, match=r"^tokenizer\.json: ") as caught:
    ConfinedTokenizer(as_json(**values)).completion("a" * 50)
  assert "\n" not in str(caught.value)
  assert isinstance(caught.value, RunError)


def test_what_ends_the_process_ends_no_other_tokenizer():
  good = ConfinedTokenizer(small_files())
  bad = ConfinedTokenizer(
    small_files("{{ messages[0].content * (10**8 if 'x' in messages[0].content else 1) }}" + WRITTEN)
  )
  for _ in range(2):
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json and vocab\.json: "):
      bad.prompt([{"role": "user", "content": "x"}], "")
  assert good.completion("a") == HuggingFaceTokenizer(small_files()).completion("a")
  assert bad.completion("a") == [*good.completion("a")[:1], 258]


def test_a_tokenizer_that_nobody_holds_is_forgotten():
  gc.collect()
  kept = ConfinedTokenizer(small_files())
  number = ConfinedTokenizer(small_files())._number
  gc.collect()
  assert number in confined._gone
  kept.completion("a")
  assert not confined._gone


def test_the_process_answers_whatever_goes_wrong_and_has_limits_around_each_question():
  calls: list[tuple[str, float]] = []
  server = Server(lambda n: calls.append(("memory", n)), lambda s: calls.append(("time", s)))
  files = {name: content.decode("latin-1") for name, content in small_files().items()}
  ask = lambda *question: json.loads(server.answer(json.dumps(question).encode()))
  assert ask("load", 7, [files]) == {"value": None}
  assert [kind for kind, _ in calls] == ["memory", "time", "memory", "memory", "time"]
  assert calls[-1] == ("time", 0.0)
  assert calls[2][1] > calls[3][1] == calls[0][1]
  assert ask("ids", 7, [])["value"]["stop_ids"] == [258]
  assert ask("completion", 7, ["a"])["value"][-1] == 258
  assert "is not Unicode" in ask("completion", 7, ["\ud800"])["error"]
  assert "KeyError" in ask("completion", 8, ["a"])["error"]
  assert "KeyError" in ask("__class__", 7, [])["error"]
  assert ask("forget", 7, []) == {"value": None}
  assert "KeyError" in ask("ids", 7, [])["error"]


def test_a_process_that_does_not_start_is_one_line(tmp_path, monkeypatch):
  (tmp_path / "broken.py").write_text("import no_such_module")
  monkeypatch.setattr(confined, "_helper", Helper(tmp_path / "broken.py"))
  with pytest.raises(
    TokenizerError, match=r"the process for tokenizers does not start: it .*; `python -c '(.*)'` shows"
  ):
    ConfinedTokenizer(small_files())


def test_the_process_imports_little():
  code = "import sys, d1jax.data.confined_process; assert not {'jax', 'numpy', 'sentencepiece'} & set(sys.modules)"
  subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.slow(reason="300 folders, each read by the process; some end it")
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_whatever_a_folder_says_is_a_tokenizer_or_an_error(data):
  """One value of one file is replaced by another of any type, or bytes are."""
  files = as_json() if data.draw(st.booleans()) else small_files()
  name = data.draw(st.sampled_from(sorted(files)))
  if name.endswith(".json") and data.draw(st.booleans()):
    whole = json.loads(files[name])
    place, key = whole, data.draw(st.sampled_from(sorted(whole)))
    while isinstance(place[key], dict) and place[key] and data.draw(st.booleans()):
      place = place[key]
      key = data.draw(st.sampled_from(sorted(place)))
    place[key] = data.draw(ANYTHING)
    files[name] = json.dumps(whole).encode()
  else:
    content = bytearray(files[name])
    start = data.draw(st.integers(0, len(content)))
    content[start : start + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=9))
    files[name] = bytes(content)
  with contextlib.suppress(ValueError):
    tokenizer = ConfinedTokenizer(files)
    ids = tokenizer.prompt(USER, "") + tokenizer.completion("a b")
    assert len(tokenizer.decode_all([ids])) == 1
