"""The page of the server: its three files, and how it behaves in headless Chromium before a stand-in of the engine."""

import contextlib
import dataclasses
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import browser as browsers
from d1jax import serving
from d1jax.data import tokenizer as tokenizers
from d1jax.generation.canvas import SCALE, rgb
from tests.data.folders import small_files
from tests.evaluation.test_html import Page
from tests.generation.test_canvas import IDS, luminance
from tests.serving.engines import SERVED, StandIn, service, tokenizer, updates, written
from tests.serving.servers import running

FILES = Path(serving.__file__).parent
HTML, CSS, JS = ((FILES / name).read_text(encoding="utf-8") for name in ("page.html", "page.css", "page.js"))
SLOW = pytest.mark.slow(reason="a browser")


def test_the_page_loads_its_own_two_files_and_nothing_else():
  page = Page(HTML)
  assert page.open == []
  loaded = [value for _, name, value in page.attributes if name in ("href", "src", "srcset", "action", "data")]
  assert [value for value in loaded if not value.startswith("data:image/svg+xml,")] == ["page.css", "page.js"]
  assert not [name for _, name, _ in page.attributes if re.match("on|style$", name)]
  assert not re.search(r"url\(|@import", CSS)
  assert not re.search(r"https?:|import[ (]", re.sub(r"(?m)//.*$", "", JS))


def test_every_field_has_a_label_and_ids_are_unique():
  page = Page(HTML)
  ids = [a["id"] for _, a, _ in page.elements if "id" in a]
  assert len(ids) == len(set(ids))
  labelled = {a["for"] for tag, a, _ in page.elements if tag == "label" and "for" in a}
  inside = re.findall(r"<label[^>]*>(?:(?!</label>).)*?<(?:input|select|textarea)", HTML, re.DOTALL)
  fields = [a for tag, a, _ in page.elements if tag in ("input", "select", "textarea")]
  assert len(fields) == len(inside) + len(labelled)
  assert set(re.findall(r'\$\("(\w+)"\)', JS)) <= set(ids)


def test_the_script_never_parses_text_as_markup_or_code_and_keeps_only_a_key():
  assert JS.isascii()
  for word in (
    "innerHTML",
    "outerHTML",
    "insertAdjacent",
    "document.write",
    "eval",
    "Function(",
    "localStorage",
    "cookie",
  ):
    assert word not in JS
  assert re.findall(r"sessionStorage\.(\w+)\((\w+)", JS) == [("setItem", "KEY"), ("getItem", "KEY")]


def mixed(color: str) -> tuple[int, int, int]:
  return tuple(bytes.fromhex(color.removeprefix("#")))


def test_colours_are_readable_and_are_those_of_the_canvas():
  light, dark = (dict(re.findall(r"--([\w-]+): (#\w{6});", part)) for part in CSS.split("prefers-color-scheme: dark"))
  dark = {name: dark[name] for name in light}  # each has both
  for colors, least in ((light, 4.5), (dark, 6.0)):
    for ground in ("paper", "card"):
      for name in ("ink", "muted", "link", "wrong", *(f"s{shade}" for shade in range(len(SCALE)))):
        one, other = sorted((luminance(mixed(colors[name])), luminance(mixed(colors[ground]))))
        assert (other + 0.05) / (one + 0.05) >= min(least, 4.5 if name in ("muted", "wrong") else least), name
    for shade in range(len(SCALE)):  # darker or lighter, but the same hue: its channels keep their order
      own, given = mixed(colors[f"s{shade}"]), rgb(shade)
      order = [sorted(range(3), key=color.__getitem__) for color in (own, given)]
      assert order[0] == order[1] or len(set(given)) < 3
  assert f"const SHADES = {len(SCALE)};" in JS


@pytest.fixture(scope="module")
def chromium():
  """A browser; the tests that need one are skipped, and say so, where there is none."""
  program = browsers.find()
  if program is None:
    pytest.skip(browsers.MISSING)
  with browsers.browser(program) as found:
    yield found


ANSWERS = {
  "hello": "Hello you.",
  "hostile": "<b>\u202e\0\x1b[2J&lt;<img src=x onerror=alert()>",
  "long": "word " * 30,
  "nothing": "",
}


class Engine(StandIn):
  """Says what `ANSWERS` has for the last message; for "break" a block, and that it failed."""

  def __init__(self) -> None:
    super().__init__(self.say)
    self.asked: list = []

  def say(self, request) -> list[int]:
    self.asked.append(request)
    (prompt,) = tokenizer().decode_all([request.prompt.tolist()])
    return written(ANSWERS.get(prompt.strip().removesuffix("assistant").strip().splitlines()[-1], "Half an answer"))

  def _run(self, request, listen, ticket) -> None:
    if "break" not in tokenizer().decode_all([request.prompt.tolist()])[0]:
      super()._run(request, listen, ticket)
      return
    block = next(u for u in updates(request, self.say(request), 261, (258,)) if u.known)
    listen(block)
    time.sleep(0.3)  # for the server to send it
    listen(block._replace(reason="error", message="the device is gone"))


@contextlib.contextmanager
def shown(page, **changes) -> Iterator[Engine]:
  """Opens the page of a server; nothing may be refused by its policy or raised in its script."""
  engine = Engine()
  own = service(engine, served=dataclasses.replace(SERVED, name="a <b>model</b>"))
  with running(dataclasses.replace(own, **changes)) as server:
    page.look(1100, 700)
    page.complaints.clear()
    page.open(f"{server.url}/")
    page.run("sessionStorage.clear()")
    page.wait("document.getElementById('model').textContent !== 'Chat' || !document.getElementById('error').hidden")
    yield engine
    assert not [one for one in page.complaints if "Failed to load resource" not in one]


TEXTS = "[...document.querySelectorAll('#turns li')].map(li => li.querySelector('p').textContent)"
DONE = "document.getElementById('stop').hidden"
SPANS = "[...document.querySelectorAll('.answer p')[0].children].map(span => [span.textContent, span.className])"


def ask(page, text: str) -> None:
  page.run("document.getElementById('text').focus()")
  page.write(text)
  page.press("Enter")


def answered(page, text: str) -> None:
  """Asks, and waits for the end of the answer."""
  before = page.run("document.querySelectorAll('.answer:not([aria-busy])').length")
  ask(page, text)
  page.wait(f"document.querySelectorAll('.answer:not([aria-busy])').length > {before}")


@SLOW
def test_answers_are_coloured_by_step_and_the_conversation_is_sent(chromium):
  page = chromium
  with shown(page) as engine:
    assert page.run("document.getElementById('model').textContent") == "a <b>model</b>"
    assert page.run("[...settings.querySelectorAll('[name]')].map(x => x.placeholder ?? x.options[0].text).join()") == (
      "0,16,8,32,random,static,0.9"
    )
    answered(page, "hello")
    assert page.run(TEXTS) == ["hello", "Hello you."]
    # Blocks of 8 tokens, each from right to left.
    steps = [*range(7, -1, -1), 9, 8]
    assert page.run(SPANS) == [[char, f"s{step}"] for char, step in zip("Hello you.", steps, strict=True)]
    figures = r"\d+ tokens a second · \d+ steps · first block after [\d.]+ s · seed \d+"
    assert re.fullmatch(figures, page.run("document.querySelector('.figures').textContent"))
    assert page.run("document.getElementById('said').textContent") == "Hello you."
    # The slider goes back to any step.
    page.run("const s = document.querySelector('.replay input'); s.value = 2; s.dispatchEvent(new Event('input'))")
    assert page.run(SPANS)[5:] == [
      ["", "masked active"],
      ["y", "s1 fresh"],
      ["o", "s0"],
      ["", "masked"],
      ["", "masked"],
    ]
    page.run("settings.elements.temperature.value = '0.5'; settings.elements.seed.value = 3")
    page.write("two")
    page.press("Enter", shift=True)
    answered(page, "lines")
    first, second = engine.asked
    asked = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "Hello you."}]
    prompt = lambda *turns: tokenizer().prompt(turns, "")
    assert first.prompt.tolist() == prompt(asked[0])
    assert second.prompt.tolist() == prompt(*asked, {"role": "user", "content": "two\nlines"})
    assert (second.spec.temperature, second.seed) == (0.5, 3)
    page.run("document.getElementById('clear').click()")
    assert page.run(TEXTS) == []
    answered(page, "nothing")  # which is no turn of the conversation
    assert page.run("document.querySelector('.figures').textContent").startswith("an empty answer")
    answered(page, "hello")
    assert engine.asked[-1].prompt.tolist() == prompt(asked[0])


@SLOW
def test_a_model_that_tells_no_turns_is_asked_message_by_message(chromium):
  bare = tokenizers.from_files(small_files(None) | {"config.json": IDS})
  with shown(chromium, tokenizer=bare) as engine:
    assert not chromium.run("document.getElementById('remember').checked")
    for _ in range(2):
      answered(chromium, "hello")
    assert [request.prompt.tolist() for request in engine.asked] == [bare.prompt([{"content": "hello"}], "")] * 2


@SLOW
def test_tokens_have_their_parts_of_the_text(chromium):
  with shown(chromium):
    for tokens, text, parts in (
      (["a", " b", "", None], "a b", ["a", " b"]),
      (["a", " be", "c"], "a b", ["a", " b"]),  # cut at a stop text
      ([" a", "b"], "ab", ["a", "b"]),  # the first word of a text has no space
      (["a", "\ufffd", "\ufffd", "b"], "a\u00e9b", ["a", "", "\u00e9", "b"]),
      (["\ufffd", "\ufffd"], "\u00e9", ["", "\u00e9"]),
      (["a", None, "c"], "abc", []),
      (["x", "y"], "ab", []),
      ([], "ab", []),
    ):
      assert chromium.run(f"aligned({json.dumps(tokens)}, {json.dumps(text)})") == parts, tokens


@SLOW
def test_hostile_answers_stay_text(chromium):
  with shown(chromium) as engine:
    chromium.run("settings.elements.max_tokens.value = 64")
    answered(chromium, "hostile")
    assert engine.asked
    assert chromium.run("document.querySelector('.answer p').textContent") == (
      re.sub("[\u202e\0\x1b]", "\ufffd", ANSWERS["hostile"])
    )
    assert chromium.run("document.querySelectorAll('#turns img, #turns script, #turns b').length") == 0


@SLOW
@pytest.mark.parametrize("way", ["button", "key"])
def test_an_answer_is_stopped_and_what_was_final_stays(chromium, way):
  page = chromium
  with shown(page) as engine:
    engine.seconds = 0.03
    page.run("settings.elements.max_tokens.value = 128")
    ask(page, "long")
    page.wait("document.querySelectorAll('.masked').length > 40 && document.querySelector('.s9')")
    page.wait("document.querySelector('.figures').textContent.includes('first block')")
    assert page.run("document.querySelector('.answer').getAttribute('aria-busy')") == "true"
    if way == "key":
      page.press("Escape")
    else:
      page.run("document.getElementById('stop').click()")
    page.wait(DONE)
    assert engine.tickets[-1].cancelled.wait(10)
    asked, said = page.run(TEXTS)
    assert (asked, len(said) % 8, said) == ("long", 0, ANSWERS["long"][: len(said)])
    assert 8 <= len(said) < 128
    assert page.run("document.querySelectorAll('.masked').length") == 1  # of the legend
    assert page.run("document.querySelector('.figures').textContent").endswith("stopped")
    assert page.run("document.getElementById('error').hidden")


@SLOW
def test_failures_are_the_servers_sentence(chromium):
  page = chromium
  with shown(page):
    page.run("settings.elements.max_tokens.value = 1000")
    ask(page, "hello")
    page.wait("!document.getElementById('error').hidden")
    assert "max_tokens=1000" in page.run("document.getElementById('error').textContent")
    # A message without an answer goes back into its field, to be sent again.
    assert page.run("document.getElementById('text').value") == "hello"
    page.run("document.getElementById('text').value = ''; settings.reset()")
    ask(page, "break")
    page.wait("!document.getElementById('error').hidden")
    assert "the device is gone" in page.run("document.getElementById('error').textContent")
    assert page.run(TEXTS) == ["break", "Half an "]
    assert page.run("document.querySelector('.figures').textContent").endswith("incomplete")


@SLOW
def test_a_server_with_a_key_is_asked_with_it(chromium):
  page = chromium
  with shown(page, key=b"secret"):
    assert "the API key is missing or wrong" in page.run("document.getElementById('error').textContent")
    assert page.run("document.activeElement.id") == "key"
    page.write("secret")
    page.press("Enter")
    page.wait("document.getElementById('error').hidden && document.getElementById('model').textContent !== 'Chat'")
    answered(page, "hello")
    assert page.run(TEXTS) == ["hello", "Hello you."]
    assert page.run("({...sessionStorage})") == {"d1jax api key": "secret"}
    assert page.run("localStorage.length + document.cookie.length") == 0


@SLOW
@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_a_phone_and_the_dark(chromium, dark):
  page = chromium
  with shown(page):
    page.look(360, 640, dark=dark, calm=True)
    page.open(page.run("location.href"))
    page.wait("document.getElementById('model').textContent !== 'Chat'")
    assert not page.run("document.getElementById('panel').open")
    page.run("settings.elements.max_tokens.value = 128; document.getElementById('remember').checked = false")
    for _ in range(4):
      answered(page, "long")
    size = page.run("[document.documentElement.scrollWidth, document.documentElement.scrollHeight]")
    assert size == [360, 640]
    scrolled = "(e => [e.scrollTop, e.scrollHeight - e.scrollTop - e.clientHeight])(document.getElementById('turns'))"
    assert page.run(scrolled)[0] > 0
    assert page.run(scrolled)[1] < 2
    ground = page.run("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(21, 23, 26)" if dark else "rgb(255, 255, 255)")
    box = page.run("(({left, right}) => [left, right])(document.getElementById('send').getBoundingClientRect())")
    assert 0 <= box[0] < box[1] <= 360
