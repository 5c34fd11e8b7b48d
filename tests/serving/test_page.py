"""The page of the server: its three files, and how it behaves in headless Chromium before a stand-in server."""

import json
import re

import pytest

from benchmarks import browser as browsers
from d1jax.generation.canvas import SCALE, rgb
from tests.evaluation.test_html import Page
from tests.generation.test_canvas import luminance
from tests.serving.stand_in import ANSWERS, MODEL, PAGE, serving_page

HTML, CSS, JS = ((PAGE / name).read_text(encoding="utf-8") for name in ("page.html", "page.css", "page.js"))
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


@pytest.fixture
def opened(chromium):
  """The page before a stand-in of its server; nothing may be refused by its policy or raised in its script."""
  with serving_page() as server:
    chromium.look(1100, 700)
    chromium.complaints.clear()
    chromium.open(server.address)
    chromium.run("sessionStorage.clear()")
    chromium.wait("document.getElementById('model').textContent !== 'Chat'")
    yield chromium, server
    assert not [one for one in chromium.complaints if "Failed to load resource" not in one]


TEXTS = "[...document.querySelectorAll('#turns li')].map(li => li.querySelector('p').innerText)"
DONE = "document.getElementById('stop').hidden"


def ask(page, text: str) -> None:
  page.run("document.getElementById('text').focus()")
  page.write(text)
  page.press("Enter")


@SLOW
def test_answers_are_coloured_by_step_and_the_conversation_is_sent(opened):
  page, server = opened
  assert page.run("document.getElementById('model').textContent") == "a <b>model</b>"
  assert page.run("[...settings.querySelectorAll('[name]')].map(x => x.placeholder ?? x.options[0].text).join()") == (
    "0,64,default,default,random,static,default"
  )
  ask(page, "hello")
  page.wait(f"{DONE} && document.querySelector('.replay')")
  assert page.run(TEXTS) == ["hello", "Hello you."]
  spans = "[...document.querySelectorAll('.answer p')[0].children].map(span => [span.textContent, span.className])"
  assert page.run(spans) == [["Hel", "s3"], ["lo", "s0"], [" you", "s9"], [".", "s6"]]
  assert page.run("document.querySelector('.figures').textContent").startswith(
    "12 tokens a second · 4 steps · first block"
  )
  assert page.run("document.getElementById('said').textContent") == "Hello you."
  # The slider goes back to any step.
  page.run("const s = document.querySelector('.replay input'); s.value = 1; s.dispatchEvent(new Event('input'))")
  assert page.run(spans) == [["", "masked active"], ["lo", "s0 fresh"], ["", "masked"], ["", "masked"]]
  page.run(
    "document.querySelector('[name=temperature]').value = '0.5'; document.querySelector('[name=seed]').value = 3"
  )
  page.write("two")
  page.press("Enter", shift=True)
  page.write("lines")
  page.press("Enter")
  page.wait(f"{DONE} && document.querySelectorAll('.answer').length === 2")
  first, second = server.asked
  asked = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "Hello you."}]
  assert page.run("document.getElementById('remember').checked")
  assert first == {
    "model": "a <b>model</b>", "messages": asked[:1], "stream": True, "d1jax": {"canvas": True}
  }  # fmt: skip
  assert second["messages"] == [*asked, {"role": "user", "content": "two\nlines"}]
  assert (second["temperature"], second["seed"]) == (0.5, 3)
  page.run("document.getElementById('clear').click()")
  assert page.run(TEXTS) == []
  ask(page, "nothing")  # which is no turn of the conversation
  page.wait(f"{DONE} && document.querySelector('.figures').textContent.startsWith('an empty answer')")
  ask(page, "hello")
  page.wait(f"{DONE} && document.querySelector('.replay')")
  assert server.asked[-1]["messages"] == asked[:1]


@SLOW
def test_a_model_that_tells_no_turns_is_asked_message_by_message(opened):
  page, server = opened
  server.model = MODEL | {"d1jax": {"turns": False}}
  page.open(server.address)
  page.wait("!document.getElementById('remember').checked")
  for _ in range(2):
    ask(page, "hello")
    page.wait(DONE)
  assert server.asked[0]["messages"] == server.asked[1]["messages"] == [{"role": "user", "content": "hello"}]


@SLOW
def test_tokens_have_their_parts_of_the_text(opened):
  page, _ = opened
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
    assert page.run(f"aligned({json.dumps(tokens)}, {json.dumps(text)})") == parts, tokens


@SLOW
def test_hostile_tokens_stay_text(opened):
  page, _ = opened
  ask(page, "hostile")
  page.wait(f"{DONE} && document.querySelector('.replay')")
  said = "".join(token for block in ANSWERS["hostile"] for token in block)
  shown = re.sub("[\u202e\0\x1b]", "\ufffd", said)
  assert page.run("document.querySelector('.answer p').textContent") == shown
  assert page.run("document.querySelectorAll('#turns img, #turns script, #turns b').length") == 0


@SLOW
@pytest.mark.parametrize("way", ["button", "key"])
def test_an_answer_is_stopped_and_what_was_final_stays(opened, way):
  page, server = opened
  ask(page, "wait")
  page.wait("document.querySelectorAll('.masked').length > 20")
  assert page.run("document.querySelector('.answer').getAttribute('aria-busy')") == "true"
  if way == "key":
    page.press("Escape")
  else:
    page.run("document.getElementById('stop').click()")
  page.wait(DONE)
  assert server.left.wait(10)
  assert page.run(TEXTS) == ["wait", "Hello"]
  assert page.run("document.querySelectorAll('.masked').length") == 1  # of the legend
  assert page.run("document.querySelector('.figures').textContent").endswith("stopped")
  assert page.run("document.getElementById('error').hidden")


@SLOW
def test_failures_are_the_servers_sentence(opened):
  page, server = opened
  for asked, sentence in (
    ("fail", "temperature=-1 must be at least 0 <b>"),
    ("break", "the device is gone"),
  ):
    ask(page, asked)
    page.wait("!document.getElementById('error').hidden")
    assert page.run("document.getElementById('error').textContent") == sentence
    # A message without an answer goes back into its field, to be sent again.
    assert page.run("document.getElementById('text').value") == ("fail" if asked == "fail" else "")
    page.run("document.getElementById('text').value = ''")
  assert page.run(TEXTS) == ["break", "Half"]
  server.key = "secret"
  assert page.run("document.getElementById('keyed').hidden")
  ask(page, "hello")
  page.wait("!document.getElementById('keyed').hidden")
  assert page.run("document.activeElement.id") == "key"
  page.write("secret")
  page.press("Enter")
  page.wait("document.getElementById('error').hidden")
  ask(page, "")  # what was refused stands there still
  page.wait(f"{DONE} && document.querySelector('.replay')")
  assert page.run("({...sessionStorage})") == {"d1jax api key": "secret"}
  assert page.run("localStorage.length + document.cookie.length") == 0


@SLOW
@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_a_phone_and_the_dark(opened, dark):
  page, server = opened
  page.look(360, 640, dark=dark, calm=True)
  page.open(server.address)
  page.wait("document.getElementById('model').textContent !== 'Chat'")
  assert not page.run("document.getElementById('panel').open")
  ask(page, "long")
  page.wait(f"{DONE} && document.querySelector('.replay')")
  size = page.run("[document.documentElement.scrollWidth, document.documentElement.scrollHeight]")
  assert size == [360, 640]
  assert page.run("(e => e.scrollHeight - e.scrollTop - e.clientHeight)(document.getElementById('turns'))") < 2
  ground = page.run("getComputedStyle(document.body).backgroundColor")
  assert ground == ("rgb(21, 23, 26)" if dark else "rgb(255, 255, 255)")
  box = page.run("(({left, right}) => [left, right])(document.getElementById('send').getBoundingClientRect())")
  assert 0 <= box[0] < box[1] <= 360
  assert len(page.picture()) > 5000
  assert json.dumps(page.run(TEXTS)).count("word") == 64
