// A text's tokens and their features. Nothing of what was typed leaves this page but in the body of POST /encode; the
// link to what is shown has it behind the #.
import { call, json } from "./call.js";
import { drawList, drawToken, drawTokens } from "./text_draw.js";
import { Facts } from "./text_features.js";
import * as links from "./text_link.js";
import { drawNested, markToken } from "./text_nested.js";
import { element, make, mean, number } from "./words.js";

const ask = element("ask"), slider = element("prefix"), tokens = element("tokens"), { model, layer, link } = ask.dataset;
const prefixes = ask.dataset.prefixes.split(",").map(Number), facts = new Facts([["model", model], ["layer", layer]]);
const tell = (text) => { element("status").textContent = text; };

let text = "";            // what the shown answers are about
let answers = null;       // one for each nested dictionary
let token = null, feature = null, looked = null;  // what is chosen, and the token whose features are shown
let all = false, pages = 1;  // of the list, and of the nested dictionaries' rows
let asking = new AbortController(), reading = new AbortController();

const view = () => ({ answer: answers[slider.value], facts, token, feature, link, withDense: element("dense").checked, all });

function say(problem) {
  element("problem").hidden = !problem;
  element("problem").textContent = problem ?? "";
}

async function encode(prefix, typed, signal) {
  const body = { inputs: typed, model, layer: Number(layer), prefix, return: "csr", include: ["l0", "relative_error"], truncate: true };
  const options = json(body);
  options.headers.Accept = "application/json";
  return (await (await call("/encode", options, signal, tell)).json()).results[0];
}

// Encodes a text with every nested dictionary at once. Whether it is what is shown now: not if it was refused, or another
// one was asked for meanwhile.
async function read(typed) {
  asking.abort();
  asking = new AbortController();
  const mine = asking;
  tell("Encoding …");
  try {
    const found = await Promise.all(prefixes.map((prefix) => encode(prefix, typed, mine.signal)));
    await facts.learn([...new Set(found.flatMap((answer) => answer.csr.indices))], mine.signal, tell);
    if (mine !== asking) return false;
    [text, answers, all, pages] = [typed, found, false, 1];
    return true;
  } catch (error) {
    if (mine === asking && error.name !== "AbortError") say(error.message);
    return false;
  } finally {
    if (mine === asking) tell("");
  }
}

function draw() {
  const { answer } = view();
  element("result").hidden = element("copy").hidden = false;
  element("count").textContent = number(answer.tokens.length);
  element("cut").textContent = answer.truncated ? "the rest was left out" : "";
  element("l0").textContent = number(mean(answer.l0.filter((_, t) => !answer.is_special[t])));
  element("relative_error").textContent = number(mean(answer.relative_error));
  if (token >= answer.tokens.length) token = null;
  looked = token;
  drawChoice();
}

const drawPrefixes = () => drawNested(view(), prefixes, answers, pages);

// What depends on the token and the feature that are chosen.
function drawChoice() {
  drawTokens(view());
  drawList(view());
  drawToken(view(), looked);
}

const here = () => links.write({ text, prefix: prefixes[slider.value], token, feature });

function remember() {
  const fragment = here();
  if (fragment !== location.hash) history.pushState(null, "", location.pathname + location.search + fragment);
}

// A token's features, of the one under the pointer or with the focus.
function look(t) {
  if (looked === t) return;
  looked = t;
  drawToken(view(), t);
}

function choose(t) {
  token = token === t ? null : t;
  looked = t;
  drawTokens(view());
  drawToken(view(), t);
  markToken(token);
  remember();
}

function pick(chosen) {
  feature = chosen;
  const kept = document.activeElement?.closest("#list, #of-token, #nested-table")?.id;
  drawChoice();
  if (kept) element(kept).querySelector(`a[data-feature="${chosen}"]`)?.focus({ preventScroll: true });
  remember();
  readFeature();
}

// The feature's own page has all that is known of it.
async function readFeature() {
  reading.abort();
  reading = new AbortController();
  const mine = reading, place = element("feature"), address = `/ui/feature/${feature}${link}`;
  if (feature === null) return place.replaceChildren(make("p", "Choose a token, or a feature, to see what it stands for.", { class: "remark" }));
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
    if (mine === reading) place.replaceChildren(make("p", `Feature ${feature} could not be read: ${error.message}`));
  }
}

function sizeOf() {
  const size = number(prefixes[slider.value]);
  element("size").textContent = size;
  slider.setAttribute("aria-valuetext", `${size} features`);
}

// What the address says, when the page is opened and when its user goes back.
async function restore() {
  const wanted = links.read(location.hash, prefixes, Number(ask.dataset.features));
  if (wanted === null || (answers && location.hash === here())) return;
  if (wanted.text === null) {
    asking.abort();
    [text, answers, token, feature] = ["", null, null, null];
    element("result").hidden = element("copy").hidden = true;
    readFeature();
    return say(wanted.problem);
  }
  element("text").value = wanted.text;
  slider.value = prefixes.indexOf(wanted.prefix ?? prefixes.at(-1));
  sizeOf();
  const other = wanted.text !== text;
  if (other && !(await read(wanted.text))) return;
  const turned = wanted.feature !== feature, count = answers[0].tokens.length;
  ({ token, feature } = wanted);
  say(token >= count ? `Of this link, token must be below ${count}, the number of tokens, and is ${token}.` : wanted.problem);
  draw();
  if (other) drawPrefixes();
  else markToken(token);
  if (turned) readFeature();
}

ask.addEventListener("submit", async (event) => {
  event.preventDefault();
  const typed = element("text").value;
  say(typed ? null : "There is no text.");
  if (!typed) return;
  if (typed !== text) {
    if (!(await read(typed))) return;
    token = null;
    drawPrefixes();
  }
  draw();
  remember();
});
element("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) ask.requestSubmit();
});
slider.addEventListener("input", () => {
  sizeOf();
  if (!answers) return;
  draw();
  remember();
});
sizeOf();  // browsers keep a slider's place when they load a page again

const tokenAt = (event) => event.target.closest("[data-token]")?.dataset.token;
tokens.addEventListener("click", (event) => { if (tokenAt(event)) choose(Number(tokenAt(event))); });
for (const kind of ["pointerover", "focusin"]) tokens.addEventListener(kind, (event) => { if (tokenAt(event)) look(Number(tokenAt(event))); });
tokens.addEventListener("pointerleave", () => { if (token !== null) look(token); });
tokens.addEventListener("keydown", (event) => {
  const every = [...tokens.querySelectorAll("button")], now = every.indexOf(document.activeElement);
  const next = { ArrowRight: now + 1, ArrowLeft: now - 1, Home: 0, End: every.length - 1 }[event.key];
  if (next === undefined || !every[next]) return;
  event.preventDefault();
  every[now].tabIndex = -1;
  every[next].tabIndex = 0;
  every[next].focus();
});
for (const place of ["list", "of-token", "nested-table"]) {
  element(place).addEventListener("click", (event) => {
    const chosen = event.target.closest("a[data-feature]")?.dataset.feature;
    if (!chosen || event.ctrlKey || event.metaKey || event.shiftKey) return;  // these open its own page elsewhere
    event.preventDefault();
    pick(Number(chosen));
  });
}
element("clear").addEventListener("click", () => {
  feature = null;
  drawChoice();
  remember();
  readFeature();
});
element("dense").addEventListener("change", () => drawList(view()));
element("all").addEventListener("click", () => {
  all = true;
  drawList(view());
  element("list").focus();
});
element("nested-more").addEventListener("click", () => {
  pages++;
  drawPrefixes();
  element("nested-table").focus();
});
element("copy").addEventListener("click", async () => {
  tell(links.tooLong(text) ?? await links.copy(location.origin + "/ui" + link + here(), element("link")));
});
// Another layer is another page: what was typed waits in this tab, and is shown there at once.
document.querySelector(".layers")?.addEventListener("submit", () => sessionStorage.setItem("text", element("text").value));
const waiting = sessionStorage.getItem("text");
sessionStorage.removeItem("text");
addEventListener("hashchange", restore);
if (waiting) {
  element("text").value = waiting;
  ask.requestSubmit();
} else if (location.hash) restore();
element("go").disabled = false;  // before this script has run, the form would only load the page again
