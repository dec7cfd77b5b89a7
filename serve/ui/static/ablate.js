// A feature taken out of one of its contexts: what the language model's predictions lose.
import { call, json } from "./call.js";
import { make, number, spaced, visible } from "./words.js";

const STEPS = 5;  // of shading
let last = 0;

for (const place of document.querySelectorAll(".to-ablate")) {
  const items = place.previousElementSibling.children;
  JSON.parse(place.dataset.texts).forEach((text, i) => offer(items[i], text, place.dataset));
}

function offer(item, text, { model, layer, feature }) {
  const button = make("button", "Ablate here", { type: "button", class: "take-out" });
  const told = make("p", "", { role: "status" }), shown = make("div", "", { class: "taken-out", hidden: "" });
  item.append(" ", button, shown);
  shown.append(told);
  button.addEventListener("click", async () => {
    const tell = (words) => { told.textContent = words; };
    shown.hidden = false;
    shown.replaceChildren(told);
    tell("The language model runs with the feature and without …");
    button.disabled = true;
    try {
      const body = { input_ids: text.ids, model, layer: Number(layer), features: [Number(feature)] };
      draw(await (await call("/ablate", json(body), undefined, tell)).json(), text, told, shown);
    } catch (error) {
      tell(error.message);
    }
    button.disabled = false;
    button.focus();
  });
}

function draw(found, text, told, shown) {
  const now = found.activations[0][text.peak], stored = number(text.activation);
  const alone = text.cut ? "Run on the stored context alone, where the analysed window began earlier" : "Run on the stored context";
  const fires = `the activation at the peak is ${number(now)}, stored is ${stored}`;
  if (found.first === null) {
    told.textContent = `${alone}: the feature does not fire here (stored is ${stored}), so nothing changes.`;
    return;
  }
  const at = found.position, from = found.loss_before.slice(found.first), to = found.loss_after.slice(found.first);
  const losses = from.length ? ` Mean loss of the tokens from there on: ${number(mean(from))} nats with it, ${number(mean(to))} without.` : "";
  told.textContent = `${alone}: ${fires}. Without the feature the prediction changes most behind “${spaced(found.tokens[at])}”, by ${number(found.kl[at])} nats (KL).${losses}`;
  const most = found.kl[at];
  const tokens = found.tokens.map((token, t) => {
    const step = found.kl[t] > 0 ? Math.max(1, Math.ceil(STEPS * found.kl[t] / most)) : 0;
    const attributes = { title: `KL ${number(found.kl[t])} nats`, ...(step && { class: "a" + step }) };
    return make(t === at ? "mark" : "span", token.trim() ? visible(token) : spaced(token), attributes);
  });
  shown.append(make("p", make("bdi", tokens), { class: "tokens" }), next(found), every(found));
}

const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
const probability = (log) => number(100 * Math.exp(log)) + " %";

// A table that can be scrolled from the keyboard.
function table(caption, heads, rows) {
  const cells = (row) => row.map((cell, i) => (i ? make("td", cell, { class: "n" }) : make("th", make("span", cell, { class: "token" }), { scope: "row" })));
  const head = heads.map((name, i) => make("th", name, { scope: "col", ...(i && { class: "n" }) }));
  const made = make("table", [make("caption", caption), make("thead", make("tr", head)), make("tbody", rows.map((row) => make("tr", cells(row))))]);
  return make("div", made, { class: "scroll", role: "region", "aria-label": `${caption} (${++last})`, tabindex: "0" });
}

function next({ up, down, tokens, position }) {
  const part = (words, entries) => table(`${words} behind “${spaced(tokens[position])}”`, ["Next token", "With", "Without"],
    entries.map((each) => [spaced(each.text), probability(each.plain), probability(each.steered)]));
  return make("div", [part("Less probable", down), part("More probable", up)], { class: "effects" });
}

function every(found) {
  const loss = (losses, t) => (t < losses.length ? number(losses[t]) : "–");
  const rows = found.tokens.map((token, t) => [spaced(token), number(found.activations[0][t]), number(found.kl[t]),
    loss(found.loss_before, t), loss(found.loss_after, t)]).slice(found.first);
  const heads = ["Token", "Activation", "KL", "Loss of the next, with", "Without"];
  return make("details", [make("summary", "Token by token, in nats"), table("From where it first fires", heads, rows)], { class: "fold" });
}
