// A chat with the server that serves this page. What a model writes is hostile text: it only ever becomes text nodes.
"use strict";

const SHADES = 10; // colours of page.css
const AHEAD = 40; // masked tokens that are drawn behind the last one that is unmasked
const KEY = "d1jax api key"; // in sessionStorage, which ends with the tab
// Controls, formats (such as right-to-left overrides) and lone surrogates, which a browser would obey or hide; but not
// the two joiners, of which letters and emoji are made.
const HIDDEN = /(?![\n\t\u200c\u200d])[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/gu;

const $ = (id) => document.getElementById(id);
const settings = $("settings");
let turns = []; // {role, content} of what the model and the user said
let running = null; // the AbortController of the answer that is being written
let served = null; // the model's name

function element(name, parent, text = "", className = "") {
  const node = document.createElement(name);
  node.textContent = text.replace(HIDDEN, "\ufffd");
  if (className) node.className = className;
  parent.append(node);
  return node;
}

/** Changes the conversation; it stays scrolled to its end if that is where the reader is. */
function append(change) {
  const list = $("turns");
  const atEnd = list.scrollHeight - list.scrollTop - list.clientHeight < 80;
  const result = change(list);
  if (atEnd) list.scrollTop = list.scrollHeight;
  return result;
}

/** An answer on the page: its canvas, its figures, and a slider that goes back to any of its steps. */
class Answer {
  constructor() {
    this.node = append((list) => element("li", list, "", "answer"));
    this.node.setAttribute("aria-busy", "true");
    element("span", this.node, "Answer: ", "unseen");
    this.canvas = element("p", this.node);
    this.figures = element("p", this.node, "waiting", "figures");
    this.began = performance.now();
    this.text = "";
    this.first = null; // seconds to the first text that is final
    this.tokens = [];
    this.steps = [];
    this.facts = {};
    this.planned = false; // whether a drawing is planned
  }

  get seconds() { return (performance.now() - this.began) / 1000; }

  /** Takes what a chunk of the stream says. */
  take(chunk) {
    const choice = chunk.choices?.[0];
    const own = chunk.d1jax ?? {};
    if (choice?.delta?.content) {
      this.first ??= this.seconds;
      this.text += choice.delta.content;
    }
    this.reason = choice?.finish_reason ?? this.reason;
    if (Array.isArray(own.tokens)) [this.tokens, this.steps] = [own.tokens, own.steps];
    else Object.assign(this.facts, own);
    if (this.planned) return;
    this.planned = true; // one drawing a frame, however fast the steps are
    requestAnimationFrame(() => {
      this.planned = false;
      if (this.node.hasAttribute("aria-busy")) append(() => this.draw());
    });
  }

  /** The steps that unmasked a token, in order; their places are what is counted and coloured. */
  get order() {
    const known = this.steps.filter((step, i) => this.tokens[i] !== null && step !== null);
    return [...new Set(known)].sort((a, b) => a - b);
  }

  /** Draws the canvas after its first `count` steps; without a canvas, the text. */
  draw(count = Infinity) {
    if (!this.tokens.length) {
      this.canvas.textContent = this.text.replace(HIDDEN, "\ufffd");
    } else {
      const order = this.order;
      const places = new Map(order.map((step, place) => [step, place]));
      const place = (i) => places.get(this.steps[i]) ?? -1; // what was given has no step
      const shown = this.tokens.map((token, i) => token !== null && place(i) < count);
      const last = shown.lastIndexOf(true);
      const drawn = Math.min(this.tokens.length, last + 1 + AHEAD);
      const newest = Math.min(count, order.length) - 1;
      const busy = this.node.hasAttribute("aria-busy") || count < order.length;
      while (this.canvas.children.length > drawn) this.canvas.lastChild.remove();
      while (this.canvas.children.length < drawn) element("span", this.canvas);
      for (let i = 0; i < drawn; i += 1) {
        const node = this.canvas.children[i];
        node.className = "masked";
        if (!shown[i]) {
          node.textContent = "";
          if (i < last) node.className += " active";
          continue;
        }
        const shade = Math.round(place(i) / Math.max(order.length - 1, 1) * (SHADES - 1));
        node.className = place(i) < 0 ? "" : `s${shade}`;
        if (busy && place(i) === newest) node.className += " fresh";
        const text = this.tokens[i].replace(HIDDEN, "\ufffd");
        if (node.textContent !== text) node.textContent = text;
      }
      if (drawn < this.tokens.length) element("span", this.canvas, `and ${this.tokens.length - drawn} more`, "more");
    }
    this.figures.textContent = this.describe();
  }

  describe() {
    const facts = this.facts;
    const steps = facts.steps ?? this.order.length;
    const parts = this.reason && !this.text ? ["an empty answer"] : [];
    if (facts.tokens_per_second !== undefined) parts.push(`${round(facts.tokens_per_second)} tokens a second`);
    else if (this.first !== null) parts.push(`${round(this.tokens.filter((x) => x !== null).length / this.seconds)} tokens a second`);
    if (steps) parts.push(`${steps} ${steps === 1 ? "step" : "steps"}`);
    if (this.first !== null) parts.push(`first block after ${round(this.first)} s`);
    if (facts.queued_seconds > 0.1) parts.push(`${round(facts.queued_seconds)} s in the queue`);
    if (facts.seed !== undefined) parts.push(`seed ${facts.seed}`);
    if (this.reason && this.reason !== "stop") parts.push(this.reason === "length" ? "cut at max tokens" : this.reason);
    return parts.join(" \u00b7 ") || "waiting";
  }

  /** Shows the final text; what was on the canvas and is no part of it goes. */
  finish(reason = this.reason) {
    this.reason = reason;
    this.node.removeAttribute("aria-busy");
    this.tokens = aligned(this.tokens, this.text);
    this.steps = this.steps.slice(0, this.tokens.length);
    append(() => {
      this.draw();
      if (this.order.length > 1) this.offerReplay(this.order.length);
    });
    $("said").textContent = this.text.replace(HIDDEN, "\ufffd");
  }

  offerReplay(steps) {
    const label = element("label", this.node, "", "replay");
    const said = element("span", label, `step ${steps} of ${steps}`);
    const slider = document.createElement("input");
    Object.assign(slider, { type: "range", min: 0, max: steps, value: steps });
    slider.addEventListener("input", () => {
      said.textContent = `step ${slider.value} of ${steps}`;
      this.draw(Number(slider.value));
    });
    label.prepend(slider);
  }
}

/**
 * The part of a text that each token has, up to the end of the text; no tokens if they do not go together.
 *
 * A token by itself may read differently than in its place: half a character, or a space before the first word. Such
 * tokens have what stands before the next one that is found.
 */
function aligned(tokens, text) {
  const parts = [];
  let at = 0;
  while (at < text.length && parts.length < tokens.length) {
    const token = tokens[parts.length];
    if (token === null) return [];
    let end = at + token.length;
    if (!text.startsWith(token, at) && !token.startsWith(text.slice(at))) {
      let next = parts.length + 1;
      while (next < tokens.length && !/^[^\ufffd]+$/.test(tokens[next] ?? "")) next += 1;
      end = next < tokens.length ? text.indexOf(tokens[next], at) : text.length;
      if (end < 0) return [];
      while (parts.length < next - 1) parts.push("");
    }
    parts.push(text.slice(at, end));
    at = end;
  }
  return at < text.length ? [] : parts;
}

function round(number) {
  return number >= 10 ? Math.round(number).toString() : Number(number.toPrecision(2)).toString();
}

/** The events of a stream of server-sent events. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (pending + value).split(/\r?\n\r?\n/);
    pending = parts.pop();
    for (const part of parts) {
      const data = part.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trimStart());
      if (data.length) yield data.join("\n");
    }
  }
}

function headers() {
  const key = $("key").value.trim();
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

/** Asks for a key where the server wants one, and raises what the server says. */
async function checked(response) {
  if (response.ok) return response;
  if (response.status === 401) {
    $("panel").open = true;
    $("keyed").hidden = false;
    $("key").focus();
  }
  const text = await response.text();
  let said = "";
  try { said = JSON.parse(text).error.message; } catch { /* not the server's JSON: some proxy's page */ }
  throw new Error(said || `The server answered with status ${response.status}.`);
}

function request(content) {
  const fields = [...new FormData(settings)].filter(([, value]) => value !== "");
  const chosen = Object.fromEntries(fields.map(([name, value]) => [name, name === "schedule" ? value : Number(value)]));
  const earlier = $("remember").checked ? turns : [];
  const messages = [...earlier, { role: "user", content }];
  return { ...(served && { model: served }), messages, stream: true, ...chosen, d1jax: { canvas: true } };
}

/** Reads an answer to its end. */
async function read(answer, content) {
  const response = await checked(await fetch("v1/chat/completions", {
    method: "POST", headers: headers(), body: JSON.stringify(request(content)), signal: running.signal,
  }));
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Error(chunk.error.message || "The server failed.");
    answer.take(chunk);
  }
  if (!answer.reason) throw new Error("The connection ended before the answer did.");
}

async function send(content) {
  fail("");
  running = new AbortController();
  const asked = append((list) => element("li", list, "", "user"));
  element("span", asked, "You: ", "unseen");
  element("p", asked, content);
  const answer = new Answer();
  $("turns").scrollTop = $("turns").scrollHeight;
  busy(true);
  let failure = null;
  try {
    await read(answer, content);
  } catch (error) {
    failure = error;
  }
  const stopped = running.signal.aborted;
  running = null;
  busy(false);
  if (!asked.isConnected) return; // the chat was cleared
  if (answer.text || !failure) {
    answer.finish(stopped ? "stopped" : failure ? "incomplete" : undefined);
    if (answer.text) turns.push({ role: "user", content }, { role: "assistant", content: answer.text });
  } else { // nothing was said: the message goes back to where it can be sent again
    asked.remove();
    answer.node.remove();
    if (!$("text").value) $("text").value = content;
    fit();
  }
  if (failure && !stopped) fail(failure instanceof TypeError ? "The server cannot be reached. Is it still running?" : failure.message);
}

function fail(message) {
  $("error").textContent = message.replace(HIDDEN, "\ufffd");
  $("error").hidden = !message;
}

function busy(on) {
  $("send").hidden = on;
  $("stop").hidden = !on;
}

/** Makes the field for messages as high as its text. */
function fit() {
  const field = $("text");
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + 2}px`;
}

function stop() { running?.abort(); }

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const content = $("text").value;
  if (running || !content.trim()) return;
  if (!settings.checkValidity()) {
    $("panel").open = true;
    settings.reportValidity();
    return;
  }
  $("text").value = "";
  fit();
  send(content);
});
$("text").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("ask").requestSubmit();
});
$("text").addEventListener("input", fit);
$("stop").addEventListener("click", () => { stop(); $("text").focus(); });
document.addEventListener("keydown", (event) => { if (event.key === "Escape") stop(); });
$("clear").addEventListener("click", () => {
  stop();
  turns = [];
  $("turns").replaceChildren();
  $("said").textContent = "";
  fail("");
  $("text").focus();
});
settings.addEventListener("submit", (event) => event.preventDefault());
$("key").addEventListener("change", () => { sessionStorage.setItem(KEY, $("key").value.trim()); greet(); });
$("colored").addEventListener("change", () => $("turns").classList.toggle("colored", $("colored").checked));

/** Shows the server's default values where nothing is chosen. */
function suggest(defaults) {
  for (const field of settings.querySelectorAll("[name]")) {
    const value = defaults[field.name];
    if (value === undefined || value === null) continue;
    if (field.tagName === "SELECT") field.options[0].textContent = String(value);
    else field.placeholder = String(value);
  }
}

/** Asks which model is served, and with which defaults. */
async function greet() {
  try {
    const models = await (await checked(await fetch("v1/models", { headers: headers() }))).json();
    served = models.data[0].id;
    suggest(models.data[0].d1jax?.defaults ?? {});
    if (models.data[0].d1jax?.turns === false) $("remember").checked = false; // it could not tell them apart
    $("model").textContent = served.replace(HIDDEN, "\ufffd");
    fail("");
  } catch (error) {
    fail(error instanceof TypeError ? "The server cannot be reached. Is it still running?" : error.message);
  }
}

$("turns").classList.toggle("colored", $("colored").checked);
$("key").value = sessionStorage.getItem(KEY) ?? "";
$("keyed").hidden = !$("key").value;
if (matchMedia("(max-width: 46rem)").matches) $("panel").open = false;
else $("text").focus(); // on a phone it would call up the keyboard
greet();
