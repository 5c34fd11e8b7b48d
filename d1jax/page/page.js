// Shows values under the pointer, and the samples. These are hostile text: nothing of them is ever parsed, they become
// text nodes.
"use strict";

const SHADES = 10; // colours of page.css
const SVG = "http://www.w3.org/2000/svg";
// Controls, formats (such as right-to-left overrides) and lone surrogates, which a browser would obey or hide; but not
// the two joiners, of which letters and emoji are made.
const HIDDEN = /(?![\n\t\u200c\u200d])[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/gu;
const $ = (id) => document.getElementById(id);

function element(name, parent, text = "", className = "") {
  const node = document.createElement(name);
  node.textContent = text.replace(HIDDEN, "\ufffd");
  if (className) node.className = className;
  parent.append(node);
  return node;
}

function short(number) {
  const size = Math.abs(number);
  if (size >= 1e5 || (size < 1e-3 && size > 0)) return number.toExponential(2);
  return String(Number(number.toPrecision(size >= 1000 ? 5 : 3)));
}

// Curves: the values at the iteration under the pointer, in all charts of its stage.

function scale(text) {
  const [low, high, first, last, logarithmic] = text.split(" ").map(Number);
  const [a, b] = logarithmic ? [Math.log10(low), Math.log10(high)] : [low, high];
  return {
    first, last, high,
    value: (pixel) => {
      const at = a + ((pixel - first) / (last - first)) * (b - a);
      return logarithmic ? 10 ** at : at;
    },
    pixel: (value) => first + ((value - low) / (high - low)) * (last - first), // of iterations, which are linear
  };
}

const lines = new Map(); // of each chart
for (const chart of document.querySelectorAll(".chart")) {
  lines.set(chart, [...chart.querySelectorAll("polyline[data-x]")].map((line) => ({
    name: line.dataset.name,
    x: scale(line.dataset.x),
    y: scale(line.dataset.y),
    points: line.getAttribute("points").split(" ").map((point) => point.split(",").map(Number)),
  })));
}

function clear(chart) {
  chart.querySelector(".cursor").replaceChildren();
  chart.closest("figure").querySelector("output").textContent = "";
}

function shape(name, parent, attributes) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  parent.append(node);
}

/** Shows the values of the lines that are under a place, given in pixels of the chart. */
function point(chart, at) {
  const cursor = chart.querySelector(".cursor");
  cursor.replaceChildren();
  const own = lines.get(chart).filter(({ x, points }) => at >= x.first - 7 && at <= Math.min(x.last, points.at(-1)[0]) + 7);
  if (!own.length) return clear(chart);
  const nearest = (points) => points.reduce((a, b) => (Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a));
  const { x, y } = own[0];
  const place = nearest(own.flatMap((line) => line.points))[0];
  shape("line", cursor, { x1: place, x2: place, y1: y.first, y2: y.last });
  const said = own.map((line) => {
    const [px, py] = nearest(line.points);
    shape("circle", cursor, { cx: px, cy: py, r: 3 });
    return `${line.name} ${short(line.y.value(py))}`;
  });
  chart.closest("figure").querySelector("output").textContent = `iteration ${Math.round(x.value(place))}: ${said.join(", ")}`;
  return undefined;
}

function follow(event) {
  const chart = event.currentTarget;
  const box = chart.getBoundingClientRect();
  const at = ((event.clientX - box.left) / box.width) * chart.viewBox.baseVal.width;
  const { stage } = chart.closest("figure").dataset;
  point(chart, at);
  const line = lines.get(chart)[0];
  if (!stage || !line) return;
  const iteration = line.x.value(at);
  for (const other of document.querySelectorAll(`figure[data-stage="${stage}"] .chart`)) {
    if (other !== chart && lines.get(other).length) point(other, lines.get(other)[0].x.pixel(iteration));
  }
}

for (const chart of lines.keys()) {
  chart.addEventListener("pointermove", follow);
  chart.addEventListener("pointerdown", follow);
  chart.addEventListener("pointerleave", () => { for (const each of lines.keys()) clear(each); });
}

// Samples.

const { questions, runs } = JSON.parse($("data").textContent);
const looks = runs[0];
const letters = runs.length > 1 ? ["A", "B"] : [""];
const order = ["sft", "grpo"];
let films = []; // of the answers that are shown: spans, the step of each, and the number of steps
let playing = null;

/** The validation of the other run at the same place, or the last one before. */
function beside(look) {
  const at = (one) => [order.indexOf(one.stage), one.iteration];
  const [stage, iteration] = at(look);
  return runs[1].filter((one) => at(one)[0] < stage || (at(one)[0] === stage && at(one)[1] <= iteration)).at(-1);
}

function title(look) { return `${look.stage} ${look.iteration}`; }

/** An answer: a line about it, and its canvas. */
function answer(parent, look, number, letter) {
  const head = element("h4", parent);
  if (letter) element("span", head, letter, `run ${letter.toLowerCase()}`).append(" ");
  const sample = look?.samples[number];
  if (!sample) {
    head.append("no answer to this question");
    return;
  }
  element("span", head, sample.solved ? "solved" : "not solved", `outcome ${sample.solved ? "solved" : "wrong"}`);
  head.append(` \u00b7 reward ${short(sample.reward)}${letter ? ` \u00b7 ${title(look)}` : ""}`);
  const canvas = element("p", parent, "", "canvas");
  canvas.dir = "auto";
  if (!sample.pieces.length) {
    canvas.textContent = sample.text.replace(HIDDEN, "\ufffd");
    return;
  }
  const total = Math.max(...sample.steps) + 1;
  if (total > 0) head.append(` \u00b7 ${sample.pieces.length} tokens in ${total} ${total === 1 ? "step" : "steps"}`);
  const spans = sample.pieces.map((piece) => element("span", canvas, piece));
  films.push({ spans, steps: sample.steps, total });
}

function drawFilms() {
  const most = Math.max(0, ...films.map((film) => film.total));
  const step = Math.min(Number($("step").value), most);
  for (const { spans, steps, total } of films) {
    spans.forEach((span, i) => {
      const shade = Math.round((steps[i] / Math.max(total - 1, 1)) * (SHADES - 1));
      const fresh = step < total && steps[i] === step - 1 ? " fresh" : "";
      span.className = steps[i] < 0 ? "" : steps[i] < step ? `s${shade}${fresh}` : "masked";
    });
  }
  $("step-said").textContent = most ? `step ${step} of ${most}` : "not recorded";
}

function drawLook() {
  const place = Number($("look").value);
  const look = looks[place];
  const [value, low, high] = look.solved.map((x) => x.toFixed(1));
  $("look-said").textContent = `${title(look)}: ${value} % of all solved [${low}, ${high}]`;
  films = [];
  document.querySelectorAll("#cards > div").forEach((card, number) => {
    const parent = card.querySelector(".answers");
    parent.replaceChildren();
    answer(parent, look, number, letters[0]);
    if (runs[1]?.length) answer(parent, beside(look), number, letters[1]);
    card.querySelectorAll(".marks button").forEach((mark) => mark.setAttribute("aria-pressed", mark.value === String(place)));
  });
  const most = Math.max(0, ...films.map((film) => film.total));
  const atEnd = Number($("step").value) >= Number($("step").max);
  $("step").max = most;
  if (atEnd) $("step").value = most;
  $("film").disabled = most < 2;
  drawFilms();
}

function stop() {
  clearInterval(playing?.timer);
  if (playing) playing.button.textContent = "Play";
  playing = null;
}

/** Moves a slider from its start to its end. */
function play(button, slider, draw, milliseconds) {
  if (playing?.button === button) return stop();
  stop();
  button.textContent = "Stop";
  slider.value = 0;
  draw();
  const timer = setInterval(() => {
    slider.value = Number(slider.value) + 1;
    draw();
    if (Number(slider.value) >= Number(slider.max)) stop();
  }, milliseconds());
  playing = { button, timer };
  return undefined;
}

function buildCards() {
  questions.forEach((question, number) => {
    const card = element("div", $("cards"), "", "card");
    const list = element("dl", card);
    for (const [name, value] of Object.entries(question)) {
      element("dt", list, name);
      element("dd", list, value).dir = "auto";
    }
    const marks = element("div", card, "", "marks");
    looks.forEach((look, place) => {
      const sample = look.samples[number];
      if (!sample) return;
      const mark = element("button", marks, sample.solved ? "\u25cf" : "\u00d7", sample.solved ? "solved" : "");
      if (place && looks[place - 1].stage !== look.stage) mark.classList.add("first");
      Object.assign(mark, { type: "button", value: place, title: title(look) });
      mark.setAttribute("aria-label", `${title(look)}: ${sample.solved ? "solved" : "not solved"}`);
      mark.addEventListener("click", () => { stop(); $("look").value = place; drawLook(); });
    });
    element("div", card, "", "answers");
  });
}

if (looks.length && questions.length) {
  $("look").max = looks.length - 1;
  $("look").value = looks.length - 1;
  buildCards();
  $("look").addEventListener("input", () => { stop(); drawLook(); });
  $("step").addEventListener("input", () => { stop(); drawFilms(); });
  $("train").addEventListener("click", () => play($("train"), $("look"), drawLook, () => 700));
  $("train").disabled = looks.length < 2;
  $("film").addEventListener("click", () => play($("film"), $("step"), drawFilms, () => Math.max(40, Math.min(500, 4000 / Number($("step").max)))));
  drawLook();
  $("answers").hidden = false;
}
