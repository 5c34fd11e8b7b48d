// Browses the completions of the page. They are hostile text: nothing of them is ever parsed, they become text nodes.
"use strict";

const PAGE = 50;
const MARKER = String.raw`<\/?(?:reasoning|answer)>|<\|\w{1,40}\|>|\\boxed\b`;
// Controls, formats (such as right-to-left overrides) and lone surrogates, which a browser would obey or hide.
const HIDDEN = String.raw`(?![\n\t])[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]`;
const SPECIAL = new RegExp(`(?<marker>${MARKER})|${HIDDEN}`, "gu");

const { arms, records, items } = JSON.parse(document.getElementById("data").textContent);
const form = document.getElementById("filter");
const FILTERS = ["task", "length", "temperature", "verdict"];
// By name, not by index: a form's own `length` is its number of fields.
const field = (name) => form.elements.namedItem(name);
const severalDraws = items.some(({ place }) => place[1] !== items[0].place[1] || place[2] !== items[0].place[2]);
let page = 0;

function element(name, parent, text = "", className = "") {
  const node = document.createElement(name);
  node.textContent = text;
  if (className) node.className = className;
  parent.append(node);
  return node;
}

/** Appends text with its markers set off and its hidden characters shown by their numbers. */
function show(parent, text) {
  let end = 0;
  for (const match of text.matchAll(SPECIAL)) {
    parent.append(text.slice(end, match.index));
    const code = match[0].codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
    if (match.groups.marker) element("mark", parent, match[0]);
    else element("span", parent, `U+${code}`, "hidden");
    end = match.index + match[0].length;
  }
  parent.append(text.slice(end));
}

function pair(list, name, text, tag = "span") {
  show(element("dt", list), name);
  show(element(tag, element("dd", list)), text);
}

function card(item) {
  const arm = arms[item.arm];
  const [index, seed, sample] = item.place;
  const details = document.createElement("details");
  details.className = "item";
  const summary = element("summary", details);
  element("span", summary, item.verdict, `outcome ${item.verdict.replace(" ", "-")}`);
  const where = [arm.task, arm.length && `length ${arm.length}`, `temp. ${arm.temperature}`, `#${index}`];
  if (severalDraws) where.push(`seed ${seed}`, `sample ${sample}`);
  element("span", summary, where.filter(Boolean).join(" \u00b7 "), "where");
  const asked = Object.values(records[item.question])[0] ?? "";
  show(element("span", summary, "", "asked"), asked.slice(0, 200));
  if (item.answer !== null) show(element("span", summary, "", "answer"), item.answer);
  const list = element("dl", details);
  for (const [name, value] of Object.entries(records[item.question])) if (value) pair(list, name, value);
  pair(list, "answer read", item.answer === null ? "none" : item.answer);
  pair(list, "grade", `reward ${item.reward}; ${item.metrics}`);
  if (item.tokens !== null) pair(list, "effective tokens", String(item.tokens));
  pair(list, "completion", item.text, "pre");
  return details;
}

function matches(item, wanted, query) {
  const values = { ...arms[item.arm], verdict: item.verdict };
  if (FILTERS.some((name) => wanted[name] && wanted[name] !== values[name])) return false;
  const texts = [item.text, item.answer ?? "", ...Object.values(records[item.question])];
  return !query || texts.some((text) => text.toLowerCase().includes(query));
}

function update() {
  const wanted = Object.fromEntries(new FormData(form));
  const found = items.filter((item) => matches(item, wanted, wanted.q.toLowerCase()));
  const pages = Math.max(1, Math.ceil(found.length / PAGE));
  page = Math.min(page, pages - 1);
  const first = page * PAGE;
  const last = Math.min(found.length, first + PAGE);
  document.getElementById("items").replaceChildren(...found.slice(first, last).map(card));
  document.getElementById("count").textContent = found.length ? `${first + 1} to ${last} of ${found.length}` : "none";
  document.getElementById("previous").disabled = page === 0;
  document.getElementById("next").disabled = page === pages - 1;
  const kept = Object.entries({ ...wanted, page: page ? String(page + 1) : "" }).filter(([, value]) => value);
  history.replaceState(null, "", `#${new URLSearchParams(kept)}`);
}

function turn(by) {
  page += by;
  update();
  document.getElementById("completions").scrollIntoView();
}

/** Sets the filters from the address, so that what is shown can be linked to. */
function restore() {
  const wanted = new URLSearchParams(location.hash.slice(1));
  for (const name of [...FILTERS, "q"]) field(name).value = wanted.get(name) ?? "";
  page = Math.max(0, (parseInt(wanted.get("page"), 10) || 1) - 1);
  update();
}

for (const name of FILTERS) {
  const select = field(name);
  const values = new Set(items.map((item) => (name === "verdict" ? item.verdict : arms[item.arm][name])));
  element("option", select, "all").value = "";
  for (const value of values) element("option", select, value || "not known").value = value;
  select.parentElement.hidden = values.size < 2;
}
form.addEventListener("input", () => { page = 0; update(); });
form.addEventListener("submit", (event) => event.preventDefault());
document.getElementById("previous").addEventListener("click", () => turn(-1));
document.getElementById("next").addEventListener("click", () => turn(1));
window.addEventListener("hashchange", restore);
restore();
