"""The page of a run: what it says, that hostile text stays text in it, and what old or damaged runs show."""

import base64
import hashlib
import itertools
import json
import logging
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

import d1jax.page
from benchmarks import browser as browsers
from d1jax import serving
from d1jax.errors import RunError
from d1jax.page import command, curves, samples, writer
from d1jax.page.samples import Validated
from tests.damages import DAMAGES
from tests.evaluation.test_html import ATTACKS, Page
from tests.page.pages import STEPS, answer, keep, record, write

FILES = Path(d1jax.page.__file__).parent
SCRIPT = (FILES / "page.js").read_text(encoding="utf-8")


def page(workdir: Path, compare: Path | None = None) -> Page:
  return Page(writer.drawn(workdir, compare and str(compare)))


def charts(found: Page) -> list[str]:
  return [a["aria-label"] for tag, a, _ in found.elements if tag == "svg" and a["class"] == "chart"]


def titles(found: Page) -> set[str]:
  return {"".join(node) for tag, a, node in found.elements if tag == "b"} | {
    label.partition(":")[0] for label in charts(found) if label.startswith("Solved")
  }


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
  return write(tmp_path_factory.mktemp("one") / "run")


@pytest.fixture(scope="module")
def drawn(run) -> tuple[str, Page]:
  text = writer.drawn(run, None)
  return text, Page(text)


def test_elements_are_closed_ids_are_unique_and_nothing_is_loaded(drawn):
  text, found = drawn
  assert found.open == []
  ids = [a["id"] for _, a, _ in found.elements if "id" in a]
  assert len(ids) == len(set(ids))
  named = {a[name] for _, a, _ in found.elements for name in ("aria-labelledby", "for") if name in a}
  assert named <= set(ids)
  assert set(re.findall(r'\$\("([\w-]+)"\)', SCRIPT)) <= set(ids)
  assert not [
    name for _, name, _ in found.attributes if name in ("href", "src", "srcset", "action") or name[:2] == "on"
  ]
  assert not re.search(r"url\(|@import|https?:", text.replace("http://www.w3.org/2000/svg", ""))
  (policy,) = [a["content"] for tag, a, _ in found.elements if a.get("http-equiv") == "Content-Security-Policy"]
  hashed = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
  assert policy.startswith(f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{hashed}'")
  assert found.texts("script")[-1] == SCRIPT


def test_the_script_never_parses_text_as_markup_or_code():
  assert SCRIPT.isascii()
  for word in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "Function(", "Storage", "cookie"):
    assert word not in SCRIPT


def test_the_page_says_how_the_run_stands(drawn):
  text, found = drawn
  assert "finished after 100 iterations of diffu-GRPO" in text
  said = " ".join("".join(node) for tag, _, node in found.elements if tag in ("dd", "b", "span", "dt"))
  said = said.replace("\u202f", " ")
  for part in ("60.0 %", "diffu-GRPO, iteration 100; SFT start 20.0 %", "95% interval [30.0, 70.0]", "1 min 20 s"):
    assert part in said
  # The alarm is judged as the run does, over the last 50 iterations.
  assert "Since iteration 81: 95% of the groups have equal rewards" in text
  rows = re.findall(r'<th scope="row">([^<]*)</th>\s*<td class="drawn">.*?</td>\s*<td>([\d.]+)</td>', text, re.DOTALL)
  assert rows[:3] == [("constant answer", "0.0"), ("before diffu-GRPO", "20.0"), ("after training", "60.0")]
  assert ("SFT update", "37.5") in rows
  assert json.loads(found.texts("pre")[0])["mode"] == "grpo"


def test_curves_have_their_figures_in_the_units_of_the_page(drawn):
  text, found = drawn
  assert {"Reward", "Reward: solved", "Groups without signal", "Entropy of the samples", "Completion length"} < titles(
    found
  )
  (hero, narrow) = [label for label in charts(found) if label.startswith("Solved, validation questions")]
  assert hero == narrow
  assert "validation, sft: from 6.67 to 20 %" in hero
  assert "validation, grpo: from 28 to 60 %" in hero
  levels = {"".join(node) for tag, a, node in found.elements if tag == "text" and "level" in a["class"]}
  assert {"SFT start 20", "alarm above 90"} <= levels
  # What never changes is a sentence instead of a chart.
  assert "KL to the reference" not in titles(found)
  assert re.search(r"KL to the reference <b>0 nats a token</b>", text)
  assert [a for tag, a, _ in found.elements if tag == "rect" and a["class"] == "alarm"]
  whiskers = [a["d"] for tag, a, _ in found.elements if tag == "path" and a["class"] == "whisker a"]
  assert [d.count("M") for d in whiskers] == [3, 5, 3, 5]


def test_charts_say_what_they_count_in_the_colours_of_the_page(drawn):
  charts = re.findall(r'<svg class="chart".*?</svg>', drawn[0], re.DOTALL)
  assert len(charts) > 10
  for chart in charts:
    assert ">iteration</text>" in chart
    assert not re.search(r"#[0-9a-f]{3}|rgb\(|style=", chart), "colours are those of the style sheet"
    ends = sorted(float(y) for y in re.findall(r'<text class="end [abt]" x="[\d.]+" y="([\d.]+)"', chart))
    assert ends, "the last value stands at the end of its line"
    assert all(below - above > 11.8 for above, below in itertools.pairwise(ends)), "names do not overlap"
  assert drawn[0].count("--line0:") == 2, "one colour for light pages, one for dark ones"


def test_samples_are_those_of_every_validation(drawn):
  data = drawn[1].data
  assert data["questions"] == [{"question": f"question {i}", "answer": "15"} for i in range(2)]
  (looks,) = data["runs"]
  assert [(look["stage"], look["iteration"]) for look in looks] == [
    *(("sft", i) for i in (20, 40, 60)),
    *(("grpo", i) for i in (20, 40, 60, 80, 100)),
  ]
  first, second = looks[-1]["samples"]
  assert first == {"text": "15", "reward": 1.0, "solved": True, "pieces": ["1", "5", "∎"], "steps": [2, 1, 0]}
  assert not second["solved"]


def test_two_runs_share_axes_and_the_fields_that_differ_are_a_table(tmp_path, run):
  other = write(tmp_path / "other", answers=("15",), seed=7, extra="<b>", task={"name": "sums"}, finished=False)
  text = writer.drawn(run, str(other))
  found = Page(text)
  assert found.open == []
  (body,) = re.findall(r'<table class="about differences">(.*?)</table>', text, re.DOTALL)
  rows = re.findall(r'<th scope="row">(.*?)</th><td>(.*?)</td><td>(.*?)</td>', body)
  assert rows == [("extra", "–", "&lt;b&gt;"), ("seed", "0", "7")]
  (reward,) = [label for label in charts(found) if label.startswith("Reward:") and "solved" not in label]
  assert reward.count("from 0.015") == 2
  assert {a["data-name"] for tag, a, _ in found.elements if tag == "polyline" and "data-name" in a} == {
    *("A", "B", "A validation", "B validation")
  }
  ends = ["".join(node) for tag, a, node in found.elements if tag == "text" and a["class"].startswith("end")]
  assert all(re.match("[AB] ", end) for end in ends)
  data = found.data
  assert [len(looks) for looks in data["runs"]] == [8, 8]
  assert data["runs"][1][-1]["samples"][1] is None, "the other run was not asked this question"


def test_a_run_that_cannot_be_compared_is_one_line_with_the_remedy(tmp_path, run):
  empty, sft = tmp_path / "empty", write(tmp_path / "sft", mode="sft")
  empty.mkdir()
  damaged = write(tmp_path / "damaged")
  (damaged / "config.json").write_text("{")
  for other, message in (
    (empty, rf"report\.compare: {empty} holds no run \(there is no config\.json\): name the work directory of a run"),
    (tmp_path / "absent", r"absent holds no run \(there is no config\.json\): name the work directory of a run"),
    (sft, rf"compare={sft} is a run of the mode sft, this one of grpo: name one of grpo"),
    (run, rf"compare={run} is this run itself: name the work directory of another run"),
    (run / ".." / "run", "is this run itself"),
    (damaged, r"config\.json is not JSON"),
  ):
    with pytest.raises(RunError, match=message) as caught:
      writer.Page(run, str(other)).check("grpo")
    assert "\n" not in str(caught.value)
  writer.Page(run, str(write(tmp_path / "other"))).check("grpo")
  writer.Page(run, None).check("grpo")


@pytest.mark.parametrize("attack", [a for a in ATTACKS if a], ids=ascii)
def test_hostile_text_stays_text(tmp_path, attack):
  run = write(tmp_path / "run", answers=(attack,), extra={attack: attack}, task={"name": attack})
  raw = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
  with (run / "metrics.jsonl").open("a") as file:  # a figure with a hostile name
    file.write(json.dumps(raw | {attack: 1.0, f"reward/{attack}": 0.5}) + "\n")
    file.write(json.dumps(raw | {"iteration": 101, attack: 2.0, f"reward/{attack}": 0.25, "alarms": [attack]}) + "\n")
  samples.append(run, Validated("grpo", 100, (0.5, 0.4, 0.6), [answer(attack, False, attack)]))
  text = writer.drawn(run, None)
  text.encode()
  found = Page(text)
  assert found.open == []
  assert [tag for tag, _, _ in found.elements].count("script") == 2
  assert not [tag for tag, _, _ in found.elements if tag in ("img", "iframe", "textarea")]
  assert not [name for _, name, _ in found.attributes if name.startswith("on")]
  assert found.data["runs"][0][-1]["samples"][-1]["text"] == attack
  assert found.data["questions"][-1]["question"] == attack


def test_a_run_at_work_shows_what_there_is(tmp_path):
  run = write(tmp_path / "run", finished=False)
  for name in ("samples.jsonl", "splits.json"):
    (run / name).unlink()
  lines = (run / "metrics.jsonl").read_text().splitlines()
  for count, said in ((0, "no iteration yet"), (1, "SFT, iteration 1 of 60"), (61, "diffu-GRPO, iteration 1 of 100")):
    (run / "metrics.jsonl").write_text("\n".join(lines[:count]))
    text = writer.drawn(run, None)
    found = Page(text)
    assert found.open == []
    assert said in text
    assert found.data == {"questions": [], "runs": [[]]}
  assert not [a for tag, a, _ in found.elements if a.get("class") == "whisker a"], "the number of questions is unknown"


def test_held_out_losses_are_losses(tmp_path):
  run = write(tmp_path / "run", mode="sft")
  lines = [record("sft", i + 1) for i in range(60)]
  lines = [one | ({"validation": -one["loss"]} if "validation" in one else {}) for one in lines]
  (run / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
  found = page(run)
  assert "Held-out loss" in titles(found)
  assert "Solved, validation questions" not in titles(found)


def test_numbers_that_no_axis_shows_are_left_out(tmp_path):
  run = write(tmp_path / "run")
  with (run / "metrics.jsonl").open("a") as file:
    for i, value in enumerate(("NaN", "Infinity", "-Infinity", "1e308", "9" * 40, "true")):
      figures = ", ".join(f'"{name}": {value}' for name in ("reward", "kl", "elapsed", "validation", "odd"))
      file.write(f'{{"stage": "grpo", "iteration": {101 + i}, {figures}}}\n')
    for iteration in ("9" * 40, "-5"):
      file.write(f'{{"stage": "grpo", "iteration": {iteration}, "reward": 1.0}}\n')
  text = writer.drawn(run, None)
  assert Page(text).open == []
  assert not re.search(r"(points|d|x|y)=\"[^\"]*(nan|inf)", text)


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl", "results.json", "splits.json"])
def test_damaged_files_cost_only_what_they_held(tmp_path, name):
  run = write(tmp_path / "run")
  content = (run / name).read_bytes()
  for how, damage in DAMAGES.items():
    damage(run / name)
    if name == "metrics.jsonl" and how == "a folder":
      with pytest.raises(RunError, match=r"metrics\.jsonl is a folder"):
        writer.drawn(run, None)
    else:
      found = page(run)
      assert found.open == []
      assert name == "metrics.jsonl" or "Reward" in titles(found)
    if (run / name).is_dir():
      shutil.rmtree(run / name)
    (run / name).unlink(missing_ok=True)
    (run / name).write_bytes(content)


def test_samples_of_another_form_are_left_out(tmp_path):
  run = write(tmp_path / "run")
  good = (run / samples.NAME).read_text().splitlines()
  one = json.loads(good[-1])
  sample = one["samples"][0]
  wrong = [
    *(one | {"stage": "x"}, one | {"iteration": "1"}, one | {"solved": 1}, one | {"samples": [3]}, {"a": 1}, [1]),
    *(
      one | {"samples": [sample | change]} for change in ({"steps": [1]}, {"record": 3}, {"reward": "x"}, {"pieces": 1})
    ),
    *(one | {"solved": [float("nan")] * 3},),
  ]
  (run / samples.NAME).write_text("\n".join([*good, *map(json.dumps, wrong), '{"stage": "grp']))
  assert len(samples.read(run)) == len(good)
  # What a kill cut off does not spoil the next line, and the later record of an iteration counts.
  samples.append(run, Validated("grpo", 100, (0.5, 0.4, 0.6), [answer("new", False)]))
  found = samples.read(run)
  assert len(found) == len(good)
  assert found[-1].samples[0].text == "new"


def test_samples_beyond_the_records_are_those_of_an_attempt_that_was_taken_back(tmp_path):
  run = write(tmp_path / "run")
  lines = (run / "metrics.jsonl").read_text().splitlines()
  (run / "metrics.jsonl").write_text("\n".join(lines[: STEPS["sft"] + 50]))
  assert page(run).data["runs"][0][-1]["iteration"] == 40


def test_results_of_a_shorter_run_are_not_those_of_the_longer(tmp_path):
  run = write(tmp_path / "run")
  (run / "config.json").write_text((run / "config.json").read_text().replace('"steps": 100', '"steps": 200'))
  text = writer.drawn(run, None)
  assert "not finished: diffu-GRPO, iteration 100 of 200" in text
  assert "after training" not in text


def test_long_runs_have_small_pages(tmp_path):
  run = write(tmp_path / "run", answers=("word " * 60,) * 4)
  lines = [record("grpo", i + 1) | {"iteration": i + 1, "reward": (i * 7919) % 101} for i in range(3000)]
  lines[1234]["reward"], lines[2345]["reward"] = -500, 700
  (run / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
  said = [answer("word " * 60, False, f"question {number}") for number in range(4)]
  keep(run, [Validated("grpo", i, (i / 9000, 0.0, 1.0), said) for i in range(20, 3001, 20)])
  text = writer.drawn(run, None)
  assert len(text) < 700_000
  found = Page(text)
  points = [a["points"].count(",") for tag, a, _ in found.elements if tag == "polyline"]
  assert max(points) <= 240
  (looks,) = found.data["runs"]
  assert 2 <= len(looks) <= 41
  assert (looks[0]["iteration"], looks[-1]["iteration"]) == (20, 3000)


def test_a_failure_is_one_warning_and_the_run_goes_on(tmp_path, caplog):
  run = write(tmp_path / "run")
  (run / writer.NAME).mkdir()
  drawing = writer.Page(run)
  with caplog.at_level(logging.WARNING):
    for _ in range(3):
      drawing.draw()
  (said,) = [record.getMessage() for record in caplog.records]
  assert f"{run / writer.NAME} is not written (RunError: {run / writer.NAME} is a folder" in said
  assert said.endswith("; the run goes on")
  (run / writer.NAME).rmdir()
  drawing.draw()
  assert Page((run / writer.NAME).read_text(encoding="utf-8")).open == []


def test_the_command_draws_into_a_file_of_its_own(tmp_path, run, capsys):
  before = {path: path.read_bytes() for path in run.iterdir()}
  ask = lambda **fields: command.run(ConfigDict({"workdir": str(run), "compare": None, "output": None} | fields))
  output = tmp_path / "page.html"
  assert ask(output=str(output)) == output
  assert output.read_text(encoding="utf-8") == writer.drawn(run, None)
  assert capsys.readouterr().out == f"{output}\n"
  other = write(tmp_path / "other")
  ask(output=str(output), compare=str(other))
  assert "How the runs differ" in output.read_text(encoding="utf-8")
  for fields, message in (
    ({"workdir": None}, "config.workdir is not set; name the folder of a run"),
    ({}, "config.output is not set; name the page, a new file like report.html"),
    ({"output": "page.txt"}, "config.output=page.txt is no name of a page; name a file that ends in .html"),
    ({"output": str(run / "page.html")}, f"lies in {run}, where a reader writes nothing: name another place"),
    ({"output": str(other / "a.html"), "compare": str(other)}, f"lies in {other}, where a reader writes nothing"),
    ({"output": str(tmp_path / "no" / "page.html")}, "no cannot be written (No such file or directory); name another"),
    ({"workdir": str(tmp_path), "output": "x.html"}, f"{tmp_path} holds no run (there is no config.json)"),
    ({"output": str(output), "compare": str(run)}, f"config.compare={run} is this run itself"),
  ):
    with pytest.raises(RunError, match=re.escape(message)):
      ask(**fields)
  assert {path: path.read_bytes() for path in run.iterdir()} == before


def test_the_canvas_has_the_colours_of_the_chat():
  chat = (Path(serving.__file__).parent / "page.css").read_text(encoding="utf-8")
  shades = lambda text: re.findall(r"--(s\d|mask): (#\w{6});", text)
  assert shades((FILES / "page.css").read_text(encoding="utf-8")) == shades(chat)


CANVAS = "[...document.querySelectorAll('.canvas')].map(c => [...c.children].map(s => s.className))"


@pytest.mark.slow(reason="a browser")
def test_in_a_browser_values_follow_the_pointer_and_samples_the_sliders(tmp_path):
  program = browsers.find()
  if program is None:
    pytest.skip(browsers.MISSING)
  hostile = "<img src=x onerror=alert()>\u202e</script>"
  path = tmp_path / "page.html"
  path.write_text(writer.drawn(write(tmp_path / "run", answers=("15", hostile)), None), encoding="utf-8")
  with browsers.browser(program) as page:
    for dark, width in ((False, 1280), (True, 360)):
      page.look(width, 800, dark=dark)
      page.open(path.as_uri())
      assert page.run("document.documentElement.scrollWidth") == width
      ground = page.run("getComputedStyle(document.body).backgroundColor")
      assert ground == ("rgb(21, 23, 26)" if dark else "rgb(255, 255, 255)")
      assert page.run("getComputedStyle(document.querySelector('.hero .narrow')).display") == (
        "block" if dark else "none"
      )
      assert page.run("document.querySelectorAll('#cards img, #cards script').length") == 0
      assert (
        page.run("document.querySelectorAll('.canvas')[1].textContent")
        == hostile.replace("\u202e", "\ufffd") + "\u220e"
      )
      # The film goes back to its first step, in which the last token is unmasked.
      page.run("step.value = 1; step.dispatchEvent(new Event('input'))")
      assert page.run(CANVAS)[0] == ["masked", "masked", "s0 fresh"]
      page.run("document.querySelector('.marks button').click()")
      assert page.run("document.getElementById('look-said').textContent").startswith("sft 20: 6.7 % of all solved")
      page.run("look.value = 7; look.dispatchEvent(new Event('input')); film.click()")
      page.wait("document.getElementById('film').textContent === 'Play'")
      assert page.run(CANVAS)[0] == ["s9", "s5", "s0"]
      # The values of all charts of a stage at the iteration under the pointer.
      page.run(
        "const c = document.querySelector('figure[data-stage=grpo] .chart'); c.scrollIntoView(); const r ="
        " c.getBoundingClientRect(); c.dispatchEvent(new PointerEvent('pointermove', {clientX: r.left + r.width / 2}))"
      )
      shown = page.run("[...document.querySelectorAll('figure[data-stage=grpo] output')].map(o => o.textContent)")
      assert len(shown) > 8
      assert {text.partition(":")[0] for text in shown} == {shown[0].partition(":")[0]}
      assert re.match(r"iteration \d+: mean [\d.]+$", shown[0])
    assert not page.complaints


def test_smoothing_is_a_running_mean():
  values = np.asarray([1.0, 3.0, 5.0, 7.0])
  np.testing.assert_allclose(curves.smoothed(values, 2), [1.0, 2.0, 4.0, 6.0])
  np.testing.assert_allclose(curves.smoothed(values, 10), [1.0, 2.0, 3.0, 4.0])
