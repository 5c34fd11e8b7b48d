"""The page: what it says, and that hostile completions cannot be more than text in it."""

import base64
import hashlib
import html.parser
import itertools
import json
import re
from pathlib import Path

import pytest

from d1jax.evaluation import html as page_module
from d1jax.evaluation.html import LIMIT, chosen, embedded, render
from d1jax.evaluation.summary import columns, compare, summarise, verdict
from tests.evaluation.arms import arm, item

ATTACKS = [
  "</script><script>alert(1)</script>",
  "</SCRIPT\n><svg onload=alert(1)>",
  "<!--<script>",
  "--><img src=x onerror=alert(1)>",
  "]]></style></pre></textarea><b>",
  "{{ 7 * 7 }}{% raw %}{#",
  "\ud800 alone \udfff",
  "nul \0 bell \7 escape \x1b",
  "\u202eright to left\u2066\u200f",
  "line\u2028paragraph\u2029\r\n\ttab",
  "\\u003c &lt; &#60; \\",
  "\U0001f600 é 中",
  "",
]
VOID = {"meta", "input", "br", "link"}


class Page(html.parser.HTMLParser):
  """A page taken apart by the rules of HTML: elements, attributes, the text of each kind of element."""

  def __init__(self, text: str):
    super().__init__(convert_charrefs=True)
    self.open: list[tuple[str, list[str]]] = []
    self.attributes: list[tuple[str, str, str | None]] = []
    self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
    self.feed(text)
    self.close()

  def handle_starttag(self, tag, attrs):
    self.handle_startendtag(tag, attrs)
    if tag not in VOID:
      self.open.append((tag, self.elements[-1][2]))

  def handle_startendtag(self, tag, attrs):
    self.attributes += [(tag, *pair) for pair in attrs]
    self.elements.append((tag, dict(attrs), []))

  def handle_endtag(self, tag):
    assert self.open.pop()[0] == tag

  def handle_data(self, data):
    if self.open:
      self.open[-1][1].append(data)

  def texts(self, tag: str, **wanted: str) -> list[str]:
    """The text of each such element, without that of elements in it."""
    return ["".join(t) for name, a, t in self.elements if name == tag and wanted.items() <= a.items()]

  @property
  def data(self):
    (found,) = self.texts("script", id="data")
    return json.loads(found)


def results(*sets, protocol="strict", accuracy="solved", **fields) -> dict:
  arms = [
    {
      "name": f"{items[0].task}_{items[0].length}",
      "task": items[0].task,
      "length": items[0].length,
      "temperature": items[0].temperature,
      "sampler": None,
      "summary": summarise(items, accuracy),
      "baseline": {"value": 0.0213, "interval": [0.01, 0.03]},
    }
    for items in sets
  ]
  return {"subject": "runs/a/checkpoints/grpo/400", "protocol": protocol, "split": "test", "arms": arms, **fields}


@pytest.fixture(scope="module")
def sets() -> list[list]:
  return [
    arm(30, 0.6),
    arm(30, 0.7, length=256),
    arm(20, 0.5, temperature=0.9, seeds=2, samples=2),
    [item(0, None, task="math", length=0)],
  ]


@pytest.fixture(scope="module")
def everything(sets) -> tuple[str, dict]:
  pair = compare(arm(30, 0.5, chosen=1), sets[0], "solved")
  noted = compare(arm(20, 0.5, seeds=2, chosen=1), arm(20, 0.6, seeds=2), "solved")
  found = results(
    *sets,
    device="some device",
    params_fingerprint="0123456789abcdef",
    base_fingerprint=None,
    questions={
      "gsm8k_128": {"n": 30, "prompts_sha256": "ab" * 32},
      "gsm8k_256": {"n": 30, "prompts_sha256": "ab" * 32},
    },
    config={"lengths": [128, 256], "seeds": [0, 1]},
    compare={"with": "runs/b", "params_fingerprint": None, "arms": {"gsm8k_128": pair, "noted": noted}},
    versions={"jax": "1.2.3", "numpy": "4.5"},
    revision={"commit": None, "source": "feed"},
  )
  return render(found, [one for own in sets for one in own]), found


def test_elements_are_closed_and_ids_are_unique(everything):
  page = Page(everything[0])
  assert page.open == []
  ids = [a["id"] for _, a, _ in page.elements if "id" in a]
  assert len(ids) == len(set(ids))
  labels = [a["aria-labelledby"] for _, a, _ in page.elements if "aria-labelledby" in a]
  assert set(labels) <= set(ids)


def test_the_page_says_what_was_evaluated(everything):
  text, found = everything
  page = Page(text)
  table = Page(re.findall(r'<table class="about">.*?</table>', text, re.DOTALL)[0])
  about = dict(zip(table.texts("th", scope="row"), table.texts("td"), strict=True))
  shown = {
    "subject": "runs/a/checkpoints/grpo/400",
    "protocol": "strict",
    "split": "test",
    "device": "some device",
    "params fingerprint": "0123456789abcdef",
    "accuracy": "solved",
    "seeds": "[0, 1]",
    "prompts, sha256": "ab" * 8,
    "versions": "jax 1.2.3, numpy 4.5",
  }
  assert shown.items() <= about.items()
  assert "base fingerprint" not in about
  details = json.loads(page.texts("pre")[0])
  assert details == {name: value for name, value in found.items() if name != "arms"}


def test_the_table_holds_the_columns_of_the_summaries(everything):
  text, found = everything
  body = text[text.index('<table class="results">') :]
  page = Page(body[: body.index("</table>") + len("</table>")])
  shown = columns(found["arms"])
  heads = [head.strip() for head in page.texts("th", scope="col")]
  assert [head for head in heads if head != "0 to 100 %"] == [column.title for column in shown]
  rows = body[body.index("<tbody>") :].split("<tr>")[1:]
  for number in range(len(found["arms"])):
    cells = re.findall(r"<(?:td|th scope=\"row\")>([^<]*)</t[dh]>", rows[number])
    assert cells == [column.cells[number] or "–" for column in shown]


def test_intervals_are_drawn_where_the_numbers_are(everything):
  text, found = everything
  page = Page(text)
  rects = {
    name: [a for tag, a, _ in page.elements if tag == "rect" and a.get("class") == name]
    for name in ("range", "value", "constant")
  }
  known = [arm["summary"] for arm in found["arms"] if arm["summary"]["accuracy"] is not None]
  assert [len(found) for found in rects.values()] == [len(known)] * 3 == [3] * 3
  for summary, bar, mark, constant in zip(known, *rects.values(), strict=True):
    low, high = (100 * end for end in summary["accuracy_interval"])
    assert float(bar["x"]) == pytest.approx(low, abs=0.006)
    assert float(bar["x"]) + float(bar["width"]) == pytest.approx(high, abs=0.012)
    assert float(mark["x"]) + float(mark["width"]) / 2 == pytest.approx(100 * summary["accuracy"], abs=0.006)
    assert float(constant["x"]) + float(constant["width"]) / 2 == pytest.approx(2.13, abs=0.006)


def test_a_comparison_is_a_square_with_its_p(everything):
  text, found = everything
  squares = text.split('<table class="square">')[1:]
  for square, (name, pair) in zip(squares, found["compare"]["arms"].items(), strict=True):
    assert f"<caption>{name}</caption>" in square
    numbers = [int(cell) for cell in re.findall(r"<td>(\d+)</td>", square)]
    assert numbers == [pair[cell] for cell in ("both", "only_first", "only_second", "neither")]
    words = " ".join(square.split())
    assert f"<b>{100 * pair['difference']:+.1f}</b> points" in words
    assert "{:+.1f} to {:+.1f}".format(*(100 * end for end in pair["interval"])) in words
    assert f"p = {pair['p']:.2g}, {pair['n']} pairs" in words
    assert ("The 40 pairs come in 20 clusters" in words) == (name == "noted")


def test_the_plots_are_in_the_page(everything):
  page = Page(everything[0])
  titles = [a["aria-label"] for tag, a, _ in page.elements if tag == "svg" and "plot" in a["class"]]
  assert titles == [
    "gsm8k: accuracy by generation length",
    "gsm8k: pass@k",
    "gsm8k: effective tokens, solved and wrong",
  ]


def test_a_small_evaluation_has_no_empty_parts():
  text = render(results([item(0)]), [item(0)])
  page = Page(text)
  assert [t.strip() for t in page.texts("h2")] == ["Results", "What was evaluated", "Completions"]
  assert "1 of 1 completions are on this page." in text


def test_completions_read_back_exactly_and_stay_text():
  items = [
    item(i, i % 2 == 0, text=text, answer=text or None, record={"question": text, "big": 10**30, "list": [1, "2"]})
    for i, text in enumerate(ATTACKS)
  ]
  plain = render(results([item(0)]), [item(0)])
  text = render(results(items), items)
  page = Page(text)
  data = page.data
  assert [one["text"] for one in data["items"]] == ATTACKS
  assert [one["answer"] for one in data["items"]] == [attack or None for attack in ATTACKS]
  for i, (one, attack) in enumerate(zip(data["items"], ATTACKS, strict=True)):
    assert one["place"] == [i, 0, 0]
    assert data["records"][one["question"]] == {"question": attack, "big": "1" + "0" * 30, "list": '[1, "2"]'}
  # Nothing of them is an element, an attribute or raw text anywhere.
  tags = lambda page: [(tag, sorted(a)) for tag, a, _ in page.elements]
  assert tags(page) == tags(Page(plain))
  assert not [attack for attack in ATTACKS if attack and "<" in attack and attack in text]
  text.encode("utf-8")


def test_the_data_is_ascii_without_markup():
  found = embedded([*ATTACKS, {"<a>": 0.5, "&": None}])
  assert found.isascii()
  assert not set("<>&\0\n") & set(found)
  assert json.loads(found) == [*ATTACKS, {"<a>": 0.5, "&": None}]
  with pytest.raises(ValueError, match="not JSON compliant"):
    embedded([float("nan")])


def test_fields_of_the_results_are_text_too():
  hostile = "<script>alert(1)</script>\udcff\0"
  found = results([item(0)], subject=hostile, config={"note": hostile}, compare=None)
  text = render(found, [item(0)])
  text.encode("utf-8")
  page = Page(text)
  assert len([tag for tag, _, _ in page.elements if tag == "script"]) == 2
  assert "<script>alert(1)</script>��" in page.texts("td")
  assert json.loads(page.texts("pre")[0])["subject"] == hostile


def test_nothing_is_loaded_and_only_the_pages_own_script_runs(everything):
  text, _ = everything
  page = Page(text)
  assert not re.search(r"https?:|//\w", re.sub(r"(?m)^\s*//.*$", "", text))
  assert not [a for a in page.attributes if a[1] in ("src", "srcset", "action", "data") or a[1].startswith("on")]
  links = [value for _, name, value in page.attributes if name in ("href", "xlink:href")]
  assert links
  assert all(link.startswith("#") for link in links)
  assert not re.search(r"url\((?!#)|@import", text)
  (policy,) = [a["content"] for _, a, _ in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
  rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
  (script,) = ["".join(t) for tag, a, t in page.elements if tag == "script" and "id" not in a]
  digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
  assert rules == {
    "default-src": "'none'",
    "style-src": "'unsafe-inline'",
    "script-src": f"'sha256-{digest}'",
    "base-uri": "'none'",
    "form-action": "'none'",
  }


def test_the_script_never_parses_text_as_markup_or_code():
  script = (Path(page_module.__file__).parent / "report.js").read_text(encoding="utf-8")
  assert script.isascii()
  for word in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval", "Function(", "setTimeout", "<!--"):
    assert word not in script
  assert "</script" not in script.lower()


def test_the_script_shows_hidden_characters_of_whatever_comes_from_a_record():
  script = (Path(page_module.__file__).parent / "report.js").read_text(encoding="utf-8")
  assert 'show(element("dt", list), name)' in script
  assert 'show(element(tag, element("dd", list)), text)' in script


def test_the_same_input_gives_the_same_bytes(everything, sets):
  text, found = everything
  assert render(json.loads(json.dumps(found)), [one for own in sets for one in own]) == text


def test_outcomes():
  items = [item(0), item(1, False, answer="8"), item(2, False), item(3, None), item(4, True, answer=None)]
  data = Page(render(results(items), items)).data
  assert [one["verdict"] for one in data["items"]] == ["solved", "wrong", "no answer", "unknown", "solved"]
  cells = [item(i, metrics={"d1_accuracy": (i, 2), "solved": (0, 1)}) for i in range(3)]
  data = Page(render(results(cells, protocol="d1", accuracy="d1_accuracy"), cells)).data
  assert [one["verdict"] for one in data["items"]] == ["wrong", "wrong", "solved"]
  assert data["items"][1]["metrics"] == "d1 accuracy 1/2, solved 0/1"
  assert data["arms"] == [{"task": "gsm8k", "length": "128", "temperature": "0"}]


@pytest.mark.parametrize(
  ("right", "wrong", "expected"),
  [(300, 700, (50, 50)), (10, 700, (10, 90)), (700, 3, (97, 3)), (40, 20, (40, 20)), (0, 200, (0, 100))],
)
def test_a_part_of_many_is_of_both_kinds_evenly_spread_in_order(right, wrong, expected):
  outcomes = [True] * right + [False] * wrong
  items = [item(i, outcomes[(i * 389) % len(outcomes)]) for i in range(len(outcomes))]
  kept = chosen(items, "solved", limit=100)
  indices = [one.index for one in kept]
  assert indices == sorted(set(indices))
  assert (sum(verdict(i, "solved") for i in kept), sum(not verdict(i, "solved") for i in kept)) == expected
  for kind, count in zip((True, False), expected, strict=True):
    own = [one.index for one in items if verdict(one, "solved") is kind]
    places = [own.index(one.index) for one in kept if verdict(one, "solved") is kind]
    if count:
      assert (places[0], places[-1]) == (0, len(own) - 1)
      gaps = {b - a for a, b in itertools.pairwise(places)}
      assert max(gaps, default=1) - min(gaps, default=1) <= 1


def test_the_page_says_that_it_holds_a_part():
  items = arm(LIMIT + 200, 0.5)
  text = render(results(items), items)
  assert len(Page(text).data["items"]) == LIMIT
  assert f"{LIMIT} of {LIMIT + 200} completions are on this page: at most {LIMIT} an arm" in text
