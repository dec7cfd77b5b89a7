// A text's tokens and their features. Nothing of what was typed leaves this page but in the body of POST /encode.
import { call } from "./call.js";

const element = (id) => document.getElementById(id);
const ask = element("ask"), slider = element("prefix"), tokens = element("tokens");
const prefixes = ask.dataset.prefixes.split(",").map(Number);
const own = [["model", ask.dataset.model], ["layer", ask.dataset.layer]];  // what every answer is to come from
const LISTED = 50, STRENGTHS = 5;
const tell = (text) => { element("status").textContent = text; };

let text = "";         // what the shown answers are about
let answers = new Map();  // by nested dictionary
let names = new Map();    // labels of features, null of those without
let massive = new Set(), massiveKnown = false;  // features of massive tokens, once they are known
let shown = null;      // the answer that is shown
let token = null, feature = null;  // what is chosen
let asking = new AbortController(), reading = new AbortController();

function make(tag, content, attributes = {}) {
  const made = document.createElement(tag);
  made.append(...[content].flat());
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

// As mtc.report.format.visible: no character may hide or reorder what follows.
function visible(string) {
  const signs = { "\n": "⏎", "\r": "␍", "\t": "⇥" };
  return string.replace(/[\p{C}\p{Zl}\p{Zp}]/gu, (c) => signs[c] ?? "U+" + c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0"));
}
const spaced = (string) => (string ? visible(string).replaceAll(" ", "␣") : "⋯");  // within a character of several tokens
const number = (value) => (value === null ? "undefined" : value.toLocaleString("en", Number.isInteger(value) ? {} : { maximumSignificantDigits: 4 }));
const mean = (values) => { const known = values.filter((v) => v !== null); return known.length ? known.reduce((a, b) => a + b, 0) / known.length : null; };

function say(problem) {
  element("problem").hidden = !problem;
  element("problem").textContent = problem ?? "";
}

async function encode(prefix) {
  const known = answers;  // of this text; another one gets another map
  if (known.has(prefix)) return known.get(prefix);
  const body = { inputs: text, model: ask.dataset.model, layer: Number(ask.dataset.layer), prefix, return: "csr", include: ["l0", "relative_error"], truncate: true };
  const options = { method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json", Accept: "application/json" } };
  const answer = await (await call("/encode", options, asking.signal, tell)).json();
  known.set(prefix, answer.results[0]);
  return answer.results[0];
}

async function show() {
  asking.abort();
  asking = new AbortController();
  const mine = asking, prefix = prefixes[slider.value];
  say(null);
  element("status").textContent = "Encoding …";
  try {
    const answer = await encode(prefix);
    await learnMassive(mine.signal);
    await learn(strongest(answer).slice(0, LISTED).map((row) => row.feature), mine.signal);
    if (mine !== asking) return;
    shown = answer;
    draw();
    element("status").textContent = "";
  } catch (error) {
    if (mine !== asking || error.name === "AbortError") return;
    element("status").textContent = "";
    say(error.message);
  }
}

// Strongest first; features of massive tokens, whose activations say nothing beside others', come last.
const byStrength = (a, b) => massive.has(a.feature) - massive.has(b.feature) || b.value - a.value || a.feature - b.feature;

// Features of the text.
function strongest(answer) {
  const found = new Map();
  const { indptr, indices, values } = answer.csr;
  for (let t = 0; t + 1 < indptr.length; t++) {
    for (let i = indptr[t]; i < indptr[t + 1]; i++) {
      const row = found.get(indices[i]) ?? { feature: indices[i], value: 0, tokens: 0 };
      row.tokens++;
      row.value = Math.max(row.value, values[i]);
      found.set(indices[i], row);
    }
  }
  return [...found.values()].sort(byStrength);
}

// Labels of features that were not asked for before; a run without an analysis has none.
async function learn(features, signal) {
  const missing = features.filter((f) => !names.has(f)).slice(0, 500);
  if (!missing.length) return;
  const wanted = new URLSearchParams([...own, ["limit", missing.length], ...missing.map((f) => ["feature", f])]);
  try {
    const answer = await (await call("/features?" + wanted, {}, signal, tell)).json();
    for (const row of answer.features) names.set(row.feature, row.label);
  } catch (error) {
    if (error.name === "AbortError") throw error;
  }
  for (const f of missing) if (!names.has(f)) names.set(f, null);
}

// Which features are of massive tokens; of a run without an analysis nobody knows.
async function learnMassive(signal) {
  if (massiveKnown) return;
  const found = new Set();
  try {
    for (let cursor = ""; cursor !== null;) {
      const wanted = new URLSearchParams([...own, ["massive", true], ["limit", 500], ...(cursor ? [["cursor", cursor]] : [])]);
      const answer = await (await call("/features?" + wanted, {}, signal, tell)).json();
      for (const row of answer.features) found.add(row.feature);
      cursor = answer.cursor;
    }
    [massive, massiveKnown] = [found, true];
  } catch (error) {
    if (error.name === "AbortError") throw error;  // else it is asked again with the next text
  }
}

function entries(t) {
  const { indptr, indices, values } = shown.csr;
  const found = [];
  for (let i = indptr[t]; i < indptr[t + 1]; i++) found.push({ feature: indices[i], value: values[i] });
  return found.sort(byStrength);
}

function draw() {
  const count = shown.tokens.length;
  element("result").hidden = false;
  element("count").textContent = number(count);
  element("cut").textContent = shown.truncated ? "the rest was left out" : "";
  element("l0").textContent = number(mean(shown.l0.filter((_, t) => !shown.is_special[t])));
  element("relative_error").textContent = number(mean(shown.relative_error));
  if (token !== null && token >= count) token = null;
  drawTokens();
  drawList();
  drawToken();
}

function drawTokens() {
  const focused = tokens.contains(document.activeElement);
  const tops = shown.tokens.map((_, t) => {
    const own = entries(t);
    return feature === null ? own[0]?.value ?? 0 : own.find((e) => e.feature === feature)?.value ?? 0;
  });
  const order = tops.filter((v) => v > 0).sort((a, b) => a - b);
  const step = (value) => {
    const share = feature === null ? (order.lastIndexOf(value) + 1) / order.length : value / order.at(-1);
    return Math.min(STRENGTHS, Math.max(1, Math.ceil(STRENGTHS * share)));
  };
  tokens.replaceChildren();
  shown.tokens.forEach((string, t) => {
    const special = shown.is_special[t];
    const label = special ? string : string.trim() ? visible(string) : spaced(string);
    const button = make("button", label, { type: "button", "aria-pressed": t === token, tabindex: t === (token ?? 0) ? 0 : -1 });
    button.className = special ? "special" : tops[t] > 0 ? "a" + step(tops[t]) : "none";
    button.title = special ? "special token: no features" : tops[t] > 0 ? `activation ${number(tops[t])}` : "not active";
    button.addEventListener("click", () => choose(t));
    tokens.append(button);
    if (string.includes("\n")) tokens.append(make("br", []));
  });
  if (focused) tokens.querySelectorAll("button")[token ?? 0].focus();
  element("clear").hidden = feature === null;
  element("legend").textContent = feature === null
    ? "Coloured by each token's strongest feature, in fifths of this text's tokens: the darker, the stronger."
    : `Coloured by feature ${feature}: the darker, the stronger; at most ${number(order.at(-1) ?? 0)}.`;
}

function table(caption, rows, headers, cells) {
  const head = make("thead", make("tr", headers.map((h, i) => (h ? make("th", h, { scope: "col", class: i > 1 ? "n" : "" }) : make("td", [])))));
  const body = make("tbody", rows.map((row) => {
    const button = make("button", String(row.feature), { type: "button" });
    button.addEventListener("click", () => pick(row.feature));
    const label = names.get(row.feature) ?? null, named = label === null ? [] : [make("span", visible(label), { class: "label" })];
    if (massive.has(row.feature)) named.unshift(make("span", "massive", { class: "badge", title: "most of its activation falls on massive tokens" }), " ");
    const line = make("tr", [make("th", button, { scope: "row" }), make("td", named), ...cells(row).map((c) => make("td", c, { class: "n" }))]);
    if (row.feature === feature) line.setAttribute("aria-current", "true");
    return line;
  }));
  return make("table", [make("caption", caption), head, body], { class: "choice" });
}

// Not the first row's: features of massive tokens come last, however strong.
const largest = (rows) => Math.max(...rows.map((row) => row.value));

function bar(value, most) {
  return make("meter", [], { min: 0, max: most, value, "aria-hidden": "true" });
}

function drawList() {
  const rows = strongest(shown), listed = rows.slice(0, LISTED);
  const caption = rows.length > LISTED ? `The strongest ${LISTED} of ${number(rows.length)} features` : `${number(rows.length)} features`;
  const last = listed.some((row) => massive.has(row.feature)) ? "; those of massive tokens come last" : "";
  element("list").replaceChildren(table(caption + last, listed, ["Feature", "Label", "", "Strongest", "Tokens"], (row) => [bar(row.value, largest(listed)), number(row.value), number(row.tokens)]));
}

function drawToken() {
  const place = element("of-token");
  if (token === null) return place.replaceChildren();
  const own = entries(token), caption = `Token ${token}, ${spaced(shown.tokens[token])}: ${number(own.length)} features`;
  place.replaceChildren(own.length ? table(caption, own, ["Feature", "Label", "", "Activation"], (row) => [bar(row.value, largest(own)), number(row.value)]) : make("p", caption));
}

async function choose(t) {
  token = token === t ? null : t;
  drawTokens();
  if (token !== null) {
    try {
      await learn(entries(t).map((e) => e.feature), asking.signal);
    } catch { return; }  // another text was asked for meanwhile
  }
  drawToken();
}

// The feature's own page has all that is known of it.
async function pick(chosen) {
  feature = chosen;
  reading.abort();
  reading = new AbortController();
  const mine = reading, place = element("feature"), address = `/ui/feature/${chosen}${ask.dataset.link}`;
  const kept = document.activeElement?.closest("#list, #of-token")?.id;
  drawTokens();
  drawList();
  drawToken();
  if (kept) element(kept).querySelector("[aria-current] button")?.focus();
  try {
    const response = await fetch(address, { headers: { Accept: "text/html" }, signal: mine.signal });
    const page = new DOMParser().parseFromString(await response.text(), "text/html");
    const article = page.querySelector("article") ?? make("article", [...page.querySelector("main").childNodes]);
    const title = article.querySelector("h1");
    title?.replaceWith(make("h2", [...title.childNodes]));  // this page has a title of its own
    article.querySelector(".own")?.replaceChildren(make("a", "Its own page", { href: address }));
    if (mine !== reading) return;
    place.replaceChildren(article);
    if (matchMedia("(max-width: 60rem)").matches) place.scrollIntoView();  // else it is beside the text
  } catch (error) {
    if (mine === reading) place.replaceChildren(make("p", `Feature ${chosen} could not be read: ${error.message}`));
  }
}

ask.addEventListener("submit", (event) => {
  event.preventDefault();
  const typed = element("text").value;
  if (!typed) return say("There is no text.");
  if (typed !== text) {
    text = typed;
    answers = new Map();
    token = null;
  }
  show();
});
element("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) ask.requestSubmit();
});
slider.addEventListener("input", () => {
  const size = number(prefixes[slider.value]);
  element("size").textContent = size;
  slider.setAttribute("aria-valuetext", `${size} features`);
  if (text) show();
});
slider.dispatchEvent(new Event("input"));  // browsers keep a slider's place when they load a page again
tokens.addEventListener("keydown", (event) => {
  const all = [...tokens.querySelectorAll("button")], now = all.indexOf(document.activeElement);
  const next = { ArrowRight: now + 1, ArrowLeft: now - 1, Home: 0, End: all.length - 1 }[event.key];
  if (next === undefined || !all[next]) return;
  event.preventDefault();
  all[now].tabIndex = -1;
  all[next].tabIndex = 0;
  all[next].focus();
});
element("clear").addEventListener("click", () => {
  feature = null;
  element("feature").replaceChildren(make("p", "Choose a token, or a feature, to see what it stands for.", { class: "remark" }));
  drawTokens();
  drawList();
  drawToken();
});
// Another layer is another page: what was typed waits in this tab, and is shown there at once.
document.querySelector(".layers")?.addEventListener("submit", () => sessionStorage.setItem("text", element("text").value));
const waiting = sessionStorage.getItem("text");
sessionStorage.removeItem("text");
if (waiting) {
  element("text").value = waiting;
  ask.requestSubmit();
}
element("go").disabled = false;  // before this script has run, the form would only load the page again
